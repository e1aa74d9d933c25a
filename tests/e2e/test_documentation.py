"""Commands and examples of README, docs and ``examples/``, executed with a tiny model in place of the default base."""

from __future__ import annotations

import contextlib
import importlib.util
import io
import pkgutil
import re
import runpy
import shutil
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
import yaml

from snake_lora_pl.__main__ import main
from snake_lora_pl.adapters import store
from snake_lora_pl.game import STYLES, TEACHERS, Game, get_style
from snake_lora_pl.paths import base_model_cache_dir
from snake_lora_pl.program import LIGHT_COMMANDS, LIGHTNING_COMMANDS
from tests import documented
from tests.adapters.test_gguf import CONVERTER
from tests.documented import PAGES, README, ROOT, Example
from tests.registry import restored_registry

pytestmark = pytest.mark.filterwarnings("ignore")

EXAMPLES = [example for page in PAGES for example in documented.examples(page)]
PYTHON = {example.place: example for example in EXAMPLES if example.language == "python"}
EXAMPLE_FILES = sorted((ROOT / "examples").glob("*.py"))
TEXT = {page: page.read_text() for page in PAGES}

# Programs that no test here runs, and the reason or the place that does.
NOT_RUN = {
    "pip": ".ci/walk.py",
    "pytest": "runs this file",
    "docker": "needs a Docker engine: .github/workflows/ci.yml",
    "vllm": "tests/adapters/test_vllm.py",
    "curl": "needs a server",
    "ollama": "needs Ollama",
    "eval": "tests/cli/commands/test_completion.py",
    "apt-get": "installs system packages",
    "scripts/container": "needs root and minutes: the release checklist",
}
OTHER_TESTS = dict.fromkeys(["ddp.yaml", "fsdp.yaml"], "tests/e2e/test_processes.py")
OTHER_TESTS |= dict.fromkeys(["watch", "scripts/record_gif"], "tests/e2e/test_watch.py")


def _commands() -> dict[tuple[str, ...], str]:
    """Return every distinct command to run, shortened, with the place of its first occurrence."""
    found: dict[tuple[str, ...], str] = {}
    for example in EXAMPLES:
        if example.language == "bash":
            for command in documented.commands(example):
                if command[0] not in NOT_RUN and not OTHER_TESTS.keys() & set(command):
                    found.setdefault(tuple(documented.shortened(command)), example.place)
    return found


COMMANDS = _commands()


def test_every_code_block_names_its_language() -> None:
    assert {example.language for example in EXAMPLES} == documented.LANGUAGES
    assert len(COMMANDS) > 20


@pytest.fixture(scope="module")
def workplace(tiny_llama_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """Return a directory with rows.jsonl, examples/, and a cache whose default base model is the tiny Llama."""
    from snake_lora_pl.models import wheel

    directory = tmp_path_factory.mktemp("workplace")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("SNAKE_LORA_PL_CACHE", str(directory / "cache"))
        base = base_model_cache_dir(wheel.SMOLLM2_135M.short_name)
        shutil.copytree(tiny_llama_dir, base)
        wheel._write_manifest(base, wheel.SMOLLM2_135M)
        shutil.copytree(ROOT / "examples", directory / "examples")
        patch.chdir(directory)
        patch.setenv("HF_HUB_OFFLINE", "1")
        with contextlib.redirect_stdout(io.StringIO()):
            assert main(["generate", "--out", "rows.jsonl", "--games", "6", "--style", "compact"]) == 0
        yield directory


@pytest.fixture(autouse=True)
def _in_workplace(workplace: Path, _isolated_cache: None, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(workplace)
    monkeypatch.setenv("SNAKE_LORA_PL_CACHE", str(workplace / "cache"))


@pytest.fixture(autouse=True)
def _restored_registries() -> Iterator[None]:
    """Remove adapter types, teachers and styles that an example registered."""
    before = [(registry, dict(registry)) for registry in (TEACHERS, STYLES)]
    with restored_registry():
        yield
    for registry, content in before:
        registry.clear()
        registry.update(content)  # type: ignore[arg-type]


@pytest.fixture(scope="module")
def adapter_dir(workplace: Path) -> Path:
    """Return the adapter of a finished run, which the documentation calls DIR."""
    command = ["python", "-m", "snake_lora_pl", "fit", "--config", "balanced.yaml"]
    with contextlib.redirect_stdout(io.StringIO()):
        assert main(documented.shortened(command)[3:]) == 0
    (directory,) = workplace.glob("logs/extensions/models/*/*/*/lora_adapters/model_artifacts")
    return directory


def filled_in(command: tuple[str, ...], adapter_dir: Path) -> list[str]:
    """Return the command with values for placeholders, on a CPU, in float32."""
    values = {word: str(adapter_dir) for word in ("DIR", "OTHER_DIR", "path/to/model_artifacts")}
    values["DIRECTORY_OR_HUB_ID"] = str(base_model_cache_dir("smollm2-135m"))
    values["OWNER/NAME"] = "me/snake"
    words = [values.get(word, word) for word in command]
    name = (documented.arguments(words) or [""])[0]
    if name in LIGHTNING_COMMANDS and "--help" not in words:
        words += ["--trainer.accelerator=cpu", "--model.dtype=float32"]
    return words


@pytest.fixture
def run(
    adapter_dir: Path, workplace: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> Callable[[tuple[str, ...]], str]:
    """Return a function that runs a documented command and returns its output."""

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
        try:
            if words[1] == "-m":
                code = main(documented.arguments(words))
            else:
                monkeypatch.setattr(sys, "argv", words[1:])
                runpy.run_path(words[1], run_name="__main__")
                code = 0
        except SystemExit as end:
            code = int(end.code or 0)
        output = capfd.readouterr()
        assert code == 0, output.err
        return output.out

    return run


@pytest.mark.parametrize(
    "command", [pytest.param(c, id=f"{place} {' '.join(c[1:4])}") for c, place in COMMANDS.items()]
)
def test_documented_command_succeeds(command: tuple[str, ...], run: Callable[[tuple[str, ...]], str]) -> None:
    if "push" in command:
        pytest.skip("tests/cli/commands/test_push.py uploads to a local hub")
    if "gguf" in command and importlib.util.find_spec("gguf") is None:
        pytest.skip("needs the gguf package")
    if "examples/train_with_grpo.py" in command:
        pytest.importorskip("trl", reason="needs trl: pip install 'trl>=1.16'")
    if "qlora.yaml" in command and importlib.util.find_spec("bitsandbytes") is None:
        pytest.skip("needs bitsandbytes")
    assert run(command).strip()


def source(page: str, *, containing: str) -> Example:
    """Return the only Python example of a page that contains a text."""
    (example,) = (e for e in PYTHON.values() if e.place.startswith(page) and containing in e.text)
    return example


def execute(example: Example, **replaced: str) -> dict:
    text = example.text
    for old, new in replaced.items():
        text = text.replace(old, new)
    names: dict = {"__name__": "example"}
    exec(compile(text, example.place, "exec"), names)
    return names


IN_README = {"page": "README.md", "containing": "train_on_heuristic_data("}
ONE_CALL = {"page": "docs/how-to/python.md", "containing": "train_on_heuristic_data("}
OWN_TRAINER = {"page": "docs/how-to/python.md", "containing": "lightning.Trainer("}
SHARED_BASE = {"page": "docs/how-to/python.md", "containing": "SharedBase.open"}
PLAIN_PEFT = {"page": "docs/how-to/serve-and-share.md", "containing": "PeftModel.from_pretrained"}
ONE_GAME = {"page": "docs/how-to/gymnasium.md", "containing": "gymnasium.make("}
MANY_GAMES = {"page": "docs/how-to/gymnasium.md", "containing": "gymnasium.make_vec("}
STYLE = {"page": "docs/how-to/extend.md", "containing": "register_style"}
# These blocks are parts of files in examples/, which are run as commands.
IN_FILES = {
    "custom_adapter.py": {"page": "docs/how-to/extend.md", "containing": "AdapterFactory.register"},
    "custom_teacher.py": {"page": "docs/how-to/extend.md", "containing": "register_teacher"},
}


def test_every_python_example_is_run() -> None:
    run = [IN_README, ONE_CALL, OWN_TRAINER, SHARED_BASE, PLAIN_PEFT, ONE_GAME, MANY_GAMES, STYLE, *IN_FILES.values()]
    assert {source(**where).place for where in run} == PYTHON.keys()


@pytest.mark.parametrize("name", IN_FILES)
def test_documented_extension_is_the_one_in_examples(name: str) -> None:
    statements = [block.strip() for block in re.split(r"\n\n\n", source(**IN_FILES[name]).text)]
    content = (ROOT / "examples" / name).read_text()
    assert all(line in content for statement in statements for line in statement.split("\n\n"))


@pytest.mark.parametrize("path", EXAMPLE_FILES, ids=lambda path: path.name)
def test_example_file_begins_with_a_documented_command(path: Path) -> None:
    shown = re.search(r"^python examples/.*$", path.read_text(), flags=re.MULTILINE)
    assert shown is not None
    assert shown[0].split()[1] == f"examples/{path.name}"
    assert tuple(documented.shortened(shown[0].split())) in COMMANDS


def test_readme_example_trains_and_plays(capsys: pytest.CaptureFixture[str]) -> None:
    small = '"trainer.max_steps": 3, "play.max_steps": 3, "model.max_new_tokens": 4'
    names = execute(source(**IN_README), **{'"trainer.max_steps": 100': small})
    assert len(source(**IN_README).text.splitlines()) <= 15
    assert names["result"].play["adapter"]["num_games"] == 4
    assert re.search(r"^(Move\.\w+|None) ", capsys.readouterr().out, flags=re.MULTILINE)


def test_one_call_trains_and_its_result_plays(capsys: pytest.CaptureFixture[str]) -> None:
    execute(source(**ONE_CALL), **{'"trainer.max_steps": 100': '"trainer.max_steps": 3, "play.max_steps": 3'})
    printed = capsys.readouterr().out
    adapter_dir = Path(re.search(r"^step \d+, val/loss [\d.]+: (.*)$", printed, flags=re.MULTILINE)[1])  # type: ignore[index]
    assert store.verify(adapter_dir).peft_config["r"] == 8
    assert re.search(r"^apples: [\d.]+, base model: [\d.]+$", printed, flags=re.MULTILINE)
    assert re.search(r"^(Move\.\w+|None)$", printed, flags=re.MULTILINE)


def test_lightning_classes_work_with_a_plain_trainer() -> None:
    execute(source(**OWN_TRAINER))
    metadata = store.verify("my_run/adapter")
    assert metadata.step in (25, 50)
    assert metadata.data["prompt_format"] == "cycle"
    assert metadata.metrics["val/loss"] > 0
    assert any(p.abs().max() > 0 for n, p in store.load("my_run/adapter").named_parameters() if "lora_B" in n)
    assert torch.load("my_run/checkpoints/last.ckpt", weights_only=True)["global_step"] == 50


def test_two_adapters_share_one_base(adapter_dir: Path) -> None:
    for name in ("first_adapter", "second_adapter"):
        shutil.copytree(adapter_dir, name)
    names = execute(source(**SHARED_BASE))
    assert names["shared"].names == ["second"]
    assert names["model"] is names["shared"].model


def test_adapter_loads_with_plain_peft(adapter_dir: Path) -> None:
    replaced = {"HuggingFaceTB/SmolLM2-135M-Instruct": str(base_model_cache_dir("smollm2-135m"))}
    names = execute(source(**PLAIN_PEFT), **replaced, **{"path/to/model_artifacts": str(adapter_dir)})
    assert names["model"].peft_config["default"].r == 16


def test_gymnasium_plays_one_game_and_many(capsys: pytest.CaptureFixture[str]) -> None:
    names = execute(source(**ONE_GAME))
    assert names["over"]
    assert str(names["info"]["end"]) in capsys.readouterr().out
    assert execute(source(**MANY_GAMES))["observations"].shape == (64, 10, 10)


def test_custom_adapter_type_is_saved_and_loaded(run: Callable[[tuple[str, ...]], str]) -> None:
    (command,) = (command for command in COMMANDS if command[1] == "examples/custom_adapter.py")
    run((*command, "--root=loha", "--play.final_games=1"))
    (adapter_dir,) = Path("loha").glob("logs/extensions/models/*/*/*/lora_adapters/model_artifacts")
    assert store.verify(adapter_dir).adapter_type == "loha"
    loaded = store.load(adapter_dir)
    assert any("hada_" in name for name, _ in loaded.named_parameters())


def test_custom_style_reads_what_it_writes() -> None:
    execute(source(**STYLE))
    style = get_style("bare")
    game = Game(10, seed=1)
    while game.end is None and game.num_steps < 20:
        text = f"before {style.write_prompt(game.board)} after"
        assert style.read_prompt(text) == game.board
        state = style.read_state(text)
        assert state == (10, game.board.head, len(game.board.body))
        game.play(game.board.legal_moves()[0])
    assert style.read_state("nothing") is None
    with pytest.raises(ValueError, match="bare"):
        style.read_prompt("nothing")


def test_notebook_trains_plays_and_shows_the_best_game(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    nbformat = pytest.importorskip("nbformat")
    nbclient = pytest.importorskip("nbclient")
    pytest.importorskip("ipykernel")
    notebook = nbformat.read(ROOT / "examples" / "notebook.ipynb", as_version=4)
    assert not any(cell.get("outputs") for cell in notebook.cells)
    (install,) = (cell for cell in notebook.cells if cell.source.startswith("%"))
    assert install.source == "%pip install --quiet git+REPOSITORY_URL"
    notebook.cells.remove(install)
    (parameters,) = (cell for cell in notebook.cells if "parameters" in cell.metadata.get("tags", []))
    small = [f"{name}={value}" for name, value in documented.SMALL_RUN.items()]
    small += ["--trainer.max_steps=2", "--play.final_games=1", "--trainer.accelerator=cpu", "--model.dtype=float32"]
    parameters.source += f"\nOPTIONS += {small}"
    for name in ("IPYTHONDIR", "JUPYTER_RUNTIME_DIR", "JUPYTER_CONFIG_DIR", "JUPYTER_DATA_DIR"):
        monkeypatch.setenv(name, str(tmp_path / name))
    monkeypatch.setenv("PYTHONPATH", str(ROOT))
    nbclient.NotebookClient(notebook, timeout=240, resources={"metadata": {"path": str(tmp_path)}}).execute()
    outputs = [output for cell in notebook.cells for output in cell.get("outputs", [])]
    printed = "".join(output.text for output in outputs if output.output_type == "stream" and output.name == "stdout")
    assert re.search(r"^adapter +[\d.]+ apples$", printed, flags=re.MULTILINE)
    assert re.search(r"^base +[\d.]+ apples$", printed, flags=re.MULTILINE)
    assert sum("image/gif" in output.get("data", {}) for output in outputs) == 1


# Names, paths and keys that the documentation mentions.


def inline_code(page: Path) -> list[str]:
    text = re.sub(r"^```.*?^```$", "", TEXT[page], flags=re.MULTILINE | re.DOTALL)
    return [" ".join(code.split()) for code in re.findall(r"(?<!`)`([^`]+)`(?!`)", text)]


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_mentioned_paths_and_modules_exist(page: Path) -> None:
    paths = re.findall(
        r"(?<![\w/.-])((?:snake_lora_pl|tests|docs|configs|benchmarks|examples|scripts|\.ci)/[\w./-]*\w)", TEXT[page]
    )
    assert [path for path in paths if "NAME" not in path and not (ROOT / path).exists()] == []
    for name, path in re.findall(r"`(\w+)`\s+in\s+`(snake_lora_pl/[\w/]+\.py)`", TEXT[page]):
        assert re.search(rf"\b(class|def) {name}\b", (ROOT / path).read_text()), name
    for module in re.findall(r"python -m (benchmarks\.\w+|tests\.\w+)", TEXT[page]):
        assert importlib.util.find_spec(module) is not None, module
    names = re.findall(r"(?:`|^::: )(snake_lora_pl(?:\.\w+)+)", TEXT[page], flags=re.MULTILINE)
    for name in names:
        pkgutil.resolve_name(name)


def test_architecture_page_finds_what_a_newcomer_looks_for() -> None:
    page = ROOT / "docs" / "explanation" / "architecture.md"
    rows = re.findall(r"^\| (.*\?) \| `(.*)` \| `(.*)` \|$", TEXT[page], flags=re.MULTILINE)
    assert len(rows) >= 8
    for question, path, name in rows:
        assert re.search(rf"\b(class|def) {name}\b", (ROOT / path).read_text()), question


@pytest.fixture(scope="module")
def options() -> dict[str, set[str]]:
    """Return the long options of every command, from its help."""
    found = {}
    for command in (*LIGHTNING_COMMANDS, *LIGHT_COMMANDS):
        with contextlib.redirect_stdout(io.StringIO()) as text, contextlib.suppress(SystemExit):
            main([command, "--help"])
        found[command] = set(re.findall(r"--([\w.]+)", text.getvalue()))
    return found


# Groups whose keys are chosen by the user, or belong to a class that the user chooses.
OPEN_GROUPS = ("model.lora.rank_pattern", "model.lora.alpha_pattern", "trainer.logger")


def is_known_key(key: str, options: dict[str, set[str]]) -> bool:
    known = set().union(*options.values())
    if key.endswith("*"):
        return any(name.startswith(key.rstrip("*")) for name in known)
    return key in known or key.startswith(OPEN_GROUPS)


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_mentioned_keys_exist(page: Path, options: dict[str, set[str]]) -> None:
    groups = "model|data|play|checkpoint|trainer|early_stopping"
    keys = [
        key
        for code in inline_code(page)
        for key in re.findall(rf"(?<![\w./])(?:--)?((?:{groups})\.[\w.]+\w|(?:{groups})\.[\w.]*\*)", code)
    ]
    assert [key for key in keys if not is_known_key(key, options)] == []


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_mentioned_options_exist(page: Path, options: dict[str, set[str]]) -> None:
    known = set().union(*options.values()) | {"user", "debootstrap", "volume"}  # of docker and scripts/container
    if page.name in ("benchmarks.md", "scaling.md"):
        known |= set().union(*map(benchmark_options, (path.stem for path in (ROOT / "benchmarks").glob("*.py"))))
    bare = [match[1] for code in inline_code(page) if (match := re.match(r"--([a-z_]+)\b(?![.-])", code))]
    assert [option for option in bare if option not in known] == []


def benchmark_options(name: str) -> set[str]:
    return set(re.findall(r'"--([\w.]+)"', (ROOT / "benchmarks" / f"{name}.py").read_text()))


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_commands_of_benchmarks_have_known_options(page: Path) -> None:
    for name, arguments in re.findall(r"python -m benchmarks\.(\w+)((?: --?[\w.]+(?: [\w.]+)*)*)", TEXT[page]):
        assert set(re.findall(r"--([\w.]+)", arguments)) <= benchmark_options(name), name


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_mentioned_metrics_exist(page: Path) -> None:
    package = "\n".join(path.read_text() for path in sorted((ROOT / "snake_lora_pl").rglob("*.py")))
    names = [
        name
        for code in inline_code(page)
        for name in re.findall(r"(?<![\w/])((?:train|val|play|perf)/[a-z_]+\w)", code)
    ]
    unknown = {name for name in names if f'"{name}"' not in package and f'"{name.split("/")[1]}"' not in package}
    assert not unknown


def test_links_of_the_readme_lead_somewhere() -> None:
    for target, anchor in re.findall(r"\]\(([^)#\s]+)(?:#([^)]*))?\)", TEXT[README]):
        if target.startswith("https://img.shields.io/"):
            continue
        assert (ROOT / target).exists(), target
        if anchor:
            titles = re.findall(r"^#+ (.*)$", (ROOT / target).read_text(), flags=re.MULTILINE)
            slugs = [re.sub(r"[^\w\s-]", "", title.lower()).replace(" ", "-") for title in titles]
            assert anchor in slugs, f"{target}#{anchor}"


def test_readme_is_short_and_in_order() -> None:
    assert len(TEXT[README].splitlines()) <= 160
    sections = re.findall(r"^## (.*)$", TEXT[README], flags=re.MULTILINE)
    assert sections == [
        "Features", "Install", "Quickstart", "Commands", "Python", "Results", "Project layout", "Documentation",
        "Limits", "Development", "License",
    ]  # fmt: skip
    for command in (
        "pip install -e . && python -m snake_lora_pl fit --config balanced.yaml --config quickstart.yaml",
        "pip install -e '.[test]' && pytest",
    ):
        assert f"```bash\n{command}\n```" in TEXT[README]


@pytest.mark.parametrize("path", sorted((ROOT / "configs").glob("*.yaml")), ids=lambda path: path.name)
def test_config_begins_with_the_command_that_runs_it(path: Path) -> None:
    command = path.read_text().splitlines()[0].removeprefix("# ").split()
    assert command[:4] == ["python", "-m", "snake_lora_pl", "fit"]
    assert command[-1] == path.name
    assert isinstance(yaml.safe_load(path.read_text()), dict)
