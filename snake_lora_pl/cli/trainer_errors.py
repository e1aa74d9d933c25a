"""Explanations of errors while the trainer, its loggers and its callbacks are created: they name the key."""

from __future__ import annotations

import inspect
import pkgutil
from collections.abc import Mapping
from typing import Any

from jsonargparse import Namespace
from lightning.pytorch import Trainer

from snake_lora_pl.console import suppress_library_output
from snake_lora_pl.errors import UserError

_MACHINE_KEYS = ("accelerator", "devices", "strategy", "precision")
"""Keys of the trainer whose values depend on the machine."""


def check_constructors(options: Namespace) -> None:
    """Create every object that a config names by its class, to find the one that cannot be created.

    jsonargparse reports the failed constructor of one item as an error of the whole value, with all types that the
    value could have had.

    Args:
        options: Options of a command, parsed but not instantiated.

    Raises:
        UserError: If a constructor fails; the message names its key, its class and its arguments.
    """
    for key, value in vars(options).items():
        _create(value, key)


def _create(value: Any, key: str) -> Any:
    if isinstance(value, list):
        return [_create(item, f"{key}[{index}]") for index, item in enumerate(value)]
    if not isinstance(value, Namespace):
        return value
    if "class_path" not in value:
        return {name: _create(item, f"{key}.{name}") for name, item in vars(value).items()}
    init_args = value.get("init_args")
    given = {**(vars(init_args) if init_args else {}), **(value.get("dict_kwargs") or {})}
    arguments = {name: _create(item, f"{key}.{name}") for name, item in given.items()}
    created_class = pkgutil.resolve_name(value.class_path)
    try:
        return created_class(**arguments)
    except Exception as error:
        raise _failed_constructor(key, created_class, arguments, error) from error


def _failed_constructor(key: str, created_class: Any, arguments: Mapping[str, Any], error: Exception) -> UserError:
    message = f"{key}: {created_class.__name__} cannot be created: {_text(error)}"
    if isinstance(error, ImportError):
        is_explained = "pip install" in message or error.name is None
        return UserError(message if is_explained else f"{message} Run `pip install {error.name}`.")
    defaults = {name: p.default for name, p in inspect.signature(created_class).parameters.items()}
    changed = [name for name, value in arguments.items() if name not in defaults or value != defaults[name]]
    return UserError(f"{message} Arguments that were set: {', '.join(changed) or 'none'}.")


def explain_trainer_error(settings: Mapping[str, Any], error: Exception) -> UserError:
    """Return an error that names the key because of which a trainer cannot be created.

    Args:
        settings: Arguments of the trainer.
        error: The error of its constructor.
    """
    # Lightning's messages do not always name the argument, so each value is tried alone.
    chosen = {name: settings[name] for name in _MACHINE_KEYS}
    if _is_refused(chosen):
        shown = ", ".join(f"{name}={value}" for name, value in chosen.items())
        return UserError(
            f"these trainer settings do not fit this machine ({shown}): {_text(error)} "
            "--trainer.accelerator=auto --trainer.devices=auto --trainer.strategy=auto work everywhere."
        )
    defaults = inspect.signature(Trainer).parameters
    for name, value in settings.items():
        if name not in chosen and value != defaults[name].default and _is_refused({name: value}):
            shown = f"={value}" if isinstance(value, str | int | float) else ""
            return UserError(f"trainer.{name}{shown}: {_text(error)}")
    return UserError(f"trainer: {_text(error)}")


def _is_refused(settings: dict[str, Any]) -> bool:
    with suppress_library_output():
        try:
            Trainer(**{"logger": False, **settings})
        except Exception:
            return True
    return False


def _text(error: Exception) -> str:
    text = " ".join(str(error).split()) or type(error).__name__
    return text if text.endswith((".", "!", "?", "`")) else f"{text}."
