"""SnakeJSONLDataModule: JSONL files in, batches out. Never sees the model."""

from __future__ import annotations

import functools
import hashlib
import logging
import os
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, TypedDict, cast

import lightning
import numpy as np
import numpy.typing as npt
import torch
from lightning.pytorch.loops.progress import _ProcessedTracker
from torch.utils.data import DataLoader, Dataset

from snake_lora_pl.constants import DEFAULT_BASE_MODEL
from snake_lora_pl.data.batching import Batch, InOrderSampler, LengthGroupedSampler, collate
from snake_lora_pl.data.encoding import Encoder, Example, OnOverflow, TemplateName, check_choice
from snake_lora_pl.data.example_cache import EncodedRows, open_encoded_rows, report_cache_errors
from snake_lora_pl.data.generated_rows import write_dataset
from snake_lora_pl.data.jsonl import Complaints, OnBadRow, Row, expand_paths, peek_row, read_rows, read_rows_at
from snake_lora_pl.data.split import leave_out_duplicates, split_by_game
from snake_lora_pl.errors import UserError
from snake_lora_pl.game.text import STYLES, read_grid_size
from snake_lora_pl.models import BaseModelSpec, load_tokenizer, prepare_base_model
from snake_lora_pl.paths import generated_data_path

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

logger = logging.getLogger(__name__)

DEFAULT_GRID_SIZE = 10
DEFAULT_BATCH_SIZE = 8
_GAMES_TO_LOOK_AT = 50


def max_processes() -> int:
    """How many processes may be asked for on this machine; far more would bring it down."""
    return max(16, 4 * (os.cpu_count() or 1))


class PromptBatch(TypedDict):
    """Prompts to complete, in file order and not padded: on which side to pad is for the generating code to say.

    Attributes:
        input_ids: The ids of each prompt.
        prompts: The text of each prompt, as the row has it.
        sources: ``path:line`` of each row.
    """

    input_ids: list[list[int]]
    prompts: list[str]
    sources: list[str]


class SnakeJSONLDataModule(lightning.LightningDataModule):
    """Rows of prompt and completion from JSONL files, split by game, encoded once and batched by length.

    Args:
        base_model: Whose tokenizer encodes the rows: a directory, a hub id or a short name.
        train_path: Rows to train on: a file, a glob or a list of them. Without it, rows are generated into the cache.
        val_path: Rows to validate on. Without it, whole games are set aside from the training rows.
        predict_path: Rows whose prompts are to be completed; they need no completion.
        val_fraction: Share of the training rows to set aside, from 0 to below 1; 0 trains without validation.
        max_length: Most tokens in an example: template, prompt, completion and EOS.
        batch_size: Rows in a batch of one process, or ``auto``: in ``fit`` the most that fit into memory, up to all of
            them (see ``AutoBatchSize``); elsewhere 8.
        template: How prompt and completion become one text: instruction, chat (the tokenizer's own) or raw.
        on_bad_row: What becomes of rows that cannot be used: error reports them all and stops, skip leaves them out.
        on_overflow: What becomes of rows over max_length: error reports them all and stops, drop leaves them out,
            shorten takes lines out of the completion's middle and keeps its last line.
        num_workers: Processes that make batches beside the training process. Rows lie encoded in a mapped file, so a
            batch costs well under a millisecond and none are needed.
        grid_size: Cells along one side of the grid. Without it, what the first row says; 10 for generated rows.
        generated_games: Games to generate where there is no train_path.
        generated_teacher: Who plays them.
        generated_style: The text format they are written in.
        generated_noise: Share of their moves that are random legal ones; the teacher's move is written all the same.
        seed: Seed of the split, of the order of the rows and of generated games.
        pad_to_multiple_of: Batches are padded to a multiple of this many tokens. 8 suits the tensor cores of GPUs and
            costs under 1% on rows of a few hundred tokens.
        trust_remote_code: Let code in the base model's directory run.
        revision: Branch, tag or commit of a hub id.
        tokenizer: For use from Python: a tokenizer to take in place of the base model's.

    Raises:
        UserError: From ``prepare_data`` and ``setup``, for everything that is wrong with a setting or a row.
    """

    def __init__(
        self,
        base_model: str = DEFAULT_BASE_MODEL,
        train_path: str | list[str] | None = None,
        val_path: str | list[str] | None = None,
        predict_path: str | list[str] | None = None,
        val_fraction: float = 0.1,
        max_length: int = 512,
        batch_size: int | Literal["auto"] = DEFAULT_BATCH_SIZE,
        template: TemplateName = "instruction",
        on_bad_row: OnBadRow = "error",
        on_overflow: OnOverflow = "shorten",
        num_workers: int = 0,
        grid_size: int | None = None,
        generated_games: int = 200,
        generated_teacher: str = "bfs",
        generated_style: str = "bfs-512",
        generated_noise: float = 0.0,
        seed: int = 0,
        pad_to_multiple_of: int = 8,
        trust_remote_code: bool = False,
        revision: str | None = None,
        tokenizer: Any = None,
    ) -> None:
        super().__init__()
        # A rank may have no prompt to complete.
        self.allow_zero_length_dataloader_with_multiple_devices = True
        self.base_model = base_model
        self.train_path = train_path
        self.val_path = val_path
        self.predict_path = predict_path
        self.val_fraction = val_fraction
        self.max_length = max_length
        self.batch_size = batch_size
        self.template = template
        self.on_bad_row = on_bad_row
        self.on_overflow = on_overflow
        self.num_workers = num_workers
        self.grid_size = grid_size
        self.generated_games = generated_games
        self.generated_teacher = generated_teacher
        self.generated_style = generated_style
        self.generated_noise = generated_noise
        self.seed = seed
        self.pad_to_multiple_of = pad_to_multiple_of
        self.trust_remote_code = trust_remote_code
        self.revision = revision
        self._tokenizer = tokenizer
        self._train: _RowSubset | None = None
        self._val: _RowSubset | None = None
        self._summary: dict[str, Any] = {}
        self._prompts: list[Row] | None = None
        self._max_rows: int | None = None

    def limit_rows(self, max_rows: int) -> None:
        """Take a first look only: that many rows from the beginning of the files, or few games where none are named.

        Call it before ``prepare_data``.
        """
        self._max_rows = max_rows
        self.generated_games = min(self.generated_games, _GAMES_TO_LOOK_AT)

    @property
    def base_spec(self) -> BaseModelSpec:
        """The base model whose tokenizer encodes the rows."""
        return BaseModelSpec(self.base_model, self.revision, self.trust_remote_code)

    @property
    def tokenizer(self) -> PreTrainedTokenizerBase:
        """The tokenizer that encodes the rows, loaded at its first use."""
        if self._tokenizer is None:
            self._tokenizer = load_tokenizer(self.base_spec)
        return self._tokenizer

    @functools.cached_property
    def encoder(self) -> Encoder:
        """What turns prompts and rows into ids."""
        return self.encoder_of(self.template)

    def encoder_of(self, template: TemplateName) -> Encoder:
        """The same in another template, for a model that was trained in it."""
        return Encoder(self.tokenizer, template, self.max_length, self.on_overflow)

    # Data

    def prepare_data(self) -> None:
        """Fetch the base model, generate rows where none are named, and encode; one process does it for all."""
        self._check_settings()
        stage = self._stage()
        if self._tokenizer is None:
            prepare_base_model(self.base_spec)
        if stage in ("test", "predict"):
            return
        if self._needs_train_rows(stage):
            paths = self.train_paths()
            if self.train_path is None:
                logger.info("no data.train_path: training on generated rows, %s", paths[0])
            self._open(paths)
        if self.val_path is not None:
            self._open(expand_paths(self.val_path))

    def setup(self, stage: str | None = None) -> None:
        """Open what ``prepare_data`` built and split it.

        Args:
            stage: ``fit``, ``validate``, ``test`` (which plays, and needs no rows) or ``predict``.
        """
        self._check_settings()
        stage = stage or "fit"
        if stage == "predict":
            self._prompts = self._read_prompts()
        elif stage != "test" and (self._train if self._needs_train_rows(stage) else self._val) is None:
            self._setup_rows(stage)

    def _setup_rows(self, stage: str) -> None:
        if self._needs_train_rows(stage):
            rows = self._open(self.train_paths())
            self._check_grid_size()
            if self.val_path is None:
                split = split_by_game(rows.games(), rows.prompt_hashes(), self.val_fraction, self.seed)
                train, self._val = split.train, _RowSubset(rows, split.val)
            else:
                self._val = self._open_val_rows(self.val_path)
                hashes = self._val.rows.prompt_hashes()
                train = leave_out_duplicates(np.arange(len(rows)), rows.prompt_hashes(), hashes)
            self._train = _RowSubset(rows, train)
        elif self.val_path is not None:
            self._val = self._open_val_rows(self.val_path)
        self._summary = self._summarise()
        if self.trainer is None or self.trainer.is_global_zero:
            logger.info("data: %s", _in_words(self._summary))

    def _open_val_rows(self, val_path: str | list[str]) -> _RowSubset:
        rows = self._open(expand_paths(val_path))
        return _RowSubset(rows, np.arange(len(rows)))

    def _open(self, paths: Sequence[Path]) -> EncodedRows:
        max_rows = None if self._max_rows is None else max(1, self._max_rows // len(paths))
        return open_encoded_rows(paths, self.encoder, self.on_bad_row, max_rows)

    def _stage(self) -> str:
        return "fit" if self.trainer is None or self.trainer.state.fn is None else self.trainer.state.fn.value

    def _needs_train_rows(self, stage: str) -> bool:
        return stage == "fit" or self.val_path is None

    def train_paths(self) -> list[Path]:
        """The files of rows to train on, generated where none are named and they are not there yet."""
        if self.train_path is not None:
            return expand_paths(self.train_path)
        path = self._generated_path()
        if not path.exists():
            with report_cache_errors():
                size = self._generated_grid_size()
                num_rows = write_dataset(
                    path,
                    self.generated_games,
                    size,
                    self.generated_teacher,
                    self.generated_style,
                    self.seed,
                    noise=self.generated_noise,
                )
            logger.info("generated %d games, %d rows on a %dx%d grid", self.generated_games, num_rows, size, size)
        return [path]

    def _generated_path(self) -> Path:
        return generated_data_path(
            self._generated_grid_size(),
            self.generated_teacher,
            self.generated_style,
            self.generated_games,
            self.generated_noise,
            self.seed,
        )

    def _generated_grid_size(self) -> int:
        return DEFAULT_GRID_SIZE if self.grid_size is None else self.grid_size

    def _read_prompts(self) -> list[Row]:
        if self.predict_path is None:
            raise UserError(
                "no prompts to complete: set data.predict_path to a JSONL file with a 'prompt' in each row."
            )
        complaints = Complaints()
        rows = []
        for row in read_rows(
            expand_paths(self.predict_path), self.on_bad_row, require_completion=False, complaints=complaints
        ):
            if refusal := self.encoder.refuse(row.prompt, source=row.source):
                complaints.add(*refusal)
            else:
                rows.append(row)
        if self.on_bad_row == "error":
            complaints.raise_if_any()
        elif complaints:
            logger.warning("skipped %s", complaints)
        if not rows:
            raise UserError(f"{self.predict_path}: no rows. Write one JSON object with a 'prompt' a line.")
        return rows

    def _check_settings(self) -> None:
        check_choice("data.on_bad_row", self.on_bad_row, OnBadRow)
        least = {"batch_size": 1, "pad_to_multiple_of": 1, "num_workers": 0, "seed": 0, "generated_games": 1}
        for name, minimum in least.items():
            value = getattr(self, name)
            if value != "auto" and value < minimum:
                raise UserError(f"data.{name} must be at least {minimum} (found: {value})")
        most = {
            "seed": 2**32 - 1,
            "pad_to_multiple_of": max(256, self.max_length),
            "num_workers": max_processes(),
        }
        for name, maximum in most.items():
            if (value := getattr(self, name)) > maximum:
                raise UserError(f"data.{name} must be at most {maximum:,} (found: {value:,})")
        if isinstance(self._tokenizer, str):
            raise UserError("data.tokenizer takes a tokenizer from Python, no name. Set data.base_model instead.")

    def _check_grid_size(self) -> None:
        found = self._first_row_grid_size()
        if None not in (self.grid_size, found) and self.grid_size != found:
            raise UserError(
                f"data.grid_size={self.grid_size}, but the first training row is of a {found}x{found} grid. "
                "Leave data.grid_size out, or name other rows."
            )

    # Loaders

    def train_dataloader(self) -> DataLoader:
        """Batches to train on, in an order of its own for every epoch."""
        loader = self._loader(self._require(self._train), shuffle=True)
        if self.trainer is not None:
            loader.before_pass = functools.partial(self._seek, cast(LengthGroupedSampler, loader.sampler))
        return loader

    def val_dataloader(self) -> DataLoader | list[DataLoader]:
        """Batches to validate on, always in the same order; an empty list where no rows validate."""
        val = self._require(self._val)
        return self._loader(val, shuffle=False) if len(val) else []

    def predict_dataloader(self) -> DataLoader:
        """Batches of prompts to complete, in file order."""
        if self._prompts is None:
            raise RuntimeError("call setup('predict') first")
        return DataLoader(
            _PromptBatches(self._prompts, self.encoder),
            sampler=InOrderSampler(len(self._prompts), self._rows_per_batch, **self._ranks()),
            batch_size=None,
            collate_fn=_as_it_is,
        )

    def longest_batch(self, num_rows: int) -> Batch:
        """The longest rows to train on as one batch: none that training meets takes more memory."""
        train = self._require(self._train)
        longest = np.argsort(train.lengths())[::-1][:num_rows]
        return self._collate(train[longest.tolist()])

    @property
    def _rows_per_batch(self) -> int:
        if self.batch_size != "auto":
            return self.batch_size
        if self._stage() == "fit":
            raise UserError(
                "data.batch_size=auto: nothing has looked for the largest batch. Add AutoBatchSize() to the "
                "trainer's callbacks, or give a number."
            )
        return DEFAULT_BATCH_SIZE

    @property
    def _collate(self) -> Callable[[Sequence[Example]], Batch]:
        pad_id = self.tokenizer.pad_token_id
        return functools.partial(
            collate,
            pad_id=self.tokenizer.eos_token_id if pad_id is None else pad_id,
            pad_to_multiple_of=self.pad_to_multiple_of,
        )

    def _loader(self, rows: _RowSubset, *, shuffle: bool) -> _LazyLoader:
        sampler = LengthGroupedSampler(
            rows.lengths(), self._rows_per_batch, shuffle=shuffle, seed=self.seed, **self._ranks()
        )
        return _LazyLoader(
            rows,
            sampler=sampler,
            batch_size=None,
            collate_fn=self._collate,
            num_workers=self.num_workers,
            persistent_workers=self.num_workers > 0,
            pin_memory=self.trainer is not None and self.trainer.strategy.root_device.type == "cuda",
            # Drawing the workers' seeds from the global generator would change the training's random numbers.
            generator=torch.Generator().manual_seed(self.seed),
        )

    def _ranks(self) -> dict[str, int]:
        """This process's place among those that share the rows, which need not be all there are."""
        return (self.trainer and self.trainer.distributed_sampler_kwargs) or {"num_replicas": 1, "rank": 0}

    # Resuming

    def _seek(self, sampler: LengthGroupedSampler) -> None:
        """Put the sampler where training stands, at the beginning of each pass.

        The batches trained on so far are counted by Lightning's loop, whose counters are part of each checkpoint. They
        count what was trained on, not what was fetched ahead; they hold whichever hook a checkpoint was written in, and
        in the total also where ``max_steps`` cut an epoch short, which Lightning counts as a whole one.
        """
        assert self.trainer is not None
        progress = cast(_ProcessedTracker, self.trainer.fit_loop.epoch_loop.batch_progress.total)
        sampler.seek(*divmod(progress.processed, int(self.trainer.num_training_batches)))

    def state_dict(self) -> dict[str, Any]:
        """What the order of the rows follows from; the position in it is in Lightning's own part of a checkpoint."""
        return {
            "split_hash": self.split_hash,
            "seed": self.seed,
            "global_batch_size": self._rows_per_batch * self._ranks()["num_replicas"],
            "batch_size": self._rows_per_batch,
        }

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Warn where training goes on with other rows, or in another order, than it began with."""
        if self._train is None:
            return
        now = self.state_dict()
        # The order depends on what all processes take together, not on one's share.
        state_dict = {name: was for name, was in state_dict.items() if name != "batch_size"}
        changed = [f"{name} was {was!r}, is {now[name]!r}" for name, was in state_dict.items() if now.get(name) != was]
        if changed:
            logger.warning("the rows will not come as in a run that was never stopped: %s", "; ".join(changed))

    # What the data is

    @property
    def data_hash(self) -> str:
        """Hash of the bytes of the training files, or of the validation files where there are no others."""
        return self.summary()["data_hash"]

    @property
    def split_hash(self) -> str:
        """Hash of which rows train and which validate."""
        return self.summary()["split_hash"]

    @property
    def num_train_rows(self) -> int:
        """Rows to train on."""
        return len(self._require(self._train))

    @property
    def num_val_rows(self) -> int:
        """Rows to validate on."""
        return len(self._require(self._val))

    @property
    def resolved_grid_size(self) -> int:
        """Cells along one side of the grid: the setting, else what the first training row says, else 10."""
        if self.grid_size is not None:
            return self.grid_size
        return self._first_row_grid_size() or DEFAULT_GRID_SIZE

    @property
    def prompt_format(self) -> str:
        """Name of the style that the first training row's prompt is written in, or ``unknown``."""
        row = self._first_row()
        if row is None:
            return self.generated_style if self.train_path is None else "unknown"
        for style in STYLES.values():
            try:
                style.read_prompt(row.prompt)
            except ValueError:
                continue
            return style.name
        return "unknown"

    def sample_rows(self, num_rows: int) -> list[Row]:
        """A few of the rows that validate, as their files have them: spread over all, and the same ones every time.

        Args:
            num_rows: How many, if there are as many.
        """
        val = self._require(self._val)
        positions = np.unique(np.linspace(0, len(val) - 1, min(num_rows, len(val))).round().astype(int))
        lines: dict[str, list[int]] = {}
        for index in np.sort(val.indices)[positions]:
            path, _, line = val.rows[int(index)].source.rpartition(":")
            lines.setdefault(path, []).append(int(line))
        return [row for path, numbers in lines.items() for row in read_rows_at(Path(path), numbers)]

    def summary(self) -> dict[str, Any]:
        """What was set up, in figures: for the log, the metadata and the report."""
        self._require(self._val)
        return dict(self._summary)

    def _summarise(self) -> dict[str, Any]:
        val = self._require(self._val)
        train = val.none_of_them() if self._train is None else self._train
        own_val_rows = 0 if train.rows is not val.rows else len(val)
        digest = hashlib.blake2b(digest_size=16)
        for subset in (train, val):
            digest.update(subset.rows.content_hash.encode())
            digest.update(len(subset).to_bytes(8, "little"))
            digest.update(subset.indices.tobytes())
        return {
            "data_hash": train.rows.content_hash,
            "split_hash": digest.hexdigest(),
            "grid_size": self.resolved_grid_size,
            "prompt_format": self.prompt_format,
            "template": self.template,
            "max_length": self.max_length,
            "num_rows": len(train.rows),
            "num_games": train.rows.num_games,
            "num_train_rows": len(train),
            "num_train_games": train.num_games(),
            "num_val_rows": len(val),
            "num_val_games": val.num_games(),
            "num_duplicates_removed": 0 if self._train is None else len(train.rows) - own_val_rows - len(train),
            "num_skipped": dict(train.rows.skipped),
        }

    def _first_row_grid_size(self) -> int | None:
        row = self._first_row()
        return None if row is None else read_grid_size(row.prompt)

    def _first_row(self) -> Row | None:
        if self.train_path is not None:
            return peek_row(self.train_path, require_completion=False)
        path = self._generated_path()
        return peek_row(path) if path.exists() else None

    def _require(self, rows: _RowSubset | None) -> _RowSubset:
        if rows is None:
            raise RuntimeError("call setup('fit') first")
        return rows


class _RowSubset(Dataset):
    """Some of the encoded rows, handed out a batch at a time."""

    def __init__(self, rows: EncodedRows, indices: npt.NDArray[np.integer[Any]]) -> None:
        self.rows = rows
        self.indices = indices.astype(np.int32 if len(rows) < 2**31 else np.int64)

    def __len__(self) -> int:
        return len(self.indices)

    def __getitem__(self, batch: Sequence[int] | int) -> list[Example]:
        # Lightning's overfit_batches asks for single rows.
        positions = [batch] if isinstance(batch, int) else batch
        return [self.rows[int(self.indices[position])] for position in positions]

    def none_of_them(self) -> _RowSubset:
        return _RowSubset(self.rows, self.indices[:0])

    def lengths(self) -> npt.NDArray[np.int32]:
        return self.rows.lengths()[self.indices]

    def num_games(self) -> int:
        return int(np.count_nonzero(np.bincount(self.rows.games()[self.indices])))


class _PromptBatches(Dataset):
    """Prompts to complete, handed out a batch at a time."""

    def __init__(self, rows: list[Row], encoder: Encoder) -> None:
        self._rows = rows
        self._encoder = encoder

    def __len__(self) -> int:
        return len(self._rows)

    def __getitem__(self, batch: Sequence[int]) -> PromptBatch:
        rows = [self._rows[index] for index in batch]
        prompts = [row.prompt for row in rows]
        return {
            "input_ids": self._encoder.encode_prompts(prompts),
            "prompts": prompts,
            "sources": [row.source for row in rows],
        }


class _LazyLoader(DataLoader):
    """A loader that asks its sampler, and starts its workers, when the first batch is asked for.

    Lightning makes the iterator earlier: before ``set_epoch``, and before a checkpoint is restored where the module
    asks for the number of steps. Workers that fetch ahead from there on would have begun at the wrong batch.
    """

    before_pass: Callable[[], None] | None = None
    wait_seconds = 0.0
    """Time that whoever iterates has spent waiting for batches, in all passes."""

    def __iter__(self) -> Iterator[Batch]:  # type: ignore[override]
        start = time.perf_counter()
        if self.before_pass is not None:
            self.before_pass()
        for batch in super().__iter__():
            self.wait_seconds += time.perf_counter() - start
            yield batch
            start = time.perf_counter()


def _as_it_is(batch: Any) -> Any:
    return batch


def _in_words(summary: dict[str, Any]) -> str:
    """What of a summary a person wants to know when a run starts; hashes are in the adapter's metadata."""
    parts = []
    for rows, games, purpose in (
        ("num_train_rows", "num_train_games", "to train on"),
        ("num_val_rows", "num_val_games", "to validate on"),
    ):
        if num_rows := summary[rows]:
            num_games = f"{summary[games]:,} game{'' if summary[games] == 1 else 's'}"
            parts.append(f"{num_rows:,} rows of {num_games} {purpose}")
    if removed := summary["num_duplicates_removed"]:
        parts.append(f"{removed:,} left out whose prompt is among those to validate on")
    size = summary["grid_size"]
    return f"{'; '.join(parts) or 'no rows'} ({size}x{size}, {summary['prompt_format']})"
