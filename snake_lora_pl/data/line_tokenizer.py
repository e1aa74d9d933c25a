"""Tokenization line by line, each distinct line once: the rows of games consist of few distinct lines.

A byte-level BPE tokenizer first splits a text into words by a pattern, and merges bytes within a word only. If the
pattern always splits at a line's end and does not look behind the split, the ids of a text are the concatenated ids of
its lines. This holds for the patterns below, between a newline that follows a visible character and the visible
character after it. Other texts, and other tokenizers, are tokenized as a whole.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from itertools import chain
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from tokenizers import Tokenizer

# Patterns of Llama 3 (up to three digits per word) and Qwen 2 (one digit per word), from their tokenizer.json.
_KNOWN_PATTERNS = {
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}"
    + digits
    + r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
    for digits in ("{1,3}", "")
}
# Limits the cache to tens of megabytes.
_MAX_CACHED_CHARS = 2**24


class LineTokenizer:
    """Tokenizer that returns the same ids as its backend and caches the ids of lines.

    Args:
        backend: A tokenizer for which ``splits_at_lines`` is true, without truncation and padding.
    """

    def __init__(self, backend: Tokenizer) -> None:
        self._backend = backend
        self._ids: dict[str, list[int]] = {}
        self._num_chars = 0

    def __call__(self, texts: list[str]) -> list[list[int]]:
        """Return the ids of each text, without special tokens around it."""
        if self._num_chars > _MAX_CACHED_CHARS:
            self._ids.clear()
            self._num_chars = 0
        lines_by_text = [list(split_lines(text)) for text in texts]
        cached = self._ids
        new = list({line: None for line in chain.from_iterable(lines_by_text) if line not in cached})
        for line, encoding in zip(new, self._backend.encode_batch_fast(new, add_special_tokens=False), strict=True):
            cached[line] = encoding.ids
            self._num_chars += len(line)
        return [list(chain.from_iterable(map(cached.__getitem__, lines))) for lines in lines_by_text]


def split_lines(text: str) -> Iterator[str]:
    """Split a text after each newline between two visible characters; the concatenated parts are the text."""
    # Python's white space includes all white space of the patterns, so a doubtful character prevents a split.
    parts: list[str] = []
    for line in text.split("\n"):
        if parts:
            before = parts[-1]
            if before and not before[-1].isspace() and line and not line[0].isspace():
                yield "\n".join(parts) + "\n"
                parts = []
        parts.append(line)
    yield "\n".join(parts)


def splits_at_lines(backend: Tokenizer) -> bool:
    """Return whether the ids of a text are the concatenated ids of its lines."""
    settings = json.loads(backend.to_str())
    model, pre_tokenizer = settings["model"], settings["pre_tokenizer"] or {}
    # NFC composes characters within a line only.
    normalizer = (settings["normalizer"] or {}).get("type")
    return (
        model["type"] == "BPE"
        and not model["dropout"]
        and normalizer in (None, "NFC")
        and all(map(_is_within_line, settings["added_tokens"]))
        and _splits_words(pre_tokenizer.get("pretokenizers", [pre_tokenizer]))
    )


def _is_within_line(added_token: dict[str, Any]) -> bool:
    matches_neighbors = added_token["lstrip"] or added_token["rstrip"] or added_token["single_word"]
    return not matches_neighbors and "\n" not in added_token["content"]


def _splits_words(steps: list[dict[str, Any]]) -> bool:
    """Return whether the steps split words by a known pattern and do nothing else that crosses a line's end."""
    num_patterns = 0
    for step in steps:
        name = step.get("type")
        if name == "ByteLevel" and not step["add_prefix_space"]:
            num_patterns += step["use_regex"]
        elif name == "Split" and step["pattern"].get("Regex") in _KNOWN_PATTERNS and step["behavior"] == "Isolated":
            num_patterns += not step["invert"]
        elif name != "Digits":
            return False
    return num_patterns > 0
