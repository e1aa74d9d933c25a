"""The README's Python examples, word for word, with the tiny model behind the default base model's name."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import torch

from snake_lora_pl.__main__ import main
from snake_lora_pl.adapters import store

README = Path(__file__).parents[2] / "README.md"

pytestmark = pytest.mark.filterwarnings("ignore")


def examples() -> list[str]:
    (section,) = re.findall(r"^## From Python\n(.*?)^## ", README.read_text(), flags=re.MULTILINE | re.DOTALL)
    return re.findall(r"^```python\n(.*?)^```", section, flags=re.MULTILINE | re.DOTALL)


@pytest.fixture
def rows(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, tiny_smollm2: str) -> None:
    """A directory with rows.jsonl in it, in which the examples are run."""
    monkeypatch.chdir(tmp_path)
    assert main(["generate", "--out", "rows.jsonl", "--games", "3", "--style", "compact"]) == 0


def test_one_call_trains_and_its_result_plays(rows: None, capsys: pytest.CaptureFixture[str]) -> None:
    capsys.readouterr()
    exec(compile(examples()[0], "README.md", "exec"), {})
    printed = capsys.readouterr().out
    adapter_dir = Path(re.search(r"^step \d+, val/loss [\d.]+: (.*)$", printed, flags=re.MULTILINE)[1])  # type: ignore[index]
    assert store.verify(adapter_dir).peft_config["r"] == 8
    assert re.search(r"^apples: [\d.]+, without the adapter [\d.]+$", printed, flags=re.MULTILINE)
    assert re.search(r"^(Move\.\w+|None)$", printed, flags=re.MULTILINE)


def test_the_three_classes_work_with_a_trainer_and_no_command_line(rows: None) -> None:
    exec(compile(examples()[1], "README.md", "exec"), {})
    metadata = store.verify("my_run/adapter")
    assert metadata.step in (25, 50)
    assert metadata.data["prompt_format"] == "compact"
    assert metadata.metrics["val/loss"] > 0
    assert any(p.abs().max() > 0 for n, p in store.load("my_run/adapter").named_parameters() if "lora_B" in n)
    assert torch.load("my_run/checkpoints/last.ckpt", weights_only=True)["global_step"] == 50


def test_two_adapters_share_one_base(rows: None) -> None:
    for name in ("first", "second"):
        exec(
            compile(
                examples()[1].replace("my_run/adapter", f"{name}_adapter").replace("=50", "=2").replace("=25", "=2"),
                "README.md",
                "exec",
            ),
            {},
        )
    names: dict = {}
    exec(compile(examples()[2], "README.md", "exec"), names)
    assert names["shared"].names == ["second"]
    assert names["model"] is names["shared"].model
