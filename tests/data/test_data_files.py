from __future__ import annotations

import os

import pytest

from snake_lora_pl.data.data_files import expand_paths, expand_weighted_paths
from snake_lora_pl.errors import UserError

GOOD = b'{"prompt": "p", "completion": "c"}'


def test_matches_of_a_glob_are_sorted(write_rows, tmp_path):
    paths = [write_rows([GOOD], name) for name in ("b.jsonl", "a.jsonl", "c.txt")]
    assert expand_paths(str(tmp_path / "*.jsonl")) == [paths[1], paths[0]]


def test_glob_ignores_directories(write_rows, tmp_path):
    path = write_rows([GOOD])
    (tmp_path / "directory.jsonl").mkdir()
    assert expand_paths(str(tmp_path / "*.jsonl")) == [path]


def test_list_may_contain_paths_and_globs(write_rows, tmp_path):
    a, b, c = (write_rows([GOOD], f"{name}.jsonl") for name in "abc")
    assert expand_paths([str(c), str(tmp_path / "[ab].jsonl")]) == [c, a, b]


def test_file_whose_name_looks_like_a_glob_is_found(write_rows):
    path = write_rows([GOOD], "rows[1].jsonl")
    assert expand_paths(str(path)) == [path]


def test_tilde_is_the_home_directory(write_rows, tmp_path, monkeypatch):
    path = write_rows([GOOD])
    with monkeypatch.context() as patch:
        patch.setenv("HOME", str(tmp_path))
        assert expand_paths("~/rows.jsonl") == [path]


def test_file_named_twice_is_returned_once_with_a_warning(write_rows, tmp_path, caplog):
    path = write_rows([GOOD])
    (tmp_path / "link.jsonl").symlink_to(path)
    assert expand_paths([str(path), str(tmp_path / "*.jsonl")]) == [path]
    assert f"{tmp_path / 'link.jsonl'}" in caplog.records[0].message
    assert f"{path}" in caplog.records[0].message


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        ("{tmp}/nothing/rows.jsonl", r"nothing/rows\.jsonl"),
        ("{tmp}/row.jsonl", r"row\.jsonl.*rows\.jsonl"),
        ("{tmp}", r"directory.*/\*\.jsonl"),
        ("{tmp}/*.json", r"\*\.json"),
        ("{tmp}/pipe", "/pipe"),
        ("/dev/null", "/dev/null"),
        ("{tmp}/loop", "/loop"),
        ("{tmp}/a\0b", "/a\0b"),
        ("", "''"),
        ("  ", "'  '"),
        ([], r"\*\.jsonl"),
        (["{tmp}/rows.jsonl", "{tmp}/other.csv"], r"other\.csv"),
    ],
)
def test_error_of_a_path_without_a_file_names_it(write_rows, tmp_path, spec, message):
    write_rows([GOOD])
    os.mkfifo(tmp_path / "pipe")
    (tmp_path / "loop").symlink_to(tmp_path / "loop")
    spec = spec.format(tmp=tmp_path) if isinstance(spec, str) else [one.format(tmp=tmp_path) for one in spec]
    with pytest.raises(UserError, match=message):
        expand_paths(spec)


def test_weight_follows_a_path_or_a_glob(tmp_path):
    for name in ("a.jsonl", "b.jsonl", "c@3"):
        (tmp_path / name).touch()
    a, b, c = (tmp_path / name for name in ("a.jsonl", "b.jsonl", "c@3"))
    assert expand_weighted_paths(f"{a}@2.5") == {a: 2.5}
    assert expand_weighted_paths([f"{tmp_path}/*.jsonl@1e-1"]) == {a: 0.1, b: 0.1}
    # A file whose whole name exists is that file.
    assert expand_weighted_paths([str(b), c, f"{c}@2"][:2]) == {b: 1, c: 1}
    assert expand_weighted_paths(f"{c}@2") == {c: 2}
    assert list(expand_weighted_paths([str(b), str(a)])) == expand_paths([str(b), str(a)])


@pytest.mark.parametrize("weight", ["0", "-1", "nan", "inf", "1e999"])
def test_weight_that_is_not_positive_and_finite_is_an_error(tmp_path, weight):
    (tmp_path / "a.jsonl").touch()
    with pytest.raises(UserError, match=f"a.jsonl: .*{weight}"):
        expand_weighted_paths(f"{tmp_path}/a.jsonl@{weight}")


def test_suffix_that_is_not_a_number_belongs_to_the_path(tmp_path):
    with pytest.raises(UserError, match="a.jsonl@heavy"):
        expand_weighted_paths(f"{tmp_path}/a.jsonl@heavy")


def test_file_with_two_weights_is_an_error(tmp_path):
    (tmp_path / "a.jsonl").touch()
    with pytest.raises(UserError, match=r"a\.jsonl.*2 and 1"):
        expand_weighted_paths([f"{tmp_path}/a.jsonl@2", f"{tmp_path}/*.jsonl"])
