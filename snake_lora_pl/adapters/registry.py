"""The registered adapter types, by name."""

from __future__ import annotations

from typing import TYPE_CHECKING

from snake_lora_pl.adapters.adalora import AdaLoRA
from snake_lora_pl.adapters.adapter_type import AdapterType
from snake_lora_pl.adapters.lora import LoRA
from snake_lora_pl.adapters.miss import MiSS
from snake_lora_pl.adapters.qlora import QLoRA
from snake_lora_pl.adapters.shira import SHiRA
from snake_lora_pl.errors import UserError, did_you_mean

if TYPE_CHECKING:
    from snake_lora_pl.adapters.adapter_type import AdapterBuilder

_ADAPTER_TYPES: dict[str, AdapterType] = {
    "lora": LoRA(),
    "qlora": QLoRA(),
    "adalora": AdaLoRA(),
    "miss": MiSS(),
    "shira": SHiRA(),
}


def register(name: str, adapter_type: AdapterType | AdapterBuilder) -> None:
    """Add an adapter type.

    Args:
        name: The value of ``model.adapter_type`` that selects it.
        adapter_type: A function that adds the adapter to a loaded base model and returns the PEFT model; an
            ``AdapterType`` where training or saving differs from LoRA.

    Raises:
        ValueError: If the name is already registered.
    """
    if name in _ADAPTER_TYPES:
        raise ValueError(f"Adapter type '{name}' is already registered.")
    _ADAPTER_TYPES[name] = adapter_type if isinstance(adapter_type, AdapterType) else AdapterType(adapter_type)


def registered() -> list[str]:
    """Return the names of the registered adapter types, sorted."""
    return sorted(_ADAPTER_TYPES)


def get_adapter_type(name: str) -> AdapterType:
    """Return the adapter type registered under a name.

    Raises:
        UserError: If there is none; the message lists the known names.
    """
    if name not in _ADAPTER_TYPES:
        known = registered()
        raise UserError(
            f"model.adapter_type: unknown type '{name}'. Known: {', '.join(known)}.{did_you_mean(name, known)}"
        )
    return _ADAPTER_TYPES[name]


def saved_conventions(name: str) -> AdapterType:
    """Return the adapter type that describes a saved adapter's settings: LoRA's if the type is not registered."""
    return _ADAPTER_TYPES.get(name, _ADAPTER_TYPES["lora"])
