"""Crash safety: a short run of ``benchmarks.kill``."""

from __future__ import annotations

from pathlib import Path

import pytest

from benchmarks.kill import MOMENTS, SAVE_EVERY_N_STEPS, SETTINGS, kill_runs
from snake_lora_pl.data.generated_rows import write_dataset


@pytest.mark.timeout(900)  # half a minute on an idle machine
def test_a_run_killed_at_each_moment_ends_like_an_uninterrupted_run(tiny_llama_dir: Path, tmp_path: Path) -> None:
    rows_path = tmp_path / "rows.jsonl"
    write_dataset(rows_path, 4, 5, "bfs", "compact", 0)
    arguments = ["fit", *SETTINGS, f"--model.base_model={tiny_llama_dir}", f"--data.train_path={rows_path}"]
    kills, differences = kill_runs(tmp_path, [*arguments, "--trainer.max_epochs=4"], num_kills=3, seed=0)
    assert {kill.moment for kill in kills} == set(MOMENTS)
    assert all(kill.partial_files for kill in kills if kill.moment == "writing")
    assert [kill.problems for kill in kills] == [[]] * 3
    assert all(kill.steps_lost <= SAVE_EVERY_N_STEPS for kill in kills)
    assert differences == [[]] * len(differences)
