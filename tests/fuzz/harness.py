"""The process that Atheris takes over: arguments are the target, then libFuzzer's options and directories."""

from __future__ import annotations

import sys

import atheris

with atheris.instrument_imports(include=["snake_lora_pl", "tests.fuzz"]):
    from tests.fuzz.targets import TARGETS


def main() -> None:
    """Run Atheris on the target that the first argument names."""
    name = sys.argv.pop(1)
    target = TARGETS[name]
    atheris.Setup(sys.argv, target if name == "rows" else lambda data: target(data.decode("utf-8", "surrogateescape")))
    atheris.Fuzz()


if __name__ == "__main__":
    main()
