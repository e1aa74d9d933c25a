"""The TensorBoard overlay: what a real fit wrote, read back with TensorBoard itself."""

from __future__ import annotations

import csv
import json

import pytest

from snake_lora_pl.paths import RunPaths

pytestmark = pytest.mark.filterwarnings("ignore")


def test_tensorboard_has_every_metric_and_what_there_is_to_read(finished: tuple[RunPaths, str]) -> None:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    paths, printed = finished
    events = EventAccumulator(str(paths.tensorboard_dir)).Reload()
    with open(paths.metrics_path, newline="") as file:
        reader = csv.DictReader(file)
        rows = list(reader)
        names = {name for name in reader.fieldnames or () if name not in ("epoch", "step")}
    assert names <= set(events.Tags()["scalars"])
    losses = [float(row["train/loss"]) for row in rows if row["train/loss"]]
    assert [event.value for event in events.Scalars("train/loss")] == pytest.approx(losses)

    texts = {tag.removesuffix("/text_summary") for tag in events.Tags()["tensors"]}
    assert {f"val/sample_rows/{place}" for place in range(3)} | {
        "val/moves",
        "games/best",
        "final_games/worst",
    } <= texts
    (line, *_) = [json.loads(text) for text in paths.validations_path.read_text().splitlines()]
    (first, *_) = events.Tensors("val/sample_rows/0/text_summary")
    said = first.tensor_proto.string_val[0].decode()
    for words in (line["rows"][0]["prompt"], line["rows"][0]["teacher"]):
        assert all(f"    {part}" in said for part in words.splitlines())
    (players,) = events.Tensors("final_games/players/text_summary")
    assert "| adapter | base | bfs | random_legal |" in players.tensor_proto.string_val[0].decode()
    assert f"tensorboard --logdir {paths.tensorboard_dir.relative_to(paths.run_dir.parents[5])}" in printed
