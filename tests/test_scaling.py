"""The cost model's tables in ``docs/explanation/scaling.md`` are what ``python -m benchmarks.scaling`` works out."""

from __future__ import annotations

import re

import pytest

from benchmarks.scaling import CONFIGS, PAGE_PATH, TABLES, sizes_of, step_of
from snake_lora_pl.training.memory.estimate import MemoryEstimate

WORKED_OUT_AGAIN = ["135M", "7B"]


@pytest.mark.parametrize(
    ("name", "num_parameters"),
    # As their model cards have them.
    [("135M", 134_515_008), ("1.5B", 1_543_714_304), ("7B", 7_615_616_512), ("70B", 70_553_706_496)],
)
def test_the_configs_are_those_of_the_models_they_are_named_after(name: str, num_parameters: int) -> None:
    assert sizes_of(CONFIGS[name]).total == num_parameters


@pytest.mark.slow
@pytest.mark.parametrize("name", TABLES)
def test_a_table_in_the_page_is_what_the_script_prints(name: str) -> None:
    (there,) = re.findall(rf"<!-- begin {name}: .*?-->\n\n(.*?)\n\n<!-- end {name}: ", PAGE_PATH.read_text(), re.DOTALL)
    lines = there.splitlines()
    header, rule, *rows = TABLES[name](WORKED_OUT_AGAIN).splitlines()
    assert lines[:2] == [header, rule]
    assert [line.split(" | ")[0].strip("| ") for line in lines[2:]] == list(CONFIGS)
    assert [lines[2 + list(CONFIGS).index(model)] for model in WORKED_OUT_AGAIN] == rows


@pytest.mark.slow
@pytest.mark.parametrize("model", WORKED_OUT_AGAIN)
def test_counted_operations_are_those_of_the_textbook(model: str) -> None:
    # A frozen weight: two operations forward and two for the gradient of its input; the head at 160 of 512 tokens.
    step, config = step_of(model, in_slices=True), CONFIGS[model]
    head = config.vocab_size * config.hidden_size * 160 / 512
    # Queries times keys and probabilities times values forward; backward the first once more, and two for each.
    attention = 4 * 3.5 * 512 * config.hidden_size * config.num_hidden_layers
    products = 4 * (step.sizes.in_layers + head)
    assert step.base_flops_per_token == pytest.approx(products + attention, rel=0.01)


@pytest.mark.slow
def test_slices_and_wires_follow_from_the_sizes() -> None:
    step = step_of("135M")
    assert isinstance(step.memory, MemoryEstimate)
    # One process has it all, two layers of it twice; with ever more only what is not cut is left.
    assert step.bytes_in_slices(1) == step.bytes_whole() + 2 * step.layer_bytes / 30
    left = step.outside_bytes + step.memory.activations + 2 * step.layer_bytes / 30
    assert step.bytes_in_slices(10**6) == pytest.approx(left, rel=1e-5)
    # 1,843,200 trained parameters of 4 bytes.
    assert step.bytes_sent_whole(2) == 1_843_200 * 4
    assert step.bytes_sent_whole(1) == step.bytes_sent_in_slices(1) == 0
    assert step.bytes_sent_in_slices(2) == step.layer_bytes + 1.5 * 1_843_200 * 4
