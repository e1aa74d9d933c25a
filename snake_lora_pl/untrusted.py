"""Readers for untrusted input: small text, JSON and YAML files, and text on its way to a terminal.

Other untrusted input is read elsewhere: rows by ``data.jsonl``, weights by safetensors, checkpoints without pickle.
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

MAX_BYTES = 16 * 2**20
"""Largest file that ``read_text`` reads."""

# Far above what a config of this package contains.
_MAX_YAML_DEPTH = 100
_MAX_YAML_VALUES = 100_000


def read_text(path: str | os.PathLike[str]) -> str:
    """Read a small text file.

    Raises:
        ValueError: If it is larger than ``MAX_BYTES``, not a regular file, or not UTF-8.
        OSError: If it cannot be read.
    """
    path = Path(path)
    if not path.is_file():
        raise ValueError("not a regular file")
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
        ValueError: If the content is not a JSON object, or ``read_text`` raises it.
        OSError: If the file cannot be read.
    """
    try:
        content = json.loads(read_text(path))
    except RecursionError:
        raise ValueError("nested too deeply") from None
    if not isinstance(content, dict):
        raise ValueError("not a JSON object")
    return content


def load_yaml(text: str, load: Callable[[str], Any]) -> Any:
    """Load YAML after ``check_yaml`` accepts it.

    Args:
        text: The YAML.
        load: The loader.

    Raises:
        yaml.YAMLError: If ``text`` is not YAML, ``check_yaml`` rejects it, or it holds a value that cannot be
            converted, such as an integer of thousands of digits.
    """
    import yaml

    try:
        check_yaml(text)
        return load(text)
    except yaml.YAMLError:
        raise
    except (ValueError, TypeError, LookupError, AttributeError) as error:
        # PyYAML does not catch errors in text that is not UTF-8, or in values such as `0b_`, which resemble integers.
        raise yaml.YAMLError(f"a value that cannot be read ({error})") from error


def check_yaml(text: str) -> None:
    """Check YAML for duplicate keys, expansion of aliases and deep nesting before a loader reads it.

    Loaders keep the last of duplicate keys. A few nested aliases can expand to more values than fit into memory, and
    recursive loaders overflow the stack.

    Raises:
        yaml.YAMLError: If ``text`` is not YAML or has one of these defects; the message states which and the line.
    """
    import yaml

    anchor_sizes: dict[str, int] = {}  # number of values, aliases expanded
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
            if event.anchor not in anchor_sizes:
                raise yaml.YAMLError(f"line {line}: alias *{event.anchor} is undefined or refers to its own parent")
            size, anchor = anchor_sizes[event.anchor], None
        elif isinstance(event, yaml.CollectionEndEvent):
            ended = stack.pop()
            size, anchor = ended.size, ended.anchor
        else:
            continue
        if size > _MAX_YAML_VALUES:
            raise yaml.YAMLError(f"line {line}: expands to more than {_MAX_YAML_VALUES:,} values")
        if anchor is not None:
            anchor_sizes[anchor] = size
        if stack and not stack[-1].add(size, key):
            raise yaml.YAMLError(f"line {line}: duplicate key {key}. Remove one.")


class _Collection:
    """A mapping or sequence while it is parsed."""

    def __init__(self, is_mapping: bool, anchor: str | None) -> None:
        self.is_mapping = is_mapping
        self.anchor = anchor
        self.size = 1
        self._num_items = 0
        self._keys: set[str] = set()

    def add(self, size: int, key: str | None) -> bool:
        """Add the next key or value; return False for a duplicate key."""
        is_key = self.is_mapping and self._num_items % 2 == 0
        self._num_items += 1
        self.size += size
        if not is_key or key is None:
            return True
        is_new = key not in self._keys
        self._keys.add(key)
        return is_new


def printable(text: str) -> str:
    """Escape the characters that could control a terminal; line breaks stay."""
    return "".join(
        char if char == "\n" or char.isprintable() else char.encode("unicode_escape").decode("ascii") for char in text
    )
