"""The scripts that complete command lines, in the shells they are for."""

from __future__ import annotations

import re
import shutil
import subprocess
from pathlib import Path

import pytest

from snake_lora_pl.__main__ import main
from snake_lora_pl.cli.commands.completion import SHELLS, completion_script
from snake_lora_pl.paths import shipped_configs
from snake_lora_pl.program import LIGHT_VERBS, LIGHTNING_VERBS, help_path

pytestmark = pytest.mark.skipif(shutil.which("bash") is None, reason="needs bash")


@pytest.fixture(scope="module")
def script(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("completion") / "snake-lora.bash"
    path.write_text(completion_script("bash"))
    return path


def complete(script: Path, *words: str, cwd: Path | None = None) -> set[str]:
    """What bash offers for the last of the words that follow the program's name."""
    line = " ".join(f"'{word}'" for word in ("snake-lora", *words))
    program = (
        f"source {script}; COMP_WORDS=({line}); COMP_CWORD={len(words)};"
        " $(complete -p snake-lora | sed -E 's/.*-F ([^ ]+).*/\\1/'); printf '%s\\n' \"${COMPREPLY[@]}\""
    )
    result = subprocess.run(["bash", "-c", program], capture_output=True, text=True, cwd=cwd or script.parent)
    errors = [line for line in result.stderr.splitlines() if "compopt: not currently executing" not in line]
    assert not errors
    return set(result.stdout.split())


def test_every_verb_is_offered(script: Path) -> None:
    assert complete(script, "") == {*LIGHTNING_VERBS, *LIGHT_VERBS}
    assert complete(script, "pre") == {"predict"}


@pytest.mark.parametrize("verb", LIGHTNING_VERBS)
def test_every_option_of_a_verbs_help_is_offered(script: Path, verb: str) -> None:
    options = set(re.findall(r"^  (?:-\w [A-Z]+, )?(--[\w.]+)", help_path(verb).read_text(), flags=re.MULTILINE))
    assert len(options) > 50
    assert options <= complete(script, verb, "--")


def test_options_of_a_light_verb_are_those_of_its_parser(script: Path) -> None:
    assert complete(script, "generate", "--s") == {"--style", "--seed"}
    assert complete(script, "merge", "--adapter", "DIR", "--o") == {"--out"}


def test_choices_configs_and_files_are_offered(script: Path, tmp_path: Path) -> None:
    (tmp_path / "mine.yaml").touch()
    assert complete(script, "fit", "--data.template", "") == {"instruction", "chat", "raw"}
    assert complete(script, "fit", "--config", "", cwd=tmp_path) == {*shipped_configs(), "mine.yaml"}
    assert complete(script, "test", "--config", "balanced.yaml", "--config", "q") == {
        name for name in shipped_configs() if name.startswith("q")
    }
    assert complete(script, "audit", "m", cwd=tmp_path) == {"mine.yaml"}


@pytest.mark.parametrize("shell", SHELLS)
def test_the_script_is_printed_and_its_shell_reads_it(shell: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["completion", shell]) == 0
    printed = capsys.readouterr().out
    assert printed == completion_script(shell) + "\n"
    if shutil.which(shell) is None:
        pytest.skip(f"no {shell} on this machine")
    assert subprocess.run([shell, "-n"], input=printed, capture_output=True, text=True, check=True).stderr == ""


def test_another_shell_is_a_mistake(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["completion", "csh"]) == 2
    assert "no script for 'csh'. Shells: bash, zsh." in capsys.readouterr().err
