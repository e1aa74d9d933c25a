"""A run that is killed at random moments, from outside and in earnest, loses nothing: the benchmark, made short."""

from __future__ import annotations

from pathlib import Path

import pytest

from benchmarks.kill import MOMENTS, SAVE_EVERY_N_STEPS, SETTINGS, kill_runs
from snake_lora_pl.data.generated_rows import write_dataset


@pytest.mark.timeout(900)  # half a minute where nothing else runs
def test_a_run_killed_five_times_loses_nothing_and_ends_as_if_it_had_not_been(
    tiny_llama_dir: Path, tmp_path: Path
) -> None:
    rows_path = tmp_path / "rows.jsonl"
    write_dataset(rows_path, 4, 5, "bfs", "compact", 0)
    arguments = ["fit", *SETTINGS, f"--model.base_model={tiny_llama_dir}", f"--data.train_path={rows_path}"]
    kills, found = kill_runs(tmp_path, [*arguments, "--trainer.max_epochs=4"], num_kills=5, seed=0)
    assert {kill.moment for kill in kills} == set(MOMENTS)
    assert all(kill.half_written for kill in kills if kill.moment == "writing")
    assert [kill.complaints for kill in kills] == [[]] * 5
    assert all(kill.steps_done - kill.steps_saved <= SAVE_EVERY_N_STEPS for kill in kills)
    assert found == [[]] * len(found)
