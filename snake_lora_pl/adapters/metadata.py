"""Metadata of an adapter, parsed as untrusted input."""

from __future__ import annotations

import dataclasses
import json
import math
import unicodedata
from dataclasses import dataclass, field
from datetime import datetime, timezone
from types import UnionType
from typing import Any, Literal, NoReturn, get_args, get_origin, get_type_hints

from snake_lora_pl.adapters.registry import saved_conventions
from snake_lora_pl.models.quantization import QuantizationConfig


@dataclass
class AdapterMetadata:
    """The content of ``adapter_metadata.json``.

    Args:
        adapter_type: Name of the adapter type in ``AdapterFactory``.
        base_model: Name of the base model for any PEFT user: a hub id or an absolute directory.
        base_model_name: Value of ``model.base_model`` in training, possibly a short name.
        base_revision: Commit of a hub model, or None.
        base_sha256: Hash of the base weights if there is no revision, or None.
        trainable_parameters: Number of trained parameters.
        total_parameters: Number of parameters of base and adapter.
        training_timestamp: Time at which the adapter was written, UTC, ISO 8601.
        grid_size: Cells per side of the board in the data, or None.
        step: Completed optimizer steps.
        epoch: Current epoch, from 0.
        metrics: Last logged value of each metric.
        data: Facts about the rows, from the data module: ``data_hash``, ``split_hash``, ``template``,
            ``template_date`` (the date in the prompts, if any), ``prompt_format`` and others.
        play: Results of the last games as in ``record_play``, and ``player``, the adapter's name in them.
        quantization: Fields of the base's ``QuantizationConfig`` in training; empty if the base was not quantized.
        peft_config: The content of ``adapter_config.json``.
        packages: Versions of the packages that affect the result.
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

    @property
    def rank(self) -> int | None:
        """Largest rank of any layer; None if the adapter has no rank."""
        return saved_conventions(self.adapter_type).saved_rank(self.peft_config)


# Type hints of the nested values that this package reads.
_PART_TYPES: dict[str, dict[str, Any]] = {
    "data": dict.fromkeys(("template", "template_date", "prompt_format", "split_hash"), str | None),
    "play": {"player": str, "players": dict[str, dict[str, Any]], "settings": dict[str, Any]},
}


def parse_metadata(text: str) -> AdapterMetadata:
    """Parse metadata and check the type of each value. Unknown keys, from other versions, are dropped.

    Args:
        text: The content of ``adapter_metadata.json``.

    Raises:
        ValueError: If the text is not JSON, or a value is missing or has the wrong type; the message names it.
    """
    try:
        content = json.loads(text, parse_constant=_reject_constant)
    except RecursionError as error:
        raise ValueError("nested too deeply") from error
    if not isinstance(content, dict):
        raise ValueError("not a JSON object")
    types = get_type_hints(AdapterMetadata)
    known = {name: value for name, value in content.items() if name in types}
    required = {f.name for f in dataclasses.fields(AdapterMetadata) if _has_no_default(f)}
    if missing := sorted(required - known.keys()):
        raise ValueError(f"missing: {', '.join(missing)}")
    for name, value in known.items():
        _check(name, value, types[name])
    part_types = {**_PART_TYPES, "peft_config": saved_conventions(known["adapter_type"]).peft_setting_types}
    for part, hints in part_types.items():
        if known.get(part):
            for name, type_hint in hints.items():
                _check(f"{part}.{name}", known[part].get(name), type_hint)
    if known.get("quantization"):
        try:
            QuantizationConfig(**known["quantization"])  # raises
        except TypeError as error:
            raise ValueError(f"quantization: {error}") from error
    return AdapterMetadata(**known)


def is_number(value: Any) -> bool:
    """Return whether a JSON value is a finite number."""
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)


def _reject_constant(name: str) -> NoReturn:
    raise ValueError(f"{name} is not JSON")


def _has_no_default(f: dataclasses.Field[Any]) -> bool:
    return f.default is dataclasses.MISSING and f.default_factory is dataclasses.MISSING


def _check(name: str, value: Any, type_hint: Any) -> None:
    if not _has_type(value, type_hint):
        expected = type_hint.__name__ if isinstance(type_hint, type) and not get_args(type_hint) else type_hint
        raise ValueError(f"{name} is {json.dumps(value)[:60]}, not of type {expected}")


def _has_type(value: Any, type_hint: Any) -> bool:
    """Return whether a JSON value and everything in it matches a type hint."""
    origin, parts = get_origin(type_hint), get_args(type_hint)
    if origin is UnionType:
        return any(_has_type(value, part) for part in parts)
    if origin is Literal:
        return isinstance(value, str) and value in parts
    if origin is dict:
        return isinstance(value, dict) and all(_has_type(item, parts[1]) for item in value.values())
    if origin is list:
        return isinstance(value, list) and all(_has_type(item, parts[0]) for item in value)
    if type_hint is Any:
        return True
    if type_hint is float:
        return is_number(value)
    if type_hint is str:
        # Control characters in printed text can control the terminal.
        return isinstance(value, str) and not any(unicodedata.category(char) == "Cc" for char in value)
    return type(value) is type_hint
