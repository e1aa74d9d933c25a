"""What README and docs show, word for word, with the tiny model behind the default base model's name."""

from __future__ import annotations

import contextlib
import importlib.util
import io
import os
import re
import runpy
import shutil
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch

from snake_lora_pl.__main__ import main
from snake_lora_pl.adapters import store
from snake_lora_pl.paths import base_model_cache_dir
from tests import documented
from tests.adapters.test_gguf import CONVERTER
from tests.documented import PAGES, README, Example
from tests.registry import restored_registry

pytestmark = pytest.mark.filterwarnings("ignore")

EXAMPLES = [example for page in PAGES for example in documented.examples(page)]
PYTHON = {example.place: example for example in EXAMPLES if example.language == "python"}

# What no test runs, and why.
NOT_RUN = {
    "pip": "the newcomer's walk installs, .ci/walk.py",
    "pytest": "this is it",
    "docker": "needs a Docker engine: .github/workflows/ci.yml",
    "vllm": "tests/adapters/test_serving.py asks vLLM's own check where it is installed",
    "curl": "needs a server",
    "ollama": "needs Ollama",
    "eval": "tests/commands/test_completion.py completes in a real bash",
    "torchrun": "tests/e2e/test_processes.py",
    "sbatch": "needs SLURM",
    "kubectl": "needs Kubernetes",
    "mkdocs": ".ci/run",
}
OTHER_TESTS = dict.fromkeys(["ddp.yaml", "fsdp.yaml"], "tests/e2e/test_processes.py")


def commands() -> dict[tuple[str, ...], str]:
    """Every distinct command that is run here, shortened, and where it stands first."""
    found: dict[tuple[str, ...], str] = {}
    for example in EXAMPLES:
        if example.language == "bash":
            for command in documented.commands(example):
                if command[0] not in NOT_RUN and not OTHER_TESTS.keys() & set(command):
                    found.setdefault(tuple(documented.shortened(command)), example.place)
    return found


COMMANDS = commands()


def test_every_example_says_what_it_is_written_in() -> None:
    assert {example.language for example in EXAMPLES} == documented.LANGUAGES
    assert len(COMMANDS) > 20


@pytest.fixture(scope="module")
def workplace(tiny_llama_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """A directory with rows.jsonl, the README's loha.py, and a cache whose default base model is the tiny Llama."""
    from snake_lora_pl.models import wheel

    directory = tmp_path_factory.mktemp("workplace")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("SNAKE_LORA_PL_CACHE", str(directory / "cache"))
        base = base_model_cache_dir(wheel.SMOLLM2_135M.short_name)
        shutil.copytree(tiny_llama_dir, base)
        wheel._write_manifest(base, wheel.SMOLLM2_135M)
        patch.chdir(directory)
        patch.setenv("HF_HUB_OFFLINE", "1")
        with contextlib.redirect_stdout(io.StringIO()):
            assert main(["generate", "--out", "rows.jsonl", "--games", "6", "--style", "compact"]) == 0
        (loha,) = (example for example in PYTHON.values() if example.text.startswith("# loha.py"))
        (directory / "loha.py").write_text(loha.text)
        yield directory


@pytest.fixture(autouse=True)
def _at_the_workplace(workplace: Path, _isolated_cache: None, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(workplace)
    monkeypatch.setenv("SNAKE_LORA_PL_CACHE", str(workplace / "cache"))


@pytest.fixture(scope="module")
def adapter_dir(workplace: Path) -> Path:
    """What the documentation calls DIR: the adapter of a finished run, which others find in logs."""
    command = ["fit", "--config", "balanced.yaml"]
    with contextlib.redirect_stdout(io.StringIO()):
        assert main(documented.shortened(["python", "-m", "snake_lora_pl", *command])[3:]) == 0
    (directory,) = workplace.glob("logs/extensions/models/*/*/*/lora_adapters/model_artifacts")
    return directory


def filled_in(command: tuple[str, ...], adapter_dir: Path) -> list[str]:
    """The command with something for each placeholder, on a CPU, in float32."""
    names = {word: str(adapter_dir) for word in ("DIR", "OTHER_DIR", "A", "B", "path/to/model_artifacts")}
    names["DIRECTORY_OR_HUB_ID"] = str(base_model_cache_dir("smollm2-135m"))
    names["OWNER/NAME"] = "me/snake"
    words = [names.get(word, word) for word in command]
    verb = next(word for word in words[1:] if word not in ("-m", "snake_lora_pl", "loha.py"))
    if verb in ("fit", "validate", "test", "predict"):
        words += ["--trainer.accelerator=cpu", "--model.dtype=float32", "--model.max_new_tokens=4"]
    return words


@pytest.fixture
def run(
    adapter_dir: Path, workplace: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> Callable[[tuple[str, ...]], str]:
    """Run a command as it is documented; return what it printed."""

    def run(command: tuple[str, ...]) -> str:
        words = filled_in(command, adapter_dir)
        if "--out" in words:
            out = workplace / words[words.index("--out") + 1]
            shutil.rmtree(out) if out.is_dir() else out.unlink(missing_ok=True)
        if "gguf" in words:
            converter = workplace / "convert_hf_to_gguf.py"
            converter.write_text(CONVERTER)
            words += ["--converter", str(converter)]
        capfd.readouterr()
        if words[1] == "-m":
            assert words[2] == "snake_lora_pl"
            try:
                code = main(words[3:])
            except SystemExit as end:  # of --print_config
                code = end.code or 0
        else:
            monkeypatch.setattr(sys, "argv", words[1:])
            with restored_registry(), pytest.raises(SystemExit) as ended:
                runpy.run_path(words[1], run_name="__main__")
            code = ended.value.code or 0
        output = capfd.readouterr()
        assert code == 0, output.err
        return output.out

    return run


@pytest.mark.parametrize("command", [pytest.param(c, id=f"{place} {c[3]}") for c, place in COMMANDS.items()])
def test_a_documented_command_ends_well(command: tuple[str, ...], run: Callable[[tuple[str, ...]], str]) -> None:
    if "push" in command:
        pytest.skip("tests/commands/test_push.py sends an adapter to a hub on this machine")
    if "gguf" in command and importlib.util.find_spec("gguf") is None:
        pytest.skip("needs the gguf package")
    if "qlora.yaml" in command and importlib.util.find_spec("bitsandbytes") is None:
        pytest.skip("needs bitsandbytes")
    assert run(command).strip()


def source(*, having: str) -> Example:
    (example,) = (example for example in PYTHON.values() if having in example.text)
    return example


def execute(example: Example, **replaced: str) -> dict:
    text = example.text
    for old, new in replaced.items():
        text = text.replace(old, new)
    names: dict = {"__name__": "example"}
    exec(compile(text, example.place, "exec"), names)
    return names


def test_every_python_example_is_run() -> None:
    run = {
        "# loha.py",
        "train_on_heuristic_data(",
        "lightning.Trainer(",
        "SharedBase.open",
        "PeftModel.from_pretrained",
    }
    assert {source(having=text).place for text in run} == PYTHON.keys()


def test_one_call_trains_and_its_result_plays(capsys: pytest.CaptureFixture[str]) -> None:
    execute(source(having="train_on_heuristic_data("))
    printed = capsys.readouterr().out
    adapter_dir = Path(re.search(r"^step \d+, val/loss [\d.]+: (.*)$", printed, flags=re.MULTILINE)[1])  # type: ignore[index]
    assert store.verify(adapter_dir).peft_config["r"] == 8
    assert re.search(r"^apples: [\d.]+, without the adapter [\d.]+$", printed, flags=re.MULTILINE)
    assert re.search(r"^(Move\.\w+|None)$", printed, flags=re.MULTILINE)


def test_the_three_classes_work_with_a_trainer_and_no_command_line() -> None:
    execute(source(having="lightning.Trainer("))
    metadata = store.verify("my_run/adapter")
    assert metadata.step in (25, 50)
    assert metadata.data["prompt_format"] == "compact"
    assert metadata.metrics["val/loss"] > 0
    assert any(p.abs().max() > 0 for n, p in store.load("my_run/adapter").named_parameters() if "lora_B" in n)
    assert torch.load("my_run/checkpoints/last.ckpt", weights_only=True)["global_step"] == 50


def test_two_adapters_share_one_base(adapter_dir: Path) -> None:
    for name in ("first_adapter", "second_adapter"):
        shutil.copytree(adapter_dir, name)
    names = execute(source(having="SharedBase.open"))
    assert names["shared"].names == ["second"]
    assert names["model"] is names["shared"].model


def test_an_adapter_loads_with_plain_peft(adapter_dir: Path) -> None:
    replaced = {"HuggingFaceTB/SmolLM2-135M-Instruct": str(base_model_cache_dir("smollm2-135m"))}
    names = execute(source(having="PeftModel.from_"), **replaced, **{"path/to/model_artifacts": str(adapter_dir)})
    assert names["model"].peft_config["default"].r == 16


def test_a_kind_of_one_s_own_takes_less_than_twenty_lines(run: Callable[[tuple[str, ...]], str]) -> None:
    loha = source(having="# loha.py")
    assert len(loha.text.splitlines()) < 20
    (command,) = (command for command in COMMANDS if command[1] == "loha.py")
    run((*command, "--root=loha", "--play.final_games=1"))
    (adapter_dir,) = Path("loha").glob("logs/extensions/models/*/*/*/lora_adapters/model_artifacts")
    with restored_registry():
        execute(loha)
        assert store.verify(adapter_dir).adapter_type == "loha"
        loaded = store.load(adapter_dir)
    assert any("hada_" in name for name, _ in loaded.named_parameters())


def test_what_is_named_exists() -> None:
    """Files and modules that README and docs point to."""
    text = "\n".join(page.read_text() for page in PAGES)
    root = README.parent
    for module in set(re.findall(r"python -m (benchmarks\.\w+)", text)):
        assert (root / f"{module.replace('.', '/')}.py").is_file(), module
    paths = re.findall(r"`((?:snake_lora_pl|tests|docs|configs|benchmarks|\.ci)/[\w./-]*)`", text)
    missing = {path for path in paths if "NAME" not in path and not os.path.exists(root / path)}
    assert not missing
