from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest

from snake_lora_pl.__main__ import main
from snake_lora_pl.adapters import store


def test_the_table_has_a_line_for_each_adapter(
    adapter_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    table = {"settings": {}, "adapters": {}, "players": {"adapter": {"apples_mean": 26.04}}}
    store.record_play(adapter_dir, table, "adapter")
    monkeypatch.chdir(tmp_path)
    assert main(["adapters"]) == 0
    header, line = capsys.readouterr().out.splitlines()
    assert header.split() == ["kind", "base", "rank", "step", "val", "loss", "apples", "size", "date", "directory"]
    metadata = store.read_metadata(adapter_dir)
    date = metadata.training_timestamp[:16].split("T")
    expected = ["lora", metadata.base_model_name, "4", "12", "0.2500", "26.0", "0.0", "MB", *date, "model_artifacts"]
    assert line.split() == expected


def test_in_a_narrow_terminal_directories_have_lines_of_their_own(
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


def test_json_is_for_machines(adapter_dir: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
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


def test_a_damaged_adapter_is_listed_with_what_is_wrong(
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


def test_an_empty_directory_says_so(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["adapters", str(tmp_path)]) == 0
    assert capsys.readouterr().out.strip() == f"no adapter under {tmp_path}"


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["adapters", "nowhere"], "nowhere: no such directory"),
        (["adapters", "--jsn"], "Did you mean --json?"),
        (["merge", "--adapter", "nowhere", "--out", "x"], "--adapter nowhere: no such directory"),
        (["merge", "--out", "x"], "required: --adapter"),
        (["merge", "--adapter", "x", "--out", "{adapter}"], "there is a directory that is not empty"),
        (["merge", "--adapter", "{adapter}", "--out", "x", "--dtype", "int8"], "--dtype must be one of auto"),
        (["export", "--adapter", "{adapter}", "--out", "x", "--format", "onnx"], "--format must be one of gguf"),
        (["export", "--adapter", "{adapter}", "--out", "x", "--converter", "no"], "--converter no: no such file"),
        (["push", "--adapter", "nowhere", "--repo", "me/x"], "--adapter nowhere: no such directory"),
        (["push", "--adapter", "{adapter}", "--repo", "no/good/name"], "It reads owner/name"),
    ],
)
def test_a_mistake_is_one_line(
    adapter_dir: Path, capsys: pytest.CaptureFixture[str], arguments: list[str], message: str
) -> None:
    assert main([argument.format(adapter=adapter_dir) for argument in arguments]) == 2
    (line,) = [line for line in capsys.readouterr().err.splitlines() if not line.startswith("The adapter names")]
    assert line.startswith("error: ")
    assert message in line
