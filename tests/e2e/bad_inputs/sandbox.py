"""What a hostile case may damage: copies of good things, in a directory of its own."""

from __future__ import annotations

import json
import os
import pickle
import shutil
import struct
from dataclasses import dataclass
from pathlib import Path
from typing import Any


class Payload:
    """Writes the canary when it is unpickled."""

    def __init__(self, canary: Path) -> None:
        self.canary = canary

    def __reduce__(self) -> tuple[Any, ...]:
        return os.mkdir, (str(self.canary),)


@dataclass
class Sandbox:
    """Paths that a case's builder works with.

    Args:
        root: The working directory of the command; nothing outside it may change.
        base: A good base model directory, outside; not to be changed.
        rows: A good JSONL file, outside; not to be changed.
        good_adapter: A good adapter directory, outside; not to be changed.
        good_checkpoint: A good checkpoint of a run, outside; not to be changed.
    """

    root: Path
    base: Path
    rows: Path
    good_adapter: Path
    good_checkpoint: Path

    @property
    def canary(self) -> Path:
        """A directory that comes into being if something was executed."""
        return self.root / "canary"

    def file(self, name: str, content: str | bytes) -> str:
        """Write a file and return its path."""
        path = self.root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content.encode() if isinstance(content, str) else content)
        return str(path)

    def adapter(self) -> Path:
        """A copy of the good adapter."""
        return Path(shutil.copytree(self.good_adapter, self.root / "adapter"))

    def model(self) -> Path:
        """A copy of the good base model."""
        return Path(shutil.copytree(self.base, self.root / "model"))

    def edited_json(self, path: Path, **changes: Any) -> None:
        """Change keys of a JSON file; a value of ``...`` removes the key."""
        content = json.loads(path.read_text())
        for key, value in changes.items():
            content.pop(key, None) if value is ... else content.update({key: value})
        path.write_text(json.dumps(content))

    def pickle_bytes(self) -> bytes:
        """A pickle that writes the canary."""
        return pickle.dumps(Payload(self.canary))

    def torch_file(self) -> bytes:
        """A torch file with such a pickle inside."""
        import io

        import torch

        buffer = io.BytesIO()
        torch.save({"state_dict": Payload(self.canary)}, buffer)
        return buffer.getvalue()


def safetensors_bytes(header: Any, body: bytes = b"", length: int | None = None) -> bytes:
    """A safetensors file with any header, and any length claimed for it."""
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    return struct.pack("<Q", len(text) if length is None else length) + text + body
