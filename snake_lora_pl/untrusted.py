"""Reading small files that a stranger may have written, and saying what came of it to a terminal.

Rows of a data set are ``data.jsonl``'s affair; weights are read by safetensors, checkpoints without pickles.
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

MAX_BYTES = 16 * 2**20
# What a config of this package comes nowhere near.
_MAX_YAML_DEPTH = 100
_MAX_YAML_VALUES = 100_000


def read_text(path: str | os.PathLike[str]) -> str:
    """Read a small text file.

    Raises:
        ValueError: If it is larger than ``MAX_BYTES``, no regular file, or not UTF-8.
        OSError: If it cannot be read.
    """
    path = Path(path)
    if not path.is_file():
        raise ValueError("no regular file")
    with open(path, "rb") as file:
        content = file.read(MAX_BYTES + 1)
    if len(content) > MAX_BYTES:
        raise ValueError(f"larger than {MAX_BYTES // 2**20} MiB")
    try:
        return content.decode("utf-8")
    except UnicodeDecodeError as error:
        raise ValueError(f"not UTF-8 (byte 0x{content[error.start]:02x} at {error.start})") from None


def read_json_object(path: str | os.PathLike[str]) -> dict[str, Any]:
    """Read a small file that holds a JSON object.

    Raises:
        ValueError: If it does not, or as ``read_text`` does.
        OSError: If it cannot be read.
    """
    try:
        content = json.loads(read_text(path))
    except RecursionError:
        raise ValueError("nested too deep") from None
    if not isinstance(content, dict):
        raise ValueError("no JSON object")
    return content


def load_yaml(text: str, load: Callable[[str], Any]) -> Any:
    """Read YAML that ``check_yaml`` found nothing in.

    Args:
        text: The YAML.
        load: What reads it.

    Raises:
        yaml.YAMLError: If it is none, or holds what nothing can be made of, such as an integer of thousands of digits.
    """
    import yaml

    try:
        check_yaml(text)
        return load(text)
    except yaml.YAMLError:
        raise
    except (ValueError, TypeError, LookupError, AttributeError) as error:
        # What PyYAML lets through: text that is not UTF-8, and values such as `0b_`, an integer only by its looks.
        raise yaml.YAMLError(f"a value that cannot be read ({error})") from error


def check_yaml(text: str) -> None:
    """Look through YAML for what a reader would take too literally, before one reads it.

    Of a key that stands twice readers keep the last. A few aliases of aliases stand for more values than memory holds,
    and what reads nested values runs out of stack.

    Raises:
        yaml.YAMLError: If ``text`` is no YAML, or holds one of these; the message says which and in what line.
    """
    import yaml

    sizes: dict[str, int] = {}  # of what has an anchor, in values, aliases followed
    stack: list[_Collection] = []
    for event in yaml.parse(text, Loader=getattr(yaml, "CSafeLoader", yaml.SafeLoader)):
        line = event.start_mark.line + 1
        key = None
        if isinstance(event, yaml.CollectionStartEvent):
            if len(stack) == _MAX_YAML_DEPTH:
                raise yaml.YAMLError(f"line {line}: nested more than {_MAX_YAML_DEPTH} deep")
            stack.append(_Collection(isinstance(event, yaml.MappingStartEvent), event.anchor))
            continue
        if isinstance(event, yaml.ScalarEvent):
            size, anchor, key = 1, event.anchor, event.value
        elif isinstance(event, yaml.AliasEvent):
            if event.anchor not in sizes:
                raise yaml.YAMLError(f"line {line}: *{event.anchor} stands for nothing, or for what it stands in")
            size, anchor = sizes[event.anchor], None
        elif isinstance(event, yaml.CollectionEndEvent):
            ended = stack.pop()
            size, anchor = ended.size, ended.anchor
        else:
            continue
        if size > _MAX_YAML_VALUES:
            raise yaml.YAMLError(f"line {line}: stands for more than {_MAX_YAML_VALUES:,} values, aliases followed")
        if anchor is not None:
            sizes[anchor] = size
        if stack and not stack[-1].add(size, key):
            raise yaml.YAMLError(f"line {line}: the key {key} stands twice; remove one")


class _Collection:
    """A mapping or a sequence of which some values have been seen."""

    def __init__(self, is_mapping: bool, anchor: str | None) -> None:
        self.is_mapping = is_mapping
        self.anchor = anchor
        self.size = 1
        self._num_seen = 0
        self._keys: set[str] = set()

    def add(self, size: int, key: str | None) -> bool:
        """Take in the next value, or the next key; False where that key has been seen."""
        is_key = self.is_mapping and self._num_seen % 2 == 0
        self._num_seen += 1
        self.size += size
        if not is_key or key is None:
            return True
        is_new = key not in self._keys
        self._keys.add(key)
        return is_new


def printable(text: str) -> str:
    """Text as it can go to any terminal: what would steer one is escaped, line breaks stay."""
    return "".join(_printable_letters(text))


def _printable_letters(text: str) -> Iterator[str]:
    for letter in text:
        yield letter if letter == "\n" or letter.isprintable() else letter.encode("unicode_escape").decode("ascii")
