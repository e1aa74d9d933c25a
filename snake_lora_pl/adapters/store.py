"""An adapter's life on disk: save it whole, say what it is, and load nothing that is not what it says.

PEFT loads an adapter whose keys do not match as one that does nothing, with a warning
(https://github.com/huggingface/peft/issues/2566); here that is an error.
"""

from __future__ import annotations

import contextlib
import dataclasses
import json
import logging
import os
import warnings
from collections.abc import Iterator
from importlib import metadata as importlib_metadata
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from snake_lora_pl.adapters.card import model_card
from snake_lora_pl.adapters.metadata import AdapterMetadata, is_number, parse_metadata
from snake_lora_pl.adapters.patterns import problem_with_pattern
from snake_lora_pl.adapters.registry import get_adapter_type, registered
from snake_lora_pl.adapters.targets import check_carries_none
from snake_lora_pl.durable import directory_durably, file_sha256, open_durably, recover_directory
from snake_lora_pl.errors import UserError, one_line
from snake_lora_pl.models.base_model import BaseModelSpec, resolve_base_model
from snake_lora_pl.models.quantization import QuantizationConfig, quantization_of
from snake_lora_pl.untrusted import read_json_object, read_text

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
# Pickles and programs: reading an adapter must run nothing.
_CODE_SUFFIXES = (".bin", ".pt", ".pth", ".pkl", ".pickle", ".ckpt", ".py", ".so")
# Settings that make PEFT or transformers import a module whose name stands in the file.
_CODE_SETTINGS = {CONFIG_FILE: ("auto_mapping", "megatron_config"), "tokenizer_config.json": ("auto_map",)}
_MAX_KEYS_NAMED = 3
# Settings that hold regular expressions for PEFT to match names with: a string, or the keys of a mapping.
_PATTERN_SETTINGS = ("target_modules", "exclude_modules", "layers_pattern", "rank_pattern", "alpha_pattern")
# What a table of games says of where things lie on this machine, which means nothing on another.
_PLACES = ("adapter", "directory", "base_model")


class StoredAdapter(NamedTuple):
    """One adapter directory that was found.

    Attributes:
        path: The directory.
        metadata: What its metadata says, or None where that cannot be read.
        weights_bytes: Size of the weights file; 0 where it is missing.
        problem: Why it cannot be loaded, or None where it is whole.
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
    hooks = get_adapter_type(metadata.adapter_type)
    config_in_memory = model.peft_config["default"]
    config, weights = hooks.saved_form(model, model.state_dict() if state_dict is None else state_dict)
    with directory_durably(adapter_dir) as directory:
        model.peft_config["default"] = config
        try:
            # PEFT's own "auto" asks the model hub whether the vocabulary was resized; it never is here.
            model.save_pretrained(str(directory), state_dict=weights, save_embedding_layers=False)
        finally:
            model.peft_config["default"] = config_in_memory
        if tokenizer is not None:
            tokenizer.save_pretrained(str(directory))
        metadata = dataclasses.replace(
            metadata,
            peft_config=json.loads((directory / CONFIG_FILE).read_text()),
            packages={name: _version(name) for name in _VERSIONED_PACKAGES},
            weights_sha256=file_sha256(directory / WEIGHTS_FILE),
        )
        _write_description(directory, metadata)
    return Path(adapter_dir)


def record_play(adapter_dir: str | os.PathLike[str], table: dict[str, Any], player: str) -> None:
    """Write into an adapter's metadata and card how it played.

    Args:
        adapter_dir: The adapter directory; its weights are not touched.
        table: Games as plain JSON: ``settings``; ``players``: name -> figures such as ``apples_mean``; ``adapters``:
            name -> settings of that player alone.
        player: Which of the players is the adapter; its figures become the metrics ``play/NAME``.

    Raises:
        UserError: If the directory is no adapter.
        OSError: If it cannot be written.
    """
    metadata = read_metadata(adapter_dir)
    figures = {f"play/{name}": value for name, value in table["players"][player].items() if is_number(value)}
    others = {name: value for name, value in metadata.metrics.items() if not name.startswith("play/")}
    settings = {**table["settings"], **table["adapters"].get(player, {})}
    settings = {name: value for name, value in settings.items() if name not in _PLACES}
    play = {"player": player, "settings": settings, "players": table["players"]}
    _write_description(Path(adapter_dir), dataclasses.replace(metadata, metrics=others | figures, play=play))


def _write_description(directory: Path, metadata: AdapterMetadata) -> None:
    for name, text in (
        (METADATA_FILE, json.dumps(dataclasses.asdict(metadata), indent=2) + "\n"),
        (CARD_FILE, model_card(metadata)),
    ):
        with open_durably(directory / name, "w", encoding="utf-8") as file:
            file.write(text)


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
        raise UserError(f"--adapter {directory}: no {METADATA_FILE} here. {_what_is_there_instead(directory)}")
    try:
        return parse_metadata(read_text(path))
    except ValueError as error:
        raise UserError(f"{path}: damaged ({error}). Train again, or copy the file from a backup.") from error


def _what_is_there_instead(directory: Path) -> str:
    if (directory / CONFIG_FILE).is_file():
        return (
            "It is an adapter that snake_lora_pl did not write, or lost that file: load it with PEFT, or copy it again."
        )
    if (directory / "config.json").is_file():
        return "It is a whole model: give it as the base model, or name the adapter that was merged into it."
    inside = _adapter_dirs(directory)
    return f"Found one in {inside[-1]}." if inside else "Was it written by snake_lora_pl?"


def verify(adapter_dir: str | os.PathLike[str]) -> AdapterMetadata:
    """Check that an adapter directory is whole, that it is what was saved, and that reading it runs no code.

    Returns:
        The adapter's metadata.

    Raises:
        UserError: If a file is missing, holds a pickle or a program, or is not the one that was saved; the message says
            which, and for a setting which one.
    """
    directory = Path(adapter_dir)
    metadata = read_metadata(directory)
    _check_adapter_type(metadata, directory)
    _refuse_code(directory)
    for name in (WEIGHTS_FILE, CONFIG_FILE):
        if not (directory / name).is_file():
            raise UserError(f"--adapter {directory}: {name} is missing. The adapter is incomplete; train again.")
    found = file_sha256(directory / WEIGHTS_FILE)
    if found != metadata.weights_sha256:
        raise UserError(
            f"{directory / WEIGHTS_FILE}: truncated or changed since it was saved (sha256 {found[:12]}..., metadata "
            f"says {metadata.weights_sha256[:12] or 'nothing'}...). Copy it again, or train again."
        )
    config = _read_settings(directory / CONFIG_FILE)
    changed = sorted(
        name
        for name in config.keys() | metadata.peft_config.keys()
        if config.get(name) != metadata.peft_config.get(name)
    )
    if changed:
        here, there = (json.dumps(settings.get(changed[0])) for settings in (config, metadata.peft_config))
        raise UserError(
            f"{directory / CONFIG_FILE}: changed since it was saved: {changed[0]} is {here}, {METADATA_FILE} says "
            f"{there}. Copy the file again, or train again."
        )
    return metadata


def list_adapters(root: str | os.PathLike[str]) -> list[StoredAdapter]:
    """Every adapter directory under ``root``, each verified, the newest last; hidden directories are passed over.

    Raises:
        UserError: If ``root`` is no directory.
    """
    root = Path(root)
    if not root.is_dir():
        raise UserError(f"{root}: no such directory. Give one that holds runs or adapters.")
    found = [_stored_adapter(directory) for directory in _adapter_dirs(root)]
    return sorted(found, key=lambda adapter: adapter.metadata.training_timestamp if adapter.metadata else "")


def _adapter_dirs(root: Path) -> list[Path]:
    """Directories at and below ``root`` that hold metadata, by name; what may not be read is passed over."""
    found = []
    for directory, subdirectories, files in os.walk(root):
        # A run that is being written, or that was killed while writing, leaves hidden directories.
        subdirectories[:] = [name for name in subdirectories if not name.startswith(".")]
        if METADATA_FILE in files:
            found.append(Path(directory))
    return sorted(found)


def _stored_adapter(directory: Path) -> StoredAdapter:
    metadata, problem = None, None
    try:
        metadata = read_metadata(directory)
        verify(directory)
    except UserError as error:
        problem = str(error)
    weights = directory / WEIGHTS_FILE
    return StoredAdapter(directory, metadata, weights.stat().st_size if weights.is_file() else 0, problem)


def _check_adapter_type(metadata: AdapterMetadata, directory: Path) -> None:
    if metadata.adapter_type not in registered():
        raise UserError(
            f"{directory / METADATA_FILE}: adapter_type is '{metadata.adapter_type}', which is not registered here "
            f"({', '.join(registered())}). Run the program that registers it, with the same arguments."
        )


def _refuse_code(directory: Path) -> None:
    """Refuse pickles and programs, also those that this package would not read: other tools would."""
    for path in sorted(directory.rglob("*")):
        if path.suffix.lower() in _CODE_SUFFIXES:
            raise UserError(
                f"--adapter {directory}: holds {path.relative_to(directory)}; pickles and programs can run code when "
                f"they are read, and an adapter needs none. If {WEIGHTS_FILE} is there too, remove it; else save the "
                "adapter again with PEFT, which writes safetensors."
            )
    for name, settings in _CODE_SETTINGS.items():
        if not (directory / name).is_file():
            continue
        content = _read_settings(directory / name)
        for setting in settings:
            if content.get(setting):
                raise UserError(
                    f"{directory / name}: {setting} names code to run ({json.dumps(content[setting])[:100]}). Adapters "
                    "bring no code of their own: take one without."
                )


def _read_settings(path: Path) -> dict[str, Any]:
    try:
        return read_json_object(path)
    except ValueError as error:
        raise UserError(f"{path}: damaged ({error}). Copy the file again, or train again.") from error


def load(
    adapter_dir: str | os.PathLike[str],
    base_model: PreTrainedModel | BaseModelSpec | str | None = None,
    *,
    adapter_name: str = "default",
    is_trainable: bool = False,
    full_precision_base: bool = False,
    **load_options: Any,
) -> PeftModel:
    """Load a verified adapter onto its base model; every key of the file must find its place and no place stay empty.

    Args:
        adapter_dir: The adapter directory.
        base_model: A loaded base, its name or spec, or None for the base that the metadata names. A loaded base is
            unchanged if the adapter does not fit.
        adapter_name: What PEFT is to call it.
        is_trainable: Whether the adapter's parameters take gradients.
        full_precision_base: Load the base unquantized also where the adapter was trained on a quantized one.
        load_options: Passed to ``load_base_model`` where the base is loaded here.

    Raises:
        UserError: If the adapter is damaged or belongs to another base, or the base carries one already.
    """
    from peft import PeftModel

    from snake_lora_pl.adapters.qlora import prepare_quantized_base
    from snake_lora_pl.models import load_base_model

    directory = Path(adapter_dir)
    metadata = verify(directory)
    _check_ranks(metadata, directory)  # what is no safetensors file is refused before a base is loaded
    if base_model is None or isinstance(base_model, str | BaseModelSpec):
        spec = base_spec(metadata, base_model)
        check_base(metadata, spec, directory)
        if metadata.quantization and not full_precision_base:
            load_options["quantization"] = QuantizationConfig(**metadata.quantization)
        base_model = load_base_model(spec, **load_options)
    else:
        check_carries_none(base_model)
        if base_model.name_or_path not in ("", metadata.base_model):
            check_base(metadata, base_model.name_or_path, directory)
    quantization = quantization_of(base_model)
    if quantization is not None:
        if not metadata.quantization or QuantizationConfig(**metadata.quantization) != quantization:
            logger.warning(
                "Adapter %s was trained on a base that is stored otherwise than the one given, which is in %d bits: "
                "its answers differ.",
                directory,
                quantization.bits,
            )
        prepare_quantized_base(base_model)
    _check_settings(metadata, directory)
    with _fitting(metadata, directory):
        model = PeftModel.from_pretrained(
            base_model,
            str(directory),
            adapter_name=adapter_name,
            is_trainable=is_trainable,
            ignore_mismatched_sizes=True,
        )
    try:
        check_weights(model, directory, adapter_name)
    except UserError:
        model.unload()
        raise
    return model


def add(model: PeftModel, adapter_dir: str | os.PathLike[str], adapter_name: str) -> None:
    """Load another verified adapter beside those that a model carries; which one computes does not change.

    Args:
        model: A PEFT model with adapters of the same PEFT type.
        adapter_dir: The adapter directory.
        adapter_name: What PEFT is to call it.

    Raises:
        UserError: If the adapter is damaged or does not fit the model, which is then as it was.
    """
    directory = Path(adapter_dir)
    metadata = verify(directory)
    _check_settings(metadata, directory)
    try:
        _check_ranks(metadata, directory)
        with _fitting(metadata, directory):
            model.load_adapter(str(directory), adapter_name, ignore_mismatched_sizes=True)
        check_weights(model, directory, adapter_name)
    except UserError:
        if adapter_name in model.peft_config:
            model.delete_adapter(adapter_name)
        raise


@contextlib.contextmanager
def _fitting(metadata: AdapterMetadata, directory: Path) -> Iterator[None]:
    """Say in one line that an adapter does not fit; what PEFT only warns of is for ``check_weights`` to refuse."""
    import torch

    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    except (MemoryError, torch.OutOfMemoryError):
        raise
    except Exception as error:  # what PEFT makes of settings that it never wrote
        raise UserError(f"--adapter {directory}: does not fit {metadata.base_model} ({one_line(error)}).") from error


def _check_settings(metadata: AdapterMetadata, directory: Path) -> None:
    """Refuse settings that the installed PEFT does not know: it would go on without them, with a warning."""
    from peft import PEFT_TYPE_TO_CONFIG_MAPPING

    settings = metadata.peft_config
    config_class = PEFT_TYPE_TO_CONFIG_MAPPING.get(settings.get("peft_type"))
    if config_class is None:
        unknown = ["peft_type"]
    else:
        known = {field.name for field in dataclasses.fields(config_class)}
        unknown = sorted(name for name, value in settings.items() if value and name not in known)
    if unknown:
        kind = "" if config_class is None else f" of {settings['peft_type']}"
        raise UserError(
            f"{directory / CONFIG_FILE}: {unknown[0]} is {json.dumps(settings.get(unknown[0]))[:60]}, which PEFT "
            f"{_version('peft')} does not know{kind}. Install the PEFT that the adapter was saved with "
            f"({metadata.packages.get('peft', 'its version is not recorded')}), or copy the adapter again."
        )
    for name in _PATTERN_SETTINGS:
        value = settings.get(name)
        if isinstance(value, str):
            patterns = [value]
        # AdaLoRA's rank_pattern has whole names of layers for keys.
        elif isinstance(value, dict) and settings.get("peft_type") != "ADALORA":
            patterns = list(value)
        else:
            patterns = []
        for pattern in patterns:
            if problem := problem_with_pattern(pattern):
                raise UserError(f"{directory / CONFIG_FILE}: {name} holds {pattern[:60]!r}: {problem}.")


def check_weights(model: PeftModel, adapter_dir: str | os.PathLike[str], adapter_name: str = "default") -> None:
    """Compare the keys and shapes of a weights file with those of the adapter that a model carries, and see its values.

    Args:
        model: A PEFT model.
        adapter_dir: The adapter directory.
        adapter_name: Which of the model's adapters the file is for.

    Raises:
        UserError: If a key is missing, unknown or of another shape, or what it holds is no finite floating-point
            numbers; the message names keys and says why.
    """
    from peft import get_peft_model_state_dict

    path = Path(adapter_dir) / WEIGHTS_FILE
    saved = _saved_shapes(path)
    if damaged := list(_damaged_values(path)):
        raise UserError(f"{path}: damaged ({_first_few(damaged)}). Copy it again, or train again.")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of what it makes of the file is said below
        state = get_peft_model_state_dict(model, adapter_name=adapter_name, save_embedding_layers=False)
    wanted = {key: tuple(tensor.shape) for key, tensor in state.items()}
    problems = [
        f"{key} is {_shape(saved[key])}, {_shape(wanted[key])} is asked for ({_why(key, saved[key], wanted[key])})"
        for key in sorted(saved.keys() & wanted.keys())
        if saved[key] != wanted[key]
    ]
    problems += [f"{key} is missing" for key in sorted(wanted.keys() - saved.keys())]
    problems += [f"{key} is unknown" for key in sorted(saved.keys() - wanted.keys())]
    if not problems:
        return
    base = model.get_base_model().name_or_path
    raise UserError(
        f"{path}: does not fit {CONFIG_FILE} and the base model {base}: {_first_few(problems)}. "
        "Use the base and the settings that it was trained with."
    )


def _first_few(problems: list[str]) -> str:
    more = [f"and {len(problems) - _MAX_KEYS_NAMED} more"] if len(problems) > _MAX_KEYS_NAMED else []
    return "; ".join([*problems[:_MAX_KEYS_NAMED], *more])


def _damaged_values(path: Path) -> Iterator[str]:
    """What is wrong with each tensor that PEFT would cast and compute with whatever it holds."""
    from safetensors import safe_open

    with safe_open(path, framework="pt") as file:
        for key in file.keys():
            tensor = file.get_tensor(key)
            if not tensor.is_floating_point():
                yield f"{key} is of {str(tensor.dtype).removeprefix('torch.')}, no type of a weight"
            elif not tensor.float().isfinite().all():
                yield f"{key} holds numbers that are not finite"


def _saved_shapes(path: Path) -> dict[str, tuple[int, ...]]:
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(path, framework="pt") as file:
            return {key: tuple(file.get_slice(key).get_shape()) for key in file.keys()}
    except SafetensorError as error:
        raise UserError(f"{path}: no safetensors file ({one_line(error)}). Copy it again, or train again.") from error


def _check_ranks(metadata: AdapterMetadata, directory: Path) -> None:
    """Refuse ranks that no weight has before PEFT reserves memory for them."""
    config = metadata.peft_config
    named = [config.get("r"), config.get("init_r"), *(config.get("rank_pattern") or {}).values()]
    rank = max((rank for rank in named if isinstance(rank, int)), default=0)
    widest = max((size for shape in _saved_shapes(directory / WEIGHTS_FILE).values() for size in shape), default=0)
    if rank > widest:
        raise UserError(
            f"{directory / CONFIG_FILE}: names rank {rank}, but no weight in {WEIGHTS_FILE} is wider than {widest}. "
            "Copy the adapter again, or train again."
        )


def _shape(shape: tuple[int, ...]) -> str:
    return "x".join(map(str, shape)) or "a single number"


def _why(key: str, saved: tuple[int, ...], wanted: tuple[int, ...]) -> str:
    """Which of the two, rank or base, a LoRA factor's shape disagrees with: A is (rank, in), B is (out, rank)."""
    rank_axis = 0 if "lora_A" in key else 1 if "lora_B" in key else None
    if rank_axis is None or len(saved) != 2 or len(wanted) != 2:
        return "another shape"
    if saved[rank_axis] != wanted[rank_axis]:
        return f"rank {saved[rank_axis]} instead of {wanted[rank_axis]}"
    return "a base of another size"


def base_spec(metadata: AdapterMetadata, base_model: BaseModelSpec | str | None = None) -> BaseModelSpec:
    """Return the base model to load an adapter onto, at the commit it was trained on unless another is asked for.

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
    """Refuse a base model that the adapter was not trained on.

    Args:
        metadata: The adapter's.
        base_model: Spec or name of a base model.
        adapter_dir: The adapter directory, for the message.
        option: What the user names the base by.

    Raises:
        UserError: If name, revision or hash differ; the message names the right one.
    """
    source = resolve_base_model(base_model)
    if metadata.base_sha256 and source.sha256 == metadata.base_sha256:
        return  # the same weights, wherever they lie now
    right_base = f"Set {option} {metadata.base_model_name}"
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


def _version(package: str) -> str:
    try:
        return importlib_metadata.version(package)
    except importlib_metadata.PackageNotFoundError:  # run from a source tree that was never installed
        return "unknown"
