"""Marks every test below as ``e2e``: command lines, several processes, untrusted input, documentation."""

from __future__ import annotations

from pathlib import Path

import pytest

DIRECTORY = Path(__file__).parent


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for item in items:
        if DIRECTORY in item.path.parents:
            item.add_marker(pytest.mark.e2e)
