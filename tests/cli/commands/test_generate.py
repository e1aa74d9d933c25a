import json
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from snake_lora_pl.__main__ import main
from snake_lora_pl.data.generated_rows import generate_rows
from snake_lora_pl.program import LIGHT_COMMANDS


@pytest.fixture
def complain(capsys: pytest.CaptureFixture[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., str]:
    """Run the command, which must fail as a user's mistake does and write nothing; return its one line."""
    monkeypatch.chdir(tmp_path)

    def run(*arguments: str) -> str:
        before = sorted(tmp_path.rglob("*"))
        assert main(["generate", *arguments]) == 2
        output = capsys.readouterr()
        assert output.out == ""
        (line,) = output.err.splitlines()
        assert sorted(tmp_path.rglob("*")) == before
        return line

    return run


def test_the_options_are_those_of_the_library(tmp_path, capsys):
    path = tmp_path / "new" / "rows.jsonl"
    options = ["--games", "2", "--grid_size", "6", "--teacher", "safe_greedy", "--style", "compact", "--seed", "5"]
    assert main(["generate", "--out", str(path), *options, "--noise", "0.1", "--augment", "--upstream_rules"]) == 0
    rows = [json.loads(line) for line in path.read_text().splitlines()]
    assert rows == list(generate_rows(2, 6, "safe_greedy", "compact", 5, noise=0.1, augment=True, upstream_rules=True))
    assert capsys.readouterr().out.startswith(f"{path}: {len(rows):,} rows of 2 games in ")


def test_workers_play_in_processes_of_their_own(tmp_path):
    # Through the interpreter: a worker imports the main module, which must not run the command again.
    command = [sys.executable, "-m", "snake_lora_pl", "generate", "--games", "12", "--grid_size", "4", "--out"]
    subprocess.run([*command, tmp_path / "1.jsonl"], check=True)
    subprocess.run([*command, tmp_path / "2.jsonl", "--workers", "2"], check=True)
    assert (tmp_path / "1.jsonl").read_bytes() == (tmp_path / "2.jsonl").read_bytes()


def test_a_file_is_replaced_only_where_that_is_asked_for(tmp_path, complain):
    path = tmp_path / "rows.jsonl"
    path.write_text("mine\n")
    assert "exists already. Choose another name, or give --overwrite" in complain("--out", str(path), "--games", "1")
    assert path.read_text() == "mine\n"
    assert main(["generate", "--out", str(path), "--games", "1", "--overwrite"]) == 0
    assert path.read_text() != "mine\n"


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "required: --out"),
        (["--out", "a", "--gamse", "3"], "unknown argument '--gamse'. Did you mean --games?"),
        (["--out", "a", "--gamse=3"], "unknown argument '--gamse'. Did you mean --games?"),
        (["--out", "a", "--zzz"], "unknown argument '--zzz'. Options: --augment,"),
        (["--out", "a", "--games", "many"], "invalid int value: 'many'"),
        (["--out", "a", "--games", "0"], "must lie between 1 and 1,000,000 (found: 0)"),
        (["--out", "a", "--teacher", "safe-greedy"], "Did you mean 'safe_greedy'?"),
        (["--out", "a", "--style", "bfs512"], "Did you mean 'bfs-512'?"),
        (["--out", "a", "--noise", "7"], "a probability, from 0 to 1"),
        (["--out", "a", "--workers", "0"], "at least 1"),
        (["--out", "."], "is a directory"),
        (["--out", "/dev/null/a"], "--out /dev/null/a: cannot be written"),
    ],
)
def test_a_mistake_is_one_line_with_what_to_do(complain, arguments, message):
    assert message in complain(*arguments)


def test_an_unknown_verb_names_the_nearest(capsys):
    assert main(["generat"]) == 2
    assert "Did you mean 'generate'?" in capsys.readouterr().err


@pytest.mark.parametrize("verb", LIGHT_COMMANDS)
def test_help_answers_at_once(verb):
    start = time.perf_counter()
    command = [sys.executable, "-m", "snake_lora_pl", verb, "--help"]
    result = subprocess.run(command, capture_output=True, text=True, check=True)
    assert time.perf_counter() - start < 2
    assert LIGHT_COMMANDS[verb] in result.stdout


def test_a_closed_pipe_is_no_error():
    command = f"{sys.executable} -m snake_lora_pl generate --help | true"
    result = subprocess.run(["bash", "-c", command], capture_output=True, text=True, check=True)
    assert result.stderr == ""
