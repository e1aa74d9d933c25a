"""Several adapters on one base model in memory."""

from __future__ import annotations

import os
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from snake_lora_pl.adapters import store
from snake_lora_pl.adapters.metadata import AdapterMetadata
from snake_lora_pl.adapters.verify import read_metadata, verify
from snake_lora_pl.errors import UserError
from snake_lora_pl.models.quantization import QuantizationConfig, quantization_of

if TYPE_CHECKING:
    from peft import PeftModel
    from transformers import PreTrainedModel

    from snake_lora_pl.models.base_model import BaseModelSpec


class _LoadedAdapter(NamedTuple):
    directory: Path
    metadata: AdapterMetadata
    peft_name: str

    @property
    def peft_type(self) -> str:
        return str(self.metadata.peft_config["peft_type"])


class SharedBase:
    """A base model with several loaded adapters, at most one of which is active.

    Adapters of one PEFT type (lora and qlora have the same, adalora has a different one) are loaded together. When an
    adapter of a different PEFT type becomes active, its layers replace those of the previous type. The base is loaded
    once and never copied.

    Args:
        model: The result of ``store.load``.
        name: Name of the model's adapter.
        adapter_dir: The directory it was loaded from.
        full_precision_base: Allow adapters that were trained on a quantized base on this unquantized base.

    Example:
        >>> shared = SharedBase.open("small", "runs/small/model_artifacts")  # doctest: +SKIP
        >>> shared.load("large", "runs/large/model_artifacts")  # doctest: +SKIP
        >>> shared.use("large").generate(...)  # doctest: +SKIP
        >>> shared.unload("small")  # doctest: +SKIP
    """

    def __init__(
        self, model: PeftModel, name: str, adapter_dir: str | os.PathLike[str], *, full_precision_base: bool = False
    ) -> None:
        self._model = model
        self._full_precision_base = full_precision_base
        self._quantization = quantization_of(model.get_base_model())
        self._base_metadata = read_metadata(adapter_dir)
        self._adapters = {name: _LoadedAdapter(Path(adapter_dir), self._base_metadata, model.active_adapter)}
        self._active: str | None = name
        self._num_loaded = 1

    @classmethod
    def open(
        cls,
        name: str,
        adapter_dir: str | os.PathLike[str],
        base_model: PreTrainedModel | BaseModelSpec | str | None = None,
        *,
        full_precision_base: bool = False,
        **load_options: Any,
    ) -> SharedBase:
        """Load a base with its first adapter.

        Args:
            name: Name of the adapter.
            adapter_dir: The adapter directory.
            base_model: As in ``store.load``.
            full_precision_base: As in ``store.load``; also applies to adapters loaded later.
            load_options: As in ``store.load``.

        Raises:
            UserError: If the adapter is damaged or was trained on a different base.
        """
        model = store.load(adapter_dir, base_model, full_precision_base=full_precision_base, **load_options)
        return cls(model, name, adapter_dir, full_precision_base=full_precision_base)

    @property
    def model(self) -> PeftModel:
        """The model with the active adapter; ``use`` may replace it."""
        return self._model

    @property
    def names(self) -> list[str]:
        """Names of the loaded adapters, in the order of loading."""
        return list(self._adapters)

    @property
    def active(self) -> str | None:
        """Name of the active adapter; None if the base computes without one."""
        return self._active

    def load(self, name: str, adapter_dir: str | os.PathLike[str]) -> AdapterMetadata:
        """Verify and load another adapter; the active adapter does not change.

        Returns:
            The adapter's metadata.

        Raises:
            UserError: If the name is in use, the adapter is damaged, or it cannot share the base. In this case nothing
                changes.
        """
        if name in self._adapters:
            raise UserError(f"an adapter named '{name}' is already loaded. Choose another name, or unload it first.")
        directory = Path(adapter_dir)
        metadata = verify(directory)
        self._check_same_base(metadata, directory)
        active = self._active
        self._adapters[name] = _LoadedAdapter(directory, metadata, f"adapter_{self._num_loaded}")
        self._num_loaded += 1
        try:
            self.use(name)  # checks that it fits
        except UserError:
            del self._adapters[name]
            raise
        finally:
            self.use(active)
        return metadata

    def use(self, name: str | None) -> PeftModel:
        """Activate an adapter, or none.

        Args:
            name: Name of a loaded adapter; None for the base without an adapter.

        Returns:
            ``model``, with the adapter active.

        Raises:
            UserError: If no adapter of that name is loaded, or its files have changed since it was loaded.
        """
        if name is None:
            self._model.base_model.disable_adapter_layers()
        else:
            adapter = self._get(name)
            self._attach(adapter)
            self._model.base_model.enable_adapter_layers()
            self._model.set_adapter(adapter.peft_name)
        self._active = name
        return self._model

    def unload(self, name: str) -> None:
        """Remove an adapter and free its weights. If it is active, none is afterwards.

        Raises:
            UserError: If no adapter of that name is loaded, or it is the only one.
        """
        adapter = self._get(name)
        if len(self._adapters) == 1:
            raise UserError(f"'{name}' is the only adapter on this base. Load another adapter first.")
        others = [other for other in self._adapters.values() if other is not adapter]
        active = None if name == self._active else self._active
        if not any(self._is_attached(other) for other in others):
            self._attach(others[0])
        if self._is_attached(adapter):
            # PEFT would choose the next active adapter and log a warning.
            self._model.set_adapter(next(other.peft_name for other in others if self._is_attached(other)))
            self._model.delete_adapter(adapter.peft_name)
        del self._adapters[name]
        self.use(active)

    def _get(self, name: str) -> _LoadedAdapter:
        if name not in self._adapters:
            raise UserError(f"no adapter named '{name}' is loaded. Loaded: {', '.join(self._adapters)}.")
        return self._adapters[name]

    def _is_attached(self, adapter: _LoadedAdapter) -> bool:
        return adapter.peft_name in self._model.peft_config

    def _attach(self, adapter: _LoadedAdapter) -> None:
        """Add an adapter's layers to the base, next to those of its PEFT type or instead of those of another type."""
        if self._is_attached(adapter):
            return
        if read_metadata(adapter.directory).weights_sha256 != adapter.metadata.weights_sha256:
            raise UserError(f"--adapter {adapter.directory}: the adapter changed since it was loaded. Load it again.")
        if adapter.peft_type == self._model.peft_type.value:
            store.add(self._model, adapter.directory, adapter.peft_name)
            return
        previous = next(other for other in self._adapters.values() if self._is_attached(other))
        base = self._model.unload()
        try:
            self._model = store.load(adapter.directory, base, adapter_name=adapter.peft_name)
        except UserError:
            self._model = store.load(previous.directory, base, adapter_name=previous.peft_name)
            raise

    def _check_same_base(self, metadata: AdapterMetadata, directory: Path) -> None:
        """Reject an adapter that was trained on a different base than the one in memory."""
        base = self._base_metadata
        if metadata.base_sha256 and base.base_sha256:
            is_same = metadata.base_sha256 == base.base_sha256
        else:
            is_same = (metadata.base_model, metadata.base_revision) == (base.base_model, base.base_revision)
        trained_on, in_memory = _describe_base(metadata), _describe_base(base)
        option = ""
        if is_same and not (self._full_precision_base and self._quantization is None):
            quantization = QuantizationConfig(**metadata.quantization) if metadata.quantization else None
            is_same = quantization == self._quantization
            trained_on, in_memory = f"{trained_on} {_describe_bits(quantization)}", _describe_bits(self._quantization)
            option = ", or set model.full_precision_base=true"
        if not is_same:
            raise UserError(
                f"--adapter {directory}: trained on {trained_on}, but the base in memory is {in_memory}, so the "
                f"adapters cannot share it. Pass one adapter at a time{option}."
            )


def _describe_base(metadata: AdapterMetadata) -> str:
    identifier = metadata.base_sha256 or metadata.base_revision
    return f"{metadata.base_model} ({identifier[:12]})" if identifier else metadata.base_model


def _describe_bits(quantization: QuantizationConfig | None) -> str:
    return "unquantized" if quantization is None else f"{quantization.bits}-bit"
