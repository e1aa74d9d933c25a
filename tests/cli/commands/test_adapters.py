from __future__ import annotations

import json
import re
import shutil
import sys
from pathlib import Path

import pytest

from snake_lora_pl.__main__ import main
from snake_lora_pl.adapters import store
from tests.adapters.conftest import rewrite_metadata


def test_table_has_a_line_per_adapter(
    adapter_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    table = {"settings": {}, "adapters": {}, "players": {"adapter": {"apples_mean": 26.04}}}
    store.record_play(adapter_dir, table, "adapter")
    monkeypatch.chdir(tmp_path)
    assert main(["adapters"]) == 0
    header, line = capsys.readouterr().out.splitlines()
    assert header.split() == ["type", "base", "rank", "step", "val", "loss", "apples", "size", "date", "directory"]
    metadata = store.read_metadata(adapter_dir)
    date = metadata.training_timestamp[:16].split("T")
    expected = ["lora", metadata.base_model_name, "4", "12", "0.2500", "26.0", "0.0", "MB", *date, "model_artifacts"]
    assert line.split() == expected


def test_narrow_terminal_shows_directories_on_separate_lines(
    adapter_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys.stdout, "isatty", lambda: True)
    monkeypatch.setenv("COLUMNS", "80")
    assert main(["adapters"]) == 0
    assert [line.strip() for line in capsys.readouterr().out.splitlines()][1::2] == ["directory", "model_artifacts"]
    monkeypatch.setenv("COLUMNS", "200")
    assert main(["adapters"]) == 0
    assert len(capsys.readouterr().out.splitlines()) == 2


def test_json_holds_the_facts_of_each_adapter(
    adapter_dir: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["adapters", str(tmp_path), "--json"]) == 0
    (row,) = json.loads(capsys.readouterr().out)
    metadata = store.read_metadata(adapter_dir)
    assert row == {
        "path": str(adapter_dir),
        "problem": None,
        "adapter_type": "lora",
        "base_model": metadata.base_model_name,
        "rank": 4,
        "step": 12,
        "val_loss": 0.25,
        "apples_mean": None,
        "weights_bytes": (adapter_dir / store.WEIGHTS_FILE).stat().st_size,
        "training_timestamp": metadata.training_timestamp,
        "vllm_obstacles": [],
    }


def test_damaged_adapter_is_listed_with_its_problem(
    adapter_dir: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (adapter_dir / "adapter_model.bin").touch()
    assert main(["adapters", str(tmp_path)]) == 0
    _, line, problem = capsys.readouterr().out.splitlines()
    assert line.startswith("damaged")
    assert "damaged: --adapter" in problem
    assert "adapter_model.bin" in problem
    (adapter_dir / store.METADATA_FILE).write_text("{")
    assert main(["adapters", str(tmp_path)]) == 0
    assert capsys.readouterr().out.splitlines()[1].split() == ["damaged", *"-------", str(adapter_dir)]


def test_directory_without_adapters_is_reported(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["adapters", str(tmp_path)]) == 0
    (line,) = capsys.readouterr().out.splitlines()
    assert line.endswith(f"under {tmp_path}")


def test_adapter_may_be_the_working_directory(
    adapter_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(adapter_dir)
    assert main(["adapters"]) == 0
    assert capsys.readouterr().out.splitlines()[1].endswith("  .")
    assert main(["merge", "--adapter", ".", "--out", str(tmp_path / "merged")]) == 0
    assert (tmp_path / "merged" / "model.safetensors").is_file()


def test_control_characters_in_directory_names_are_escaped(
    adapter_dir: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    good = adapter_dir.rename(tmp_path / "first\nsecond\x1b[2J")
    shutil.copytree(good, tmp_path / "d\x1b[2J\namaged")
    (tmp_path / "d\x1b[2J\namaged" / store.WEIGHTS_FILE).unlink()
    assert main(["adapters", str(tmp_path)]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == 4
    assert all(line.isprintable() for line in lines)
    assert any(line.endswith(r"first\nsecond\x1b[2J") for line in lines)
    assert main(["adapters", str(tmp_path), "--json"]) == 0
    assert {row["path"] for row in json.loads(capsys.readouterr().out)} == {
        str(good), str(tmp_path / "d\x1b[2J\namaged"),
    }  # fmt: skip


def test_unreadable_metadata_does_not_stop_the_list(
    adapter_dir: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "a" / store.METADATA_FILE).mkdir(parents=True)
    (tmp_path / "b").mkdir()
    (tmp_path / "b" / store.METADATA_FILE).symlink_to("nowhere")
    (tmp_path / "loop").symlink_to(tmp_path)
    assert main(["adapters", str(tmp_path), "--json"]) == 0
    problems = {row["path"]: row["problem"] for row in json.loads(capsys.readouterr().out)}
    assert problems.keys() == {str(tmp_path / "b"), str(adapter_dir)}
    assert problems[str(adapter_dir)] is None
    assert store.METADATA_FILE in problems[str(tmp_path / "b")]


def test_unregistered_adapter_type_is_reported(
    adapter_dir: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    rewrite_metadata(adapter_dir, adapter_type="loha")
    for arguments in (
        ["merge", "--adapter", str(adapter_dir), "--out", str(tmp_path / "x")],
        ["adapters", str(tmp_path)],
    ):
        main(arguments)
        output = "".join(capsys.readouterr())
        assert re.search(r"'loha'.*adalora, lora, miss, qlora, shira", output)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["adapters", "nowhere"], "nowhere"),
        (["adapters", "--jsn"], "'--json'"),
        (["merge", "--adapter", "nowhere", "--out", "x"], "--adapter nowhere"),
        (["merge", "--out", "x"], "--adapter"),
        (["merge", "--adapter", "{adapter}", "--adapter", "x", "--out", "x"], "merge: takes one --adapter"),
        (["merge", "--adapter", "{adapter}", "--out", "{adapter}"], "not empty"),
        (["merge", "--adapter", "{adapter}", "--out", "x", "--dtype", "int8"], "--dtype"),
        (["export", "--adapter", "{adapter}", "--out", "x", "--format", "onnx"], "--format"),
        (["export", "--adapter", "{adapter}", "--out", "x", "--converter", "no"], "--converter no"),
        (["push", "--adapter", "nowhere", "--repo", "me/x"], "--adapter nowhere"),
        (["push", "--adapter", "{adapter}", "--repo", "no/good/name"], "owner/name"),
    ],
)
def test_user_error_is_one_line(
    adapter_dir: Path, capsys: pytest.CaptureFixture[str], arguments: list[str], message: str
) -> None:
    assert main([argument.format(adapter=adapter_dir) for argument in arguments]) == 2
    (line,) = [line for line in capsys.readouterr().err.splitlines() if not line.startswith("The adapter names")]
    assert line.startswith("error: ")
    assert message in line
