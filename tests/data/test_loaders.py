from __future__ import annotations

from snake_lora_pl.data import loaders
from tests.data.lightning_runs import set_up


def test_loader_measures_how_long_its_consumer_waits(make, rows_path, monkeypatch):
    clock_s = 0.0

    def spend(duration_s: float) -> None:
        nonlocal clock_s
        clock_s += duration_s

    monkeypatch.setattr(loaders.time, "perf_counter", lambda: clock_s)
    loader = set_up(make(rows_path)).train_dataloader()
    collate = loader.collate_fn
    loader.collate_fn = lambda examples: (spend(1), collate(examples))[1]
    for _ in loader:
        spend(100)
    assert loader.wait_seconds == len(loader)


def test_batches_are_transformed_when_they_are_requested(make, rows_path):
    events = []
    for num_workers in (0, 1):
        loader = set_up(make(rows_path, num_workers=num_workers, batch_size=2)).train_dataloader()
        loader.transform_batch = lambda batch: (events.append("transformed"), {**batch, "sources": ["new"]})[1]
        batches = iter(loader)
        for _ in range(2):
            assert next(batches)["sources"] == ["new"]
            events.append("requested")
    assert events == ["transformed", "requested"] * 4
