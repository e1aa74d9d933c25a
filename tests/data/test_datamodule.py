from __future__ import annotations

import itertools
import json
import logging
import multiprocessing
import random
import time
import warnings
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import lightning
import numpy as np
import pytest
import torch
from lightning.pytorch.callbacks import Callback
from lightning.pytorch.cli import LightningArgumentParser
from lightning.pytorch.trainer.states import TrainerFn

from snake_lora_pl.data import datamodule as datamodule_module
from snake_lora_pl.data.datamodule import SnakeJSONLDataModule
from snake_lora_pl.data.generated_rows import generate_rows
from snake_lora_pl.errors import UserError
from snake_lora_pl.paths import generated_data_path
from tests.data.conftest import games_of_steps, position


@pytest.fixture
def make(tiny_tokenizer, tmp_path):
    """Makes a data module over rows, by default 41 rows in 7 games."""

    def make_datamodule(train_path: Any = None, **settings: Any) -> SnakeJSONLDataModule:
        settings = {"batch_size": 4, "tokenizer": tiny_tokenizer, **settings}
        return SnakeJSONLDataModule(train_path=None if train_path is None else str(train_path), **settings)

    return make_datamodule


@pytest.fixture
def rows_path(write_rows) -> Path:
    return write_rows(games_of_steps(6, 5, 7, 6, 5, 6, 6))


def set_up(datamodule: SnakeJSONLDataModule, stage: str = "fit") -> SnakeJSONLDataModule:
    datamodule.prepare_data()
    datamodule.setup(stage)
    return datamodule


def sources(loader: Any) -> list[str]:
    return list(itertools.chain(*(batch["sources"] for batch in loader)))


# Rows


def test_training_and_validation_rows_are_all_rows_and_no_game_is_in_both(make, rows_path):
    datamodule = set_up(make(rows_path, val_fraction=0.2))
    train, val = sources(datamodule.train_dataloader()), sources(datamodule.val_dataloader())
    assert sorted(train + val) == sorted(f"{rows_path}:{line}" for line in range(1, 42))
    assert (len(train), len(val)) == (datamodule.num_train_rows, datamodule.num_val_rows)
    game_of_line = np.repeat(np.arange(7), [6, 5, 7, 6, 5, 6, 6])
    games = [{game_of_line[int(one.rsplit(":")[-1]) - 1] for one in part} for part in (train, val)]
    assert games[0].isdisjoint(games[1])


def test_with_a_val_path_nothing_is_split_off_but_duplicates_are_removed(make, write_rows, caplog):
    train = write_rows(games_of_steps(5, 5), "train.jsonl")
    val = write_rows([*games_of_steps(2), position(7, 7, "UP")], "val.jsonl")
    with caplog.at_level(logging.INFO):
        datamodule = set_up(make(train, val_path=str(val)))
    assert sorted(sources(datamodule.val_dataloader())) == [f"{val}:{line}" for line in (1, 2, 3)]
    assert (datamodule.num_train_rows, datamodule.num_val_rows) == (8, 3)
    assert datamodule.summary()["num_duplicates_removed"] == 2
    said = "8 rows of 2 games to train on; 3 rows of 2 games to validate on; 2 left out"
    assert said in caplog.text


def test_validation_alone_needs_no_training_rows_where_there_is_a_val_path(make, rows_path):
    datamodule = make(val_path=str(rows_path))
    datamodule.setup("validate")
    assert datamodule.num_val_rows == 41
    assert not generated_data_path(10, "bfs", "bfs-512", 200, 0.0, 0).exists()


def test_fitting_after_validating_alone_opens_the_training_rows(make, rows_path, write_rows):
    val_path = write_rows([position(7, 7, "UP")], "val.jsonl")
    datamodule = make(rows_path, val_path=str(val_path))
    datamodule.setup("validate")
    datamodule.setup("fit")
    assert (datamodule.num_train_rows, datamodule.num_val_rows) == (41, 1)


def test_fit_and_validate_have_the_same_validation_rows(make, rows_path):
    fit, validate = (set_up(make(rows_path), stage) for stage in ("fit", "validate"))
    assert sources(fit.val_dataloader()) == sources(validate.val_dataloader())
    assert fit.split_hash == validate.split_hash


def test_a_val_fraction_of_zero_validates_nothing(make, rows_path):
    datamodule = set_up(make(rows_path, val_fraction=0))
    assert datamodule.val_dataloader() == []
    assert datamodule.num_train_rows == 41


def test_rows_may_come_from_a_glob(make, write_rows, tmp_path):
    for name in "ab":
        write_rows(games_of_steps(3, 4), f"{name}.jsonl")
    assert set_up(make(tmp_path / "*.jsonl", val_fraction=0)).num_train_rows == 14


def test_hashes_follow_the_rows_and_the_split(make, write_rows):
    one, same = (write_rows(games_of_steps(5, 5, 5), f"{name}.jsonl") for name in "ab")
    other = write_rows(games_of_steps(5, 5, 6), "c.jsonl")
    modules = [set_up(make(one)), set_up(make(same)), set_up(make(other)), set_up(make(one, val_fraction=0.5))]
    data, split = [m.data_hash for m in modules], [m.split_hash for m in modules]
    assert data[0] == data[1] == data[3] != data[2]
    assert split[0] == split[1]
    assert len({split[0], split[2], split[3]}) == 3


# Batches


def test_batches_are_padded_on_the_right_to_the_multiple_asked_for(make, rows_path, tiny_tokenizer):
    datamodule = set_up(make(rows_path, pad_to_multiple_of=16))
    for batch in datamodule.train_dataloader():
        assert batch["input_ids"].shape == batch["labels"].shape
        assert batch["input_ids"].shape[1] % 16 == 0
        assert (batch["labels"] == tiny_tokenizer.eos_token_id).sum(1).eq(1).all()


def test_workers_give_the_same_batches(make, rows_path):
    batches = [list(set_up(make(rows_path, num_workers=n)).train_dataloader()) for n in (0, 2)]
    for alone, helped in zip(*batches, strict=True):
        assert alone["sources"] == helped["sources"]
        assert alone["input_ids"].equal(helped["input_ids"])


def test_loading_moves_no_global_random_generator(make, rows_path):
    datamodule = set_up(make(rows_path))
    before = torch.get_rng_state().tolist(), random.getstate(), np.random.get_state()[1].tolist()
    list(datamodule.train_dataloader())
    list(datamodule.val_dataloader())
    assert (torch.get_rng_state().tolist(), random.getstate(), np.random.get_state()[1].tolist()) == before


def test_validation_batches_come_in_the_same_order_each_time(make, rows_path):
    loader = set_up(make(rows_path, val_fraction=0.5)).val_dataloader()
    assert sources(loader) == sources(loader)


# Prompts to complete


def test_prompts_come_in_file_order_with_the_ids_the_model_was_trained_on(make, write_rows, tiny_tokenizer):
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
        ([], "no rows"),
        ([{"completion": "c"}], "missing key 'prompt'"),
        ([{"prompt": "a<|im_end|>"}], r"rows.jsonl:1: holds '<\|im_end\|>'"),
    ],
)
def test_prompts_are_checked_as_training_rows_are(make, write_rows, rows, message):
    with pytest.raises(UserError, match=message):
        make(predict_path=str(write_rows(rows)), template="chat").setup("predict")


def test_bad_prompts_are_left_out_on_skip(make, write_rows, caplog):
    path = write_rows([{"prompt": "a"}, {}, {"prompt": "a<|im_end|>"}])
    datamodule = make(predict_path=str(path), template="chat", on_bad_row="skip")
    datamodule.setup("predict")
    assert sources(datamodule.predict_dataloader()) == [f"{path}:1"]
    assert "2 bad rows (1 missing key, 1 special token in the text)" in caplog.text


def test_without_a_predict_path_the_error_names_it(make):
    with pytest.raises(UserError, match=r"set data\.predict_path"):
        make().setup("predict")


# Generated rows


def test_without_a_train_path_rows_are_generated_once_and_it_is_said_where(make, caplog):
    with caplog.at_level(logging.INFO):
        datamodule = set_up(make(generated_games=3, grid_size=6))
    path = generated_data_path(6, "bfs", "bfs-512", 3, 0.0, 0)
    assert f"no data.train_path: training on generated rows, {path}" in caplog.text
    assert "generated 3 games" in caplog.text
    assert all(source.startswith(f"{path}:") for source in sources(datamodule.train_dataloader()))
    assert (datamodule.resolved_grid_size, datamodule.prompt_format) == (6, "bfs-512")
    caplog.clear()
    with caplog.at_level(logging.INFO):
        set_up(make(generated_games=3, grid_size=6))
    assert "generated 3 games" not in caplog.text


def test_generated_rows_follow_teacher_style_and_noise(make):
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


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"generated_teacher": "bsf"}, "bfs"),
        ({"generated_style": "compct"}, "compact"),
        ({"generated_noise": 2}, "noise"),
    ],
)
def test_what_cannot_be_generated_is_an_error_that_names_what_can(make, settings, message):
    with pytest.raises(UserError, match=message):
        make(generated_games=1, **settings).prepare_data()


def test_a_cache_that_cannot_hold_generated_rows_names_the_variable_that_moves_it(make, tmp_path, monkeypatch):
    (tmp_path / "file").touch()
    with monkeypatch.context() as patch:
        patch.setenv("SNAKE_LORA_PL_CACHE", str(tmp_path / "file"))
        with pytest.raises(UserError, match="set SNAKE_LORA_PL_CACHE"):
            make(generated_games=1).prepare_data()


# The grid


def test_the_grid_size_is_read_from_the_rows(make, write_rows):
    path = write_rows([position(x, 3, "RIGHT", size=12) for x in range(5)])
    assert make(path).resolved_grid_size == 12


def test_the_grid_size_of_rows_that_do_not_say_is_ten(make, write_rows):
    datamodule = make(write_rows([{"prompt": "p", "completion": "c"}]))
    assert (datamodule.resolved_grid_size, datamodule.prompt_format) == (10, "unknown")


def test_a_grid_size_that_the_rows_contradict_is_an_error(make, rows_path):
    with pytest.raises(UserError, match="data.grid_size=8, but the first training row is of a 10x10 grid"):
        set_up(make(rows_path, grid_size=8))


# Settings


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"batch_size": 0}, "data.batch_size must be at least 1"),
        ({"num_workers": -1}, "data.num_workers must be at least 0"),
        ({"pad_to_multiple_of": 0}, "data.pad_to_multiple_of must be at least 1"),
        ({"val_fraction": 1.0}, "data.val_fraction must be at least 0 and below 1"),
        ({"seed": -1}, "data.seed must be at least 0"),
        ({"generated_games": 0}, "data.generated_games must be at least 1"),
        ({"on_bad_row": "ignore"}, "unknown data.on_bad_row 'ignore'. Choose one of error, skip"),
        ({"on_overflow": "cut"}, "unknown data.on_overflow 'cut'"),
        ({"template": "alpaca"}, "unknown data.template 'alpaca'"),
        ({"max_length": 0}, "data.max_length must be at least 2"),
        ({"tokenizer": "gpt2"}, "data.tokenizer takes a tokenizer from Python"),
    ],
)
def test_a_setting_that_cannot_be_is_an_error_that_names_it(make, rows_path, settings, message):
    with pytest.raises(UserError, match=message):
        set_up(make(rows_path, **settings))


def test_a_train_path_that_is_not_there_is_an_error(make, tmp_path):
    with pytest.raises(UserError, match="no such file"):
        make(tmp_path / "nothing.jsonl").prepare_data()


def test_the_command_line_can_build_it_and_shows_a_line_of_help_for_every_setting(rows_path):
    parser = LightningArgumentParser()
    parser.add_lightning_class_args(SnakeJSONLDataModule, "data")
    arguments = ["--data.train_path", str(rows_path), "--data.batch_size=2", "--data.val_path", '["a", "b"]']
    datamodule = parser.instantiate(parser.parse_args(arguments)).data
    assert (datamodule.train_path, datamodule.batch_size, datamodule.val_path) == (str(rows_path), 2, ["a", "b"])
    undocumented = [action.dest for action in parser._actions if action.dest.startswith("data.") and not action.help]
    assert undocumented == []
    assert "data.template" in parser.format_help()


def test_a_base_model_names_the_tokenizer(tiny_llama_dir, rows_path, tiny_tokenizer):
    datamodule = set_up(SnakeJSONLDataModule(str(tiny_llama_dir), str(rows_path)))
    assert datamodule.tokenizer.get_vocab() == tiny_tokenizer.get_vocab()


# Under Lightning


class Recorder(lightning.LightningModule):
    """Learns nothing and remembers the rows of each batch."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = torch.nn.Parameter(torch.zeros(1))
        self.seen: list[list[str]] = []
        self.validated: list[list[str]] = []

    def training_step(self, batch: dict, batch_idx: int) -> torch.Tensor:
        self.seen.append(batch["sources"])
        return self.weight.sum()

    def validation_step(self, batch: dict, batch_idx: int) -> None:
        self.validated.append(batch["sources"])

    def configure_optimizers(self) -> torch.optim.Optimizer:
        # A schedule reads this, which makes Lightning ask for the loader before a checkpoint is restored.
        assert self.trainer.estimated_stepping_batches > 0
        return torch.optim.SGD(self.parameters(), 0.1)


class SaveIn(Callback):
    """Writes a checkpoint each time Lightning calls a hook."""

    def __init__(self, directory: Path, hook: str) -> None:
        self.paths: dict[int, Path] = {}
        setattr(self, hook, lambda trainer, module, *_: self._save(trainer, module, directory))

    def _save(self, trainer: lightning.Trainer, module: Recorder, directory: Path) -> None:
        if not trainer.sanity_checking:
            num_seen = len(module.seen)
            self.paths[num_seen] = directory / f"{num_seen}.ckpt"
            trainer.save_checkpoint(self.paths[num_seen])


def quiet_trainer(**settings: Any) -> lightning.Trainer:
    return lightning.Trainer(
        accelerator="cpu",
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        **settings,
    )


def fit(datamodule: SnakeJSONLDataModule, ckpt_path: Path | None = None, **settings: Any) -> Recorder:
    module = Recorder()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        quiet_trainer(**settings).fit(module, datamodule=datamodule, ckpt_path=ckpt_path)
    return module


# 37 training rows in batches of 8: 5 batches an epoch, the last of 5 rows.
SETTINGS = {"batch_size": 8, "val_fraction": 0.1}


@pytest.mark.parametrize("hook", ["on_train_batch_end", "on_validation_end", "on_train_epoch_end"])
@pytest.mark.parametrize("limit", [{"max_epochs": 3}, {"max_steps": 9, "max_epochs": -1}], ids=["epochs", "steps"])
@pytest.mark.parametrize("num_workers", [0, 2])
def test_a_run_resumed_anywhere_sees_the_rows_that_it_would_have_seen(
    make, rows_path, tmp_path, hook, limit, num_workers
):
    settings = {**limit, "accumulate_grad_batches": 2, "val_check_interval": 2}
    save = SaveIn(tmp_path, hook)
    whole = fit(make(rows_path, **SETTINGS), callbacks=[save], **settings).seen
    assert len(whole) == 15
    assert len({str(sorted(itertools.chain(*whole[i : i + 5]))) for i in (0, 5, 10)}) == 1
    assert len({str(whole[i : i + 5]) for i in (0, 5, 10)}) == 3
    stops = dict(list(save.paths.items())[:: 4 if num_workers else 1])
    assert stops
    for num_seen, ckpt_path in stops.items():
        resumed = fit(make(rows_path, **SETTINGS, num_workers=num_workers), ckpt_path, **settings)
        assert resumed.seen == whole[num_seen:], num_seen


@pytest.mark.parametrize("num_steps", range(1, 12))
def test_a_run_stopped_by_max_steps_goes_on_where_it_stopped(make, rows_path, tmp_path, num_steps):
    whole = fit(make(rows_path, **SETTINGS), max_steps=15, max_epochs=-1).seen
    save = SaveIn(tmp_path, "on_train_end")
    first = fit(make(rows_path, **SETTINGS), max_steps=num_steps, max_epochs=-1, callbacks=[save]).seen
    second = fit(make(rows_path, **SETTINGS), save.paths[num_steps], max_steps=15, max_epochs=-1).seen
    assert first + second == whole


def test_a_run_stopped_by_an_exception_in_a_step_sees_that_steps_rows_again(make, rows_path, tmp_path):
    class Fails(Callback):
        def on_train_batch_start(self, trainer: lightning.Trainer, module: Recorder, *_: object) -> None:
            if len(module.seen) == 3:
                trainer.save_checkpoint(tmp_path / "failed.ckpt")
                raise ZeroDivisionError

    whole = fit(make(rows_path, **SETTINGS), max_epochs=2).seen
    with pytest.raises(ZeroDivisionError):
        fit(make(rows_path, **SETTINGS), max_epochs=2, callbacks=[Fails()])
    assert fit(make(rows_path, **SETTINGS), tmp_path / "failed.ckpt", max_epochs=2).seen == whole[3:]


def test_fewer_batches_than_there_are_make_shorter_epochs(make, rows_path, tmp_path):
    settings = {"max_epochs": 3, "limit_train_batches": 2}
    save = SaveIn(tmp_path, "on_train_batch_end")
    whole = fit(make(rows_path, **SETTINGS), callbacks=[save], **settings).seen
    every = fit(make(rows_path, **SETTINGS), max_epochs=3).seen
    assert whole == [*every[0:2], *every[5:7], *every[10:12]]
    assert fit(make(rows_path, **SETTINGS), save.paths[3], **settings).seen == whole[3:]


def test_going_on_with_other_rows_is_warned_of(make, rows_path, write_rows, tmp_path, caplog):
    save = SaveIn(tmp_path, "on_train_batch_end")
    fit(make(rows_path, **SETTINGS), max_epochs=1, callbacks=[save])
    fit(make(rows_path, **SETTINGS), save.paths[2], max_epochs=1)
    assert "the rows will not come as" not in caplog.text
    fit(make(rows_path, **SETTINGS | {"batch_size": 4}), save.paths[2], max_epochs=1)
    assert "the rows will not come as in a run that was never stopped: global_batch_size was 8, is 4" in caplog.text


def test_the_state_in_a_checkpoint_is_plain_data(make, rows_path, tmp_path):
    save = SaveIn(tmp_path, "on_train_batch_end")
    fit(make(rows_path, **SETTINGS), max_epochs=1, callbacks=[save])
    state = torch.load(save.paths[2], weights_only=True)["SnakeJSONLDataModule"]
    assert set(state) == {"split_hash", "seed", "global_batch_size", "batch_size"}


def test_training_without_validation_rows_runs(make, rows_path):
    module = fit(make(rows_path, **SETTINGS | {"val_fraction": 0}), max_epochs=1)
    assert (len(module.seen), module.validated) == (6, [])


def test_overfitting_a_few_batches_runs(make, rows_path):
    seen = fit(make(rows_path, **SETTINGS), max_epochs=2, overfit_batches=3).seen
    assert seen[:3] == seen[3:]


def test_a_trainer_validates_on_a_val_path_while_fitting_and_alone(make, rows_path, write_rows):
    val_path = write_rows([position(7, 7, "UP")], "val.jsonl")
    fitted = fit(make(rows_path, val_path=str(val_path)), max_epochs=1, num_sanity_val_steps=0)
    assert (len(fitted.seen), fitted.validated) == (11, [[f"{val_path}:1"]])
    validated = Recorder()
    quiet_trainer().validate(validated, datamodule=make(val_path=str(val_path)))
    assert validated.validated == [[f"{val_path}:1"]]


def test_completing_prompts_opens_no_training_rows(make, write_rows, monkeypatch):
    prompts_path = write_rows([{"prompt": "p"}], "prompts.jsonl")
    monkeypatch.setattr(datamodule_module, "open_encoded_rows", lambda *_: pytest.fail("no rows are needed"))

    class Completes(Recorder):
        def predict_step(self, batch: dict) -> list[str]:
            return batch["prompts"]

    assert quiet_trainer().predict(Completes(), datamodule=make(predict_path=str(prompts_path))) == [["p"]]


# Several processes


def _fit_on_a_rank(rank: int, port: int, rows_path: Path, tokenizer_dir: Path, queue: Any) -> None:
    import os

    os.environ.update(
        MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port), WORLD_SIZE="2", NODE_RANK="0", LOCAL_RANK=str(rank)
    )
    datamodule = SnakeJSONLDataModule(str(tokenizer_dir), str(rows_path), batch_size=4, val_fraction=0.1)
    module = fit(datamodule, max_epochs=1, devices=2, strategy="ddp")
    queue.put((rank, module.seen, module.validated))


@pytest.mark.slow
def test_two_ranks_see_the_rows_that_one_sees_in_the_same_number_of_steps(make, rows_path, tiny_llama_dir):
    import socket

    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    spawn = multiprocessing.get_context("spawn")
    queue = spawn.Queue()
    processes = [
        spawn.Process(target=_fit_on_a_rank, args=(rank, port, rows_path, tiny_llama_dir, queue)) for rank in range(2)
    ]
    for process in processes:
        process.start()
    ranks = sorted(queue.get(timeout=120) for _ in processes)
    for process in processes:
        process.join()
    one = fit(make(rows_path, **SETTINGS), max_epochs=1)
    for i, whole in ((1, one.seen), (2, one.validated)):
        steps = zip(ranks[0][i], ranks[1][i], strict=True)
        assert [sorted(a + b) for a, b in steps] == [sorted(batch) for batch in whole]


def test_opening_a_prepared_data_set_is_fast(make, bfs512_sample_path):
    make(bfs512_sample_path).prepare_data()
    start = time.process_time()
    make(bfs512_sample_path).setup("fit")
    assert time.process_time() - start < 1


# Fit to the machine, and fast


def test_the_longest_batch_holds_the_longest_rows_to_train_on(make, rows_path):
    datamodule = set_up(make(rows_path))
    lengths = np.sort(datamodule._train.lengths())[::-1]
    batch = datamodule.longest_batch(3)
    assert batch["input_ids"].shape == (3, -(-lengths[0] // 8) * 8)
    last_labels = (batch["labels"] != -100).int().cumsum(dim=1).argmax(dim=1)
    assert (last_labels + 1).tolist() == lengths[:3].tolist()


def test_auto_is_for_whoever_fits_to_find(make, rows_path, tmp_path):
    datamodule = make(rows_path, batch_size="auto")
    with pytest.raises(UserError, match=r"data.batch_size=auto: nothing has looked .* Add AutoBatchSize\(\)"):
        fit(datamodule, max_epochs=1)


def test_completing_prompts_takes_eight_rows_where_none_are_asked_for(make, rows_path):
    datamodule = make(predict_path=str(rows_path), batch_size="auto")
    datamodule.setup("predict")
    datamodule.trainer = SimpleNamespace(
        state=SimpleNamespace(fn=TrainerFn.PREDICTING), distributed_sampler_kwargs=None
    )
    assert len(next(iter(datamodule.predict_dataloader()))["sources"]) == 8


def test_the_loader_counts_what_its_reader_waited(make, rows_path, monkeypatch):
    loader = set_up(make(rows_path)).train_dataloader()
    collate = loader.collate_fn
    loader.collate_fn = lambda examples: (time.sleep(0.01), collate(examples))[1]
    for _ in loader:
        time.sleep(0.02)
    assert 0.01 * len(loader) < loader.wait_seconds < 0.02 * len(loader)
