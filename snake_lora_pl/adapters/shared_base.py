"""Several adapters on one base model in memory: loaded, switched and unloaded without reading the base again."""

from __future__ import annotations

import os
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from snake_lora_pl.adapters import store
from snake_lora_pl.errors import UserError
from snake_lora_pl.models.quantization import QuantizationConfig, quantization_of

if TYPE_CHECKING:
    from peft import PeftModel
    from transformers import PreTrainedModel

    from snake_lora_pl.models.base_model import BaseModelSpec


class _Loaded(NamedTuple):
    directory: Path
    metadata: store.AdapterMetadata
    peft_name: str

    @property
    def peft_type(self) -> str:
        return str(self.metadata.peft_config["peft_type"])


class SharedBase:
    """One base model and the adapters on it, of which one computes at a time, or none.

    Adapters of one PEFT type (lora and qlora are of one, adalora of another) lie side by side on the model. Where the
    next one to compute is of another type, the layers of the one type are taken off the base and those of the other put
    on; the base itself is never read or copied again.

    Args:
        model: What ``store.load`` returned.
        name: What to call the adapter that it carries.
        adapter_dir: Where that adapter was loaded from.
        full_precision_base: Whether adapters that were trained on a quantized base may share this one unquantized.

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
        self._base = store.read_metadata(adapter_dir)
        self._adapters = {name: _Loaded(Path(adapter_dir), self._base, model.active_adapter)}
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
            name: What to call the adapter.
            adapter_dir: The adapter directory.
            base_model: As in ``store.load``.
            full_precision_base: As in ``store.load``; for those loaded later as well.
            load_options: As in ``store.load``.

        Raises:
            UserError: If the adapter is damaged or belongs to another base.
        """
        model = store.load(adapter_dir, base_model, full_precision_base=full_precision_base, **load_options)
        return cls(model, name, adapter_dir, full_precision_base=full_precision_base)

    @property
    def model(self) -> PeftModel:
        """The model as it computes now; ask again after ``use``, which may put another around the base."""
        return self._model

    @property
    def names(self) -> list[str]:
        """The adapters that are loaded, in the order in which they were."""
        return list(self._adapters)

    @property
    def active(self) -> str | None:
        """The adapter that computes; None where the base computes alone."""
        return self._active

    def load(self, name: str, adapter_dir: str | os.PathLike[str]) -> store.AdapterMetadata:
        """Load another adapter, verified; which one computes does not change.

        Returns:
            What the adapter is.

        Raises:
            UserError: If the name is taken, the adapter is damaged, or it cannot share the base. Nothing has changed
                then.
        """
        if name in self._adapters:
            raise UserError(f"an adapter named '{name}' is loaded already. Choose another name, or unload it first.")
        directory = Path(adapter_dir)
        metadata = store.verify(directory)
        self._check_shares(metadata, directory)
        active = self._active
        self._adapters[name] = _Loaded(directory, metadata, f"adapter_{self._num_loaded}")
        self._num_loaded += 1
        try:
            self.use(name)  # that it fits is known before anything is computed with it
        except UserError:
            del self._adapters[name]
            raise
        finally:
            self.use(active)
        return metadata

    def use(self, name: str | None) -> PeftModel:
        """Compute with another adapter, or with the base alone.

        Args:
            name: A loaded adapter, or None.

        Returns:
            ``model``, as it computes from here on.

        Raises:
            UserError: If no adapter of that name is loaded, or its files are no longer those that were.
        """
        if name is None:
            self._model.base_model.disable_adapter_layers()
        else:
            adapter = self._get(name)
            self._put_on(adapter)
            self._model.base_model.enable_adapter_layers()
            self._model.set_adapter(adapter.peft_name)
        self._active = name
        return self._model

    def unload(self, name: str) -> None:
        """Forget an adapter and free its weights; where it was the one that computes, the base computes alone.

        Raises:
            UserError: If no adapter of that name is loaded, or no other one is.
        """
        adapter = self._get(name)
        if len(self._adapters) == 1:
            raise UserError(f"'{name}' is the only adapter on this base. Load another one before, or drop them all.")
        others = [other for other in self._adapters.values() if other is not adapter]
        active = None if name == self._active else self._active
        if not any(self._is_on(other) for other in others):
            self._put_on(others[0])
        if self._is_on(adapter):
            # PEFT would choose another one itself, and warn of it.
            self._model.set_adapter(next(other.peft_name for other in others if self._is_on(other)))
            self._model.delete_adapter(adapter.peft_name)
        del self._adapters[name]
        self.use(active)

    def _get(self, name: str) -> _Loaded:
        if name not in self._adapters:
            raise UserError(f"no adapter named '{name}' is loaded. Loaded: {', '.join(self._adapters)}.")
        return self._adapters[name]

    def _is_on(self, adapter: _Loaded) -> bool:
        return adapter.peft_name in self._model.peft_config

    def _put_on(self, adapter: _Loaded) -> None:
        """Put an adapter's layers on the base, beside those of its type or in place of those of another."""
        if self._is_on(adapter):
            return
        if store.read_metadata(adapter.directory).weights_sha256 != adapter.metadata.weights_sha256:
            raise UserError(
                f"--adapter {adapter.directory}: was replaced by another since it was loaded. Load it again."
            )
        if adapter.peft_type == self._model.peft_type.value:
            store.add(self._model, adapter.directory, adapter.peft_name)
            return
        before = next(other for other in self._adapters.values() if self._is_on(other))
        base = self._model.unload()
        try:
            self._model = store.load(adapter.directory, base, adapter_name=adapter.peft_name)
        except UserError:
            self._model = store.load(before.directory, base, adapter_name=before.peft_name)
            raise

    def _check_shares(self, metadata: store.AdapterMetadata, directory: Path) -> None:
        """Refuse an adapter that was trained on another base than the one in memory."""
        base = self._base
        if metadata.base_sha256 and base.base_sha256:
            is_same = metadata.base_sha256 == base.base_sha256
        else:
            is_same = (metadata.base_model, metadata.base_revision) == (base.base_model, base.base_revision)
        trained_on, in_memory = _source_in_words(metadata), _source_in_words(base)
        way_on = ""
        if is_same and not (self._full_precision_base and self._quantization is None):
            wanted = QuantizationConfig(**metadata.quantization) if metadata.quantization else None
            is_same = wanted == self._quantization
            trained_on, in_memory = f"{trained_on} {_bits(wanted)}", _bits(self._quantization)
            way_on = ", or set model.full_precision_base=true"
        if not is_same:
            raise UserError(
                f"--adapter {directory}: trained on {trained_on}, but the base in memory is {in_memory}: the adapters "
                f"cannot share it. Give one of them at a time{way_on}."
            )


def _source_in_words(metadata: store.AdapterMetadata) -> str:
    mark = metadata.base_sha256 or metadata.base_revision
    return f"{metadata.base_model} ({mark[:12]})" if mark else metadata.base_model


def _bits(quantization: QuantizationConfig | None) -> str:
    return "unquantized" if quantization is None else f"in {quantization.bits} bits"
