"""Tests of the cost model, and of its tables in ``docs/explanation/scaling.md``."""

from __future__ import annotations

import re

import pytest

from benchmarks.cost_model import CONFIGS, sizes_of, step_of
from benchmarks.scaling import PAGE_PATH, TABLES

CHECKED_MODELS = ["135M", "7B"]


@pytest.mark.parametrize(
    ("name", "num_parameters"),
    # From the model cards.
    [("135M", 134_515_008), ("1.5B", 1_543_714_304), ("7B", 7_615_616_512), ("70B", 70_553_706_496)],
)
def test_configs_have_the_parameters_of_their_models(name: str, num_parameters: int) -> None:
    assert sizes_of(CONFIGS[name]).total == num_parameters


@pytest.mark.slow
@pytest.mark.parametrize("name", TABLES)
def test_the_page_contains_the_computed_tables(name: str) -> None:
    page = PAGE_PATH.read_text(encoding="utf-8")
    (table,) = re.findall(rf"<!-- begin {name}: .*?-->\n\n(.*?)\n\n<!-- end {name}: ", page, re.DOTALL)
    lines = table.splitlines()
    checked = CHECKED_MODELS[-1:]
    header, separator, *rows = TABLES[name](checked).splitlines()
    assert lines[:2] == [header, separator]
    assert [line.split(" | ")[0].strip("| ") for line in lines[2:]] == list(CONFIGS)
    assert [lines[2 + list(CONFIGS).index(model)] for model in checked] == rows


@pytest.mark.slow
@pytest.mark.parametrize("model", CHECKED_MODELS)
def test_counted_operations_agree_with_the_textbook_formula(model: str) -> None:
    # A frozen weight costs two operations forward and two for the gradient of its input. The LM head runs for 160 of
    # 512 tokens.
    step, config = step_of(model, sharded=True), CONFIGS[model]
    lm_head = config.vocab_size * config.hidden_size * 160 / 512
    # Forward, queries by keys and probabilities by values; backward, the first of them again and two for each.
    attention = 4 * 3.5 * 512 * config.hidden_size * config.num_hidden_layers
    products = 4 * (step.sizes.in_layers + lm_head)
    assert step.base_flops_per_token == pytest.approx(products + attention, rel=0.01)


@pytest.mark.slow
def test_memory_and_communication_follow_from_the_sizes() -> None:
    step = step_of("135M")
    two_layers = 2 * step.layer_bytes / 30
    assert step.fsdp_bytes(1) == step.ddp_bytes + two_layers
    # With many processes, only what is not sharded remains.
    not_sharded = step.outside_bytes + step.memory.activations + two_layers
    assert step.fsdp_bytes(10**6) == pytest.approx(not_sharded, rel=1e-5)
    # 1,843,200 trained parameters of 4 bytes.
    assert step.ddp_sent_bytes(2) == 1_843_200 * 4
    assert step.ddp_sent_bytes(1) == step.fsdp_sent_bytes(1) == 0
    assert step.fsdp_sent_bytes(2) == step.layer_bytes + 1.5 * 1_843_200 * 4
