"""The kinds of adapter that there are, by name."""

from __future__ import annotations

import difflib
from typing import TYPE_CHECKING

from snake_lora_pl.adapters.adalora import AdaLoRA
from snake_lora_pl.adapters.adapter_type import AdapterKind
from snake_lora_pl.adapters.lora import LoRA
from snake_lora_pl.adapters.qlora import QLoRA
from snake_lora_pl.errors import UserError

if TYPE_CHECKING:
    from snake_lora_pl.adapters.adapter_type import AdapterBuilder

_KINDS: dict[str, AdapterKind] = {"lora": LoRA(), "qlora": QLoRA(), "adalora": AdaLoRA()}


def register(adapter_type: str, kind: AdapterKind | AdapterBuilder) -> None:
    """Add a kind of adapter.

    Args:
        adapter_type: The name that ``model.adapter_type`` takes.
        kind: Puts the adapter on a loaded base model and returns the PEFT model; an ``AdapterKind`` where its
            training differs from LoRA's.

    Raises:
        ValueError: If the name is taken.
    """
    if adapter_type in _KINDS:
        raise ValueError(f"Adapter type '{adapter_type}' is registered already.")
    _KINDS[adapter_type] = kind if isinstance(kind, AdapterKind) else AdapterKind(kind)


def registered() -> list[str]:
    """Names of the kinds there are, sorted."""
    return sorted(_KINDS)


def kind_of(adapter_type: str) -> AdapterKind:
    """The kind of a name.

    Raises:
        UserError: If there is none; the message lists those there are.
    """
    if adapter_type not in _KINDS:
        known = registered()
        near = difflib.get_close_matches(adapter_type, known, n=1)
        hint = f" Did you mean '{near[0]}'?" if near else ""
        raise UserError(f"model.adapter_type: unknown type '{adapter_type}'. Known: {', '.join(known)}.{hint}")
    return _KINDS[adapter_type]
