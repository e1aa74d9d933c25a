"""Imports and commands that must not import torch, Lightning, transformers or PEFT."""

from __future__ import annotations

import subprocess
import sys

import pytest

from snake_lora_pl.program import LIGHT_COMMANDS

HEAVY = {"torch", "lightning", "transformers", "peft"}


def modules_after(code: str) -> set[str]:
    script = f"import sys\n{code}\nprint(*{{name.split('.')[0] for name in sys.modules}}, file=sys.stderr)"
    result = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    return set(result.stderr.split())


@pytest.mark.parametrize(
    "code",
    [
        "import snake_lora_pl",
        "import snake_lora_pl.game, snake_lora_pl.game.text, snake_lora_pl.game.teachers",
        "import snake_lora_pl.models",
        "import snake_lora_pl.data.generated_rows",
        "from snake_lora_pl.__main__ import main; assert main(['generate']) == 2",
        "from snake_lora_pl.__main__ import main; main(['--help'])",
        "from snake_lora_pl.__main__ import main; assert main(['adapters', 'snake_lora_pl']) == 0",
        "from snake_lora_pl.__main__ import main; assert main(['fitt']) == 2",
    ],
)
def test_nothing_heavy_is_imported(code: str) -> None:
    assert not modules_after(code) & HEAVY


@pytest.mark.parametrize("command", LIGHT_COMMANDS)
def test_help_of_a_light_command_imports_nothing_heavy(command: str) -> None:
    code = f"import snake_lora_pl.__main__ as m\ntry: m.main([{command!r}, '--help'])\nexcept SystemExit: pass"
    assert not modules_after(code) & HEAVY


def test_exports_are_imported_on_access() -> None:
    import snake_lora_pl

    for name in snake_lora_pl.__all__:
        assert getattr(snake_lora_pl, name).__name__ == name
    assert dir(snake_lora_pl) == sorted(snake_lora_pl.__all__)
    with pytest.raises(AttributeError, match="no attribute 'nothing'"):
        _ = snake_lora_pl.nothing
