"""Imports and commands that must not import torch, Lightning, transformers or PEFT."""

from __future__ import annotations

import json
import os
import subprocess
import sys

import pytest

from snake_lora_pl.program import LIGHT_COMMANDS

HEAVY = {"torch", "lightning", "transformers", "peft"}


CODES = [
    "import snake_lora_pl",
    "import snake_lora_pl.game, snake_lora_pl.game.text, snake_lora_pl.game.teachers",
    "import snake_lora_pl.models",
    "import snake_lora_pl.data.generated_rows",
    "assert main(['generate']) == 2",
    "main(['--help'])",
    "assert main(['adapters', 'snake_lora_pl']) == 0",
    "assert main(['fitt']) == 2",
    *(f"try: main([{command!r}, '--help'])\nexcept SystemExit: pass" for command in LIGHT_COMMANDS),
]


def test_nothing_heavy_is_imported() -> None:
    # In one process; the output names the first code that imports something heavy.
    script = f"""
import contextlib, io, json, sys
found = []
for code in {["from snake_lora_pl.__main__ import main", *CODES]!r}:
    with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
        exec(code)
    found.append([code, sorted({HEAVY!r} & set(sys.modules))])
print(json.dumps(found))
"""
    result = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    found = json.loads(result.stdout)
    assert len(found) > len(CODES)
    assert [code for code, heavy in found if heavy] == []


@pytest.mark.parametrize(
    ("arguments", "part"), [(["fit", "--help"], "--model.lora.rank"), (["completion", "bash"], "--model.lora.rank")]
)
def test_text_is_cached_so_that_the_second_call_imports_nothing_heavy(arguments: list[str], part: str) -> None:
    script = (
        f"import sys; from snake_lora_pl.__main__ import main; main({arguments});"
        "print(*{name.split('.')[0] for name in sys.modules}, file=sys.stderr)"
    )
    command, environment = [sys.executable, "-c", script], {**os.environ, "COLUMNS": "200"}
    first, second = (
        subprocess.run(command, capture_output=True, text=True, check=True, env=environment) for _ in range(2)
    )
    assert part in first.stdout
    assert second.stdout == first.stdout
    assert "torch" in first.stderr.split()
    assert not set(second.stderr.split()) & (HEAVY | {"jsonargparse", "shtab"})


def test_help_does_not_depend_on_the_width_of_the_terminal(monkeypatch: pytest.MonkeyPatch) -> None:
    from snake_lora_pl.cli.help import render_help

    monkeypatch.setenv("COLUMNS", "200")
    lengths = sorted(map(len, render_help("fit").splitlines()))
    assert lengths[int(0.95 * len(lengths))] <= 80  # the others hold a word that cannot be wrapped


def test_exports_are_imported_on_access() -> None:
    import snake_lora_pl

    for name in snake_lora_pl.__all__:
        assert getattr(snake_lora_pl, name).__name__ == name
    assert dir(snake_lora_pl) == sorted(snake_lora_pl.__all__)
    with pytest.raises(AttributeError, match="no attribute 'nothing'"):
        _ = snake_lora_pl.nothing
