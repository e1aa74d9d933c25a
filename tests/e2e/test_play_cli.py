"""The games of fit and test, in this process, with the tiny model."""

from __future__ import annotations

import contextlib
import csv
import io
import json
import shutil
from pathlib import Path

import pytest

from snake_lora_pl.__main__ import main
from snake_lora_pl.adapters import store
from snake_lora_pl.paths import GamesPaths, RunPaths
from snake_lora_pl.reporting.games_file import read_games
from tests.ranks import run_ranks
from tests.small_run import small_run

pytestmark = pytest.mark.filterwarnings("ignore::UserWarning")

RUN_PATTERN = "logs/extensions/models/grid-size-5/llm_finetune_v0.03_*/snake_reasoning"


@pytest.fixture(scope="module")
def flags(tiny_llama_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    """Options of a small run: compact rows of a 5x5 grid."""
    path = tmp_path_factory.mktemp("rows") / "rows.jsonl"
    with contextlib.redirect_stdout(io.StringIO()):
        assert main(["generate", "--out", str(path), "--games", "4", "--grid_size", "5", "--style", "compact"]) == 0
    short = ["--trainer.limit_train_batches=2", "--trainer.limit_val_batches=1"]
    return small_run(tiny_llama_dir, path, *short, "--play.reading=score", "--play.max_steps=3")


@pytest.fixture(scope="module")
def finished_run(flags: list[str], tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, str]:
    """The working directory of a fit of three epochs that plays after the second and at the end, and its output."""
    directory = tmp_path_factory.mktemp("finished")
    with pytest.MonkeyPatch.context() as patch, contextlib.redirect_stdout(io.StringIO()) as out:
        patch.setenv("SNAKE_LORA_PL_CACHE", str(directory / "cache"))
        patch.chdir(directory)
        code = main(
            [
                "fit",
                "--config",
                "balanced.yaml",
                *flags,
                "--trainer.max_epochs=3",
                "--trainer.val_check_interval=0.5",
                "--play.val_games=2",
                "--play.every_n_epochs=2",
                "--play.final_games=3",
                "--checkpoint.monitor=play/apples_mean",
                "--checkpoint.mode=max",
            ]
        )
    assert code == 0
    return directory, out.getvalue()


@pytest.fixture
def run(finished_run: tuple[Path, str]) -> RunPaths:
    (run_dir,) = finished_run[0].glob(RUN_PATTERN)
    return RunPaths(run_dir)


def check_games(paths: GamesPaths, names: list[str], num_games: int) -> dict:
    """Check the files of a match; return its table."""
    files = {path.name for path in paths.games_dir.iterdir()}
    replays = {f"{which}.{suffix}" for which in ("best", "median", "worst") for suffix in ("gif", "html")}
    assert files == {"games.jsonl", "table.json"} | replays
    table = json.loads(paths.table_path.read_text())
    assert list(table["players"]) == names
    games = list(read_games(paths.games_path))
    assert [game.player for game in games] == [name for name in names for _ in range(num_games)]
    for name in names:
        own = [game for game in games if game.player == name]
        apples = sum(game.recording.num_apples(-1) for game in own) / num_games
        assert table["players"][name]["apples_mean"] == pytest.approx(apples)
        assert [game.seed for game in own] == [game.seed for game in games[:num_games]]
    return table


def test_fit_plays_every_n_epochs_and_at_the_last_validation(run: RunPaths) -> None:
    with open(run.metrics_path, newline="") as file:
        rows = list(csv.DictReader(file))
    played = [row["step"] for row in rows if row["play/apples_mean"]]
    # Two steps an epoch, validated after each: after epoch 2, and at the last validation.
    assert played == ["3", "5"]
    assert len([row for row in rows if row["val/loss"]]) == 6
    logged = {name for row in rows for name, value in row.items() if value}
    assert {
        "play/apples_mean", "play/apples_median", "play/win_rate", "play/steps_mean", "play/fatal_move_rate",
        "play/unparseable_rate", "play/teacher_agreement", "play/moves_per_second",
    } <= logged  # fmt: skip


def test_best_adapter_is_chosen_among_those_that_played(run: RunPaths) -> None:
    metadata = store.verify(run.artifacts_dir)
    assert metadata.step in (4, 6)
    assert "play/apples_mean" in metadata.metrics


def test_fit_ends_with_the_table_of_adapter_base_teacher_and_random(
    finished_run: tuple[Path, str], run: RunPaths
) -> None:
    printed = finished_run[1]
    assert all(label in printed for label in ("adapter", "base", "bfs", "random_legal", "fatal moves", "95% interval"))
    assert "3 games on 5x5" in printed
    table = check_games(run.games, ["adapter", "base", "bfs", "random_legal"], 3)
    assert table["players"]["adapter"]["reading"] == "score"
    assert table["players"]["bfs"]["teacher_agreement"] == 1


def test_metadata_and_card_hold_the_games_table(run: RunPaths) -> None:
    metadata = store.verify(run.artifacts_dir)
    table = json.loads(run.games.table_path.read_text())
    assert metadata.play["players"] == table["players"]
    assert metadata.metrics["play/apples_mean"] == table["players"]["adapter"]["apples_mean"]
    assert run.artifacts_dir.name not in json.dumps(metadata.play), "a path of this machine in the metadata"
    assert "| | adapter | base | bfs | random_legal |" in (run.artifacts_dir / store.CARD_FILE).read_text()


def test_games_of_the_command_test_are_reproducible(
    run: RunPaths, flags: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    # Style and grid come from the adapter, not from data.train_path.
    rest = [flag for flag in flags if "train_path" not in flag]
    arguments = ["test", "--config", "balanced.yaml", *rest, "--adapter", str(run.artifacts_dir), "--games=2"]
    tables = []
    for _ in range(2):
        assert main([*arguments, "--play.legal_mask=true"]) == 0
        last = capsys.readouterr().out.strip().splitlines()[-1]
        assert last.endswith(str(run.games.games_dir))
        tables.append(check_games(run.games, ["adapter", "adapter+mask", "base", "bfs", "random_legal"], 2))
    for table in tables:
        assert table.pop("moves_per_second").keys() == table["players"].keys()
    assert tables[0] == tables[1]
    assert tables[0]["settings"]["style"] == "compact"
    assert tables[0]["settings"]["grid_size"] == 5
    assert tables[0]["settings"]["max_steps_without_apple"] == 100
    assert tables[0]["settings"]["adapter"] == str(run.artifacts_dir)
    assert tables[0]["players"]["adapter+mask"]["reading"] == "score+mask"
    assert tables[0]["players"]["adapter+mask"]["fatal_move_rate"] == 0


def test_base_model_plays_when_no_adapter_is_given(
    flags: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture,
    capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    monkeypatch.chdir(tmp_path)
    with caplog.at_level("WARNING", logger="snake_lora_pl"):
        assert main(["test", "--config", "balanced.yaml", *flags, "--games=1", "--play.reading=generate"]) == 0
    assert any("--adapter" in message for message in caplog.messages)
    (games_dir,) = tmp_path.glob("games_*")
    table = check_games(GamesPaths(games_dir), ["base", "bfs", "random_legal"], 1)
    assert table["players"]["base"]["unparseable_rate"] == 1  # a random model names no move
    assert table["settings"]["adapter"] is None


@pytest.fixture(scope="module")
def other_adapter_dir(flags: list[str], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An adapter of another rank, prompt style and template, outside of its run directory."""
    directory = tmp_path_factory.mktemp("other")
    rows = directory / "rows.jsonl"
    arguments = [*flags, f"--data.train_path={rows}", "--data.template=chat", "--model.lora.rank=4", "--root"]
    arguments += [str(directory), "--trainer.max_steps=2", "--model.learning_rate=0.1", "--data.max_length=1500"]
    with pytest.MonkeyPatch.context() as patch, contextlib.redirect_stdout(io.StringIO()):
        patch.setenv("SNAKE_LORA_PL_CACHE", str(directory / "cache"))
        assert main(["generate", "--out", str(rows), "--games", "4", "--grid_size", "5", "--style", "bfs-512"]) == 0
        assert main(["fit", "--config", "balanced.yaml", *arguments]) == 0
    (run_dir,) = directory.glob(RUN_PATTERN)
    return RunPaths(run_dir).artifacts_dir.rename(directory / "rank four")


def test_two_adapters_play_as_each_does_alone(
    run: RunPaths, other_adapter_dir: Path, flags: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    monkeypatch.chdir(tmp_path)
    arguments = ["test", "--config", "balanced.yaml", *flags, "--games=3", "--play.max_steps=8"]
    alone, games = [], []
    for adapter_dir in (run.artifacts_dir, other_adapter_dir):
        assert main([*arguments, "--adapter", str(adapter_dir)]) == 0
        paths = GamesPaths.of_adapters([adapter_dir])
        if adapter_dir == other_adapter_dir:
            (paths,) = map(GamesPaths, tmp_path.glob("games_*"))
        alone.append(check_games(paths, ["adapter", "base", "bfs", "random_legal"], 3))
        games.append({game.player: game for game in read_games(paths.games_path)})
        shutil.rmtree(paths.games_dir)
    capsys.readouterr()

    assert main([*arguments, "--adapter", str(run.artifacts_dir), f"--adapter={other_adapter_dir}"]) == 0
    printed = capsys.readouterr().out
    (paths,) = map(GamesPaths, tmp_path.glob("games_*"))
    table = json.loads(paths.table_path.read_text())
    first, second = table["adapters"]
    assert first.startswith("adapter ")
    assert second.startswith("adapter ")
    assert second.endswith("rank_four")
    assert table["adapters"][first] == {
        "directory": str(run.artifacts_dir), "style": "compact", "template": "instruction",
    }  # fmt: skip
    assert table["adapters"][second] == {"directory": str(other_adapter_dir), "style": "bfs-512", "template": "chat"}
    bases = ["base compact", "base bfs-512"]
    assert list(table["players"]) == [first, second, *bases, "bfs", "random_legal"]
    for index, (adapter, base) in enumerate(zip((first, second), bases, strict=True)):
        assert table["players"][adapter] == alone[index]["players"]["adapter"]
        assert table["players"][base] == alone[index]["players"]["base"]
        together = {game.player: game for game in read_games(paths.games_path)}
        assert together[adapter].moves == games[index]["adapter"].moves
        names = {path.name for path in (paths.games_dir / adapter.replace(" ", "_")).iterdir()}
        assert names == {f"{which}.{suffix}" for which in ("best", "median", "worst") for suffix in ("gif", "html")}
    assert table["players"][first] != table["players"][second]

    difference = table["differences"][f"{first} - {second}"]
    apples = [table["players"][name]["apples_mean"] for name in (first, second)]
    assert difference["mean"] == pytest.approx(apples[0] - apples[1])
    assert difference["low"] <= difference["mean"] <= difference["high"]
    assert f"{first} - {second}: {difference['mean']:+.1f}" in printed
    assert f"{difference['low']:+.1f} to {difference['high']:+.1f}" in printed
    assert f"{second}: {other_adapter_dir}" in printed
    assert "style" not in table["settings"]
    for name, adapter_dir in ((first, run.artifacts_dir), (second, other_adapter_dir)):
        assert store.read_metadata(adapter_dir).play["player"] == name


def test_play_style_applies_to_all_adapters(
    run: RunPaths, other_adapter_dir: Path, flags: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    arguments = ["test", "--config", "balanced.yaml", *flags, "--games=1", "--play.style=compact"]
    assert main([*arguments, f"--adapter={run.artifacts_dir}", "--adapter", str(other_adapter_dir)]) == 0
    (path,) = tmp_path.glob("games_*/table.json")
    table = json.loads(path.read_text())
    assert [adapter["style"] for adapter in table["adapters"].values()] == ["compact", "compact"]
    assert [name for name in table["players"] if name.startswith("base")] == [
        "base compact instruction", "base compact chat",
    ]  # fmt: skip


def test_adapters_of_different_grids_need_play_grid_size(
    run: RunPaths, flags: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    other = Path(shutil.copytree(run.artifacts_dir, tmp_path / "other"))
    metadata = json.loads((other / store.METADATA_FILE).read_text())
    (other / store.METADATA_FILE).write_text(json.dumps({**metadata, "grid_size": 6}))
    arguments = ["test", "--config", "balanced.yaml", *flags, "--games=1", "--adapter", str(run.artifacts_dir)]
    arguments += ["--adapter", str(other)]
    assert main(arguments) == 2
    (error,) = [line for line in capfd.readouterr().err.splitlines() if line.startswith("error: ")]
    assert "5x5 and 6x6" in error
    assert "--play.grid_size" in error
    assert main([*arguments, "--play.grid_size=6"]) == 0


@pytest.mark.parametrize("command", ["fit", "validate", "predict"])
def test_only_test_takes_several_adapters(
    command: str, flags: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    assert main([command, "--config", "balanced.yaml", *flags, "--adapter=a", "--adapter", "b"]) == 2
    assert f"{command} takes one --adapter" in capfd.readouterr().err
    assert not list(tmp_path.iterdir())


@pytest.mark.slow
def test_two_ranks_play_the_same_games_as_one(run: RunPaths, flags: list[str], tmp_path: Path) -> None:
    tables = []
    for num_devices in (1, 2):
        arguments = ["test", "--config", "balanced.yaml", *flags, "--adapter", str(run.artifacts_dir), "--games=3"]
        arguments += [f"--trainer.devices={num_devices}", f"--trainer.strategy={'ddp' if num_devices == 2 else 'auto'}"]
        run_ranks(tmp_path, arguments) if num_devices == 2 else main(arguments)
        table = check_games(run.games, ["adapter", "base", "bfs", "random_legal"], 3)
        table.pop("moves_per_second")
        tables.append(table)
    assert tables[0] == tables[1]


@pytest.mark.slow
def test_two_ranks_fit_and_play(flags: list[str], tmp_path: Path) -> None:
    arguments = ["fit", "--config", "balanced.yaml", *flags, "--trainer.max_steps=2", "--trainer.devices=2"]
    arguments += ["--trainer.strategy=ddp", "--play.val_games=3", "--play.final_games=3"]
    run_ranks(tmp_path, arguments)
    (run_dir,) = tmp_path.glob(RUN_PATTERN)
    check_games(RunPaths(run_dir).games, ["adapter", "base", "bfs", "random_legal"], 3)
    with open(RunPaths(run_dir).metrics_path, newline="") as file:
        assert [row["step"] for row in csv.DictReader(file) if row["play/apples_mean"]] == ["1"]


@pytest.mark.parametrize(
    ("flag", "part"),
    [
        ("--games=0", "play.test_games"),
        ("--play.test_games=0", "play.test_games"),
        ("--play.reading=guess", "reading"),
        ("--play.legal_mask=true", "play.reading=score"),
        ("--play.teacher=bsf", "'bfs'"),
        ("--play.style=bfs", "play.style"),
        ("--play.max_steps=0", "play.max_steps"),
        ("--play.max_stps=3", "'play.max_steps'"),
        ("--adapter=nowhere", "--adapter nowhere"),
    ],
)
def test_user_error_is_one_line(
    flag: str, part: str, flags: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
    capfd: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    monkeypatch.chdir(tmp_path)
    without_reading = [given for given in flags if "reading" not in given]
    assert main(["test", "--config", "balanced.yaml", *without_reading, flag]) == 2
    (error,) = [line for line in capfd.readouterr().err.splitlines() if line.startswith("error: ")]
    assert part in error
    assert not list(tmp_path.iterdir())
