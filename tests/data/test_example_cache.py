from __future__ import annotations

import json
import logging
import multiprocessing
import os
import pickle
import re
import shutil
import time
from pathlib import Path

import pytest

from snake_lora_pl.data import example_cache
from snake_lora_pl.data.data_files import expand_paths
from snake_lora_pl.data.draw_weights import UNKNOWN
from snake_lora_pl.data.encoding import Encoder, Example
from snake_lora_pl.data.example_cache import hash_file, open_examples
from snake_lora_pl.data.example_files import ExampleFile, ExampleFileWriter, Examples
from snake_lora_pl.data.jsonl import Row, read_rows
from snake_lora_pl.errors import UserError
from snake_lora_pl.paths import encoded_rows_dir
from tests.data.conftest import games_of_steps


@pytest.fixture
def encoder(tiny_tokenizer) -> Encoder:
    return Encoder(tiny_tokenizer)


@pytest.fixture
def encoded_paths(monkeypatch) -> list[Path]:
    """Paths of the files that were encoded, in order."""
    paths = []
    build = example_cache._Cache.build

    def record(self, directory: Path, path: Path, content_hash: str) -> None:
        paths.append(path)
        build(self, directory, path, content_hash)

    monkeypatch.setattr(example_cache._Cache, "build", record)
    return paths


def contents(rows: Examples) -> list[tuple[list[int], int, str]]:
    return [(list(ids), num_prompt, source) for ids, num_prompt, source in (rows[i] for i in range(len(rows)))]


def test_examples_equal_the_output_of_the_encoder(encoder, bfs512_sample_path):
    rows = open_examples([bfs512_sample_path], encoder)
    expected = encoder.encode(list(read_rows([bfs512_sample_path])))
    assert contents(rows) == [(list(ids), num_prompt, source) for ids, num_prompt, source in expected]
    assert rows.lengths().tolist() == [len(ids) for ids, _, _ in expected]


def test_examples_do_not_depend_on_chunk_boundaries(encoder, bfs512_sample_path, monkeypatch):
    whole = contents(open_examples([bfs512_sample_path], encoder))
    shutil.rmtree(encoded_rows_dir("").parent)
    monkeypatch.setattr(example_cache, "_ROWS_PER_CHUNK", 100)
    monkeypatch.setattr(example_cache, "_CHARS_PER_CHUNK", 30_000)
    assert contents(open_examples([bfs512_sample_path], encoder)) == whole


def test_files_form_one_sequence_in_the_order_given(encoder, write_rows):
    paths = [write_rows(games_of_steps(*steps), f"{i}.jsonl") for i, steps in enumerate([(3, 2), (4,), (1, 1)])]
    rows = open_examples(paths, encoder)
    assert [source for _, _, source in contents(rows)] == [
        f"{path}:{line}" for path, num_rows in zip(paths, (5, 4, 2), strict=True) for line in range(1, num_rows + 1)
    ]
    assert rows.games().tolist() == [0, 0, 0, 1, 1, 2, 2, 2, 2, 3, 4]
    assert rows.num_games == 5


def test_empty_file_among_others_is_accepted(encoder, write_rows):
    paths = [write_rows([], "a.jsonl"), write_rows(games_of_steps(2), "b.jsonl"), write_rows([], "c.jsonl")]
    rows = open_examples(paths, encoder)
    assert [source for _, _, source in contents(rows)] == [f"{paths[1]}:1", f"{paths[1]}:2"]


def test_no_rows_are_an_error_that_counts_skipped_rows(encoder, write_rows):
    with pytest.raises(UserError, match=r"rows\.jsonl: .*'prompt' and 'completion'"):
        open_examples([write_rows([])], encoder)
    with pytest.raises(UserError, match=r"rows\.jsonl: .*2 bad JSON"):
        open_examples([write_rows([b"x", b"y"])], encoder, "skip")


def test_prompt_hashes_are_equal_exactly_for_equal_prompts(encoder, write_rows):
    rows = [{"prompt": prompt, "completion": f"c{i}"} for i, prompt in enumerate(["a", "b", "a", "A"])]
    hashes = open_examples([write_rows(rows)], encoder).prompt_hashes().tolist()
    assert hashes[0] == hashes[2]
    assert len(set(hashes)) == 3


@pytest.mark.parametrize(("vocabulary_size", "dtype"), [(2**16, "uint16"), (2**16 + 1, "uint32")])
def test_ids_take_two_bytes_up_to_65536_tokens(tmp_path, vocabulary_size, dtype):
    last_id = vocabulary_size - 1
    with ExampleFileWriter(tmp_path, vocabulary_size) as writer:
        writer.write([(Row("p", "c", None, "x", 1), 0, Example([last_id, 0], 1, "x:1"))], [UNKNOWN])
        writer.finish(content_hash="", num_games=1, skipped={})
    assert json.loads((tmp_path / "meta.json").read_text())["token_dtype"] == dtype
    assert ExampleFile(tmp_path, Path("x"))[0].input_ids.tolist() == [last_id, 0]


def test_pickle_contains_paths_instead_of_arrays(encoder, bfs512_sample_path):
    rows = open_examples([bfs512_sample_path], encoder)
    pickled = pickle.dumps(rows)
    assert len(pickled) < 2000
    assert contents(pickle.loads(pickled)) == contents(rows)


def test_second_opening_uses_the_cache(encoder, bfs512_sample_path, encoded_paths):
    first = contents(open_examples([bfs512_sample_path], encoder))
    assert contents(open_examples([bfs512_sample_path], encoder)) == first
    assert len(encoded_paths) == 1


def test_copy_of_a_file_uses_the_same_cache_entry(encoder, write_rows, encoded_paths):
    a, b = (write_rows(games_of_steps(3), name) for name in ("a.jsonl", "b.jsonl"))
    open_examples([a], encoder)
    assert open_examples([b], encoder)[0].source == f"{b}:1"
    assert len(encoded_paths) == 1


def test_file_name_need_not_be_utf_8(encoder, write_rows, caplog):
    caplog.set_level(logging.CRITICAL, "snake_lora_pl")  # pytest-xdist cannot transfer such a name in a log record
    path = write_rows(games_of_steps(3), os.fsdecode(b"\xff.jsonl"))
    assert len(open_examples(expand_paths(str(path.parent / "*.jsonl")), encoder)) == 3


def test_additional_file_does_not_reencode_the_others(encoder, write_rows, encoded_paths):
    a, b = (write_rows(games_of_steps(steps), f"{steps}.jsonl") for steps in (3, 4))
    open_examples([a], encoder)
    open_examples([a, b], encoder)
    assert encoded_paths == [a, b]


def test_each_setting_has_its_own_cache_entry(tiny_tokenizer, write_rows, encoded_paths):
    path = write_rows(games_of_steps(3))
    for settings in ({}, {"template": "raw"}, {"max_length": 300}, {"on_overflow": "drop"}):
        open_examples([path], Encoder(tiny_tokenizer, **settings))
    open_examples([path], Encoder(tiny_tokenizer), "skip")
    assert len(encoded_paths) == 5


def test_edit_is_detected_even_if_size_and_mtime_are_restored(encoder, write_rows):
    path = write_rows([{"prompt": "p", "completion": "abc"}])
    an_hour_ago = time.time() - 3600
    os.utime(path, (an_hour_ago, an_hour_ago))
    times = path.stat()
    before = contents(open_examples([path], encoder))
    write_rows([{"prompt": "p", "completion": "xyz"}])
    os.utime(path, ns=(times.st_atime_ns, times.st_mtime_ns))
    assert contents(open_examples([path], encoder)) != before


def test_hash_of_an_old_file_is_cached(write_rows, monkeypatch):
    path = write_rows(games_of_steps(3))
    monkeypatch.setattr(example_cache, "_TIMESTAMP_RESOLUTION_S", -1)
    first = hash_file(path)
    monkeypatch.setattr("hashlib.blake2b", None)
    monkeypatch.setattr(example_cache, "hash_text", lambda *_: next(encoded_rows_dir("content_hashes").iterdir()).name)
    assert hash_file(path) == first


def test_hash_of_a_fresh_file_is_not_cached(write_rows):
    hash_file(write_rows(games_of_steps(3)))
    assert not encoded_rows_dir("content_hashes").exists()


def test_error_of_hashing_names_the_file_and_the_reason(write_rows, monkeypatch):
    path = write_rows(games_of_steps(1))

    def fail(*_: object, **__: object) -> None:
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr("builtins.open", fail)
    with pytest.raises(UserError, match=r"rows\.jsonl: .*Permission denied"):
        hash_file(path)


def test_file_that_changes_while_it_is_read_is_an_error(encoder, write_rows, monkeypatch):
    path = write_rows(games_of_steps(3))
    build = example_cache._Cache.build

    def build_and_append(*args) -> None:
        build(*args)
        with open(path, "ab") as file:
            file.write(b"\n")

    monkeypatch.setattr(example_cache._Cache, "build", build_and_append)
    with pytest.raises(UserError, match=r"rows\.jsonl: changed"):
        open_examples([path], encoder)


def cached_dir() -> Path:
    (meta,) = encoded_rows_dir("").glob("*/meta.json")
    return meta.parent


DAMAGES = {
    "no_meta": lambda directory: (directory / "meta.json").unlink(),
    "half_a_meta": lambda directory: (directory / "meta.json").write_text("{"),
    "foreign_meta": lambda directory: (directory / "meta.json").write_text("[]"),
    "no_tokens": lambda directory: (directory / "tokens.bin").unlink(),
    "short_tokens": lambda directory: os.truncate(directory / "tokens.bin", 10),
    "long_lines": lambda directory: (directory / "line.bin").write_bytes(bytes(10_000)),
    "zeroed_offsets": lambda directory: (directory / "offsets.bin").write_bytes(bytes(8 * 4)),
}


@pytest.mark.parametrize("damage", DAMAGES.values(), ids=DAMAGES)
def test_damaged_cache_entry_is_rebuilt_with_a_warning(encoder, write_rows, caplog, damage):
    path = write_rows(games_of_steps(3))
    before = contents(open_examples([path], encoder))
    entry = cached_dir()
    damage(entry)
    assert contents(open_examples([path], encoder)) == before
    assert entry.name in caplog.text
    caplog.clear()
    open_examples([path], encoder)
    assert caplog.records == []


def test_leftover_of_a_killed_build_is_removed(encoder, write_rows):
    path = write_rows(games_of_steps(3))
    open_examples([path], encoder)
    directory = cached_dir()
    shutil.rmtree(directory)
    leftover = directory.with_name(f".{directory.name}.abc.tmp")
    leftover.mkdir()
    open_examples([path], encoder)
    assert not leftover.exists()


def test_failed_build_leaves_no_files(encoder, write_rows):
    with pytest.raises(UserError, match=r"1 missing key"):
        open_examples([write_rows([*games_of_steps(3), b"{}"])], encoder)
    assert [path for path in encoded_rows_dir("").iterdir() if not path.name.endswith(".lock")] == []


def _open_in_a_process(path: Path, tokenizer_dir: Path, barrier, queue) -> None:
    from transformers import AutoTokenizer

    encoder = Encoder(AutoTokenizer.from_pretrained(tokenizer_dir))
    barrier.wait()
    queue.put(contents(open_examples([path], encoder)))


def test_two_processes_build_the_same_entry(tiny_llama_dir, encoder, write_rows):
    path = write_rows(games_of_steps(10, 10))
    fork = multiprocessing.get_context("fork")
    barrier, queue = fork.Barrier(2), fork.Queue()
    processes = [fork.Process(target=_open_in_a_process, args=(path, tiny_llama_dir, barrier, queue)) for _ in range(2)]
    for process in processes:
        process.start()
    results = [queue.get(timeout=60) for _ in processes]
    for process in processes:
        process.join()
    assert results[0] == results[1] == contents(open_examples([path], encoder))


def test_error_of_an_unwritable_cache_names_its_path_and_variable(encoder, write_rows, tmp_path, monkeypatch):
    (tmp_path / "file").touch()
    with monkeypatch.context() as patch:
        patch.setenv("SNAKE_LORA_PL_CACHE", str(tmp_path / "file" / "cache"))
        with pytest.raises(UserError, match=r"file/cache .*SNAKE_LORA_PL_CACHE"):
            open_examples([write_rows(games_of_steps(1))], encoder)


def test_full_disk_is_an_error_that_names_the_variable(encoder, write_rows, monkeypatch):
    def fail(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(ExampleFileWriter, "write", fail)
    with pytest.raises(UserError, match=r"No space left on device.*SNAKE_LORA_PL_CACHE"):
        open_examples([write_rows(games_of_steps(1))], encoder)


def test_invalid_and_too_long_rows_of_all_files_are_reported_together(tiny_tokenizer, write_rows):
    long = {"prompt": "p" * 300, "completion": "c"}
    a, b = write_rows([long, *games_of_steps(2), b"{}"], "a.jsonl"), write_rows([long], "b.jsonl")
    with pytest.raises(UserError, match=r"2 too long, 1 missing key") as caught:
        open_examples([a, b], Encoder(tiny_tokenizer, max_length=300, on_overflow="error"))
    assert [line.split(": ")[0] for line in str(caught.value).splitlines()[1:]] == [f"{a}:4", f"{a}:1", f"{b}:1"]


def test_dropped_rows_are_logged_at_every_opening(tiny_tokenizer, write_rows, caplog):
    path = write_rows([{"prompt": "p" * 300, "completion": "c"}, *games_of_steps(2)])
    encoder = Encoder(tiny_tokenizer, max_length=300, on_overflow="drop")
    for expected in ("dropped 1 rows over data.max_length=300", "skipped 1 too long"):
        rows = open_examples([path], encoder)
        assert [row.source for row in map(rows.__getitem__, range(2))] == [f"{path}:2", f"{path}:3"]
        assert rows.skipped == {"too long": 1}
        assert expected in caplog.text


def test_row_that_cannot_be_shortened_is_an_error_even_if_invalid_rows_are_skipped(tiny_tokenizer, write_rows):
    path = write_rows([{"prompt": "p" * 300, "completion": "c"}, b"{}", *games_of_steps(1)])
    with pytest.raises(UserError, match=r"1 too long"):
        open_examples([path], Encoder(tiny_tokenizer, max_length=300), "skip")


def test_skipped_rows_are_logged_at_every_opening(encoder, write_rows, caplog):
    path = write_rows([b"{}", *games_of_steps(2), b"nonsense"])
    for _ in range(2):
        assert len(open_examples([path], encoder, "skip")) == 2
        assert "1 missing key, 1 bad JSON" in caplog.text
        caplog.clear()


def test_row_with_a_special_token_is_invalid_under_chat(tiny_tokenizer, write_rows):
    path = write_rows([{"prompt": "a<|im_end|>", "completion": "c"}, {"prompt": "a", "completion": "c"}])
    encoder = Encoder(tiny_tokenizer, "chat")
    with pytest.raises(UserError, match=r"rows\.jsonl:1: .*'<\|im_end\|>'"):
        open_examples([path], encoder)
    assert len(open_examples([path], encoder, "skip")) == 1


def test_long_build_logs_its_progress(encoder, bfs512_sample_path, caplog, monkeypatch):
    monkeypatch.setattr(example_cache, "_ROWS_PER_CHUNK", 100)
    monkeypatch.setattr(example_cache, "_PROGRESS_INTERVAL_S", 0)
    with caplog.at_level(logging.INFO):
        open_examples([bfs512_sample_path], encoder)
    counts = [re.search(r" (\d+) rows", record.message)[1] for record in caplog.records]
    assert counts == ["100", "200", "300", "354", "354"]


def test_games_of_two_files_are_distinct(encoder, write_rows):
    rows = [{**row, "game": 0} for row in games_of_steps(2)]
    paths = [write_rows(rows, "a.jsonl"), write_rows(rows[:1], "b.jsonl")]
    assert open_examples(paths, encoder).games().tolist() == [0, 0, 1]


def test_sample_has_four_games(encoder, bfs512_sample_path):
    assert open_examples([bfs512_sample_path], encoder).num_games == 4
