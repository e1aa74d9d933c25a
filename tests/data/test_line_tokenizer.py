from __future__ import annotations

import copy
import json
import unicodedata
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st
from tokenizers import AddedToken, Regex, Tokenizer, normalizers, pre_tokenizers

from snake_lora_pl.data import line_tokenizer
from snake_lora_pl.data.line_tokenizer import LineTokenizer, split_lines, splits_at_lines

SPACES = [chr(code) for code in range(0x110000) if chr(code).isspace()]
# Characters at which a split can go wrong: all white space, line ends, and classes of characters in the patterns.
TEXTS = (
    st.text(st.sampled_from([*"\n\n\n\n", *SPACES, *"aZß漢7½']-_.,:!\u0301\u0300", "\r", "\x00"]), max_size=40)
    | st.text()
)


@pytest.fixture(scope="module")
def byte_level(tiny_tokenizer) -> Tokenizer:
    """Tokenizer with SmolLM2's pre-tokenizer: single digits, then GPT-2's pattern."""
    backend = Tokenizer.from_str(tiny_tokenizer.backend_tokenizer.to_str())
    backend.encode_special_tokens = True
    backend.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    )
    return backend


@pytest.fixture(scope="module", params=sorted(line_tokenizer._KNOWN_PATTERNS))
def patterned(request, byte_level: Tokenizer) -> Tokenizer:
    """Tokenizer with the pre-tokenizer of Llama 3, or of Qwen 2, and NFC."""
    backend = copy.deepcopy(byte_level)
    backend.normalizer = normalizers.NFC()
    backend.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(request.param), "isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    return backend


def whole(backend: Tokenizer, text: str) -> list[int]:
    return backend.encode(text, add_special_tokens=False).ids


@given(TEXTS)
def test_concatenated_lines_are_the_text(text: str) -> None:
    assert "".join(split_lines(text)) == text


@given(text=TEXTS)
def test_ids_equal_those_of_the_whole_text(byte_level: Tokenizer, text: str) -> None:
    assert splits_at_lines(byte_level)
    assert LineTokenizer(byte_level)([text]) == [whole(byte_level, text)]


@given(text=TEXTS)
def test_ids_equal_those_of_the_whole_text_with_other_patterns(patterned: Tokenizer, text: str) -> None:
    assert splits_at_lines(patterned)
    assert LineTokenizer(patterned)([text]) == [whole(patterned, text)]


def test_ids_of_real_rows_equal_those_of_the_whole_text(byte_level: Tokenizer, bfs512_sample_path: Path) -> None:
    rows = [json.loads(line) for line in bfs512_sample_path.read_text().splitlines()]
    texts = [text for row in rows for text in (row["prompt"], row["completion"])]
    assert LineTokenizer(byte_level)(texts) == [whole(byte_level, text) for text in texts]


def test_python_treats_all_white_space_of_the_patterns_as_white_space() -> None:
    # The patterns' \s is Unicode's White_Space; a split next to such a character could be wrong.
    white_space = [chr(c) for c in range(0x110000) if unicodedata.category(chr(c)) in ("Zs", "Zl", "Zp")]
    assert {*white_space, *"\t\n\v\f\r\x85"} <= set(SPACES)


def test_each_distinct_line_is_tokenized_once(byte_level: Tokenizer) -> None:
    tokenize = LineTokenizer(byte_level)
    tokenize(["first\nsecond\nthird", "first\nsecond\nfourth"])
    assert sorted(tokenize._ids) == ["first\n", "fourth", "second\n", "third"]


def test_cache_of_lines_is_bounded(byte_level: Tokenizer, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(line_tokenizer, "_MAX_CACHED_CHARS", 100)
    tokenize = LineTokenizer(byte_level)
    for number in range(50):
        text = f"line {number}\nand another line {number}"
        assert tokenize([text]) == [whole(byte_level, text)]
        assert sum(map(len, tokenize._ids)) < 150


@pytest.mark.parametrize(
    "change",
    [
        lambda t: setattr(t, "pre_tokenizer", pre_tokenizers.Metaspace()),
        lambda t: setattr(t, "pre_tokenizer", pre_tokenizers.ByteLevel(add_prefix_space=True)),
        lambda t: setattr(t, "pre_tokenizer", pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)),
        lambda t: setattr(t, "pre_tokenizer", pre_tokenizers.Split(Regex(r"\S+\s+\S+"), "isolated")),
        lambda t: setattr(t, "normalizer", normalizers.Prepend("_")),
        lambda t: t.add_tokens([AddedToken(".\nA")]),
        lambda t: t.add_tokens([AddedToken("word", lstrip=True)]),
    ],
    ids=[
        "metaspace",
        "prefix space",
        "no pattern",
        "unknown pattern",
        "prepending",
        "token across lines",
        "token with spaces",
    ],
)
def test_other_tokenizers_are_not_split_at_lines(byte_level: Tokenizer, change) -> None:
    backend = copy.deepcopy(byte_level)
    change(backend)
    assert not splits_at_lines(backend)
