"""Verification of adapter directories, as untrusted input, before anything in them is used.

PEFT loads an adapter whose keys do not match as one without effect, with a warning
(https://github.com/huggingface/peft/issues/2566); here it is an error. Reading an adapter runs none of its code.
"""

from __future__ import annotations

import dataclasses
import json
import logging
import os
import warnings
from collections.abc import Iterator
from importlib import metadata as importlib_metadata
from pathlib import Path
from typing import TYPE_CHECKING, Any

from snake_lora_pl.adapters.metadata import AdapterMetadata, parse_metadata
from snake_lora_pl.adapters.patterns import problem_with_pattern
from snake_lora_pl.adapters.registry import get_adapter_type, registered
from snake_lora_pl.durable import file_sha256, recover_directory
from snake_lora_pl.errors import UserError, one_line
from snake_lora_pl.models.base_model import BaseModelSpec, resolve_base_model
from snake_lora_pl.untrusted import read_json_object, read_text

if TYPE_CHECKING:
    from peft import PeftModel

logger = logging.getLogger(__name__)

WEIGHTS_FILE = "adapter_model.safetensors"
CONFIG_FILE = "adapter_config.json"
METADATA_FILE = "adapter_metadata.json"
# Pickles and programs.
_CODE_SUFFIXES = (".bin", ".pt", ".pth", ".pkl", ".pickle", ".ckpt", ".py", ".so")
# Settings that make PEFT or transformers import a module named in the file.
_CODE_SETTINGS = {CONFIG_FILE: ("auto_mapping", "megatron_config"), "tokenizer_config.json": ("auto_map",)}
# Settings with regular expressions that PEFT matches against names: a string, or the keys of a mapping.
_PATTERN_SETTINGS = ("target_modules", "exclude_modules", "layers_pattern", "rank_pattern", "alpha_pattern")
_MAX_LISTED_KEYS = 3


def read_metadata(adapter_dir: str | os.PathLike[str]) -> AdapterMetadata:
    """Read ``adapter_metadata.json``.

    Raises:
        UserError: If the directory is not an adapter of this package, or the file is damaged.
    """
    directory = Path(adapter_dir)
    recover_directory(directory)
    path = directory / METADATA_FILE
    if not directory.is_dir():
        raise UserError(f"--adapter {directory}: no such directory. Pass the model_artifacts directory of a run.")
    if not path.is_file():
        raise UserError(f"--adapter {directory}: {METADATA_FILE} is missing. {_describe_other_content(directory)}")
    try:
        return parse_metadata(read_text(path))
    except ValueError as error:
        raise UserError(f"{path}: damaged ({error}). Copy the file from a backup, or train again.") from error


def find_adapter_dirs(root: Path) -> list[Path]:
    """Return the directories at and below ``root`` that hold metadata, sorted; unreadable ones are skipped."""
    found = []
    for directory, subdirectories, files in os.walk(root):
        # Hidden directories belong to runs that are being written, or were killed while writing.
        subdirectories[:] = [name for name in subdirectories if not name.startswith(".")]
        if METADATA_FILE in files:
            found.append(Path(directory))
    return sorted(found)


def verify(adapter_dir: str | os.PathLike[str]) -> AdapterMetadata:
    """Check that an adapter directory is complete, unchanged since it was saved, and free of code.

    Returns:
        The adapter's metadata.

    Raises:
        UserError: If a file is missing, can run code, or changed since it was saved; the message names the file and, if
            it applies, the setting.
    """
    directory = Path(adapter_dir)
    metadata = read_metadata(directory)
    if metadata.adapter_type not in registered():
        raise UserError(
            f"{directory / METADATA_FILE}: adapter_type '{metadata.adapter_type}' is not registered "
            f"({', '.join(registered())}). Run the program that registers it, with the same arguments."
        )
    _reject_code(directory)
    for name in (WEIGHTS_FILE, CONFIG_FILE):
        if not (directory / name).is_file():
            raise UserError(f"--adapter {directory}: {name} is missing. Copy the adapter again, or train again.")
    found = file_sha256(directory / WEIGHTS_FILE)
    if found != metadata.weights_sha256:
        raise UserError(
            f"{directory / WEIGHTS_FILE}: truncated or changed since it was saved (sha256 {found[:12]}..., "
            f"{METADATA_FILE}: {metadata.weights_sha256[:12] or 'none'}...). Copy it again, or train again."
        )
    config = _read_settings(directory / CONFIG_FILE)
    changed = sorted(
        name
        for name in config.keys() | metadata.peft_config.keys()
        if config.get(name) != metadata.peft_config.get(name)
    )
    if changed:
        value, recorded = (json.dumps(settings.get(changed[0])) for settings in (config, metadata.peft_config))
        raise UserError(
            f"{directory / CONFIG_FILE}: changed since it was saved: {changed[0]} is {value}, in {METADATA_FILE} it is "
            f"{recorded}. Copy the file again, or train again."
        )
    return metadata


def check_settings(metadata: AdapterMetadata, directory: Path) -> None:
    """Check PEFT's settings before PEFT uses them.

    Raises:
        UserError: If the installed PEFT does not know a setting, which it would ignore with a warning, or a pattern is
            not on the allow list.
    """
    from peft import PEFT_TYPE_TO_CONFIG_MAPPING

    settings = metadata.peft_config
    config_class = PEFT_TYPE_TO_CONFIG_MAPPING.get(settings.get("peft_type"))
    if config_class is None:
        unknown = ["peft_type"]
    else:
        known = {field.name for field in dataclasses.fields(config_class)}
        unknown = sorted(name for name, value in settings.items() if value and name not in known)
    if unknown:
        peft_type = "" if config_class is None else f" for {settings['peft_type']}"
        raise UserError(
            f"{directory / CONFIG_FILE}: {unknown[0]} is {json.dumps(settings.get(unknown[0]))[:60]}, which PEFT "
            f"{package_version('peft')} does not support{peft_type}. Install the PEFT version that saved the adapter "
            f"({metadata.packages.get('peft', 'not recorded')}), or copy the adapter again."
        )
    for name in _PATTERN_SETTINGS:
        value = settings.get(name)
        patterns = [value] if isinstance(value, str) else value if isinstance(value, dict) else []
        for pattern in patterns:
            if problem := problem_with_pattern(pattern):
                raise UserError(f"{directory / CONFIG_FILE}: {name}: {pattern[:60]!r} is {problem}.")


def check_ranks(metadata: AdapterMetadata, directory: Path) -> None:
    """Check that no rank exceeds the size of the weights, before PEFT allocates memory for it.

    Raises:
        UserError: If one does, or the weights are not a safetensors file.
    """
    config = metadata.peft_config
    ranks = [config.get("r"), config.get("init_r"), *(config.get("rank_pattern") or {}).values()]
    rank = max((rank for rank in ranks if isinstance(rank, int)), default=0)
    largest = max((size for shape in _saved_shapes(directory / WEIGHTS_FILE).values() for size in shape), default=0)
    if rank > largest:
        raise UserError(
            f"{directory / CONFIG_FILE}: rank {rank} exceeds the largest dimension in {WEIGHTS_FILE}, {largest}. "
            "Copy the adapter again, or train again."
        )


def check_weights(model: PeftModel, adapter_dir: str | os.PathLike[str], adapter_name: str = "default") -> None:
    """Compare keys and shapes of a weights file with those of a model's adapter, and check the file's values.

    Args:
        model: A PEFT model.
        adapter_dir: The adapter directory.
        adapter_name: Name of the adapter in the model.

    Raises:
        UserError: If a key is missing, unknown or has a different shape, or a tensor has another dtype or invalid
            values; the message names the keys.
    """
    from peft import get_peft_model_state_dict

    path = Path(adapter_dir) / WEIGHTS_FILE
    hooks = get_adapter_type(read_metadata(adapter_dir).adapter_type)
    saved = _saved_shapes(path)
    if damaged := [*_damaged_values(path, hooks.integer_tensors), *hooks.problems(model, adapter_name)]:
        raise UserError(f"{path}: damaged ({_first_few(damaged)}). Copy it again, or train again.")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # mismatches are reported below
        state = get_peft_model_state_dict(model, adapter_name=adapter_name, save_embedding_layers=False)
    expected = {key: tuple(tensor.shape) for key, tensor in state.items()}
    problems = [
        f"{key} is {_shape(saved[key])}, expected {_shape(expected[key])} ({_cause(key, saved[key], expected[key])})"
        for key in sorted(saved.keys() & expected.keys())
        if saved[key] != expected[key]
    ]
    problems += [f"{key} is missing" for key in sorted(expected.keys() - saved.keys())]
    problems += [f"{key} is unknown" for key in sorted(saved.keys() - expected.keys())]
    if problems:
        base = model.get_base_model().name_or_path
        raise UserError(
            f"{path}: does not fit {CONFIG_FILE} and the base model {base}: {_first_few(problems)}. "
            "Use the base and the settings of its training."
        )


def base_spec(metadata: AdapterMetadata, base_model: BaseModelSpec | str | None = None) -> BaseModelSpec:
    """Return the base model to load an adapter onto, at the commit of its training unless a revision is given.

    Args:
        metadata: The adapter's metadata.
        base_model: Spec or name of the base; None takes the name from the metadata.
    """
    spec = BaseModelSpec.of(base_model or metadata.base_model_name)
    if spec.revision is None:
        source = resolve_base_model(spec)
        if source.origin == "hub" and source.canonical_id == metadata.base_model:
            return dataclasses.replace(spec, revision=metadata.base_revision)
    return spec


def check_base(
    metadata: AdapterMetadata,
    base_model: BaseModelSpec | str,
    adapter_dir: str | os.PathLike[str],
    option: str = "--model.base_model",
) -> None:
    """Check that an adapter was trained on a base model.

    Args:
        metadata: The adapter's metadata.
        base_model: Spec or name of the base.
        adapter_dir: The adapter directory, for the message.
        option: Command-line option for the base, for the message.

    Raises:
        UserError: If the name or hash differs; the message names the correct base.
    """
    source = resolve_base_model(base_model)
    if metadata.base_sha256 and source.sha256 == metadata.base_sha256:
        return  # the same weights, in any directory
    fix = f"Set {option} {metadata.base_model_name}"
    if source.canonical_id != metadata.base_model:
        raise UserError(
            f"--adapter {adapter_dir}: trained on {metadata.base_model}, not on {source.canonical_id}. {fix}."
        )
    if metadata.base_sha256 and source.sha256:
        raise UserError(
            f"--adapter {adapter_dir}: trained on different weights of {metadata.base_model} (sha256 "
            f"{metadata.base_sha256[:12]}..., found {source.sha256[:12]}...). {fix} with the weights of its training."
        )
    if metadata.base_revision != source.revision or metadata.base_sha256 or source.sha256:
        logger.warning(
            "Adapter %s was trained on %s (%s), but the base is a different copy of that model; results may differ.",
            adapter_dir,
            metadata.base_model_name,
            metadata.base_sha256 or metadata.base_revision or "no revision recorded",
        )


def package_version(package: str) -> str:
    """Return the version of an installed package; ``unknown`` if it is not installed."""
    try:
        return importlib_metadata.version(package)
    except importlib_metadata.PackageNotFoundError:  # this package, run from a source tree
        return "unknown"


def _describe_other_content(directory: Path) -> str:
    if (directory / CONFIG_FILE).is_file():
        return "The adapter was not saved by snake_lora_pl, or is incomplete: load it with PEFT, or copy it again."
    if (directory / "config.json").is_file():
        return "The directory holds a complete model: pass it as the base model, or pass the adapter merged into it."
    inside = [found for found in find_adapter_dirs(directory) if found != directory]
    return f"Found an adapter in {inside[-1]}." if inside else "Pass an adapter saved by snake_lora_pl."


def _reject_code(directory: Path) -> None:
    """Reject pickles and programs, including files that only other tools would load."""
    for path in sorted(directory.rglob("*")):
        if path.suffix.lower() in _CODE_SUFFIXES:
            raise UserError(
                f"--adapter {directory}: contains {path.relative_to(directory)}; pickles and programs can run code "
                f"when they are loaded. If {WEIGHTS_FILE} exists, delete the file; else save the adapter again with "
                "PEFT as safetensors."
            )
    for name, settings in _CODE_SETTINGS.items():
        if not (directory / name).is_file():
            continue
        content = _read_settings(directory / name)
        for setting in settings:
            if content.get(setting):
                raise UserError(
                    f"{directory / name}: {setting} names code to run ({json.dumps(content[setting])[:100]}), which is "
                    "not supported. Use an adapter without it."
                )


def _read_settings(path: Path) -> dict[str, Any]:
    try:
        return read_json_object(path)
    except ValueError as error:
        raise UserError(f"{path}: damaged ({error}). Copy the file again, or train again.") from error


def _damaged_values(path: Path, integer_tensors: tuple[str, ...]) -> Iterator[str]:
    """Yield a description of each tensor with a wrong dtype or values that are not finite; PEFT would use it anyway."""
    import torch
    from safetensors import safe_open

    with safe_open(path, framework="pt") as file:
        for key in file.keys():
            tensor = file.get_tensor(key)
            if key.rsplit(".", 1)[-1] in integer_tensors:
                if tensor.is_floating_point() or tensor.is_complex() or tensor.dtype == torch.bool:
                    yield f"{key} has dtype {str(tensor.dtype).removeprefix('torch.')}, not an integer dtype"
            elif not tensor.is_floating_point():
                yield f"{key} has dtype {str(tensor.dtype).removeprefix('torch.')}, not a floating-point dtype"
            elif not tensor.float().isfinite().all():
                yield f"{key} contains values that are not finite"


def _saved_shapes(path: Path) -> dict[str, tuple[int, ...]]:
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(path, framework="pt") as file:
            return {key: tuple(file.get_slice(key).get_shape()) for key in file.keys()}
    except SafetensorError as error:
        raise UserError(
            f"{path}: not a safetensors file ({one_line(error)}). Copy it again, or train again."
        ) from error


def _first_few(problems: list[str]) -> str:
    more = [f"and {len(problems) - _MAX_LISTED_KEYS} more"] if len(problems) > _MAX_LISTED_KEYS else []
    return "; ".join([*problems[:_MAX_LISTED_KEYS], *more])


def _shape(shape: tuple[int, ...]) -> str:
    return "x".join(map(str, shape)) or "a scalar"


def _cause(key: str, saved: tuple[int, ...], expected: tuple[int, ...]) -> str:
    """Return whether rank or base explains a mismatch of a LoRA factor: A is (rank, in), B is (out, rank)."""
    rank_axis = 0 if "lora_A" in key else 1 if "lora_B" in key else None
    if rank_axis is None or len(saved) != 2 or len(expected) != 2:
        return "different shape"
    if saved[rank_axis] != expected[rank_axis]:
        return f"rank {saved[rank_axis]} instead of {expected[rank_axis]}"
    return "base of a different size"
