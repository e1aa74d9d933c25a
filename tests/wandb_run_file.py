"""Reader of the file that W&B writes for an offline run."""

from __future__ import annotations

import json
import struct
from collections.abc import Iterator
from pathlib import Path
from typing import Any

_BLOCK_BYTES = 2**15
_FILE_HEADER_BYTES = _RECORD_HEADER_BYTES = 7
_FULL, _LAST = 1, 4


def _read_records(path: Path) -> Iterator[Any]:
    """Yield the protobuf records of a run file, which uses LevelDB's log format after a header of W&B.

    Format: https://github.com/google/leveldb/blob/main/doc/log_format.md
    """
    from wandb.proto.wandb_internal_pb2 import Record

    content = path.read_bytes()
    offset, parts = _FILE_HEADER_BYTES, []
    while offset + _RECORD_HEADER_BYTES <= len(content):
        left_in_block = _BLOCK_BYTES - offset % _BLOCK_BYTES
        if left_in_block < _RECORD_HEADER_BYTES:
            offset += left_in_block
            continue
        _, size, record_type = struct.unpack("<IHB", content[offset : offset + _RECORD_HEADER_BYTES])
        offset += _RECORD_HEADER_BYTES
        if record_type == 0 or offset + size > len(content):  # not written yet
            return
        parts.append(content[offset : offset + size])
        offset += size
        if record_type in (_FULL, _LAST):
            yield Record.FromString(b"".join(parts))
            parts = []


class WandbRunFile:
    """Content of an offline run.

    Attributes:
        directory: The run's directory below ``wandb/``.
        run: Protobuf record of the run.
        config: Nested config values.
        metrics: Metric definitions by name.
        history: One dictionary per logged step.
        artifacts: Artifacts, without the ones that W&B makes of tables.
        is_complete: Whether the run was finished.
    """

    def __init__(self, save_dir: Path) -> None:
        (self.directory,) = save_dir.glob("wandb/offline-run-*")
        (path,) = self.directory.glob("run-*.wandb")
        self.config: dict[str, Any] = {}
        self.metrics: dict[str, Any] = {}
        self.history: list[dict[str, Any]] = []
        self.artifacts: list[Any] = []
        self.is_complete = False
        for record in _read_records(path):
            record_type = record.WhichOneof("record_type")
            if record_type == "run":
                self.run = record.run
                self._update_config(record.run.config)
            elif record_type == "config":
                self._update_config(record.config)
            elif record_type == "metric":
                self.metrics[record.metric.name or record.metric.glob_name] = record.metric
            elif record_type == "history":
                row: dict[str, Any] = {}
                for item in record.history.item:
                    _set_nested(row, list(item.nested_key) or [item.key], json.loads(item.value_json))
                self.history.append(row)
            elif record_type == "exit":
                self.is_complete = True
            elif record_type == "artifact" and record.artifact.type != "run_table":
                self.artifacts.append(record.artifact)

    def _update_config(self, config: Any) -> None:
        for item in config.update:
            _set_nested(self.config, list(item.nested_key) or [item.key], json.loads(item.value_json))

    def values(self, key: str) -> list[Any]:
        """Return the values logged under a key, in order."""
        return [row[key] for row in self.history if key in row]

    def file(self, value: dict[str, Any]) -> Path:
        """Return the path of a logged file."""
        return self.directory / "files" / value["path"]


def _set_nested(target: dict[str, Any], keys: list[str], value: Any) -> None:
    for key in keys[:-1]:
        target = target.setdefault(key, {})
    target[keys[-1]] = value
