"""Process that Atheris controls; the arguments are the target, libFuzzer's options and directories."""

from __future__ import annotations

import sys

import atheris

with atheris.instrument_imports(include=["snake_lora_pl", "tests.fuzz"]):
    from tests.fuzz.targets import TARGETS


def main() -> None:
    """Run Atheris on the target named by the first argument."""
    name = sys.argv.pop(1)
    target = TARGETS[name]
    atheris.Setup(sys.argv, target if name == "rows" else lambda data: target(data.decode("utf-8", "surrogateescape")))
    atheris.Fuzz()


if __name__ == "__main__":
    main()
