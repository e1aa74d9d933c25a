from __future__ import annotations

import re

import pytest

from snake_lora_pl.adapters.patterns import problem_with_pattern

NAME = "model.layers.11.self_attn.some_rather_long_projection_of_it"


@pytest.mark.parametrize(
    "pattern",
    [
        "q_proj",
        r".*\.(q|v)_proj",
        r"model\.layers\.(\d|1\d)\.self_attn\.(q_proj|k_proj)",
        r"layers\.[0-9]+\..*_proj",
        r"^model\.layers\.\d+\.[^.]+\.[qkvo]_proj$",
        r"(?!.*lm_head).*",
        r"model\..*?\.layers\..*?\.[qv]_proj",
        "model.layers.0.self_attn.q_proj",
    ],
)
def test_common_patterns_are_accepted(pattern: str) -> None:
    assert problem_with_pattern(pattern) is None


@pytest.mark.parametrize(
    "pattern",
    [
        "(a+)+$",
        "(([a-z_.0-9])+)+!",
        "(foo|bar)+",
        "(a?){60}b",
        "(a{1,100}){50}",
        "(?=(a+)+)x",
        ".*" * 12 + "!",
        ".*" * 5,
        "a?" * 30,
        "(m|m)(o|o)(d|d)(e|e)(l|l)",
        "a" * 501,
        "(?P<x>a)",
    ],
)
def test_patterns_that_can_take_exponential_time_are_rejected(pattern: str) -> None:
    assert problem_with_pattern(pattern)


@pytest.mark.parametrize("pattern", ["(", ")", "[", "[z-a]", "(" * 400, "a{99999999999999999999}", "*"])
def test_invalid_patterns_are_rejected(pattern: str) -> None:
    assert problem_with_pattern(pattern)


@pytest.mark.parametrize("pattern", [".*" * 4 + "x$", "(.*|.*)(.*|.*)x"])
def test_slowest_accepted_patterns_terminate(pattern: str) -> None:
    assert problem_with_pattern(pattern) is None
    assert re.fullmatch(pattern, NAME) is None
