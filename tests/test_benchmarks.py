"""Tests of benchmarks that depend on internals of the package."""

from __future__ import annotations

import json
import math
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from torch.autograd import DeviceType

from benchmarks import adapter_types, play
from benchmarks.interleaved import Turn, TurnTimer, run_interleaved, speed_ratio
from benchmarks.play import GameSlots, PlainModel, common_prefix_length
from benchmarks.train_step import make_step, min_duration_s, product_share

pytestmark = pytest.mark.filterwarnings("ignore")


def test_the_timed_training_step_runs(tiny_llama_dir: Path) -> None:
    # Imported here, because the contenders below import this module in new processes.
    from snake_lora_pl.training.memory.estimate import blank_batch

    step = make_step(str(tiny_llama_dir), rank=4, dtype="float32")
    assert min_duration_s(step, blank_batch(2, 32, 8), num_repeats=1) > 0


def count_turns(timer: TurnTimer, first_units: int, num_turns: int) -> None:
    for turn in range(num_turns):
        timer.start()
        timer.stop(first_units + turn, math.nan, 0.0, time.perf_counter())


def test_contenders_alternate_and_the_first_round_is_not_counted() -> None:
    turns = run_interleaved({"a": count_turns, "b": count_turns}, 10, num_rounds=3)
    assert {name: [turn.num_units for turn in taken] for name, taken in turns.items()} == {
        "a": [11, 12, 13],
        "b": [11, 12, 13],
    }
    ends = sorted((turn.details, name) for name, taken in turns.items() for turn in taken)
    assert [{name for _, name in ends[i : i + 2]} for i in (0, 2, 4)] == [{"a", "b"}] * 3


def test_the_speed_ratio_is_taken_within_each_round() -> None:
    turns = [Turn(1.0, 40, 0.0, 0.0), Turn(2.0, 40, 0.0, 0.0), Turn(1.0, 90, 0.0, 0.0)]
    baseline = [Turn(1.0, 20, 0.0, 0.0), Turn(2.0, 10, 0.0, 0.0), Turn(1.0, 30, 0.0, 0.0)]
    ratio = speed_ratio(turns, baseline)
    assert (ratio.median, ratio.min, ratio.max) == (3, 2, 4)


def exit_in_second_turn(timer: TurnTimer, first_units: int, num_turns: int) -> None:
    timer.start()
    timer.stop(first_units, math.nan, 0.0)
    raise SystemExit(3)


def test_a_contender_that_exits_early_is_named() -> None:
    with pytest.raises(SystemExit, match="'b'"):
        run_interleaved({"a": count_turns, "b": exit_in_second_turn}, 10, num_rounds=3)


def test_share_of_products_counts_kernels_by_the_operator_that_launched_them() -> None:
    def event(key: str, duration: float, device: DeviceType = DeviceType.CPU) -> Any:
        return SimpleNamespace(
            key=key, self_cpu_time_total=duration, self_device_time_total=duration, device_type=device
        )

    kernels = [
        event("nvjet_tst_128x256", 6, DeviceType.CUDA),
        event("vectorized_elementwise_kernel", 2, DeviceType.CUDA),
    ]
    operators = [event("aten::addmm", 6), event("aten::mul", 2), event("aten::linear", 0)]
    assert product_share([*kernels, *operators], on_gpu=True) == 0.75
    assert product_share([event("aten::mm", 3), event("aten::mul", 1)], on_gpu=False) == 0.75


def test_batched_generate_completes_as_one_game_at_a_time_with_and_without_a_cached_prefix(
    tiny_llama_dir: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from snake_lora_pl.data.encoding import Encoder
    from snake_lora_pl.game import get_style
    from snake_lora_pl.models import load_base_model, load_tokenizer

    monkeypatch.setattr(play, "MAX_NEW_TOKENS", 6)
    model = PlainModel.__new__(PlainModel)  # without an adapter
    model.tokenizer, model.style = load_tokenizer(str(tiny_llama_dir)), get_style("compact")
    model.encoder = Encoder(model.tokenizer, "instruction")
    model.model = load_base_model(str(tiny_llama_dir), dtype="float32").eval()
    boards = GameSlots(4, 12).boards
    prompts = [model.encoder.encode_prompt(model.style.write_prompt(board)) for board in boards]
    assert len({len(prompt) for prompt in prompts}) > 1
    assert common_prefix_length(prompts) > 0
    expected = [model.complete(board) for board in boards]
    assert len(set(expected)) > 1
    assert model.complete_batch(boards) == expected
    assert model.complete_batch(boards, cache_prefix=True) == expected


def test_the_table_of_adapter_types_has_means_and_ranges_of_the_seeds() -> None:
    values = {key: [1.0, 1.0] for key in adapter_types.COLUMNS}
    table = adapter_types.table({"lora": values | {"val_loss": [0.5, 0.7]}, "miss": values})
    lora, miss = (line.split(" | ") for line in table.splitlines()[2:])
    column = [*adapter_types.COLUMNS].index("val_loss") + 1
    assert (lora[column], miss[column]) == ("0.600 (0.500 to 0.700)", "1.000")


@pytest.mark.e2e
def test_adapter_types_are_compared_with_lora_on_the_same_rows(
    tiny_llama_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("TOKENIZERS_PARALLELISM", "false")  # as the benchmark sets it
    path = tmp_path / "results.json"
    options = ["--base_model", str(tiny_llama_dir), "--steps", "3", "--games", "2", "--val_batches", "1"]
    adapter_types.main([*options, "--rank", "4", "--variants", "miss", "--json", str(path)])
    results = json.loads(path.read_text())["variants"]
    assert results.keys() == {"lora", "miss"}
    assert all(result.keys() == adapter_types.COLUMNS.keys() for result in results.values())
    assert results["lora"]["step_time_ratio"] == [1]
    assert results["miss"]["trained_parameters"] < results["lora"]["trained_parameters"]
    assert results["miss"]["val_loss"] != results["lora"]["val_loss"]
    assert all(0 <= result["val_move_accuracy"][0] <= 1 for result in results.values())
