"""Readers of untrusted input, tested with inputs that are almost valid."""

from __future__ import annotations

import gzip
import json

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from snake_lora_pl.game import Move
from snake_lora_pl.game.text import STYLES
from snake_lora_pl.paths import shipped_configs
from tests.fuzz import targets
from tests.game.board_strategies import boards

# Untrusted input: thousands of generated examples.
pytestmark = pytest.mark.e2e

often = settings(max_examples=1000)
anything = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=8),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=8), inner, max_size=3),
    max_leaves=8,
)
texts = st.text(max_size=40)
row = st.fixed_dictionaries({"prompt": texts | anything, "completion": texts | anything}, optional={"game": anything})
line = st.one_of(
    row.map(json.dumps),
    row.map(lambda fields: json.dumps(fields, ensure_ascii=False)),
    anything.map(json.dumps),
    st.builds(lambda text, cut: text[:cut], row.map(json.dumps), st.integers(0, 60)),
    st.builds(lambda depth: "[" * depth, st.integers(0, 5000)),
).map(lambda text: text.encode("utf-8", "surrogatepass"))
ends = st.sampled_from([b"\n", b"\r\n", b"\n\n", b"", b"\r", b"\x85", b"\xe2\x80\xa8"])
file_of_rows = st.lists(st.tuples(line | st.binary(max_size=40), ends).map(b"".join), max_size=6).map(b"".join)
compressed = file_of_rows.map(gzip.compress)
cut = st.builds(lambda content, at: content[:at], compressed, st.integers(0, 60))


@st.composite
def damaged(draw: st.DrawFn, whole: st.SearchStrategy[str]) -> str:
    """Return a text with up to three parts removed, duplicated or overwritten."""
    text = draw(whole)
    for _ in range(draw(st.integers(0, 3))):
        begin = draw(st.integers(0, len(text)))
        end = draw(st.integers(begin, min(len(text), begin + 40)))
        patch = draw(
            st.one_of(st.just(""), st.just(text[begin:end] * 2), st.sampled_from("0123456789[]{},:;'\n-& *"), texts)
        )
        text = text[:begin] + patch + text[end:]
    return text


written = st.builds(
    lambda style, board, move: style.write_prompt(board) + "\n" + style.write_completion(board, move),
    st.sampled_from(list(STYLES.values())),
    boards(max_size=6),
    st.sampled_from([*Move]),
)
whole_metadata = {
    "adapter_type": "lora", "base_model": "b", "base_model_name": "b", "base_revision": None, "base_sha256": None,
    "trainable_parameters": 1, "total_parameters": 2, "grid_size": 10, "metrics": {"val/loss": 1.5},
    "data": {"template": "instruction", "prompt_format": "compact"}, "peft_config": {"peft_type": "LORA", "r": 8},
    "play": {"player": "a", "players": {"a": {"apples_mean": 1.5}}, "settings": {"games": 3}},
}  # fmt: skip


@st.composite
def nearly_metadata(draw: st.DrawFn) -> str:
    fields = {**whole_metadata, **draw(st.dictionaries(st.sampled_from(sorted(whole_metadata)), anything, max_size=2))}
    for part in ("data", "peft_config", "play"):
        if isinstance(fields[part], dict) and fields[part]:
            name = draw(st.sampled_from(sorted(fields[part])))
            fields[part] = {**fields[part], **draw(st.just({}) | anything.map(lambda value, name=name: {name: value}))}
    return json.dumps(fields)


nodes = st.recursive(
    st.sampled_from(["1", "0b_", "a", "*a", "&a x", "'", "!!int z", "<<: *a", "? [a]", "~", "2020-99-99", "9" * 5000])
    | texts,
    lambda inner: (
        st.builds("[{}, {}]".format, inner, inner)
        | st.builds("{{a: {}, {}: 1}}".format, inner, inner)
        | st.builds("&a {}".format, inner)
    ),
    max_leaves=6,
)
shipped = st.sampled_from([path.read_text(encoding="utf-8") for path in shipped_configs().values()])
names = st.sampled_from(["", ".", "..", "/", "\0", "balanced.yaml", "balanced", "~", "x" * 5000, "\ud800", "*.yaml"])


@often
@given(file_of_rows | compressed | cut | st.binary(max_size=80))
def test_any_file_gives_rows_or_errors(content: bytes) -> None:
    targets.rows(content)


@often
@given(damaged(written) | texts)
def test_any_text_is_read_as_a_board(text: str) -> None:
    targets.prompts(text)


@often
@given(nearly_metadata() | damaged(nearly_metadata()) | anything.map(json.dumps) | texts)
def test_any_metadata_is_valid_or_an_error(text: str) -> None:
    targets.metadata(text)


@often
@given(damaged(shipped) | nodes | names | texts)
def test_any_config_is_valid_or_an_error(text: str) -> None:
    targets.configs(text)
