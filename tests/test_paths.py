from __future__ import annotations

import pytest

from snake_lora_pl.paths import distinct_names, get_model_path

ADAPTER_DIR = "lora_adapters/model_artifacts"


def adapter_of_run(timestamp: str, grid_size: int = 10, name: str = "snake_reasoning") -> str:
    return str(get_model_path("llm_finetune", "0.03", grid_size, name, timestamp) / ADAPTER_DIR)


@pytest.mark.parametrize(
    ("paths", "names"),
    [
        (
            [adapter_of_run("20260101_120000"), adapter_of_run("20260102_120000")],
            ["20260101_120000", "20260102_120000"],
        ),
        ([adapter_of_run("20260101_120000", name="a"), adapter_of_run("20260101_120000", name="b")], ["a", "b"]),
        (
            [adapter_of_run("20260101_120000", 10), adapter_of_run("20260102_120000", 8)],
            ["grid-size-10_20260101_120000", "grid-size-8_20260102_120000"],
        ),
        (
            [f"/small/{adapter_of_run('20260101_120000')}", f"/large/{adapter_of_run('20260102_120000')}"],
            ["small_20260101_120000", "large_20260102_120000"],
        ),
        (["/a/small", "/a/large"], ["small", "large"]),
        (["/x/a/final", "/x/b/final", "/x/b/c/final"], ["a", "b", "b_c"]),
        (["/x/a", "/x/a/b"], ["a", "b"]),
        (["/x/a b", "/x/a_b", "/x/ü"], ["a_b_1", "a_b_2", "ü"]),
        (["here", "/x/there"], None),
    ],
)
def test_directories_are_named_by_the_parts_in_which_they_differ(paths: list[str], names: list[str] | None) -> None:
    found = distinct_names(paths)
    assert len(set(found)) == len(paths)
    assert names is None or found == names
    assert not any("/" in name for name in found)
