from __future__ import annotations

from pathlib import Path

import pytest
from transformers import AutoModelForCausalLM

from snake_lora_pl.__main__ import main
from tests.adapters.conftest import rewrite_metadata
from tests.adapters.test_gguf import CONVERTER


def test_merge_prints_directory_size_and_rounding(
    adapter_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    assert main(["merge", "--adapter", str(adapter_dir), "--out", "merged", "--dtype", "bfloat16"]) == 0
    line = capsys.readouterr().out.strip()
    assert line.startswith("merged: 30,880 parameters in bfloat16")
    assert "--dtype float32" in line
    assert line.endswith("vllm serve merged")
    assert AutoModelForCausalLM.from_pretrained("merged").num_parameters() == 30_880


@pytest.mark.parametrize(
    ("template", "expected"),
    [
        ("instruction", '"""### Instruction:\n{{ .Prompt }}\n\n### Response:\n"""'),
        ("raw", '"""{{ .Prompt }}"""'),
        ("chat", '"""<|im_start|>user\n{{ .Prompt }}<|im_end|>\n<|im_start|>assistant\n"""'),
    ],
)
def test_export_writes_the_trained_template_into_the_modelfile(
    adapter_dir: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], template: str, expected: str
) -> None:
    rewrite_metadata(adapter_dir, data={"template": template})
    (tmp_path / "convert.py").write_text(CONVERTER)
    out = tmp_path / "out"
    arguments = [
        "export",
        "--adapter",
        str(adapter_dir),
        "--out",
        str(out),
        "--converter",
        str(tmp_path / "convert.py"),
    ]
    assert main(arguments) == 0
    assert f"ollama create snake -f {out / 'Modelfile'}" in capsys.readouterr().out
    text = (out / "Modelfile").read_text()
    assert f"TEMPLATE {expected}" in text
    assert 'PARAMETER stop "<|im_end|>"' in text


def test_export_needs_a_template_when_the_metadata_names_none(
    adapter_dir: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    rewrite_metadata(adapter_dir, data={})
    (tmp_path / "convert.py").write_text(CONVERTER)
    arguments = ["export", "--adapter", str(adapter_dir), "--out", str(tmp_path / "out")]
    arguments += ["--converter", str(tmp_path / "convert.py")]
    assert main(arguments) == 2
    assert "instruction, chat, raw" in capsys.readouterr().err
    assert main([*arguments, "--template", "chatty"]) == 2
    assert "--template 'chatty'" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()
    assert main([*arguments, "--template", "raw"]) == 0
    assert 'TEMPLATE """{{ .Prompt }}"""' in (tmp_path / "out" / "Modelfile").read_text()
