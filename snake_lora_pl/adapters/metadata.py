"""What an adapter's metadata says, read as something that a stranger may have written."""

from __future__ import annotations

import dataclasses
import json
import math
import unicodedata
from dataclasses import dataclass, field
from datetime import datetime, timezone
from types import UnionType
from typing import Any, NoReturn, get_args, get_origin, get_type_hints

from snake_lora_pl.models.quantization import QuantizationConfig


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
        step: Optimizer steps done.
        epoch: Epoch the adapter was written in, from 0.
        metrics: Last logged value of each metric.
        data: What the data module says of the rows: ``data_hash``, ``split_hash``, ``template``, ``prompt_format`` ...
        play: The table of the games it played last, as ``record_play`` takes it, and ``player``, its own name there.
        quantization: How the base was quantized while it was trained on (``QuantizationConfig``); empty if it
            was not.
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
    play: dict[str, Any] = field(default_factory=dict)
    quantization: dict[str, Any] = field(default_factory=dict)
    peft_config: dict[str, Any] = field(default_factory=dict)
    packages: dict[str, str] = field(default_factory=dict)
    weights_sha256: str = ""


# Of the fields that hold anything, what this package itself reads; of PEFT's settings PEFT checks the others.
_PARTS: dict[str, dict[str, Any]] = {
    "data": {"template": str | None, "prompt_format": str | None, "split_hash": str | None},
    "play": {"player": str, "players": dict[str, dict[str, Any]], "settings": dict[str, Any]},
    "peft_config": {
        "peft_type": str | None,
        "r": int | None,
        "init_r": int | None,
        "rank_pattern": dict[str, int] | None,
        "target_modules": list[str] | str | None,
        "modules_to_save": list[str] | None,
    },
}


def parse_metadata(text: str) -> AdapterMetadata:
    """Read metadata, every value of the type that its field names; keys of other versions are left out.

    Args:
        text: JSON, as ``adapter_metadata.json`` holds it.

    Raises:
        ValueError: If it is no JSON, or a value is missing or of another type; the message names it.
    """
    try:
        content = json.loads(text, parse_constant=_refuse_constant)
    except RecursionError as error:
        raise ValueError("nested too deep") from error
    if not isinstance(content, dict):
        raise ValueError("no JSON object")
    types = get_type_hints(AdapterMetadata)
    known = {name: value for name, value in content.items() if name in types}
    needed = {f.name for f in dataclasses.fields(AdapterMetadata) if _has_no_default(f)}
    if missing := sorted(needed - known.keys()):
        raise ValueError(f"{', '.join(missing)} missing")
    for name, value in known.items():
        _check(name, value, types[name])
    for part, part_types in _PARTS.items():
        if not known.get(part):
            continue
        for name, type_hint in part_types.items():
            # AdaLoRA's says of every triplet whether it is there.
            is_adalora_s = name == "rank_pattern" and known[part].get("peft_type") == "ADALORA"
            hint = dict[str, list[bool]] | None if is_adalora_s else type_hint
            _check(f"{part}.{name}", known[part].get(name), hint)
    if known.get("quantization"):
        try:
            QuantizationConfig(**known["quantization"])  # raises
        except TypeError as error:
            raise ValueError(f"quantization: {error}") from error
    return AdapterMetadata(**known)


def is_number(value: Any) -> bool:
    """Whether a value that came from JSON is a finite number."""
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)


def _refuse_constant(name: str) -> NoReturn:
    raise ValueError(f"{name} is no JSON")


def _has_no_default(f: dataclasses.Field[Any]) -> bool:
    return f.default is dataclasses.MISSING and f.default_factory is dataclasses.MISSING


def _check(name: str, value: Any, type_hint: Any) -> None:
    if not _is_of(value, type_hint):
        expected = type_hint.__name__ if isinstance(type_hint, type) and not get_args(type_hint) else type_hint
        raise ValueError(f"{name} is {json.dumps(value)[:60]}, not of type {expected}")


def _is_of(value: Any, type_hint: Any) -> bool:
    """Whether a value that came from JSON has a type, with all that it holds."""
    origin, parts = get_origin(type_hint), get_args(type_hint)
    if origin is UnionType:
        return any(_is_of(value, part) for part in parts)
    if origin is dict:
        return isinstance(value, dict) and all(_is_of(item, parts[1]) for item in value.values())
    if origin is list:
        return isinstance(value, list) and all(_is_of(item, parts[0]) for item in value)
    if type_hint is Any:
        return True
    if type_hint is float:
        return is_number(value)
    if type_hint is str:
        # What is printed must not steer a terminal.
        return isinstance(value, str) and not any(unicodedata.category(letter) == "Cc" for letter in value)
    return type(value) is type_hint
