"""Callback that lets the adapter play, and adds the states that it visits to the training rows."""

from __future__ import annotations

import functools
import logging
from collections.abc import Sequence
from typing import Any, NamedTuple, cast

import lightning.pytorch as pl
import numpy as np
import torch
from lightning.pytorch.utilities.seed import isolate_rng
from typing_extensions import override

from snake_lora_pl.collectives import gather_objects
from snake_lora_pl.data.batching import Batch, split_batch
from snake_lora_pl.data.datamodule import SnakeJSONLDataModule
from snake_lora_pl.data.encoding import Example
from snake_lora_pl.data.loaders import LazyDataLoader
from snake_lora_pl.data.samplers import LengthGroupedSampler
from snake_lora_pl.durable import remove_leftovers
from snake_lora_pl.errors import UserError
from snake_lora_pl.evaluation.distributed import Ranks
from snake_lora_pl.evaluation.language_model import in_eval_mode
from snake_lora_pl.evaluation.player_factory import TrainedModule, find_style, make_player, shown_progress
from snake_lora_pl.evaluation.settings import PlaySettings
from snake_lora_pl.game import Style
from snake_lora_pl.imitation.mixing import RowMixer
from snake_lora_pl.imitation.rows import (
    RoundRow,
    as_data_rows,
    encode_rows,
    read_round,
    rows_of,
    state_of_round,
    write_round,
)
from snake_lora_pl.imitation.settings import ImitationSettings
from snake_lora_pl.imitation.visits import RoundCounts, play_round
from snake_lora_pl.paths import RunPaths

logger = logging.getLogger(__name__)

_PREFIX = "imitate/"


class Imitation(pl.Callback):
    """Imitation on visited states (DAgger, https://arxiv.org/abs/1011.0686).

    A *round*: the adapter plays seeded games, the teacher names the move in each state, and the states are written to
    ``rounds/NNN.jsonl`` and join the training rows with the next batch. Rounds are played when the first batch after a
    multiple of ``every_n_steps`` steps is loaded. At that point every checkpoint of the step before it either was
    written without the round, and a resumed run plays it again with the same result, or is written with the round and
    the batch that contains its rows.

    No game that evaluates is played, and states whose prompt is also in the validation rows are dropped.

    Args:
        settings: Settings of the rounds.
        play: Settings of the player: style, reading and default teacher.
        run: The run that the files are written to.

    Raises:
        UserError: In ``setup``, if the style of the prompts is unknown or a setting does not fit the data.
    """

    def __init__(self, settings: ImitationSettings, play: PlaySettings, run: RunPaths) -> None:
        self.settings = settings
        self.play = play
        self.run = run
        self._rounds: list[dict[str, Any]] = []
        self._style: Style | None = None
        self._mixer = RowMixer(settings.rows_share, 0)

    @property
    @override
    def state_key(self) -> str:
        # Independent of the settings, so that a resumed run may change them.
        return "Imitation"

    @override
    def state_dict(self) -> dict[str, Any]:
        return {"rounds": list(self._rounds)}

    @override
    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self._rounds = list(state_dict["rounds"])

    @override
    def setup(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        if stage != "fit":
            return
        data = _data(trainer)
        # Ranks started separately by a launcher may have different directories: rank 0 decides.
        self.run = trainer.strategy.broadcast(self.run)
        self._style = find_style(self.play, data)
        if self._style is None:
            raise UserError("imitate: the style of the training prompts is unknown. Set play.style.")
        if data.train_path is None and data.seed == self.settings.seed:
            raise UserError(
                f"imitate.seed={self.settings.seed} is the seed of the generated rows. Set another imitate.seed."
            )
        self._mixer = RowMixer(self.settings.rows_share, data.seed)
        if trainer.is_global_zero:
            remove_leftovers(self.run.rounds_dir, "*.jsonl")

    @override
    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        for number, known in enumerate(self._rounds):
            self._add(_data(trainer), number, read_round(self.run.round_path(number), known["sha256"]))
        self._attach(trainer, pl_module)

    @override
    def on_train_epoch_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self._attach(trainer, pl_module)  # Lightning may have reloaded the loader

    def _attach(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        # A dry run does not play.
        if trainer.fast_dev_run:  # type: ignore[attr-defined]
            return
        loader = trainer.train_dataloader
        if not isinstance(loader, LazyDataLoader):
            raise UserError("imitate needs the training loader of SnakeJSONLDataModule. Set imitate.every_n_steps=0.")
        loader.transform_batch = functools.partial(self._transform_batch, trainer, pl_module, loader)

    def _transform_batch(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, loader: LazyDataLoader, batch: Batch
    ) -> Batch:
        """Play the round that is due, then mix rows of all rounds into a batch."""
        if self._is_due(trainer.global_step):
            self._play_round(trainer, pl_module)
        if not len(self._mixer):
            return batch
        sampler = cast(LengthGroupedSampler, loader.sampler)
        progress = cast(Any, trainer.fit_loop.epoch_loop.batch_progress.total)
        examples = self._mixer.mix(
            split_batch(batch),
            progress.processed,
            batch_size=sampler.batch_size,
            rank=sampler.rank,
            num_replicas=sampler.num_replicas,
        )
        mixed: Batch = loader.collate_fn(examples)
        return mixed

    def _is_due(self, step: int) -> bool:
        every = self.settings.every_n_steps
        last_step = self._rounds[-1]["step"] if self._rounds else 0
        return step // every > last_step // every

    def _play_round(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        data, number, step = _data(trainer), len(self._rounds), trainer.global_step
        round_ = self._visit(trainer, pl_module, data, number)
        is_validation = data.val_prompts()
        rows = [row for row in round_.rows if not is_validation(row["prompt"])]
        content = encode_rows(rows)
        if trainer.is_global_zero:
            write_round(self.run.round_path(number), content)
        self._rounds.append(state_of_round(step, content))
        num_rows = self._add(data, number, rows)
        metrics = round_.counts.metrics() | {"rows_added": float(num_rows)}
        values = {f"{_PREFIX}{name}": value for name, value in metrics.items()}
        # LightningModule.log is not available while a batch is loaded.
        trainer.callback_metrics.update({name: torch.tensor(value) for name, value in values.items()})
        for run_logger in trainer.loggers:
            run_logger.log_metrics(values, step=step - 1)
        if trainer.is_global_zero:
            logger.info(
                "step %d: round %d, %d games, %.1f apples, traps %.1f%%, fatal moves %.2f%%, disagreements %.1f%%, "
                "%d rows added",
                step,
                number,
                round_.counts.num_games,
                metrics["apples_mean"],
                *(100 * metrics.get(name, 0.0) for name in ("trap_rate", "fatal_move_rate", "disagreement_rate")),
                num_rows,
            )

    def _visit(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, data: SnakeJSONLDataModule, number: int
    ) -> _Round:
        """Play the games of a round, each slot on one rank; all ranks return the whole round."""
        if self._style is None:
            raise RuntimeError("setup() was not called")
        style, settings, ranks = self._style, self.settings, Ranks.of(trainer)
        slots = range(settings.num_games)[ranks.rank :: ranks.size]
        module = cast(TrainedModule, pl_module)
        with in_eval_mode(pl_module), isolate_rng():
            policy = make_player(module, data.encoder, style, self.play.reading, "imitation")
            with shown_progress(trainer, policy.name) as progress:
                teacher = settings.teacher or self.play.teacher
                games = play_round(policy, settings, teacher, data.resolved_grid_size, number, slots, progress)
        rows = [[row for game in played for row in rows_of(game, style, settings)] for played in games]
        counts = RoundCounts.of([game for played in games for game in played])
        parts = gather_objects(trainer, (rows, counts))
        if ranks.size == 1:
            # Ranks that hold shards of one model all played all games; they use the rows of the first one.
            parts = parts[:1]
        by_slot = ranks.join([part[0] for part in parts], settings.num_games)
        return _Round(
            [row for rows_of_slot in by_slot for row in rows_of_slot], RoundCounts.total([p[1] for p in parts])
        )

    def _add(self, data: SnakeJSONLDataModule, number: int, rows: Sequence[RoundRow]) -> int:
        """Encode rows and add them to the training rows.

        Returns:
            The number of rows added, without those that ``data.on_overflow=drop`` dropped.

        Raises:
            UserError: If a row cannot be encoded.
        """
        examples, weights = [], []
        encoded = data.encoder.encode(as_data_rows(rows, self.run.round_path(number)))
        for row, example in zip(rows, encoded, strict=True):
            if isinstance(example, Example):
                ids = np.asarray(example.input_ids, np.uint32)  # a quarter of a list's size
                examples.append(example._replace(input_ids=ids))
                weights.append(row["weight"])
            elif data.on_overflow != "drop":
                raise UserError(f"{example.source}: {example.message}")
        self._mixer.add(examples, weights)
        return len(examples)


class _Round(NamedTuple):
    """Rows and counts of all games of a round."""

    rows: list[RoundRow]
    counts: RoundCounts


def _data(trainer: pl.Trainer) -> SnakeJSONLDataModule:
    data = trainer.datamodule  # type: ignore[attr-defined]
    if not isinstance(data, SnakeJSONLDataModule):
        raise UserError(
            "imitate needs a SnakeJSONLDataModule. Set imitate.every_n_steps=0, or pass one to the trainer."
        )
    return data
