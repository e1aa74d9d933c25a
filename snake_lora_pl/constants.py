"""Values that several packages share."""

from __future__ import annotations

IGNORE_INDEX = -100
"""Label of a token that carries no loss; the default of ``torch.nn.functional.cross_entropy``."""

DEFAULT_BASE_MODEL = "smollm2-135m"
"""Short name of the embedded default base model."""

DEFAULT_GRID_SIZE = 10
"""Cells along one side of the grid where neither a setting nor a file states it."""
