"""Adapter directories: save, load and list adapters.

Other packages use adapters on disk through this module.
"""

from __future__ import annotations

import contextlib
import dataclasses
import json
import logging
import os
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from snake_lora_pl.adapters.card import model_card
from snake_lora_pl.adapters.metadata import AdapterMetadata, is_number
from snake_lora_pl.adapters.registry import get_adapter_type
from snake_lora_pl.adapters.targets import check_has_no_adapter
from snake_lora_pl.adapters.verify import (
    CONFIG_FILE,
    METADATA_FILE,
    WEIGHTS_FILE,
    base_spec,
    check_base,
    check_ranks,
    check_settings,
    check_weights,
    find_adapter_dirs,
    package_version,
    read_metadata,
    verify,
)
from snake_lora_pl.durable import directory_durably, file_sha256, open_durably
from snake_lora_pl.errors import UserError, one_line
from snake_lora_pl.models.base_model import BaseModelSpec
from snake_lora_pl.models.chat_template import save_tokenizer
from snake_lora_pl.models.quantization import QuantizationConfig, quantization_of

if TYPE_CHECKING:
    import torch
    from peft import PeftModel
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

__all__ = [
    "CARD_FILE",
    "CONFIG_FILE",
    "METADATA_FILE",
    "WEIGHTS_FILE",
    "AdapterMetadata",
    "StoredAdapter",
    "add",
    "base_spec",
    "check_base",
    "check_weights",
    "list_adapters",
    "load",
    "read_metadata",
    "record_play",
    "save",
    "verify",
]

logger = logging.getLogger(__name__)

CARD_FILE = "README.md"
_VERSIONED_PACKAGES = ("snake_lora_pl", "torch", "lightning", "transformers", "peft", "bitsandbytes")
# Settings of games that are paths on this machine.
_LOCAL_SETTINGS = ("adapter", "directory", "base_model")


class StoredAdapter(NamedTuple):
    """An adapter directory found by ``list_adapters``.

    Attributes:
        path: The directory.
        metadata: The adapter's metadata; None if it cannot be read.
        weights_bytes: Size of the weights file; 0 if it is missing.
        problem: Why the adapter cannot be loaded; None if it is intact.
    """

    path: Path
    metadata: AdapterMetadata | None
    weights_bytes: int
    problem: str | None


def save(
    model: PeftModel,
    adapter_dir: str | os.PathLike[str],
    metadata: AdapterMetadata,
    tokenizer: PreTrainedTokenizerBase | None = None,
    state_dict: dict[str, torch.Tensor] | None = None,
) -> Path:
    """Write an adapter directory atomically: weights, config, metadata, tokenizer files and model card.

    Args:
        model: The PEFT model; only its adapter is written.
        adapter_dir: Directory to write; an existing adapter is replaced in one step.
        metadata: The adapter's metadata; ``peft_config``, ``packages`` and ``weights_sha256`` are filled in here.
        tokenizer: Saved with the adapter if given.
        state_dict: Full weights gathered from shards; None reads them from ``model``.

    Returns:
        ``adapter_dir`` as a path.
    """
    hooks = get_adapter_type(metadata.adapter_type)
    config_in_memory = model.peft_config["default"]
    config, weights = hooks.saved_form(model, model.state_dict() if state_dict is None else state_dict)
    with directory_durably(adapter_dir) as directory:
        model.peft_config["default"] = config
        try:
            # PEFT's default "auto" asks the model hub whether the vocabulary was resized; it never is here.
            model.save_pretrained(str(directory), state_dict=weights, save_embedding_layers=False)
        finally:
            model.peft_config["default"] = config_in_memory
        if tokenizer is not None:
            save_tokenizer(tokenizer, directory, metadata.data.get("template_date"))
        metadata = dataclasses.replace(
            metadata,
            peft_config=json.loads((directory / CONFIG_FILE).read_text()),
            packages={name: package_version(name) for name in _VERSIONED_PACKAGES},
            weights_sha256=file_sha256(directory / WEIGHTS_FILE),
        )
        _write_metadata_and_card(directory, metadata)
    return Path(adapter_dir)


def record_play(adapter_dir: str | os.PathLike[str], table: dict[str, Any], player: str) -> None:
    """Write the results of games into an adapter's metadata and model card.

    Args:
        adapter_dir: The adapter directory; its weights are not touched.
        table: Results of games as plain JSON: ``settings``; ``players``: name -> statistics such as ``apples_mean``;
            ``adapters``: name -> settings of that player.
        player: The adapter's name among the players; its statistics become the metrics ``play/NAME``.

    Raises:
        UserError: If the directory is not an adapter.
        OSError: If it cannot be written.
    """
    metadata = read_metadata(adapter_dir)
    play_metrics = {f"play/{name}": value for name, value in table["players"][player].items() if is_number(value)}
    other_metrics = {name: value for name, value in metadata.metrics.items() if not name.startswith("play/")}
    settings = {**table["settings"], **table["adapters"].get(player, {})}
    settings = {name: value for name, value in settings.items() if name not in _LOCAL_SETTINGS}
    play = {"player": player, "settings": settings, "players": table["players"]}
    metadata = dataclasses.replace(metadata, metrics=other_metrics | play_metrics, play=play)
    _write_metadata_and_card(Path(adapter_dir), metadata)


def load(
    adapter_dir: str | os.PathLike[str],
    base_model: PreTrainedModel | BaseModelSpec | str | None = None,
    *,
    adapter_name: str = "default",
    is_trainable: bool = False,
    full_precision_base: bool = False,
    **load_options: Any,
) -> PeftModel:
    """Verify an adapter and load it onto its base model. Keys of file and model must match exactly.

    Args:
        adapter_dir: The adapter directory.
        base_model: The base: a loaded model, its spec or its name; None takes the base from the metadata. A loaded
            model is unchanged if the adapter does not fit.
        adapter_name: The adapter's name in PEFT.
        is_trainable: Whether the adapter's parameters require gradients.
        full_precision_base: Load the base unquantized even if the adapter was trained on a quantized base.
        load_options: Passed to ``load_base_model`` unless the base is loaded already.

    Raises:
        UserError: If the adapter is damaged or was trained on a different base, or the base already carries one.
    """
    from peft import PeftModel

    from snake_lora_pl.adapters.qlora import prepare_quantized_base
    from snake_lora_pl.models import load_base_model

    directory = Path(adapter_dir)
    metadata = verify(directory)
    check_ranks(metadata, directory)
    check_settings(metadata, directory)
    if base_model is None or isinstance(base_model, str | BaseModelSpec):
        spec = base_spec(metadata, base_model)
        check_base(metadata, spec, directory)
        if metadata.quantization and not full_precision_base:
            load_options["quantization"] = QuantizationConfig(**metadata.quantization)
        base_model = load_base_model(spec, **load_options)
        if full_precision_base and quantization_of(base_model) is not None:
            raise UserError(
                f"model.full_precision_base: {spec.name} is stored quantized and has no other weights. "
                "Remove the setting."
            )
    else:
        check_has_no_adapter(base_model)
        if base_model.name_or_path not in ("", metadata.base_model):
            check_base(metadata, base_model.name_or_path, directory)
    quantization = quantization_of(base_model)
    if quantization is not None:
        if not metadata.quantization or QuantizationConfig(**metadata.quantization) != quantization:
            logger.warning(
                "Adapter %s was trained on a base with a different quantization than this %d-bit base; its "
                "completions will differ.",
                directory,
                quantization.bits,
            )
        prepare_quantized_base(base_model, quantization)
    with _peft_errors(metadata, directory):
        model = PeftModel.from_pretrained(
            base_model,
            str(directory),
            adapter_name=adapter_name,
            is_trainable=is_trainable,
            config=get_adapter_type(metadata.adapter_type).load_config(directory),
            ignore_mismatched_sizes=True,
        )
    try:
        check_weights(model, directory, adapter_name)
    except UserError:
        model.unload()
        raise
    return model


def add(model: PeftModel, adapter_dir: str | os.PathLike[str], adapter_name: str) -> None:
    """Verify another adapter and load it into a model; the active adapter does not change.

    Args:
        model: A PEFT model with adapters of the same PEFT type.
        adapter_dir: The adapter directory.
        adapter_name: The adapter's name in PEFT.

    Raises:
        UserError: If the adapter is damaged or does not fit the model, which is then unchanged.
    """
    directory = Path(adapter_dir)
    metadata = verify(directory)
    check_settings(metadata, directory)
    try:
        check_ranks(metadata, directory)
        with _peft_errors(metadata, directory):
            model.load_adapter(str(directory), adapter_name, ignore_mismatched_sizes=True)
        check_weights(model, directory, adapter_name)
    except UserError:
        if adapter_name in model.peft_config:
            model.delete_adapter(adapter_name)
        raise


def list_adapters(root: str | os.PathLike[str]) -> list[StoredAdapter]:
    """Find and verify every adapter at and below ``root``, the newest last; hidden directories are skipped.

    Raises:
        UserError: If ``root`` is not a directory.
    """
    root = Path(root)
    if not root.is_dir():
        raise UserError(f"{root}: no such directory. Pass a directory of runs or adapters.")
    found = [_stored_adapter(directory) for directory in find_adapter_dirs(root)]
    return sorted(found, key=lambda adapter: adapter.metadata.training_timestamp if adapter.metadata else "")


def _stored_adapter(directory: Path) -> StoredAdapter:
    metadata, problem = None, None
    try:
        metadata = read_metadata(directory)
        verify(directory)
    except UserError as error:
        problem = str(error)
    weights_path = directory / WEIGHTS_FILE
    return StoredAdapter(directory, metadata, weights_path.stat().st_size if weights_path.is_file() else 0, problem)


def _write_metadata_and_card(directory: Path, metadata: AdapterMetadata) -> None:
    for name, text in (
        (METADATA_FILE, json.dumps(dataclasses.asdict(metadata), indent=2) + "\n"),
        (CARD_FILE, model_card(metadata)),
    ):
        with open_durably(directory / name, "w", encoding="utf-8") as file:
            file.write(text)


@contextlib.contextmanager
def _peft_errors(metadata: AdapterMetadata, directory: Path) -> Iterator[None]:
    """Turn exceptions of PEFT into one line, and ignore its warnings: ``check_weights`` raises instead."""
    import torch

    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    except (MemoryError, torch.OutOfMemoryError):
        raise
    except Exception as error:  # settings that PEFT did not write raise anything
        raise UserError(
            f"--adapter {directory}: does not fit {metadata.base_model} ({one_line(error)}). Copy the adapter again."
        ) from error
