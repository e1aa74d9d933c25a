import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from snake_lora_pl.__main__ import main
from snake_lora_pl.data.generated_rows import generate_rows


@pytest.fixture
def expect_user_error(
    capsys: pytest.CaptureFixture[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> Callable[..., str]:
    """Run the command, which must end with a user error and write nothing; return its one line."""
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


def test_options_are_passed_to_the_library(tmp_path, capsys):
    path = tmp_path / "new" / "rows.jsonl"
    options = ["--games", "2", "--grid_size", "6", "--teacher", "safe_greedy", "--style", "compact", "--seed", "5"]
    options += ["--noise", "0.1", "--noise_moves", "safe", "--augment", "--upstream_rules"]
    assert main(["generate", "--out", str(path), *options]) == 0
    rows = [json.loads(line) for line in path.read_text().splitlines()]
    settings = {"noise": 0.1, "noise_moves": "safe", "augment": "all", "upstream_rules": True}
    assert rows == list(generate_rows(2, 6, "safe_greedy", "compact", 5, **settings))
    assert capsys.readouterr().out.startswith(f"{path}: {len(rows):,} rows of 2 games in ")


def test_number_of_workers_does_not_change_the_file(tmp_path):
    # In a new process: a worker imports the main module, which must not run the command again.
    command = [sys.executable, "-m", "snake_lora_pl", "generate", "--games", "12", "--grid_size", "4", "--out"]
    subprocess.run([*command, tmp_path / "1.jsonl"], check=True)
    subprocess.run([*command, tmp_path / "2.jsonl", "--workers", "2"], check=True)
    assert (tmp_path / "1.jsonl").read_bytes() == (tmp_path / "2.jsonl").read_bytes()


def test_existing_file_is_replaced_only_with_overwrite(tmp_path, expect_user_error):
    path = tmp_path / "rows.jsonl"
    path.write_text("mine\n")
    assert "--overwrite" in expect_user_error("--out", str(path), "--games", "1")
    assert path.read_text() == "mine\n"
    assert main(["generate", "--out", str(path), "--games", "1", "--overwrite"]) == 0
    assert path.read_text() != "mine\n"


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "--out"),
        (["--out", "a", "--gamse", "3"], "'--games'"),
        (["--out", "a", "--gamse=3"], "'--games'"),
        (["--out", "a", "--zzz"], "--augment, "),
        (["--out", "a", "--games", "many"], "'many'"),
        (["--out", "a", "--games", "0"], "1,000,000"),
        (["--out", "a", "--teacher", "safe-greedy"], "'safe_greedy'"),
        (["--out", "a", "--style", "bfs512"], "'bfs-512'"),
        (["--out", "a", "--noise", "7"], "found: 7.0"),
        (["--out", "a", "--noise_moves", "save"], "legal, safe, mixed (found: 'save')"),
        (["--out", "a", "--workers", "0"], "at least 1"),
        (["--out", "."], "directory"),
        (["--out", "/dev/null/a"], "--out /dev/null/a"),
    ],
)
def test_user_error_is_one_line(expect_user_error, arguments, message):
    assert message in expect_user_error(*arguments)


def test_unknown_command_names_the_nearest(capsys):
    assert main(["generat"]) == 2
    assert "'generate'" in capsys.readouterr().err


def test_closed_pipe_prints_no_error():
    command = f"{sys.executable} -m snake_lora_pl generate --help | true"
    result = subprocess.run(["bash", "-c", command], capture_output=True, text=True, check=True)
    assert result.stderr == ""
