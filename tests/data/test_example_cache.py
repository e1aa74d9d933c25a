from __future__ import annotations

import json
import logging
import multiprocessing
import os
import pickle
import shutil
import time
from pathlib import Path

import pytest

from snake_lora_pl.data import example_cache
from snake_lora_pl.data.encoding import Encoder
from snake_lora_pl.data.example_cache import EncodedRows, GameCounter, hash_file, open_encoded_rows
from snake_lora_pl.data.jsonl import Row, expand_paths, read_rows
from snake_lora_pl.errors import UserError
from snake_lora_pl.paths import encoded_rows_dir
from tests.data.conftest import games_of_steps, position

SHARED_DIR = Path(__file__).parents[3] / "shared" / "data" / "heuristics_v0.04"


@pytest.fixture
def encoder(tiny_tokenizer) -> Encoder:
    return Encoder(tiny_tokenizer)


@pytest.fixture
def count_builds(monkeypatch) -> list[Path]:
    """Paths of the files that are encoded from now on."""
    built = []
    build = example_cache._build

    def counting(directory: Path, path: Path, *args) -> None:
        built.append(path)
        build(directory, path, *args)

    monkeypatch.setattr(example_cache, "_build", counting)
    return built


def contents(rows: EncodedRows) -> list[tuple[list[int], int, str]]:
    return [(list(ids), num_prompt, source) for ids, num_prompt, source in (rows[i] for i in range(len(rows)))]


def settle(path: Path) -> None:
    """Make a file's time of last change look older than the resolution of time stamps."""
    monkeypatch_time = time.time() - 60
    os.utime(path, (monkeypatch_time, monkeypatch_time))


# What is kept


def test_rows_come_back_as_the_encoder_made_them(encoder, bfs512_sample_path):
    rows = open_encoded_rows([bfs512_sample_path], encoder)
    expected = encoder.encode(list(read_rows([bfs512_sample_path])))
    assert contents(rows) == [(list(ids), num_prompt, source) for ids, num_prompt, source in expected]
    assert rows.lengths().tolist() == [len(ids) for ids, _, _ in expected]
    assert rows.num_targets() == sum(len(ids) - num_prompt for ids, num_prompt, _ in expected)


def test_chunks_leave_no_trace(encoder, bfs512_sample_path, monkeypatch):
    whole = contents(open_encoded_rows([bfs512_sample_path], encoder))
    shutil.rmtree(encoded_rows_dir("").parent)
    monkeypatch.setattr(example_cache, "_ROWS_PER_CHUNK", 100)
    monkeypatch.setattr(example_cache, "_CHARS_PER_CHUNK", 30_000)
    assert contents(open_encoded_rows([bfs512_sample_path], encoder)) == whole


def test_several_files_are_one_sequence_in_the_order_given(encoder, write_rows):
    paths = [write_rows(games_of_steps(*steps), f"{i}.jsonl") for i, steps in enumerate([(3, 2), (4,), (1, 1)])]
    rows = open_encoded_rows(paths, encoder)
    assert [source for _, _, source in contents(rows)] == [
        f"{path}:{line}" for path, num_rows in zip(paths, (5, 4, 2), strict=True) for line in range(1, num_rows + 1)
    ]
    assert rows.games().tolist() == [0, 0, 0, 1, 1, 2, 2, 2, 2, 3, 4]
    assert rows.num_games == 5


def test_an_empty_file_among_others_is_fine(encoder, write_rows):
    paths = [write_rows([], "a.jsonl"), write_rows(games_of_steps(2), "b.jsonl"), write_rows([], "c.jsonl")]
    rows = open_encoded_rows(paths, encoder)
    assert [source for _, _, source in contents(rows)] == [f"{paths[1]}:1", f"{paths[1]}:2"]


def test_no_rows_at_all_are_an_error(encoder, write_rows):
    with pytest.raises(UserError, match=r"rows.jsonl: no rows\. Write one JSON object"):
        open_encoded_rows([write_rows([])], encoder)
    with pytest.raises(UserError, match=r"rows.jsonl: no rows .2 bad JSON left out"):
        open_encoded_rows([write_rows([b"x", b"y"])], encoder, "skip")


def test_prompts_hash_alike_if_and_only_if_they_are_alike(encoder, write_rows):
    rows = [{"prompt": prompt, "completion": f"c{i}"} for i, prompt in enumerate(["a", "b", "a", "A"])]
    hashes = open_encoded_rows([write_rows(rows)], encoder).prompt_hashes().tolist()
    assert hashes[0] == hashes[2]
    assert len(set(hashes)) == 3


@pytest.mark.parametrize(("vocabulary_size", "dtype"), [(2**16, "uint16"), (2**16 + 1, "uint32")])
def test_ids_take_two_bytes_where_the_vocabulary_allows(tmp_path, vocabulary_size, dtype):
    from snake_lora_pl.data.encoding import Example

    last_id = vocabulary_size - 1
    with example_cache._Writer(tmp_path, vocabulary_size) as writer:
        writer.write([(Row("p", "c", None, "x", 1), 0, Example([last_id, 0], 1, "x:1"))])
        writer.finish(content_hash="", num_games=1, skipped={})
    assert json.loads((tmp_path / "meta.json").read_text())["token_dtype"] == dtype
    assert example_cache.EncodedFile(tmp_path, Path("x"))[0].input_ids.tolist() == [last_id, 0]


def test_pickled_rows_are_a_name_not_a_copy(encoder, bfs512_sample_path):
    rows = open_encoded_rows([bfs512_sample_path], encoder)
    pickled = pickle.dumps(rows)
    assert len(pickled) < 2000
    assert contents(pickle.loads(pickled)) == contents(rows)


# The cache


def test_a_second_opening_encodes_nothing_and_gives_the_same(encoder, bfs512_sample_path, count_builds):
    first = contents(open_encoded_rows([bfs512_sample_path], encoder))
    assert contents(open_encoded_rows([bfs512_sample_path], encoder)) == first
    assert len(count_builds) == 1


def test_a_file_of_another_name_and_the_same_bytes_is_not_encoded_again(encoder, write_rows, count_builds):
    a, b = (write_rows(games_of_steps(3), name) for name in ("a.jsonl", "b.jsonl"))
    open_encoded_rows([a], encoder)
    assert open_encoded_rows([b], encoder)[0].source == f"{b}:1"
    assert len(count_builds) == 1


def test_a_file_name_may_be_any_bytes(encoder, write_rows, caplog):
    caplog.set_level(logging.CRITICAL, "snake_lora_pl")  # pytest-xdist cannot pass such a name on in what was logged
    path = write_rows(games_of_steps(3), os.fsdecode(b"\xff.jsonl"))
    assert len(open_encoded_rows(expand_paths(str(path.parent / "*.jsonl")), encoder)) == 3


def test_one_more_shard_leaves_the_others_as_they_are(encoder, write_rows, count_builds):
    a, b = (write_rows(games_of_steps(steps), f"{steps}.jsonl") for steps in (3, 4))
    open_encoded_rows([a], encoder)
    open_encoded_rows([a, b], encoder)
    assert count_builds == [a, b]


def test_other_settings_have_other_rows(tiny_tokenizer, write_rows, count_builds):
    path = write_rows(games_of_steps(3))
    for settings in ({}, {"template": "raw"}, {"max_length": 300}, {"on_overflow": "drop"}):
        open_encoded_rows([path], Encoder(tiny_tokenizer, **settings))
    open_encoded_rows([path], Encoder(tiny_tokenizer), "skip")
    assert len(count_builds) == 5


def test_an_edit_is_noticed_also_where_size_and_time_of_change_are_put_back(encoder, write_rows):
    path = write_rows([{"prompt": "p", "completion": "abc"}])
    settle(path)
    times = path.stat()
    before = contents(open_encoded_rows([path], encoder))
    write_rows([{"prompt": "p", "completion": "xyz"}])
    os.utime(path, ns=(times.st_atime_ns, times.st_mtime_ns))
    assert contents(open_encoded_rows([path], encoder)) != before


def test_the_hash_of_a_settled_file_is_remembered(write_rows, monkeypatch):
    path = write_rows(games_of_steps(3))
    monkeypatch.setattr(example_cache, "_STAMPS_SETTLE_S", -1)
    first = hash_file(path)
    monkeypatch.setattr("hashlib.blake2b", None)
    monkeypatch.setattr(example_cache, "_hash_text", lambda *_: next(encoded_rows_dir("content_hashes").iterdir()).name)
    assert hash_file(path) == first


def test_the_hash_of_a_fresh_file_is_not_remembered_since_its_time_stamps_prove_nothing(write_rows):
    hash_file(write_rows(games_of_steps(3)))
    assert not encoded_rows_dir("content_hashes").exists()


def test_a_file_that_cannot_be_hashed_is_an_error(write_rows, monkeypatch):
    path = write_rows(games_of_steps(1))

    def fail(*_: object, **__: object) -> None:
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr("builtins.open", fail)
    with pytest.raises(UserError, match=r"rows.jsonl: cannot be read \(Permission denied\)"):
        hash_file(path)


def test_a_file_that_changes_while_it_is_read_is_an_error(encoder, write_rows, monkeypatch):
    path = write_rows(games_of_steps(3))
    build = example_cache._build

    def build_and_append(*args) -> None:
        build(*args)
        with open(path, "ab") as file:
            file.write(b"\n")

    monkeypatch.setattr(example_cache, "_build", build_and_append)
    with pytest.raises(UserError, match=r"rows.jsonl: changed while it was read"):
        open_encoded_rows([path], encoder)


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
def test_a_damaged_cache_is_built_again_with_a_warning(encoder, write_rows, caplog, damage):
    path = write_rows(games_of_steps(3))
    before = contents(open_encoded_rows([path], encoder))
    damage(cached_dir())
    assert contents(open_encoded_rows([path], encoder)) == before
    assert "is damaged" in caplog.text
    caplog.clear()
    open_encoded_rows([path], encoder)
    assert "is damaged" not in caplog.text


def test_what_a_killed_build_left_is_removed_by_the_next(encoder, write_rows):
    path = write_rows(games_of_steps(3))
    open_encoded_rows([path], encoder)
    directory = cached_dir()
    shutil.rmtree(directory)
    leftover = directory.with_name(f".{directory.name}.abc.tmp")
    leftover.mkdir()
    open_encoded_rows([path], encoder)
    assert not leftover.exists()


def test_a_build_that_fails_leaves_nothing_behind(encoder, write_rows):
    with pytest.raises(UserError, match="1 bad row"):
        open_encoded_rows([write_rows([*games_of_steps(3), b"{}"])], encoder)
    assert [path for path in encoded_rows_dir("").iterdir() if not path.name.endswith(".lock")] == []


def _open_in_a_process(path: Path, tokenizer_dir: Path, barrier, queue) -> None:
    from transformers import AutoTokenizer

    encoder = Encoder(AutoTokenizer.from_pretrained(tokenizer_dir))
    barrier.wait()
    queue.put(contents(open_encoded_rows([path], encoder)))


def test_two_processes_may_build_at_once(tiny_llama_dir, encoder, write_rows):
    path = write_rows(games_of_steps(10, 10))
    fork = multiprocessing.get_context("fork")
    barrier, queue = fork.Barrier(2), fork.Queue()
    processes = [fork.Process(target=_open_in_a_process, args=(path, tiny_llama_dir, barrier, queue)) for _ in range(2)]
    for process in processes:
        process.start()
    results = [queue.get(timeout=60) for _ in processes]
    for process in processes:
        process.join()
    assert results[0] == results[1] == contents(open_encoded_rows([path], encoder))


def test_a_cache_that_cannot_be_written_names_the_variable_that_moves_it(encoder, write_rows, tmp_path, monkeypatch):
    (tmp_path / "file").touch()
    with monkeypatch.context() as patch:
        patch.setenv("SNAKE_LORA_PL_CACHE", str(tmp_path / "file" / "cache"))
        with pytest.raises(UserError, match=r"cannot write to the cache .*file/cache .*set SNAKE_LORA_PL_CACHE to"):
            open_encoded_rows([write_rows(games_of_steps(1))], encoder)


def test_a_full_disk_is_an_error_that_says_so(encoder, write_rows, monkeypatch):
    def fail(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(example_cache._Writer, "write", fail)
    with pytest.raises(UserError, match=r"No space left on device.*Free some space, or set SNAKE_LORA_PL_CACHE"):
        open_encoded_rows([write_rows(games_of_steps(1))], encoder)


# Rows that are left out


def test_bad_and_too_long_rows_of_all_files_are_reported_at_once(tiny_tokenizer, write_rows):
    long = {"prompt": "p" * 300, "completion": "c"}
    a, b = write_rows([long, *games_of_steps(2), b"{}"], "a.jsonl"), write_rows([long], "b.jsonl")
    with pytest.raises(UserError, match=r"3 bad rows .2 too long, 1 missing key") as caught:
        open_encoded_rows([a, b], Encoder(tiny_tokenizer, max_length=300, on_overflow="error"))
    assert [line.split(": ")[0] for line in str(caught.value).splitlines()[1:]] == [f"{a}:4", f"{a}:1", f"{b}:1"]


def test_dropped_rows_are_counted_each_time(tiny_tokenizer, write_rows, caplog):
    path = write_rows([{"prompt": "p" * 300, "completion": "c"}, *games_of_steps(2)])
    encoder = Encoder(tiny_tokenizer, max_length=300, on_overflow="drop")
    for said in ("dropped 1 row", "left out 1 too long"):
        rows = open_encoded_rows([path], encoder)
        assert [row.source for row in map(rows.__getitem__, range(2))] == [f"{path}:2", f"{path}:3"]
        assert rows.skipped == {"too long": 1}
        assert said in caplog.text


def test_a_row_that_cannot_be_shortened_is_an_error_also_where_bad_rows_are_skipped(tiny_tokenizer, write_rows):
    path = write_rows([{"prompt": "p" * 300, "completion": "c"}, b"{}", *games_of_steps(1)])
    with pytest.raises(UserError, match=r"1 bad row .1 too long"):
        open_encoded_rows([path], Encoder(tiny_tokenizer, max_length=300), "skip")


def test_skipped_rows_are_counted_each_time(encoder, write_rows, caplog):
    path = write_rows([b"{}", *games_of_steps(2), b"nonsense"])
    for said in ("skipped 2 bad rows", "left out 1 missing key, 1 bad JSON"):
        assert len(open_encoded_rows([path], encoder, "skip")) == 2
        assert said in caplog.text


def test_under_chat_a_row_with_a_special_token_is_a_bad_row(tiny_tokenizer, write_rows):
    path = write_rows([{"prompt": "a<|im_end|>", "completion": "c"}, {"prompt": "a", "completion": "c"}])
    encoder = Encoder(tiny_tokenizer, "chat")
    with pytest.raises(UserError, match=r"rows.jsonl:1: holds '<\|im_end\|>'"):
        open_encoded_rows([path], encoder)
    assert len(open_encoded_rows([path], encoder, "skip")) == 1


def test_a_long_build_says_how_far_it_is(encoder, bfs512_sample_path, caplog, monkeypatch):
    monkeypatch.setattr(example_cache, "_ROWS_PER_CHUNK", 100)
    monkeypatch.setattr(example_cache, "_PROGRESS_EVERY_S", 0)
    with caplog.at_level(logging.INFO):
        open_encoded_rows([bfs512_sample_path], encoder)
    assert "encoding, 100 rows so far" in caplog.text
    assert "encoded, 354 rows so far" in caplog.text


# Games


def games_of(rows: list[dict]) -> list[int]:
    counter = GameCounter()
    return [
        counter.game_of(Row(row["prompt"], row["completion"], row.get("game"), "x", line))
        for line, row in enumerate(rows)
    ]


def test_a_game_begins_where_the_head_is_not_where_the_last_move_led():
    assert games_of(games_of_steps(3, 1, 4)) == [0, 0, 0, 1, 2, 2, 2, 2]


def test_rows_that_name_their_game_belong_to_it_wherever_they_stand():
    named = [{**position(5, 5, "UP"), "game": game} for game in "abab"]
    assert games_of(named) == [0, 1, 0, 1]
    assert games_of([named[0], *games_of_steps(2), named[1], named[0]]) == [0, 1, 1, 2, 0]


def test_rows_of_an_unknown_format_are_games_of_their_own():
    unknown = {"prompt": "p", "completion": "c"}
    assert games_of([unknown, unknown, *games_of_steps(2), unknown]) == [0, 1, 2, 2, 3]


def test_games_of_two_files_are_never_the_same_one(encoder, write_rows):
    rows = [{**row, "game": 0} for row in games_of_steps(2)]
    paths = [write_rows(rows, "a.jsonl"), write_rows(rows[:1], "b.jsonl")]
    assert open_encoded_rows(paths, encoder).games().tolist() == [0, 0, 1]


def test_the_sample_has_its_four_games(encoder, bfs512_sample_path):
    assert open_encoded_rows([bfs512_sample_path], encoder).num_games == 4


@pytest.mark.skipif(not SHARED_DIR.is_dir(), reason="the shared heuristics-v0.04 files are not beside the repository")
def test_the_upstream_file_has_its_forty_games():
    counter = GameCounter()
    games = [
        counter.game_of(row)
        for row in read_rows(expand_paths(str(SHARED_DIR / "grid-size-10" / "bfs-512" / "*.jsonl")))
    ]
    assert (len(games), counter.num_games) == (5348, 40)
