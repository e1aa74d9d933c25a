"""Errors while the trainer and the objects of its config are created name the key."""

from __future__ import annotations

import pytest
from jsonargparse import Namespace
from lightning.pytorch import Trainer
from lightning.pytorch.callbacks import EarlyStopping

from snake_lora_pl.cli.trainer_errors import check_constructors, explain_trainer_error
from snake_lora_pl.errors import UserError

MACHINE = {"accelerator": "cpu", "devices": 1, "strategy": "auto", "precision": None}


class NeedsPackage:
    """A logger whose package is missing."""

    def __init__(self, level: int = 1, inner: object = None) -> None:
        raise ModuleNotFoundError("No module named 'nowhere'", name="nowhere")


class NeedsPositive:
    """A callback that checks its argument."""

    def __init__(self, level: int = 1, inner: object = None) -> None:
        if level < 0:
            raise ValueError("must be positive")


def spec(name: str, **init_args: object) -> Namespace:
    return Namespace(class_path=f"{__name__}.{name}", init_args=Namespace(**init_args))


def options(**trainer: object) -> Namespace:
    return Namespace(root=".", trainer=Namespace(**trainer))


def test_missing_package_is_reported_with_the_command_that_installs_it() -> None:
    with pytest.raises(UserError, match=r"trainer\.logger: NeedsPackage .*`pip install nowhere`"):
        check_constructors(options(logger=spec("NeedsPackage")))


def test_hint_of_a_library_is_not_repeated() -> None:
    with pytest.raises(UserError) as error:
        check_constructors(options(logger=Namespace(class_path="lightning.pytorch.loggers.MLFlowLogger")))
    assert str(error.value).count("pip install") == 1


def test_wrong_argument_is_reported_with_key_class_and_argument() -> None:
    with pytest.raises(UserError, match=r"trainer\.callbacks\[1\]: NeedsPositive .*must be positive.*: level\."):
        check_constructors(options(callbacks=[spec("NeedsPositive"), spec("NeedsPositive", level=-1, inner=None)]))


def test_object_within_an_object_is_reported_with_its_own_key() -> None:
    inner = spec("NeedsPositive", level=-1)
    with pytest.raises(UserError, match=r"trainer\.logger\.inner: NeedsPositive"):
        check_constructors(options(logger=spec("NeedsPositive", inner=inner)))


def test_valid_config_is_accepted() -> None:
    check_constructors(options(callbacks=[spec("NeedsPositive", level=2)], max_steps=3, logger=None))


@pytest.mark.parametrize(
    ("settings", "expected"),
    [
        ({"profiler": "foo"}, "trainer.profiler=foo: "),
        ({"val_check_interval": 2.5, "max_steps": 3}, "trainer.val_check_interval=2.5: "),
        ({"max_time": "abc"}, "trainer.max_time=abc: "),
        ({"callbacks": [EarlyStopping("a"), EarlyStopping("a")]}, "trainer.callbacks: "),
        ({"gradient_clip_algorithm": "foo"}, "trainer.gradient_clip_algorithm=foo: "),
    ],
)
def test_error_of_the_trainer_names_the_key_and_not_the_machine(settings: dict[str, object], expected: str) -> None:
    with pytest.raises(Exception) as raised:  # noqa: PT011
        Trainer(**{"logger": False, **MACHINE, **settings})
    message = str(explain_trainer_error({**MACHINE, **settings}, raised.value))
    assert message.startswith(expected)
    assert "accelerator" not in message


@pytest.mark.parametrize("settings", [{"accelerator": "tpu"}, {"strategy": "foo"}])
def test_error_of_the_machine_names_its_four_keys(settings: dict[str, object]) -> None:
    message = str(explain_trainer_error({**MACHINE, **settings, "max_steps": 3}, ValueError("not found")))
    assert all(f"{key}=" in message for key in MACHINE)
    assert "--trainer.accelerator=auto" in message
