"""What a run leaves to look at: sample rows, confusion of moves, games, and the page made of them."""

from __future__ import annotations

import csv
import json
import re
import shlex
import subprocess
import sys
from collections.abc import Iterator
from html.parser import HTMLParser
from pathlib import Path

import pytest

from snake_lora_pl.__main__ import main
from snake_lora_pl.evaluation.distributed import PlayerResult
from snake_lora_pl.evaluation.game_loop import play_games
from snake_lora_pl.evaluation.policy import Answer, TeacherPolicy
from snake_lora_pl.evaluation.validations import (
    JudgedRow,
    Validation,
    add_validation,
    keep_validations,
    read_validations,
)
from snake_lora_pl.game import Board, get_style
from snake_lora_pl.paths import RunPaths
from snake_lora_pl.reporting.games_file import write_games
from snake_lora_pl.reporting.html_report import render_report, write_report
from snake_lora_pl.reporting.table import table_json
from tests.browser import CHROMIUM, Tab, chromium_tab
from tests.reporting.conftest import NASTY

STYLE = get_style("bfs-512")
BOARD = Board(5, ((2, 2), (2, 1), (1, 1)), (4, 4))


class Talker(TeacherPolicy):
    """A player whose words claim things and try to break out of a page."""

    def __init__(self) -> None:
        super().__init__("bfs")
        self.name = "adapter"
        self.reading = "generate"

    def answer(self, boards: list[Board], seeds: list[int]) -> list[Answer]:  # type: ignore[override]
        moves = [answer.move for answer in super().answer(boards, seeds)]
        words = [STYLE.write_completion(board, move) for board, move in zip(boards, moves, strict=True) if move]
        return [
            Answer(move, text.replace("Manhattan distance to apple: ", "Manhattan distance to apple: 9") + NASTY)
            for move, text in zip(moves, words, strict=True)
        ]


@pytest.fixture(scope="module")
def made_up(tmp_path_factory: pytest.TempPathFactory) -> RunPaths:
    """The files of a run that never was, with words and names that would break a page that trusts them."""
    paths = RunPaths(tmp_path_factory.mktemp("made_up") / "llm_finetune_v0.03_20260102_030405" / "snake")
    paths.run_dir.mkdir(parents=True)
    paths.config_path.write_text(f"model:\n  base_model: tiny\n  adapter_type: lora\n# {NASTY}\n")
    with open(paths.metrics_path, "w", newline="") as file:
        writer = csv.writer(file)
        names = ["epoch", "step", "train/loss", "val/loss", "val/decision_accuracy", "train/learning_rate"]
        writer.writerow([*names, "perf/tokens_per_second", "adapter/update_norm/layers_00-07", "play/apples_mean"])
        for step in range(1200):
            writer.writerow([0, step, 3 / (1 + step), "", "", 1e-4, 100 + step, 0.1, ""])
            if step % 300 == 299:
                writer.writerow([0, step, "", 2 / step, 0.5 + step / 3000, "", "", "", step / 100])
        writer.writerow([0, 1200, "nan", "inf", "", "", "", "", ""])
    for step in (300, 600, 600, 900):
        rows = [
            JudgedRow.of("rows.jsonl:1", STYLE.write_prompt(BOARD), STYLE.write_completion(BOARD, move), words)
            for move, words in [
                (move, NASTY if place else STYLE.write_completion(BOARD, move))
                for place, move in enumerate(BOARD.legal_moves())
            ]
        ]
        add_validation(paths.validations_path, Validation(step, 0, rows, [[step, 1, 0, 0, 2], *[[0] * 5] * 3]))
    players = []
    for policy in (Talker(), TeacherPolicy("random_legal")):
        games = play_games(policy, [1, 2, 3, 4], grid_size=5, max_steps=20)
        players.append(PlayerResult(policy.name, policy.reading, _summaries(games), games))
    write_games(paths.games.games_path, players)
    settings = {"num_games": 4, "grid_size": 5, "max_steps": 20, "max_steps_without_apple": 100, "teacher": "bfs"}
    paths.games.table_path.write_text(json.dumps(table_json(players, settings, {"adapter": {}})))
    write_report(paths)
    return paths


def _summaries(games: list) -> list:
    from snake_lora_pl.evaluation.statistics import GameSummary

    return [GameSummary.of(game) for game in games]


class Page(HTMLParser):
    """The elements of a page as a parser sees them, and its data."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self._open = ""
        self._texts: dict[str, str] = {}
        self.feed(text)
        self.data = json.loads(self._texts["data"])

    def handle_starttag(self, tag: str, attributes: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attributes)))
        self._open = dict(attributes).get("id") or ""

    def handle_data(self, data: str) -> None:
        self._texts[self._open] = self._texts.get(self._open, "") + data


# ------------------------------------------------------------------ what a fit leaves


def test_fit_shows_the_same_rows_at_every_validation(finished: tuple[RunPaths, str], shown_flags: list[str]) -> None:
    validations = list(read_validations(finished[0].validations_path))
    assert [validation["step"] for validation in validations] == [2, 4]
    first, second = ([(row["source"], row["prompt"], row["teacher"]) for row in v["rows"]] for v in validations)
    assert first == second
    val_path = next(flag for flag in shown_flags if "val_path" in flag).partition("=")[2]
    rows = [json.loads(line) for line in Path(val_path).read_text().splitlines()]
    # The first, the last and the middle one of twelve, as the file has them.
    assert [source for source, _, _ in first] == [f"{val_path}:{line}" for line in (1, 7, 12)]
    assert [prompt for _, prompt, _ in first] == [rows[line - 1]["prompt"] for line in (1, 7, 12)]
    assert all(row["words"] != row["teacher"] and row["is_right"] is False for row in validations[0]["rows"])


def test_the_confusion_of_moves_counts_every_validation_row(finished: tuple[RunPaths, str]) -> None:
    for validation in read_validations(finished[0].validations_path):
        assert sum(map(sum, validation["decisions"])) == 4  # two batches of two rows


def test_fit_writes_the_page_and_says_where(finished: tuple[RunPaths, str]) -> None:
    paths, printed = finished
    data = Page(paths.report_path.read_text()).data
    assert {chart["title"] for chart in data["charts"]} >= {"Loss", "Learning rate", "Throughput", "Gradient norm"}
    norms = next(chart for chart in data["charts"] if chart["title"].startswith("Norm of the weights' change"))
    assert all(point[1] > 0 for line in norms["series"] for point in line["points"])
    assert data["play"]["players"] == ["adapter", "base", "bfs", "random_legal"]
    assert set(data["games"]["replays"]) == {"best", "median", "worst"}
    assert data["config"] == paths.config_path.read_text()
    assert [line.split() for line in printed.splitlines() if line.startswith("report ")] == [
        ["report", str(paths.report_path.relative_to(paths.run_dir.parents[5]))]
    ]
    assert all((paths.run_dir / link).exists() for _, link in data["files"])


def test_the_verb_writes_the_same_page_from_the_runs_files(
    finished: tuple[RunPaths, str], capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    paths = finished[0]
    monkeypatch.chdir(paths.run_dir.parents[5])
    before = paths.report_path.read_text()
    paths.report_path.unlink()
    assert main(["report", str(paths.artifacts_dir.relative_to(Path.cwd()))]) == 0
    assert capsys.readouterr().out.strip() == f"Report written to {paths.report_path.relative_to(Path.cwd())}"
    assert Page(paths.report_path.read_text()).data == Page(before).data


def test_the_pages_commands_run(
    finished: tuple[RunPaths, str], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    paths = finished[0]
    monkeypatch.chdir(paths.run_dir.parents[5])
    commands = dict(Page(render_report(paths)).data["commands"])
    before = paths.report_path.read_text()
    few = ["--games=1", "--play.max_steps=2", "--trainer.accelerator=cpu", "--model.max_new_tokens=2"]
    assert main([*shlex.split(commands["Play more games"])[3:], *few]) == 0
    assert "Table, games and replays written to" in capsys.readouterr().out
    assert Page(paths.report_path.read_text()).data["play"]["caption"].startswith("1 game on 5")
    assert paths.report_path.read_text() != before
    assert main(shlex.split(commands["Write this page anew"])[3:]) == 0
    assert set(commands) == {
        "Play more games", "Run it again", "Write this page anew", "Write a plain model, without PEFT",
    }  # fmt: skip


# ------------------------------------------------------------------ the page


def test_the_page_is_made_without_torch(made_up: RunPaths) -> None:
    code = (
        "import sys\nfrom snake_lora_pl.__main__ import main\n"
        f"main(['report', {str(made_up.run_dir)!r}])\nassert not {{'torch', 'lightning'}} & sys.modules.keys()"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


def test_words_of_a_model_stay_text(made_up: RunPaths) -> None:
    text = made_up.report_path.read_text()
    page = Page(text)
    assert [tag for tag, _ in page.tags if tag == "script"] == ["script", "script"]
    assert "img" not in [tag for tag, _ in page.tags]
    assert "<img" not in text
    assert page.data["validations"][0]["rows"][1]["words"] == NASTY
    assert NASTY in page.data["games"]["replays"]["best"]["frames"][0]["words"]
    assert NASTY in page.data["config"]


def test_the_page_asks_for_nothing(made_up: RunPaths) -> None:
    page = Page(made_up.report_path.read_text())
    (policy,) = [a["content"] for _, a in page.tags if a.get("http-equiv") == "Content-Security-Policy"]
    assert policy == "default-src 'none'; style-src 'unsafe-inline'; script-src 'unsafe-inline'"
    assert not [a for _, a in page.tags if "src" in a or "href" in a]


def test_curves_are_thinned_to_means_and_leave_out_what_is_no_number(made_up: RunPaths) -> None:
    charts = {chart["title"]: chart for chart in Page(made_up.report_path.read_text()).data["charts"]}
    train, val = charts["Loss"]["series"]
    assert len(train["points"]) == 400  # 1,200 in groups of three
    assert train["points"][0] == [3, pytest.approx((3 + 1.5 + 1) / 3, rel=1e-4)]
    assert [step for step, _ in val["points"]] == [300, 600, 900, 1200]


def test_claims_and_moves_are_counted_over_the_adapters_games(made_up: RunPaths) -> None:
    games = Page(made_up.report_path.read_text()).data["games"]
    claims = {name: (right, total) for name, right, total in games["claims"]}
    num_moves = sum(map(sum, games["decisions"]))
    assert claims["head"] == (num_moves, num_moves)
    assert claims["manhattan_distance"] == (0, num_moves)
    assert sum(games["decisions"][i][i] for i in range(4)) == num_moves


def test_a_validation_that_comes_again_replaces_the_first(made_up: RunPaths, tmp_path: Path) -> None:
    path = tmp_path / "validations.jsonl"
    path.write_text(made_up.validations_path.read_text() + '{"step": 1200, "cut')
    assert [validation["step"] for validation in read_validations(path)] == [300, 600, 900]
    keep_validations(path, 600)
    assert [json.loads(line)["step"] for line in path.read_text().splitlines()] == [300, 600]


def test_a_run_without_games_and_validations_has_a_page(tmp_path: Path) -> None:
    paths = RunPaths(tmp_path)
    paths.metrics_path.write_text("epoch,step,train/loss\n0,0,1.5\n")
    data = Page(render_report(paths)).data
    assert (data["play"], data["games"], data["validations"]) == (None, None, [])


def test_what_is_no_run_is_one_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["report", str(tmp_path)]) == 2
    assert "no run lies here" in capsys.readouterr().err
    RunPaths(tmp_path).metrics_path.write_text("epoch,step,train/loss\n0,zero,1.5\n")
    assert main(["report", str(tmp_path)]) == 2
    assert re.fullmatch(r"error: .*a file of the run cannot be read.*\n", capsys.readouterr().err)


# ------------------------------------------------------------------ in a browser


@pytest.fixture(scope="module")
def tab() -> Iterator[Tab]:
    if CHROMIUM is None:
        pytest.skip("no Chromium on this machine: install one (apt install chromium) to look at the page")
    with chromium_tab() as tab:
        yield tab


@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize("width", [1280, 390])
def test_a_browser_draws_the_page_without_a_complaint(made_up: RunPaths, tab: Tab, width: int, scheme: str) -> None:
    tab.open(made_up.report_path, width=width, scheme=scheme)
    assert tab.problems == []
    assert tab.run("document.title").endswith("report")  # and not what the words would make of it
    assert tab.run("document.images.length") == 0
    # Every chart has its line, inside its frame, and nothing is wider than the window.
    lines = tab.run(
        """[...document.querySelectorAll('#curves .chart')].map(chart => {
            const path = chart.querySelector('path.line');
            const box = chart.getBoundingClientRect(), at = path.getBoundingClientRect();
            const across = at.left >= box.left && at.right <= box.right + 1;
            const down = at.top >= box.top && at.bottom <= box.bottom;
            return [path.getTotalLength(), across && down];
        })"""
    )
    assert len(lines) >= 6
    assert all(length > 50 and inside for length, inside in lines)
    assert tab.run("document.documentElement.scrollWidth") <= width
    background = tab.run("getComputedStyle(document.body).backgroundColor")
    brightness = sum(map(int, re.findall(r"\d+", background)[:3])) / 3
    assert (brightness < 60) == (scheme == "dark")


def test_replays_step_in_a_browser(made_up: RunPaths, tab: Tab) -> None:
    tab.open(made_up.report_path)

    def pixels() -> str:
        return tab.run("document.getElementById('board').toDataURL()")

    def at() -> str:
        return tab.run("document.getElementById('at').textContent")

    seen = [pixels()]
    assert at().startswith("step 0 of ")
    for step in (1, 2):
        tab.run("document.getElementById('forward').click()")
        assert at().startswith(f"step {step} of ")
        seen.append(pixels())
    assert len(set(seen)) == 3
    assert NASTY in tab.run("document.getElementById('words').textContent")
    tab.run("document.getElementById('forward').focus()")
    tab.press("ArrowLeft")
    assert at().startswith("step 1 of ")
    assert pixels() == seen[1]
    tab.press("End")
    assert "Ends with" in tab.run("document.querySelector('dl.game').textContent")
    tab.run("document.querySelector('[data-which=worst]').click()")
    assert at().startswith("step 0 of ")
    tab.run("document.getElementById('play').click()")
    tab.run("new Promise((done) => setTimeout(done, 400))")
    assert not at().startswith("step 0 of ")
    assert tab.problems == []


def test_a_slider_shows_earlier_validations_in_a_browser(made_up: RunPaths, tab: Tab) -> None:
    tab.open(made_up.report_path)
    cell = "document.querySelector('#moves td').firstChild.textContent"
    assert tab.run(cell) == "900"
    tab.run("const s = document.querySelector('#moves input'); s.value = 0; s.dispatchEvent(new Event('input'))")
    assert tab.run(cell) == "300"
    assert tab.run("document.querySelectorAll('#words article').length") == 3


def test_keys_read_a_chart_in_a_browser(made_up: RunPaths, tab: Tab) -> None:
    tab.open(made_up.report_path)
    tab.run("document.querySelector('#curves .chart').focus()")
    tab.press("ArrowRight")
    assert "step 3" in tab.run("document.querySelector('#curves .tip').textContent")
