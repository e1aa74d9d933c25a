from __future__ import annotations

import itertools
import json
import logging
import random
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from lightning.pytorch.cli import LightningArgumentParser
from lightning.pytorch.trainer.states import TrainerFn

from snake_lora_pl.constants import IGNORE_INDEX
from snake_lora_pl.data import datamodule as datamodule_module
from snake_lora_pl.data.datamodule import SnakeJSONLDataModule
from snake_lora_pl.data.encoding import Encoder
from snake_lora_pl.data.generated_rows import generate_rows
from snake_lora_pl.data.jsonl import read_rows
from snake_lora_pl.errors import UserError
from snake_lora_pl.game import read_moves, read_state
from snake_lora_pl.paths import generated_data_path
from tests.data.conftest import games_of_steps, position
from tests.data.lightning_runs import Recorder, fit, quiet_trainer, set_up


def sources(loader: Any) -> list[str]:
    return list(itertools.chain(*(batch["sources"] for batch in loader)))


def test_split_uses_every_row_and_no_game_is_on_both_sides(make, rows_path):
    datamodule = set_up(make(rows_path, val_fraction=0.2))
    train, val = sources(datamodule.train_dataloader()), sources(datamodule.val_dataloader())
    assert sorted(train + val) == sorted(f"{rows_path}:{line}" for line in range(1, 42))
    assert (len(train), len(val)) == (datamodule.num_train_rows, datamodule.num_val_rows)
    game_of_line = np.repeat(np.arange(7), [6, 5, 7, 6, 5, 6, 6])
    games = [{game_of_line[int(one.rsplit(":")[-1]) - 1] for one in part} for part in (train, val)]
    assert games[0].isdisjoint(games[1])


def test_val_path_replaces_the_split_and_drops_duplicates_from_training(make, write_rows, caplog):
    train = write_rows(games_of_steps(5, 5), "train.jsonl")
    val = write_rows([*games_of_steps(2), position(7, 7, "UP")], "val.jsonl")
    with caplog.at_level(logging.INFO):
        datamodule = set_up(make(train, val_path=str(val)))
    assert sorted(sources(datamodule.val_dataloader())) == [f"{val}:{line}" for line in (1, 2, 3)]
    assert (datamodule.num_train_rows, datamodule.num_val_rows) == (8, 3)
    assert datamodule.summary()["num_duplicates_removed"] == 2
    assert "8 rows of 2 games to train on; 3 rows of 2 games to validate on; 2 dropped" in caplog.text


def test_validation_with_a_val_path_opens_no_training_rows(make, rows_path):
    datamodule = make(val_path=str(rows_path))
    datamodule.setup("validate")
    assert datamodule.num_val_rows == 41
    assert not generated_data_path(10, "bfs", "bfs-512", 200, 0.0, 0).exists()


def test_fit_after_validate_opens_the_training_rows(make, rows_path, write_rows):
    val_path = write_rows([position(7, 7, "UP")], "val.jsonl")
    datamodule = make(rows_path, val_path=str(val_path))
    datamodule.setup("validate")
    datamodule.setup("fit")
    assert (datamodule.num_train_rows, datamodule.num_val_rows) == (41, 1)


def test_fit_and_validate_use_the_same_validation_rows(make, rows_path):
    fit, validate = (set_up(make(rows_path), stage) for stage in ("fit", "validate"))
    assert sources(fit.val_dataloader()) == sources(validate.val_dataloader())
    assert fit.split_hash == validate.split_hash


def test_val_fraction_of_zero_gives_no_validation_loader(make, rows_path):
    datamodule = set_up(make(rows_path, val_fraction=0))
    assert datamodule.val_dataloader() == []
    assert datamodule.num_train_rows == 41


def test_train_path_may_be_a_glob(make, write_rows, tmp_path):
    for name in "ab":
        write_rows(games_of_steps(3, 4), f"{name}.jsonl")
    assert set_up(make(tmp_path / "*.jsonl", val_fraction=0)).num_train_rows == 14


def test_hashes_depend_on_the_rows_and_the_split(make, write_rows):
    one, same = (write_rows(games_of_steps(5, 5, 5), f"{name}.jsonl") for name in "ab")
    other = write_rows(games_of_steps(5, 5, 6), "c.jsonl")
    modules = [set_up(make(one)), set_up(make(same)), set_up(make(other)), set_up(make(one, val_fraction=0.5))]
    data, split = [m.data_hash for m in modules], [m.split_hash for m in modules]
    assert data[0] == data[1] == data[3] != data[2]
    assert split[0] == split[1]
    assert len({split[0], split[2], split[3]}) == 3


def test_batches_are_padded_to_a_multiple_and_have_one_eos_per_row(make, rows_path, tiny_tokenizer):
    datamodule = set_up(make(rows_path, pad_to_multiple_of=16))
    for batch in datamodule.train_dataloader():
        assert batch["input_ids"].shape == batch["labels"].shape
        assert batch["input_ids"].shape[1] % 16 == 0
        assert (batch["labels"] == tiny_tokenizer.eos_token_id).sum(1).eq(1).all()


def test_batches_do_not_depend_on_num_workers(make, rows_path):
    batches = [list(set_up(make(rows_path, num_workers=n)).train_dataloader()) for n in (0, 2)]
    for without, with_workers in zip(*batches, strict=True):
        assert without["sources"] == with_workers["sources"]
        assert without["input_ids"].equal(with_workers["input_ids"])


def test_loading_does_not_change_the_global_random_state(make, rows_path):
    datamodule = set_up(make(rows_path))
    before = torch.get_rng_state().tolist(), random.getstate(), np.random.get_state()[1].tolist()
    list(datamodule.train_dataloader())
    list(datamodule.val_dataloader())
    assert (torch.get_rng_state().tolist(), random.getstate(), np.random.get_state()[1].tolist()) == before


def test_validation_batches_have_the_same_order_in_each_pass(make, rows_path):
    loader = set_up(make(rows_path, val_fraction=0.5)).val_dataloader()
    assert sources(loader) == sources(loader)


def test_prompts_come_in_file_order_with_the_ids_of_training(make, write_rows, tiny_tokenizer):
    path = write_rows([{"prompt": f"prompt {i}"} for i in range(6)])
    datamodule = make(predict_path=str(path))
    datamodule.setup("predict")
    batches = list(datamodule.predict_dataloader())
    assert [len(batch["prompts"]) for batch in batches] == [4, 2]
    assert sources(batches) == [f"{path}:{line}" for line in range(1, 7)]
    assert batches[1]["prompts"] == ["prompt 4", "prompt 5"]
    assert tiny_tokenizer.decode(batches[1]["input_ids"][0]) == "### Instruction:\nprompt 4\n\n### Response:\n"


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        ([], r"rows\.jsonl: "),
        ([{"completion": "c"}], r"rows\.jsonl:1: .*'prompt'"),
        ([{"prompt": "a<|im_end|>"}], r"rows\.jsonl:1: .*'<\|im_end\|>'"),
    ],
)
def test_prompts_are_validated_like_training_rows(make, write_rows, rows, message):
    with pytest.raises(UserError, match=message):
        make(predict_path=str(write_rows(rows)), template="chat").setup("predict")


def test_invalid_prompts_are_skipped_on_request(make, write_rows, caplog):
    path = write_rows([{"prompt": "a"}, {}, {"prompt": "a<|im_end|>"}])
    datamodule = make(predict_path=str(path), template="chat", on_bad_row="skip")
    datamodule.setup("predict")
    assert sources(datamodule.predict_dataloader()) == [f"{path}:1"]
    assert "1 missing key, 1 special token in the text" in caplog.text


def test_missing_predict_path_is_an_error_that_names_it(make):
    with pytest.raises(UserError, match=r"data\.predict_path"):
        make().setup("predict")


def test_rows_are_generated_once_without_a_train_path_and_their_path_is_logged(make, caplog):
    with caplog.at_level(logging.INFO):
        datamodule = set_up(make(generated_games=3, grid_size=6))
    path = generated_data_path(6, "bfs", "bfs-512", 3, 0.0, 0)
    assert str(path) in caplog.text
    assert "generated 3 games" in caplog.text
    assert all(source.startswith(f"{path}:") for source in sources(datamodule.train_dataloader()))
    assert (datamodule.resolved_grid_size, datamodule.prompt_format) == (6, "bfs-512")
    caplog.clear()
    with caplog.at_level(logging.INFO):
        set_up(make(generated_games=3, grid_size=6))
    assert "generated 3 games" not in caplog.text


def test_generated_rows_depend_on_teacher_style_and_noise(make):
    datamodule = set_up(
        make(
            generated_games=3, grid_size=6, generated_teacher="safe_greedy", generated_style="compact",
            generated_noise=0.2,
        )
    )  # fmt: skip
    path = generated_data_path(6, "safe_greedy", "compact", 3, 0.2, 0)
    rows = [json.loads(line) for line in path.read_text().splitlines()]
    assert rows == list(generate_rows(3, 6, "safe_greedy", "compact", 0, noise=0.2))
    assert datamodule.prompt_format == "compact"


def test_generated_rows_depend_on_noise_moves(make):
    settings = {"generated_games": 2, "grid_size": 6, "generated_noise": 0.2}
    set_up(make(**settings, generated_noise_moves="safe"))
    path = generated_data_path(6, "bfs", "bfs-512", 2, 0.2, 0, "safe")
    assert path != generated_data_path(6, "bfs", "bfs-512", 2, 0.2, 0)
    rows = [json.loads(line) for line in path.read_text().splitlines()]
    assert rows == list(generate_rows(2, 6, noise=0.2, noise_moves="safe"))


@pytest.mark.parametrize("style", ["features", "cycle"])
def test_prompts_without_a_board_tell_style_and_grid_size(make, style):
    datamodule = set_up(make(generated_games=2, grid_size=6, generated_style=style))
    path = generated_data_path(6, "bfs", style, 2, 0.0, 0)
    for module in (datamodule, set_up(make(path))):
        assert (module.resolved_grid_size, module.prompt_format) == (6, style)
        assert module.summary()["num_games"] == 2


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"generated_teacher": "bsf"}, "bfs"),
        ({"generated_style": "compct"}, "compact"),
        ({"generated_noise": 2}, "noise"),
        ({"generated_noise_moves": "save"}, r"data\.generated_noise_moves.*safe"),
    ],
)
def test_invalid_generation_setting_is_an_error_that_names_the_alternatives(make, settings, message):
    with pytest.raises(UserError, match=message):
        make(generated_games=1, **settings).prepare_data()


def test_error_of_an_unwritable_cache_of_generated_rows_names_the_variable(make, tmp_path, monkeypatch):
    (tmp_path / "file").touch()
    with monkeypatch.context() as patch:
        patch.setenv("SNAKE_LORA_PL_CACHE", str(tmp_path / "file"))
        with pytest.raises(UserError, match="SNAKE_LORA_PL_CACHE"):
            make(generated_games=1).prepare_data()


def test_grid_size_is_read_from_the_rows(make, write_rows):
    path = write_rows([position(x, 3, "RIGHT", size=12) for x in range(5)])
    assert make(path).resolved_grid_size == 12


def test_grid_size_of_rows_of_an_unknown_format_is_ten(make, write_rows):
    datamodule = make(write_rows([{"prompt": "p", "completion": "c"}]))
    assert (datamodule.resolved_grid_size, datamodule.prompt_format) == (10, "unknown")


def test_grid_size_that_contradicts_the_rows_is_an_error(make, rows_path):
    with pytest.raises(UserError, match=r"data\.grid_size=8.*10x10"):
        set_up(make(rows_path, grid_size=8))


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"batch_size": 0}, r"data\.batch_size .*1.*0"),
        ({"num_workers": -1}, r"data\.num_workers .*0.*-1"),
        ({"pad_to_multiple_of": 0}, r"data\.pad_to_multiple_of .*1.*0"),
        ({"val_fraction": 1.0}, r"data\.val_fraction .*1\.0"),
        ({"seed": -1}, r"data\.seed .*0.*-1"),
        ({"generated_games": 0}, r"data\.generated_games .*1.*0"),
        ({"on_bad_row": "ignore"}, r"data\.on_bad_row 'ignore'.*error, skip"),
        ({"on_overflow": "cut"}, r"data\.on_overflow 'cut'"),
        ({"template": "alpaca"}, r"data\.template 'alpaca'"),
        ({"max_length": 0}, r"data\.max_length .*2.*0"),
        ({"tokenizer": "gpt2"}, r"data\.tokenizer .*gpt2.*data\.base_model"),
    ],
)
def test_invalid_setting_is_an_error_that_names_it(make, rows_path, settings, message):
    with pytest.raises(UserError, match=message):
        set_up(make(rows_path, **settings))


def test_missing_train_path_is_an_error_that_names_it(make, tmp_path):
    with pytest.raises(UserError, match=r"nothing\.jsonl"):
        make(tmp_path / "nothing.jsonl").prepare_data()


def test_command_line_creates_the_data_module_and_documents_every_setting(rows_path):
    parser = LightningArgumentParser()
    parser.add_lightning_class_args(SnakeJSONLDataModule, "data")
    arguments = ["--data.train_path", str(rows_path), "--data.batch_size=2", "--data.val_path", '["a", "b"]']
    datamodule = parser.instantiate(parser.parse_args(arguments)).data
    assert (datamodule.train_path, datamodule.batch_size, datamodule.val_path) == (str(rows_path), 2, ["a", "b"])
    undocumented = [action.dest for action in parser._actions if action.dest.startswith("data.") and not action.help]
    assert undocumented == []
    assert "data.template" in parser.format_help()


def test_tokenizer_is_that_of_the_base_model(tiny_llama_dir, rows_path, tiny_tokenizer):
    datamodule = set_up(SnakeJSONLDataModule(str(tiny_llama_dir), str(rows_path)))
    assert datamodule.tokenizer.get_vocab() == tiny_tokenizer.get_vocab()


def test_longest_batch_holds_the_longest_training_rows(make, rows_path):
    datamodule = set_up(make(rows_path))
    lengths = np.sort(datamodule._train_subset.lengths())[::-1]
    batch = datamodule.longest_batch(3)
    assert batch["input_ids"].shape == (3, -(-lengths[0] // 8) * 8)
    last_labels = (batch["labels"] != IGNORE_INDEX).int().cumsum(dim=1).argmax(dim=1)
    assert (last_labels + 1).tolist() == lengths[:3].tolist()


def test_automatic_batch_size_needs_its_callback_in_fit(make, rows_path, tmp_path):
    datamodule = make(rows_path, batch_size="auto")
    with pytest.raises(UserError, match=r"data\.batch_size=auto.*AutoBatchSize\(\)"):
        fit(datamodule, max_epochs=1)


def test_automatic_batch_size_is_eight_in_predict(make, rows_path):
    datamodule = make(predict_path=str(rows_path), batch_size="auto")
    datamodule.setup("predict")
    datamodule.trainer = SimpleNamespace(
        state=SimpleNamespace(fn=TrainerFn.PREDICTING), distributed_sampler_kwargs=None
    )
    assert len(next(iter(datamodule.predict_dataloader()))["sources"]) == 8


def test_fit_runs_without_validation_rows(make, rows_path):
    module = fit(make(rows_path, batch_size=8, val_fraction=0), max_epochs=1)
    assert (len(module.seen), module.validated) == (6, [])


def test_overfit_batches_repeats_the_same_batches(make, rows_path):
    seen = fit(make(rows_path, batch_size=8), max_epochs=2, overfit_batches=3).seen
    assert seen[:3] == seen[3:]
    assert [len(batch) for batch in seen] == [8] * 6


def test_val_path_is_used_in_fit_and_in_validate(make, rows_path, write_rows):
    val_path = write_rows([position(7, 7, "UP")], "val.jsonl")
    fitted = fit(make(rows_path, val_path=str(val_path)), max_epochs=1, num_sanity_val_steps=0)
    assert (len(fitted.seen), fitted.validated) == (11, [[f"{val_path}:1"]])
    validated = Recorder()
    quiet_trainer().validate(validated, datamodule=make(val_path=str(val_path)))
    assert validated.validated == [[f"{val_path}:1"]]


def test_predict_opens_no_training_rows(make, write_rows, monkeypatch):
    prompts_path = write_rows([{"prompt": "p"}], "prompts.jsonl")
    monkeypatch.setattr(datamodule_module, "open_examples", lambda *_: pytest.fail("opened training rows"))

    class Completes(Recorder):
        def predict_step(self, batch: dict) -> list[str]:
            return batch["prompts"]

    assert quiet_trainer().predict(Completes(), datamodule=make(predict_path=str(prompts_path))) == [["p"]]


def test_setup_encodes_no_rows_after_prepare_data(make, rows_path, monkeypatch):
    make(rows_path).prepare_data()
    monkeypatch.setattr(Encoder, "encode", lambda *_: pytest.fail("encoded rows again"))
    datamodule = make(rows_path)
    datamodule.setup("fit")
    assert datamodule.num_train_rows > 0


def test_val_prompts_are_those_of_the_validation_rows(make, write_rows):
    validating, training = position(7, 7, "UP"), position(1, 1, "UP")
    path = write_rows([training])
    datamodule = set_up(make(path, val_path=str(write_rows([validating], "val.jsonl"))))
    is_validation = datamodule.val_prompts()
    assert is_validation(validating["prompt"])
    assert not is_validation(training["prompt"])


def draws(datamodule: SnakeJSONLDataModule, num_epochs: int = 200) -> dict[str, float]:
    """Return the mean number of draws of each training row per epoch."""
    loader = datamodule.train_dataloader()
    counts: dict[str, float] = {}
    for epoch in range(num_epochs):
        loader.sampler.set_epoch(epoch)
        for batch in loader.sampler:
            for example in datamodule._train_subset[batch]:
                counts[example.source] = counts.get(example.source, 0) + 1 / num_epochs
    return counts


def test_rows_are_drawn_by_the_weights_of_rows_and_files(make, write_rows):
    heavy = write_rows([row | {"weight": 3} for row in games_of_steps(2)] + games_of_steps(0, 2), "a.jsonl")
    light = write_rows(games_of_steps(0, 0, 4), "b.jsonl")
    datamodule = make(val_fraction=0)
    datamodule.train_path = [f"{heavy}@2", str(light)]
    counts = draws(set_up(datamodule))
    total = 2 * (3 + 3 + 1 + 1) + 4
    expected = {f"{heavy}:{i}": weight for i, weight in enumerate((6, 6, 2, 2), start=1)}
    expected |= {f"{light}:{i}": 1 for i in range(1, 5)}
    assert counts == pytest.approx({source: 8 * weight / total for source, weight in expected.items()}, abs=0.12)


@pytest.mark.parametrize("balance", ["length", "decisive", "length+decisive"])
def test_balance_draws_every_group_equally_often(make, balance):
    settings = {"generated_games": 3, "grid_size": 6, "generated_teacher": "safe_greedy", "generated_noise": 0.1}
    datamodule = set_up(make(**settings, generated_style="features", balance=balance, val_fraction=0.3))
    rows = {f"{datamodule.train_paths()[0]}:{row.line}": row for row in read_rows(datamodule.train_paths())}
    counts: dict[object, float] = {}
    for source, count in draws(datamodule, 100).items():
        length, is_decisive = read_state(rows[source].prompt).length, read_moves(rows[source].prompt).is_decisive
        group = {"length": length, "decisive": is_decisive, "length+decisive": (length, is_decisive)}[balance]
        counts[group] = counts.get(group, 0) + count
    if balance == "length+decisive":
        lengths = {length for length, _ in counts}
        of_length = {length: [counts[key] for key in counts if key[0] == length] for length in lengths}
        assert all(max(parts) == pytest.approx(min(parts), rel=0.2, abs=1) for parts in of_length.values())
        counts = {length: sum(parts) for length, parts in of_length.items()}
    assert len(counts) == 2 if balance == "decisive" else len(counts) > 20
    assert list(counts.values()) == pytest.approx([datamodule.num_train_rows / len(counts)] * len(counts), abs=1)


def test_weights_and_balance_do_not_change_the_split_or_the_validation(make, rows_path):
    plain, balanced = set_up(make(rows_path)), set_up(make(rows_path, balance="length"))
    weighted = set_up(make(f"{rows_path}@2"))
    assert plain.split_hash == balanced.split_hash == weighted.split_hash
    assert sources(plain.val_dataloader()) == sources(balanced.val_dataloader())
    # All files have the same weight.
    assert sources(plain.train_dataloader()) == sources(weighted.train_dataloader())
    assert plain.state_dict() == weighted.state_dict()


def test_balance_needs_prompts_of_a_known_style(make, write_rows, caplog):
    unknown = [{"prompt": f"p{i}", "completion": "c"} for i in range(3)]
    with pytest.raises(UserError, match=r"data\.balance=decisive"):
        set_up(make(write_rows(unknown), balance="decisive", val_fraction=0))
    set_up(make(write_rows([*unknown, *games_of_steps(4)], "mixed.jsonl"), balance="length", val_fraction=0))
    assert "3 of 7" in caplog.text


@pytest.mark.parametrize(
    ("settings", "message"),
    [({"balance": "size"}, r"data\.balance.*length"), ({"group_by_length": "no"}, r"data\.group_by_length.*'no'")],
)
def test_invalid_sampling_setting_is_an_error(make, rows_path, settings, message):
    with pytest.raises(UserError, match=message):
        make(rows_path, **settings).prepare_data()


@pytest.mark.parametrize("is_grouped", [False, True])
def test_rows_are_grouped_by_length_on_request(make, rows_path, is_grouped):
    datamodule = set_up(make(rows_path, group_by_length=is_grouped))
    assert datamodule.train_dataloader().sampler.group_by_length is is_grouped
    assert ("group_by_length" in datamodule.state_dict()) is not is_grouped


def test_extreme_rows_are_the_longest_and_one_with_the_largest_id(make, rows_path):
    datamodule = make(train_path=str(rows_path))
    datamodule.prepare_data()
    assert datamodule.extreme_rows() == []
    datamodule.setup("fit")
    examples = [one for s in (datamodule._train, datamodule._val) for one in s[range(len(s))]]
    extreme = datamodule.extreme_rows()
    assert max(len(row.input_ids) for row in extreme) == max(len(row.input_ids) for row in examples)
    assert max(max(row.input_ids) for row in extreme) == max(max(row.input_ids) for row in examples)
    assert {row.source for row in extreme} <= {row.source for row in examples}
