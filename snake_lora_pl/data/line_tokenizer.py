"""Tokenizing by line, each distinct line once: rows of games consist of few different lines.

A byte-level BPE tokenizer first cuts a text into words by a pattern, and merges bytes within a word only. Where that
pattern always cuts behind a line's end, and looks no further back than the cut, the ids of a text are those of its
lines, one after the other. That holds for the patterns below, between a newline that follows a visible character and
the visible character that follows it. Any other text, and any other tokenizer, is tokenized whole.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from itertools import chain
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from tokenizers import Tokenizer

# Of Llama 3, and of Qwen 2, which takes digits one by one.
_KNOWN_PATTERNS = {
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}"
    + digits
    + r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
    for digits in ("{1,3}", "")
}
# Bounds what is remembered to some tens of megabytes, however many rows there are.
_MAX_CHARS_REMEMBERED = 2**24


class LineTokenizer:
    """Gives the ids that the tokenizer gives for whole texts.

    Args:
        backend: A tokenizer that ``cuts_at_lines``, without truncation and padding.
    """

    def __init__(self, backend: Tokenizer) -> None:
        self._backend = backend
        self._ids: dict[str, list[int]] = {}
        self._num_chars = 0

    def __call__(self, texts: list[str]) -> list[list[int]]:
        """Ids of each text, without special tokens around it."""
        if self._num_chars > _MAX_CHARS_REMEMBERED:
            self._ids.clear()
            self._num_chars = 0
        pieces = [list(split_lines(text)) for text in texts]
        known = self._ids
        new = list({piece: None for piece in chain.from_iterable(pieces) if piece not in known})
        for piece, encoding in zip(new, self._backend.encode_batch_fast(new, add_special_tokens=False), strict=True):
            known[piece] = encoding.ids
            self._num_chars += len(piece)
        return [list(chain.from_iterable(map(known.__getitem__, one))) for one in pieces]


def split_lines(text: str) -> Iterator[str]:
    """Cut a text behind each newline that stands between two visible characters; the parts joined are the text."""
    # Python's white space comprises all that the tokenizers' patterns call so: where in doubt, nothing is cut.
    parts: list[str] = []
    for line in text.split("\n"):
        if parts:
            before = parts[-1]
            if before and not before[-1].isspace() and line and not line[0].isspace():
                yield "\n".join(parts) + "\n"
                parts = []
        parts.append(line)
    yield "\n".join(parts)


def cuts_at_lines(backend: Tokenizer) -> bool:
    """Whether a tokenizer gives a text the ids of its lines, one after the other."""
    settings = json.loads(backend.to_str())
    model, pre_tokenizer = settings["model"], settings["pre_tokenizer"] or {}
    # Composition, too, goes no further than a line's end.
    normalizer = (settings["normalizer"] or {}).get("type")
    return (
        model["type"] == "BPE"
        and not model["dropout"]
        and normalizer in (None, "NFC")
        and all(map(_is_within_line, settings["added_tokens"]))
        and _cuts_words(pre_tokenizer.get("pretokenizers", [pre_tokenizer]))
    )


def _is_within_line(added_token: dict[str, Any]) -> bool:
    takes_neighbours = added_token["lstrip"] or added_token["rstrip"] or added_token["single_word"]
    return not takes_neighbours and "\n" not in added_token["content"]


def _cuts_words(steps: list[dict[str, Any]]) -> bool:
    """Whether pre-tokenizers cut words by a known pattern and do nothing else that reaches beyond a line."""
    num_patterns = 0
    for step in steps:
        kind = step.get("type")
        if kind == "ByteLevel" and not step["add_prefix_space"]:
            num_patterns += step["use_regex"]
        elif kind == "Split" and step["pattern"].get("Regex") in _KNOWN_PATTERNS and step["behavior"] == "Isolated":
            num_patterns += not step["invert"]
        elif kind != "Digits":
            return False
    return num_patterns > 0
