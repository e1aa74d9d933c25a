"""Completion scripts, run by the shells."""

from __future__ import annotations

import re
import shutil
import subprocess
from pathlib import Path

import pytest

from snake_lora_pl.__main__ import main
from snake_lora_pl.cli.commands.completion import SHELLS, completion_script
from snake_lora_pl.cli.help import help_text
from snake_lora_pl.paths import shipped_configs
from snake_lora_pl.program import LIGHT_COMMANDS, LIGHTNING_COMMANDS

pytestmark = pytest.mark.skipif(shutil.which("bash") is None, reason="needs bash")


@pytest.fixture(scope="module")
def script(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("completion") / "snake-lora.bash"
    path.write_text(completion_script("bash"))
    return path


def complete(script: Path, *words: str, cwd: Path | None = None) -> set[str]:
    """Return bash's candidates for the last of the words after the program name."""
    line = " ".join(f"'{word}'" for word in ("snake-lora", *words))
    program = (
        f"source {script}; COMP_WORDS=({line}); COMP_CWORD={len(words)};"
        " $(complete -p snake-lora | sed -E 's/.*-F ([^ ]+).*/\\1/'); printf '%s\\n' \"${COMPREPLY[@]}\""
    )
    result = subprocess.run(["bash", "-c", program], capture_output=True, text=True, cwd=cwd or script.parent)
    errors = [line for line in result.stderr.splitlines() if "compopt: not currently executing" not in line]
    assert not errors
    return set(result.stdout.split())


def test_every_command_is_completed(script: Path) -> None:
    assert complete(script, "") == {*LIGHTNING_COMMANDS, *LIGHT_COMMANDS}
    assert complete(script, "pre") == {"predict"}


@pytest.mark.parametrize("command", LIGHTNING_COMMANDS)
def test_every_option_in_the_help_is_completed(script: Path, command: str) -> None:
    options = set(re.findall(r"^  (?:-\w [A-Z]+, )?(--[\w.]+)", help_text(command), flags=re.MULTILINE))
    assert len(options) > 50
    assert options <= complete(script, command, "--")


def test_options_of_light_commands_are_completed(script: Path) -> None:
    assert complete(script, "generate", "--s") == {"--style", "--seed"}
    assert complete(script, "merge", "--adapter", "DIR", "--o") == {"--out"}


def test_choices_configs_and_files_are_completed(script: Path, tmp_path: Path) -> None:
    (tmp_path / "mine.yaml").touch()
    assert complete(script, "fit", "--data.template", "") == {"instruction", "chat", "raw"}
    assert complete(script, "fit", "--config", "", cwd=tmp_path) == {*shipped_configs(), "mine.yaml"}
    assert complete(script, "test", "--config", "balanced.yaml", "--config", "q") == {
        name for name in shipped_configs() if name.startswith("q")
    }
    assert complete(script, "audit", "m", cwd=tmp_path) == {"mine.yaml"}


@pytest.mark.parametrize("shell", SHELLS)
@pytest.mark.e2e
def test_printed_script_is_valid_in_its_shell(shell: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["completion", shell]) == 0
    printed = capsys.readouterr().out
    assert printed == completion_script(shell) + "\n"
    if shutil.which(shell) is None:
        pytest.skip(f"needs {shell}")
    assert subprocess.run([shell, "-n"], input=printed, capture_output=True, text=True, check=True).stderr == ""


def test_unknown_shell_is_a_user_error(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["completion", "csh"]) == 2
    assert "'csh'. Shells: bash, zsh" in capsys.readouterr().err
