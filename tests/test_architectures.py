"""Every architecture from training to merging, and the table of the documentation.

The rows of the table are written by ``UPDATE_TABLES=1 pytest -m "" tests/test_architectures.py``.
"""

from __future__ import annotations

import os
import re
from pathlib import Path

import pytest

from snake_lora_pl.decoding import decoder
from tests.architecture_proof import Support, measure, write_rows
from tests.architectures import CONFIGS, NOT_CAUSAL, save_model

PAGE = Path(__file__).parents[1] / "docs" / "reference" / "base-models.md"
_ROW = re.compile(r"^\| `(\w+)` \|.*$", flags=re.MULTILINE)

# One of each path: fused layers, transposed layers with learned positions, changed logits with ``generate``.
QUICK = {"llama", "gpt2", "gemma2"}


@pytest.fixture(scope="module")
def rows(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_rows(tmp_path_factory.mktemp("rows"))


def write_row(support: Support) -> None:
    """Replace the row of an architecture in the table."""
    text = PAGE.read_text()
    found = {match[1]: match[0] for match in _ROW.finditer(text)} | {support.model_type: str(support)}
    header, _, rest = text.partition("|---|---|---|---|---|---|---|\n")
    rest = _ROW.sub("", rest).lstrip("\n")
    table = "\n".join(found[name] for name in CONFIGS if name in found)
    PAGE.write_text(f"{header}|---|---|---|---|---|---|---|\n{table}\n\n{rest}")


@pytest.mark.filterwarnings("ignore:You have overridden `on_before_batch_transfer`:UserWarning")
@pytest.mark.filterwarnings("ignore:.*does not have many workers:UserWarning")
@pytest.mark.parametrize(
    "model_type", [pytest.param(name, marks=[] if name in QUICK else pytest.mark.e2e) for name in CONFIGS]
)
def test_architecture_trains_plays_and_merges_as_plain_libraries_do_and_as_documented(
    model_type: str, rows: Path, tiny_llama_dir: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    pytest.importorskip("bitsandbytes")
    decoder._log_fallback.cache_clear()
    base_dir = save_model(model_type, tmp_path / "base", tiny_llama_dir)
    support = measure(model_type, base_dir, rows, tmp_path)
    logged = [record.getMessage() for record in caplog.records if record.name == decoder.__name__]
    assert bool(logged) == (support.games == "generate")
    if os.environ.get("UPDATE_TABLES"):
        write_row(support)
    assert str(support) in PAGE.read_text().splitlines()


def test_table_lists_the_architectures_that_are_tested() -> None:
    text = PAGE.read_text()
    assert [match[1] for match in _ROW.finditer(text)] == list(CONFIGS)
    assert all(f"`{name}`" in text for name in NOT_CAUSAL)
