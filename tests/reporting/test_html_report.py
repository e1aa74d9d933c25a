"""Content of the HTML report of a synthetic run, and its behavior in a browser."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from html.parser import HTMLParser
from pathlib import Path

import pytest

from snake_lora_pl.__main__ import main
from snake_lora_pl.paths import RunPaths
from snake_lora_pl.reporting.html_report import render_report
from tests.browser import Tab
from tests.reporting.conftest import HTML_INJECTION


class ParsedReport(HTMLParser):
    """Elements of an HTML report and its JSON data."""

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


def test_command_report_does_not_import_torch(synthetic_run: RunPaths) -> None:
    code = (
        "import sys\nfrom snake_lora_pl.__main__ import main\n"
        f"main(['report', {str(synthetic_run.run_dir)!r}])\nassert not {{'torch', 'lightning'}} & sys.modules.keys()"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


def test_completions_cannot_inject_html(synthetic_run: RunPaths) -> None:
    text = synthetic_run.report_path.read_text()
    report = ParsedReport(text)
    assert [tag for tag, _ in report.tags if tag == "script"] == ["script", "script"]
    assert "img" not in [tag for tag, _ in report.tags]
    assert "<img" not in text
    assert report.data["validations"][0]["rows"][1]["words"] == HTML_INJECTION
    assert HTML_INJECTION in report.data["games"]["replays"]["best"]["frames"][0]["words"]
    assert HTML_INJECTION in report.data["config"]


def test_report_loads_nothing(synthetic_run: RunPaths) -> None:
    report = ParsedReport(synthetic_run.report_path.read_text())
    (policy,) = [a["content"] for _, a in report.tags if a.get("http-equiv") == "Content-Security-Policy"]
    assert policy == "default-src 'none'; style-src 'unsafe-inline'; script-src 'unsafe-inline'"
    assert not [a for _, a in report.tags if "src" in a or "href" in a]


def test_curves_are_averaged_to_500_points_without_nan_and_infinity(synthetic_run: RunPaths) -> None:
    charts = {chart["title"]: chart for chart in ParsedReport(synthetic_run.report_path.read_text()).data["charts"]}
    train, val = charts["Loss"]["series"]
    assert len(train["points"]) == 400  # means of three steps each
    assert train["points"][0] == [3, pytest.approx((3 + 1.5 + 1) / 3, rel=1e-4)]
    assert [step for step, _ in val["points"]] == [300, 600, 900, 1200]


def test_claims_and_moves_are_counted_over_the_games_of_the_adapter(synthetic_run: RunPaths) -> None:
    games = ParsedReport(synthetic_run.report_path.read_text()).data["games"]
    claims = {name: (right, total) for name, right, total in games["claims"]}
    num_moves = sum(map(sum, games["decisions"]))
    assert claims["head"] == (num_moves, num_moves)
    assert claims["manhattan_distance"] == (0, num_moves)
    assert sum(games["decisions"][i][i] for i in range(4)) == num_moves


def test_run_without_games_and_validations_has_a_report(tmp_path: Path) -> None:
    paths = RunPaths(tmp_path)
    paths.metrics_path.write_text("epoch,step,train/loss\n0,0,1.5\n")
    data = ParsedReport(render_report(paths)).data
    assert (data["play"], data["games"], data["validations"]) == (None, None, [])


def test_directory_without_run_is_a_one_line_error(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["report", str(tmp_path)]) == 2
    assert re.fullmatch(rf"error: .*{tmp_path.name}.*config\.yaml.*metrics\.csv.*\n", capsys.readouterr().err)


def test_damaged_run_file_is_a_one_line_error(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    RunPaths(tmp_path).metrics_path.write_text("epoch,step,train/loss\n0,zero,1.5\n")
    assert main(["report", str(tmp_path)]) == 2
    assert re.fullmatch(rf"error: .*{tmp_path.name}.*ValueError.*zero.*\n", capsys.readouterr().err)


@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize("width", [1280, 390])
def test_browser_renders_report_without_errors(synthetic_run: RunPaths, tab: Tab, width: int, scheme: str) -> None:
    tab.open(synthetic_run.report_path, width=width, scheme=scheme)
    assert tab.problems == []
    assert tab.run("document.title").endswith("report")  # not the title that the injection sets
    assert tab.run("document.images.length") == 0
    # Every chart has a line within its frame, and nothing is wider than the window.
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


def test_replay_controls_step_through_a_game(synthetic_run: RunPaths, tab: Tab) -> None:
    tab.open(synthetic_run.report_path)

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
    assert HTML_INJECTION in tab.run("document.getElementById('words').textContent")
    tab.run("document.getElementById('forward').focus()")
    tab.press("ArrowLeft")
    assert at().startswith("step 1 of ")
    assert pixels() == seen[1]
    tab.press("End")
    assert "End" in tab.run("[...document.querySelectorAll('dl.game dt')].map((term) => term.textContent)")
    tab.run("document.querySelector('[data-which=worst]').click()")
    assert at().startswith("step 0 of ")
    tab.run("document.getElementById('play').click()")
    tab.run("new Promise((done) => setTimeout(done, 400))")
    assert not at().startswith("step 0 of ")
    assert tab.problems == []


def test_slider_shows_earlier_validations(synthetic_run: RunPaths, tab: Tab) -> None:
    tab.open(synthetic_run.report_path)
    cell = "document.querySelector('#moves td').firstChild.textContent"
    assert tab.run(cell) == "900"
    tab.run("const s = document.querySelector('#moves input'); s.value = 0; s.dispatchEvent(new Event('input'))")
    assert tab.run(cell) == "300"
    assert tab.run("document.querySelectorAll('#words article').length") == 3


def test_arrow_keys_read_single_steps_of_a_chart(synthetic_run: RunPaths, tab: Tab) -> None:
    tab.open(synthetic_run.report_path)
    tab.run("document.querySelector('#curves .chart').focus()")
    tab.press("ArrowRight")
    assert "step 3" in tab.run("document.querySelector('#curves .tip').textContent")
