"""An adapter's life on disk: save it whole, say what it is, and load nothing that is not what it says.

PEFT loads an adapter whose keys do not match as one that does nothing, with a warning
(https://github.com/huggingface/peft/issues/2566); here that is an error.
"""

from __future__ import annotations

import dataclasses
import json
import logging
import os
from dataclasses import dataclass, field
from datetime import datetime, timezone
from importlib import metadata as importlib_metadata
from pathlib import Path
from typing import TYPE_CHECKING, Any

from snake_lora_pl.durable import directory_durably, recover_directory
from snake_lora_pl.errors import UserError
from snake_lora_pl.models.wheel import file_sha256

if TYPE_CHECKING:
    import torch
    from peft import PeftModel
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

logger = logging.getLogger(__name__)

WEIGHTS_FILE = "adapter_model.safetensors"
CONFIG_FILE = "adapter_config.json"
METADATA_FILE = "adapter_metadata.json"
CARD_FILE = "README.md"
_VERSIONED_PACKAGES = ("snake_lora_pl", "torch", "lightning", "transformers", "peft", "bitsandbytes")


@dataclass
class AdapterMetadata:
    """What an adapter is, what it was trained on and with what; ``adapter_metadata.json`` holds it as plain JSON.

    Args:
        adapter_type: Kind of adapter, as registered in ``AdapterFactory``.
        base_model: Name that any PEFT user loads the base by: a hub id or an absolute directory.
        base_model_name: Name that ``model.base_model`` took, which may be a short name.
        base_revision: Commit of a hub model, or None.
        base_sha256: Hash of the copy that was trained on, where it has no revision, or None.
        trainable_parameters: Number of parameters that were trained.
        total_parameters: Number of parameters of base and adapter.
        training_timestamp: When the adapter was written, UTC, ISO 8601.
        grid_size: Cells along one side of the board in the data, or None.
        step: Optimiser steps done.
        epoch: Epoch the adapter was written in, from 0.
        metrics: Last logged value of each metric.
        data: What the data module says of the rows: ``data_hash``, ``split_hash``, ``template``, ``prompt_format`` ...
        peft_config: PEFT's settings as plain JSON.
        packages: Version of each package that matters to the result.
        weights_sha256: Hash of ``adapter_model.safetensors``.
    """

    adapter_type: str
    base_model: str
    base_model_name: str
    base_revision: str | None
    base_sha256: str | None
    trainable_parameters: int
    total_parameters: int
    training_timestamp: str = field(default_factory=lambda: datetime.now(timezone.utc).isoformat(timespec="seconds"))
    grid_size: int | None = None
    step: int = 0
    epoch: int = 0
    metrics: dict[str, float] = field(default_factory=dict)
    data: dict[str, Any] = field(default_factory=dict)
    peft_config: dict[str, Any] = field(default_factory=dict)
    packages: dict[str, str] = field(default_factory=dict)
    weights_sha256: str = ""


def save(
    model: PeftModel,
    adapter_dir: str | os.PathLike[str],
    metadata: AdapterMetadata,
    tokenizer: PreTrainedTokenizerBase | None = None,
    state_dict: dict[str, torch.Tensor] | None = None,
) -> Path:
    """Write the adapter directory as a whole: weights, config, metadata, tokenizer files and model card.

    Args:
        model: The PEFT model; only its adapter is written.
        adapter_dir: Where to; an adapter that stands there is replaced in one step.
        metadata: What the adapter is; ``peft_config``, ``packages`` and ``weights_sha256`` are filled in here.
        tokenizer: Saved beside the adapter where given.
        state_dict: Full weights gathered from shards; None reads them from ``model``.

    Returns:
        ``adapter_dir`` as a path.
    """
    with directory_durably(adapter_dir) as directory:
        # PEFT's own "auto" asks the model hub whether the vocabulary was resized; it never is here.
        model.save_pretrained(str(directory), state_dict=state_dict, save_embedding_layers=False)
        if tokenizer is not None:
            tokenizer.save_pretrained(str(directory))
        metadata = dataclasses.replace(
            metadata,
            peft_config=json.loads((directory / CONFIG_FILE).read_text()),
            packages=_package_versions(),
            weights_sha256=file_sha256(directory / WEIGHTS_FILE),
        )
        (directory / METADATA_FILE).write_text(json.dumps(dataclasses.asdict(metadata), indent=2) + "\n")
        (directory / CARD_FILE).write_text(model_card(metadata))
    return Path(adapter_dir)


def read_metadata(adapter_dir: str | os.PathLike[str]) -> AdapterMetadata:
    """Read ``adapter_metadata.json``.

    Raises:
        UserError: If the directory is no adapter of this package, or the file is damaged.
    """
    directory = Path(adapter_dir)
    recover_directory(directory)
    path = directory / METADATA_FILE
    if not directory.is_dir():
        raise UserError(f"--adapter {directory}: no such directory. Give the model_artifacts directory of a run.")
    if not path.is_file():
        inside = sorted(p.relative_to(directory).parent for p in directory.glob(f"**/{METADATA_FILE}"))
        hint = f" Found one in {directory / inside[-1]}." if inside else " Was it written by snake_lora_pl?"
        raise UserError(f"--adapter {directory}: no {METADATA_FILE} here.{hint}")
    names = {f.name for f in dataclasses.fields(AdapterMetadata)}
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
        return AdapterMetadata(**{k: v for k, v in content.items() if k in names})
    except (ValueError, TypeError, AttributeError, RecursionError) as error:
        raise UserError(f"{path}: damaged ({error}). Train again, or copy the file from a backup.") from error


def verify(adapter_dir: str | os.PathLike[str]) -> AdapterMetadata:
    """Check that an adapter directory is whole and that its weights are those that were saved.

    Returns:
        The adapter's metadata.

    Raises:
        UserError: If a file is missing or the weights' hash differs; the message says which.
    """
    directory = Path(adapter_dir)
    metadata = read_metadata(directory)
    for name in (WEIGHTS_FILE, CONFIG_FILE):
        if not (directory / name).is_file():
            raise UserError(f"--adapter {directory}: {name} is missing. The adapter is incomplete; train again.")
    found = file_sha256(directory / WEIGHTS_FILE)
    if found != metadata.weights_sha256:
        raise UserError(
            f"{directory / WEIGHTS_FILE}: truncated or changed since it was saved (sha256 {found[:12]}..., metadata "
            f"says {str(metadata.weights_sha256)[:12]}...). Copy it again, or train again."
        )
    return metadata


def load(
    adapter_dir: str | os.PathLike[str],
    base_model: PreTrainedModel | str | None = None,
    *,
    is_trainable: bool = False,
    **load_options: Any,
) -> PeftModel:
    """Load a verified adapter onto its base model; every key of the file must find its place and no place stay empty.

    Args:
        adapter_dir: The adapter directory.
        base_model: A loaded base, a name, or None for the base that the metadata names.
        is_trainable: Whether the adapter's parameters take gradients.
        load_options: Passed to ``load_base_model`` where the base is loaded here.

    Raises:
        UserError: If the adapter is damaged or belongs to another base.
    """
    from peft import PeftModel, get_peft_model_state_dict
    from safetensors import SafetensorError, safe_open

    from snake_lora_pl.models import load_base_model

    directory = Path(adapter_dir)
    metadata = verify(directory)
    if base_model is None:
        base_model = metadata.base_model_name
    if isinstance(base_model, str):
        check_base(metadata, base_model, directory, revision=load_options.get("revision"))
        base_model = load_base_model(base_model, **load_options)
    try:
        with safe_open(directory / WEIGHTS_FILE, framework="pt") as file:
            saved_keys = set(file.keys())
        model = PeftModel.from_pretrained(base_model, str(directory), is_trainable=is_trainable)
    except (SafetensorError, RuntimeError, ValueError, KeyError, TypeError) as error:
        first_lines = " ".join(str(error).split())[:300]
        raise UserError(f"--adapter {directory}: does not fit {metadata.base_model} ({first_lines}).") from error
    wanted_keys = set(get_peft_model_state_dict(model, save_embedding_layers=False))
    if saved_keys != wanted_keys:
        missing, extra = sorted(wanted_keys - saved_keys), sorted(saved_keys - wanted_keys)
        parts = [f"missing {len(missing)} such as {missing[0]}"] if missing else []
        parts += [f"{len(extra)} unknown such as {extra[0]}"] if extra else []
        raise UserError(
            f"{directory / WEIGHTS_FILE}: its keys do not match {CONFIG_FILE} ({'; '.join(parts)}). Use the base "
            f"model {metadata.base_model} and an unchanged {CONFIG_FILE}."
        )
    return model


def load_weights(model: PeftModel, adapter_dir: str | os.PathLike[str]) -> None:
    """Put the weights of a saved adapter into a model that carries one of the same shape.

    Raises:
        UserError: If the adapter is damaged or has other keys.
    """
    from peft import load_peft_weights, set_peft_model_state_dict

    verify(adapter_dir)
    weights = load_peft_weights(str(adapter_dir), device="cpu")
    result = set_peft_model_state_dict(model, weights)
    missing = [name for name, parameter in model.named_parameters() if parameter.requires_grad]
    missing = sorted(set(missing) & set(result.missing_keys))
    if missing or result.unexpected_keys:
        different = (missing or list(result.unexpected_keys))[0]
        raise UserError(f"--adapter {adapter_dir}: does not fit the model that it is loaded into, such as {different}.")


def check_base(
    metadata: AdapterMetadata, base_model: str, adapter_dir: str | os.PathLike[str], revision: str | None = None
) -> None:
    """Refuse a base model that the adapter was not trained on.

    Raises:
        UserError: If name, revision or hash differ; the message names the right one.
    """
    from snake_lora_pl.models import resolve_base_model

    source = resolve_base_model(base_model, revision=revision)
    if metadata.base_sha256 and source.sha256 == metadata.base_sha256:
        return  # the same weights, wherever they lie now
    right_base = f"Set --model.base_model {metadata.base_model_name}"
    if source.canonical_id != metadata.base_model:
        raise UserError(
            f"--adapter {adapter_dir}: trained on {metadata.base_model}, not on {source.canonical_id}. {right_base}."
        )
    if metadata.base_sha256 and source.sha256:
        raise UserError(
            f"--adapter {adapter_dir}: trained on another copy of {metadata.base_model} (sha256 "
            f"{metadata.base_sha256[:12]}..., here {source.sha256[:12]}...). {right_base}, the copy it was trained on."
        )
    if metadata.base_revision != source.revision or metadata.base_sha256 or source.sha256:
        logger.warning(
            "Adapter %s was trained on %s (%s); its base here is another copy of that model, results may differ.",
            adapter_dir,
            metadata.base_model_name,
            metadata.base_sha256 or metadata.base_revision or "no revision recorded",
        )


def model_card(metadata: AdapterMetadata) -> str:
    """Model card of an adapter: what it is, what it was trained on, how it scored, how to load it."""
    from huggingface_hub import ModelCardData

    is_hub_id = not os.path.isabs(metadata.base_model)
    header = ModelCardData(
        base_model=metadata.base_model if is_hub_id else None,
        library_name="peft",
        pipeline_tag="text-generation",
        tags=["snake", metadata.adapter_type, "lora", "base_model:adapter"],
    )
    settings = metadata.peft_config
    base_in_code = repr(metadata.base_model)
    lines = [
        "---",
        header.to_yaml(),
        "---",
        "",
        f"# A {metadata.adapter_type} adapter that plays Snake",
        "",
        f"Trained on [`{metadata.base_model}`](https://huggingface.co/{metadata.base_model})"
        if is_hub_id
        else f"Trained on `{metadata.base_model}`",
        f"for {metadata.step} optimiser steps with snake_lora_pl {metadata.packages.get('snake_lora_pl', '')}.",
        "",
        "| setting | value |",
        "|---|---|",
        *(
            f"| {name} | {settings[key]} |"
            for name, key in (("rank", "r"), ("alpha", "lora_alpha"), ("dropout", "lora_dropout"))
            if key in settings
        ),
        f"| layers | {', '.join(sorted(settings.get('target_modules') or []))} |",
        f"| trained parameters | {metadata.trainable_parameters:,} of {metadata.total_parameters:,} |",
        *(f"| {name} | {value} |" for name, value in sorted(metadata.data.items())),
        "",
        "| metric | value |",
        "|---|---|",
        *(f"| {name} | {value:.4g} |" for name, value in sorted(metadata.metrics.items())),
        "",
        "```python",
        "from peft import PeftModel",
        "from transformers import AutoModelForCausalLM, AutoTokenizer",
        "",
        f"base = AutoModelForCausalLM.from_pretrained({base_in_code})",
        'model = PeftModel.from_pretrained(base, "path/to/this/directory")',
        'tokenizer = AutoTokenizer.from_pretrained("path/to/this/directory")',
        "```",
        "",
        "Packages: " + ", ".join(f"{name} {version}" for name, version in metadata.packages.items()) + ".",
        "",
    ]
    return "\n".join(lines)


def _package_versions() -> dict[str, str]:
    versions = {}
    for name in _VERSIONED_PACKAGES:
        try:
            versions[name] = importlib_metadata.version(name)
        except importlib_metadata.PackageNotFoundError:  # run from a source tree that was never installed
            versions[name] = "unknown"
    return versions
