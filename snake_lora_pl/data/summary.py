"""Summary of the data of a run: hashes and counts for the log, the metadata of adapters and the report."""

from __future__ import annotations

import hashlib
from typing import Any

from snake_lora_pl.data.loaders import ExampleSubset


def summarize(train: ExampleSubset | None, val: ExampleSubset, **settings: Any) -> dict[str, Any]:
    """Return hashes and counts.

    Args:
        train: Examples to train on; None for a run that only validates on ``val_path``.
        val: Examples to validate on.
        settings: Settings to include, such as ``template``.

    Returns:
        ``data_hash``, the hash of the training files (the validation files without training); ``split_hash``, the hash
        of which rows train and which validate; the settings; counts of rows, games, duplicates and skipped rows.
    """
    subset = val.empty() if train is None else train
    examples = subset.examples
    num_split_off = len(val) if val.examples is examples else 0
    digest = hashlib.blake2b(digest_size=16)
    for part in (subset, val):
        digest.update(part.examples.content_hash.encode())
        digest.update(len(part).to_bytes(8, "little"))
        digest.update(part.indices.tobytes())
    return {
        "data_hash": examples.content_hash,
        "split_hash": digest.hexdigest(),
        **settings,
        "num_rows": len(examples),
        "num_games": examples.num_games,
        "num_train_rows": len(subset),
        "num_train_games": subset.num_games(),
        "num_val_rows": len(val),
        "num_val_games": val.num_games(),
        "num_duplicates_removed": 0 if train is None else len(examples) - num_split_off - len(train),
        "num_skipped": dict(examples.skipped),
    }


def format_summary(summary: dict[str, Any]) -> str:
    """Return the counts of a summary as one line for the log."""
    parts = []
    for rows, games, purpose in (
        ("num_train_rows", "num_train_games", "to train on"),
        ("num_val_rows", "num_val_games", "to validate on"),
    ):
        if num_rows := summary[rows]:
            num_games = f"{summary[games]:,} game{'' if summary[games] == 1 else 's'}"
            parts.append(f"{num_rows:,} rows of {num_games} {purpose}")
    if removed := summary["num_duplicates_removed"]:
        parts.append(f"{removed:,} dropped because their prompt is also in the validation rows")
    size = summary["grid_size"]
    return f"{'; '.join(parts) or 'no rows'} ({size}x{size}, {summary['prompt_format']})"
