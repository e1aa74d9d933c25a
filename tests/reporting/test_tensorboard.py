"""Texts of the TensorBoard logger, read back with TensorBoard."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from snake_lora_pl.paths import RunPaths
from snake_lora_pl.reporting.tensorboard import RunTensorBoardLogger
from tests.reporting.conftest import BOARD, HTML_INJECTION, STYLE, SyntheticResults

pytestmark = pytest.mark.filterwarnings("ignore")


@pytest.fixture(scope="module")
def events(results: SyntheticResults, tmp_path_factory: pytest.TempPathFactory) -> Any:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    paths = RunPaths(tmp_path_factory.mktemp("run"))
    logger = RunTensorBoardLogger()
    logger.attach(paths, "name")
    logger.show_validation(results.validation)
    logger.show_games(results.players[0], 900, is_final=False)
    logger.show_outcome(results.outcome)
    logger.finish()
    return EventAccumulator(str(paths.tensorboard_dir)).Reload()


def text(events: Any, tag: str) -> str:
    (event,) = events.Tensors(f"{tag}/text_summary")
    return event.tensor_proto.string_val[0].decode()


def test_sample_row_shows_prompt_and_completions_verbatim(events: Any) -> None:
    shown = text(events, "val/sample_rows/1")
    for content in (STYLE.write_prompt(BOARD), HTML_INJECTION):
        assert all(f"    {line}" in shown for line in content.splitlines())
    assert "right move: no" in shown


def test_confusion_matrix_is_a_table(events: Any) -> None:
    assert "| UP | 900 | 1 | 0 | 0 | 2 |" in text(events, "val/moves")


def test_games_show_the_completions_of_each_step(events: Any) -> None:
    for which in ("best", "median", "worst"):
        assert HTML_INJECTION in text(events, f"games/{which}")


def test_players_are_a_table(events: Any) -> None:
    assert "| adapter | random_legal |" in text(events, "final_games/players")


def test_given_directory_is_kept(tmp_path: Path) -> None:
    logger = RunTensorBoardLogger(str(tmp_path / "mine"))
    logger.attach(RunPaths(tmp_path / "run"), "name")
    assert logger.log_dir.rstrip("/") == str(tmp_path / "mine")
