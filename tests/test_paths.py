from __future__ import annotations

import pytest

from snake_lora_pl.paths import distinct_names, get_model_path

RUN = "lora_adapters/model_artifacts"


def run_of(timestamp: str, grid_size: int = 10, name: str = "snake_reasoning") -> str:
    return str(get_model_path("llm_finetune", "0.03", grid_size, name, timestamp) / RUN)


@pytest.mark.parametrize(
    ("paths", "names"),
    [
        ([run_of("20260101_120000"), run_of("20260102_120000")], ["20260101_120000", "20260102_120000"]),
        ([run_of("20260101_120000", name="a"), run_of("20260101_120000", name="b")], ["a", "b"]),
        (
            [run_of("20260101_120000", 10), run_of("20260102_120000", 8)],
            ["grid-size-10_20260101_120000", "grid-size-8_20260102_120000"],
        ),
        (
            [f"/small/{run_of('20260101_120000')}", f"/large/{run_of('20260102_120000')}"],
            ["small_20260101_120000", "large_20260102_120000"],
        ),
        (["/a/small", "/a/large"], ["small", "large"]),
        (["/x/a/final", "/x/b/final", "/x/b/c/final"], ["a", "b", "b_c"]),
        (["/x/a", "/x/a/b"], ["a", "b"]),
        (["/x/a b", "/x/a_b", "/x/ü"], ["a_b_1", "a_b_2", "ü"]),
        (["here", "/x/there"], None),
    ],
)
def test_directories_are_named_by_what_tells_them_apart(paths: list[str], names: list[str] | None) -> None:
    found = distinct_names(paths)
    assert len(set(found)) == len(paths)
    assert names is None or found == names
    assert not any("/" in name for name in found)
