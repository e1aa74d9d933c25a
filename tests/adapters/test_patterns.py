from __future__ import annotations

import re

import pytest

from snake_lora_pl.adapters.patterns import problem_with_pattern

NAME = "model.layers.11.self_attn.some_rather_long_projection_of_it"


@pytest.mark.parametrize(
    "pattern",
    ["q_proj", r".*\.(q|v)_proj", r"model\.layers\.(\d|1\d)\.self_attn\.(q_proj|k_proj)", r"layers\.[0-9]+\..*_proj"],
)
def test_patterns_that_people_write_are_fine(pattern: str) -> None:
    assert problem_with_pattern(pattern) is None


@pytest.mark.parametrize(
    "pattern",
    ["(a+)+$", "(([a-z_.0-9])+)+!", "(foo|bar)+", "(a?){60}b", "(a{1,100}){50}", "(?=(a+)+)x", ".*" * 12 + "!"],
)
def test_patterns_that_may_take_for_ever_are_not(pattern: str) -> None:
    assert "for ever" in str(problem_with_pattern(pattern))


@pytest.mark.parametrize("pattern", ["(", "(" * 400, "a" * 501, "a{99999999999999999999}"])
def test_what_is_no_pattern_is_said_to_be_none(pattern: str) -> None:
    assert problem_with_pattern(pattern) is not None


def test_the_slowest_pattern_that_is_let_through_comes_to_an_end() -> None:
    pattern = ".*" * 4 + "!"
    assert problem_with_pattern(pattern) is None
    assert re.fullmatch(pattern, NAME) is None
