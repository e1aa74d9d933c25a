"""The directory that a hostile input may change, with copies of good files."""

from __future__ import annotations

import io
import json
import os
import pickle
import shutil
import struct
from dataclasses import dataclass
from pathlib import Path
from typing import Any


class Payload:
    """Object that creates the canary directory when it is unpickled."""

    def __init__(self, canary: Path) -> None:
        self.canary = canary

    def __reduce__(self) -> tuple[Any, ...]:
        return os.mkdir, (str(self.canary),)


@dataclass
class Sandbox:
    """Paths for the builder of a case.

    Args:
        root: The working directory of the command; nothing outside it may change.
        base: A good base model directory outside ``root``; read-only.
        rows: A good JSONL file outside ``root``; read-only.
        good_adapter: A good adapter directory outside ``root``; read-only.
        good_checkpoint: A good checkpoint outside ``root``; read-only.
    """

    root: Path
    base: Path
    rows: Path
    good_adapter: Path
    good_checkpoint: Path

    @property
    def canary(self) -> Path:
        """Directory that exists if untrusted code was executed."""
        return self.root / "canary"

    def file(self, name: str, content: str | bytes) -> str:
        """Write a file below ``root`` and return its path."""
        path = self.root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content.encode() if isinstance(content, str) else content)
        return str(path)

    def adapter(self) -> Path:
        """Copy the good adapter."""
        return Path(shutil.copytree(self.good_adapter, self.root / "adapter"))

    def model(self) -> Path:
        """Copy the good base model."""
        return Path(shutil.copytree(self.base, self.root / "model"))

    def edit_json(self, path: Path, **changes: Any) -> None:
        """Change keys of a JSON file; a value of ``...`` removes the key."""
        content = json.loads(path.read_text())
        for key, value in changes.items():
            content.pop(key, None) if value is ... else content.update({key: value})
        path.write_text(json.dumps(content))

    def pickle_bytes(self) -> bytes:
        """Return a pickle that creates the canary."""
        return pickle.dumps(Payload(self.canary))

    def torch_file(self) -> bytes:
        """Return a torch file that contains such a pickle."""
        import torch

        buffer = io.BytesIO()
        torch.save({"state_dict": Payload(self.canary)}, buffer)
        return buffer.getvalue()


def safetensors_bytes(header: Any, body: bytes = b"", length: int | None = None) -> bytes:
    """Return a safetensors file with any header and any declared header length."""
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    return struct.pack("<Q", len(text) if length is None else length) + text + body
