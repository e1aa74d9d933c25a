"""SnakeJSONLDataModule: reads JSONL files and returns batches; knows nothing of the model."""

from __future__ import annotations

import functools
import logging
import math
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import lightning
import numpy as np
import numpy.typing as npt
import torch
from torch.utils.data import DataLoader
from typing_extensions import override

from snake_lora_pl.constants import DEFAULT_BASE_MODEL, DEFAULT_GRID_SIZE
from snake_lora_pl.data.batching import Batch, PromptBatch, collate
from snake_lora_pl.data.data_files import expand_paths, expand_weighted_paths
from snake_lora_pl.data.draw_weights import UNKNOWN, Balance, balanced_levels, draw_probabilities
from snake_lora_pl.data.encoding import Encoder, Example, OnOverflow, TemplateName, check_choice
from snake_lora_pl.data.example_cache import open_examples, report_cache_errors
from snake_lora_pl.data.example_files import Examples, hash_prompt
from snake_lora_pl.data.generated_rows import Augmentation, NoiseMoves, write_dataset
from snake_lora_pl.data.jsonl import OnBadRow, Row, peek_row, read_rows, read_rows_at
from snake_lora_pl.data.loaders import ExampleSubset, LazyDataLoader, PromptBatches, max_processes
from snake_lora_pl.data.resume import restore_data_position, warn_if_order_changed
from snake_lora_pl.data.row_errors import RowErrors
from snake_lora_pl.data.samplers import FixedOrderSampler, InOrderSampler, LengthGroupedSampler
from snake_lora_pl.data.split import drop_duplicates, split_by_game
from snake_lora_pl.data.summary import format_summary, summarize
from snake_lora_pl.errors import UserError
from snake_lora_pl.game.text import find_style, read_grid_size
from snake_lora_pl.models import BaseModelSpec, load_tokenizer, prepare_base_model
from snake_lora_pl.paths import generated_data_path

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

logger = logging.getLogger(__name__)

DEFAULT_BATCH_SIZE = 8
_MAX_GAMES_OF_LIMITED_ROWS = 50


class SnakeJSONLDataModule(lightning.LightningDataModule):
    """Prompt/completion rows from JSONL files, split by game, encoded once and batched by length.

    Args:
        base_model: Model whose tokenizer encodes the rows: a short name, a directory or a hub id.
        train_path: Training rows: a file, a glob or a list of them. Default: rows generated into the cache. ``PATH@2``
            draws the rows of a file, or of the files of a glob, twice as often as rows of weight 1.
        val_path: Validation rows. Default: whole games split off from the training rows.
        predict_path: Rows with prompts for predict; they need no completion.
        val_fraction: Fraction of the training rows to split off, in [0, 1); 0 trains without validation.
        max_length: Maximum number of tokens per example: template, prompt, completion and EOS.
        batch_size: Rows per batch on each device, or ``auto``: the most that fit into memory in fit, 8 elsewhere.
        template: Text format of prompt and completion: instruction, chat (the tokenizer's chat template) or raw.
        template_date: Date in the prompts of a chat template that renders one, as YYYY-MM-DD. Default: today.
        on_bad_row: How to handle invalid rows: error or skip.
        on_overflow: How to handle rows longer than max_length: error, drop, or shorten, which removes lines from the
            middle of the completion and keeps the last line.
        num_workers: Number of loader processes. Examples are memory-mapped and a batch takes well under a millisecond,
            so 0 suffices.
        grid_size: Cells per side of the grid. Default: read from the first row; 10 for generated rows.
        generated_games: Number of games to generate if train_path is not set.
        generated_teacher: Teacher that plays the generated games.
        generated_style: Text format of generated rows.
        generated_noise: Probability of a random move in generated games; rows still contain the teacher's move.
        generated_noise_moves: Set that random moves are drawn from: legal, safe (those after which the tail is
            reachable) or mixed (one of the two, with equal probability).
        generated_augment: Symmetries of the board that positions of generated games are written in: none, all, or
            random (each position in one of them).
        balance: Draw training rows evenly over the snake's length, over whether the prompt offers both a trap and a
            safe move (decisive), or over both (length+decisive): evenly over lengths and, within each, over decisive or
            not. Default: as often as they occur.
        group_by_length: Whether training batches have rows of similar length, so that little is padded. Packed rows
            need no padding.
        seed: Seed of the split, the order of the rows and the generated games.
        pad_to_multiple_of: Pad batches to a multiple of this many tokens; 8 suits the tensor cores of GPUs.
        trust_remote_code: Whether to run code from the base model's repository.
        revision: Branch, tag or commit of a hub model.
        tokenizer: Tokenizer object to use instead of the base model's; from Python only.

    Raises:
        UserError: From ``prepare_data`` and ``setup``, if a setting or a row is invalid.
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
        template_date: str | None = None,
        on_bad_row: OnBadRow = "error",
        on_overflow: OnOverflow = "shorten",
        num_workers: int = 0,
        grid_size: int | None = None,
        generated_games: int = 200,
        generated_teacher: str = "bfs",
        generated_style: str = "bfs-512",
        generated_noise: float = 0.0,
        generated_noise_moves: NoiseMoves = "legal",
        generated_augment: Augmentation = "none",
        balance: Balance | None = None,
        group_by_length: bool = False,
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
        self.template_date = template_date
        self.on_bad_row = on_bad_row
        self.on_overflow = on_overflow
        self.num_workers = num_workers
        self.grid_size = grid_size
        self.generated_games = generated_games
        self.generated_teacher = generated_teacher
        self.generated_style = generated_style
        self.generated_noise = generated_noise
        self.generated_noise_moves: NoiseMoves = generated_noise_moves
        self.generated_augment: Augmentation = generated_augment
        self.balance = balance
        self.group_by_length = group_by_length
        self.seed = seed
        self.pad_to_multiple_of = pad_to_multiple_of
        self.trust_remote_code = trust_remote_code
        self.revision = revision
        self._tokenizer = tokenizer
        self._train: ExampleSubset | None = None
        self._val: ExampleSubset | None = None
        self._summary: dict[str, Any] = {}
        self._prompts: list[Row] | None = None
        self._max_rows: int | None = None

    def limit_rows(self, max_rows: int) -> None:
        """Limit a dry run to the first rows of the files, or to 50 generated games; call before ``prepare_data``."""
        self._max_rows = max_rows
        self.generated_games = min(self.generated_games, _MAX_GAMES_OF_LIMITED_ROWS)

    @property
    def base_spec(self) -> BaseModelSpec:
        """The base model whose tokenizer encodes the rows."""
        return BaseModelSpec(self.base_model, self.revision, self.trust_remote_code)

    @property
    def tokenizer(self) -> PreTrainedTokenizerBase:
        """The tokenizer that encodes the rows, loaded on first use."""
        if self._tokenizer is None:
            self._tokenizer = load_tokenizer(self.base_spec)
        return self._tokenizer

    @functools.cached_property
    def encoder(self) -> Encoder:
        """The encoder of prompts and rows."""
        return Encoder(self.tokenizer, self.template, self.max_length, self.on_overflow, self.template_date)

    def encoder_of(self, template: TemplateName, template_date: str | None = None) -> Encoder:
        """Return an encoder with another template and date, for a model that was trained with them."""
        # The date of the rows stays the same past midnight.
        date = template_date or self.encoder.template_date or self.template_date
        return Encoder(self.tokenizer, template, self.max_length, self.on_overflow, date)

    @override
    def prepare_data(self) -> None:
        self._check_settings()
        stage = self._stage()
        if self._tokenizer is None:
            prepare_base_model(self.base_spec)
        if stage in ("test", "predict"):
            return
        if self._needs_train_rows(stage):
            paths = self.train_paths()
            if self.train_path is None:
                logger.info("data.train_path is not set: training on generated rows, %s", paths[0])
            self._open_train(paths)
        if self.val_path is not None:
            self._open(expand_paths(self.val_path))

    @override
    def setup(self, stage: str | None = None) -> None:
        self._check_settings()
        stage = stage or "fit"
        if stage == "predict":
            self._prompts = self._read_prompts()
        elif stage != "test" and (self._train if self._needs_train_rows(stage) else self._val) is None:
            self._setup_rows(stage)

    def train_paths(self) -> list[Path]:
        """Return the files of training rows; without ``train_path``, generate them unless the cache has them."""
        if self.train_path is not None:
            return list(expand_weighted_paths(self.train_path))
        path = self._generated_path()
        if not path.exists():
            size = self._generated_grid_size()
            with report_cache_errors():
                num_rows = write_dataset(
                    path,
                    self.generated_games,
                    size,
                    self.generated_teacher,
                    self.generated_style,
                    self.seed,
                    noise=self.generated_noise,
                    noise_moves=self.generated_noise_moves,
                    augment=self.generated_augment,
                )
            logger.info("generated %d games, %d rows on a %dx%d grid", self.generated_games, num_rows, size, size)
        return [path]

    @override
    def train_dataloader(self) -> LazyDataLoader:
        sampler = self._sampler(
            self._train_subset, probabilities=self._draw_probabilities(), group_by_length=self.group_by_length
        )
        loader = self._loader(self._train_subset, sampler)
        if self.trainer is not None:
            loader.before_pass = functools.partial(restore_data_position, sampler, self.trainer)
        return loader

    @override
    def val_dataloader(self) -> LazyDataLoader | list[LazyDataLoader]:
        """Return the loader of validation batches, always in the same order; an empty list without validation rows."""
        val = self._val_subset
        return self._loader(val, self._sampler(val, shuffle=False)) if len(val) else []

    @override
    def predict_dataloader(self) -> DataLoader[PromptBatch]:
        """Return the loader of prompts to complete, in file order."""
        if self._prompts is None:
            raise RuntimeError("call setup('predict') first")
        return DataLoader(
            PromptBatches(self._prompts, self.encoder),
            sampler=InOrderSampler(len(self._prompts), self._rows_per_batch, **self._ranks()),
            batch_size=None,
        )

    def longest_batch(self, num_rows: int) -> Batch:
        """Return the longest training rows as one batch; no batch of that many rows takes more memory."""
        longest = np.argsort(self._train_subset.lengths())[::-1][:num_rows]
        return self._collate(self._train_subset[longest.tolist()])

    def extreme_rows(self) -> list[Example]:
        """Return rows of which one has the most tokens and one the largest token id; empty if there are no rows."""
        rows = []
        for subset in (self._train, self._val):
            if subset is not None and len(subset):
                rows += [*subset[[int(subset.lengths().argmax())]], subset.examples.with_largest_id()]
        return rows

    @override
    def state_dict(self) -> dict[str, Any]:
        """Return what determines the rows and their order; Lightning's loop stores the position (see ``resume``)."""
        state = {
            "split_hash": self.split_hash,
            "seed": self.seed,
            "template_date": self.encoder.template_date,
            "global_batch_size": self._rows_per_batch * self._ranks()["num_replicas"],
            "batch_size": self._rows_per_batch,
        }
        # The weights of rows are part of the files, and thus of the hash.
        weights = list(self._file_weights().values())
        sampling = {
            "balance": self.balance,
            "file_weights": weights if len(set(weights)) > 1 else None,
            "group_by_length": None if self.group_by_length else False,
        }
        return state | {name: value for name, value in sampling.items() if value is not None}

    @override
    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        if self._train is not None:
            warn_if_order_changed(state_dict, self.state_dict())

    @property
    def data_hash(self) -> str:
        """Hash of the training files, or of the validation files if there are no others."""
        return str(self.summary()["data_hash"])

    @property
    def split_hash(self) -> str:
        """Hash of which rows train and which validate."""
        return str(self.summary()["split_hash"])

    @property
    def num_train_rows(self) -> int:
        """Number of training rows."""
        return len(self._train_subset)

    @property
    def num_val_rows(self) -> int:
        """Number of validation rows."""
        return len(self._val_subset)

    @property
    def resolved_grid_size(self) -> int:
        """Cells per side of the grid: the setting, else the size in the first training row, else 10."""
        if self.grid_size is not None:
            return self.grid_size
        return self._first_row_grid_size() or DEFAULT_GRID_SIZE

    @property
    def prompt_format(self) -> str:
        """Name of the style of the first training row's prompt, or ``unknown``."""
        row = self._first_row()
        if row is None:
            return self.generated_style if self.train_path is None else "unknown"
        style = find_style(row.prompt)
        return "unknown" if style is None else style.name

    def sample_rows(self, num_rows: int) -> list[Row]:
        """Return validation rows as in their files, evenly spaced and the same ones every time.

        Args:
            num_rows: Maximum number of rows.
        """
        val = self._val_subset
        positions = np.unique(np.linspace(0, len(val) - 1, min(num_rows, len(val))).round().astype(int))
        lines: dict[str, list[int]] = {}
        for index in np.sort(val.indices)[positions]:
            path, _, line = val.examples[int(index)].source.rpartition(":")
            lines.setdefault(path, []).append(int(line))
        return [row for path, numbers in lines.items() for row in read_rows_at(Path(path), numbers)]

    def val_prompts(self) -> Callable[[str], bool]:
        """Return a function that tells whether a prompt is in the validation rows."""
        val = self._val_subset
        hashes = set(val.examples.prompt_hashes()[val.indices].tolist())
        return lambda prompt: hash_prompt(prompt) in hashes

    def summary(self) -> dict[str, Any]:
        """Return hashes and counts of the data, see ``summarize``."""
        if not self._summary:
            raise RuntimeError("call setup('fit') first")
        return dict(self._summary)

    @property
    def _train_subset(self) -> ExampleSubset:
        if self._train is None:
            raise RuntimeError("call setup('fit') first")
        return self._train

    @property
    def _val_subset(self) -> ExampleSubset:
        if self._val is None:
            raise RuntimeError("call setup('fit') or setup('validate') first")
        return self._val

    def _setup_rows(self, stage: str) -> None:
        if self.val_path is not None:
            val_examples = self._open(expand_paths(self.val_path))
            val = ExampleSubset(val_examples, np.arange(len(val_examples)))
        if self._needs_train_rows(stage):
            examples = self._open_train(self.train_paths())
            self._check_grid_size()
            if self.val_path is None:
                split = split_by_game(examples.games(), examples.prompt_hashes(), self.val_fraction, self.seed)
                train, val = split.train, ExampleSubset(examples, split.val)
            else:
                train = drop_duplicates(
                    np.arange(len(examples)), examples.prompt_hashes(), val_examples.prompt_hashes()
                )
            self._train = ExampleSubset(examples, train)
            self._check_strata(self._train)
        self._val = val
        self._summary = summarize(
            self._train,
            val,
            grid_size=self.resolved_grid_size,
            prompt_format=self.prompt_format,
            template=self.template,
            **({} if self.encoder.template_date is None else {"template_date": self.encoder.template_date}),
            max_length=self.max_length,
        )
        if self.trainer is None or self.trainer.is_global_zero:
            logger.info("data: %s", format_summary(self._summary))

    def _open_train(self, paths: Sequence[Path]) -> Examples:
        weights = self._file_weights()
        return self._open(paths, [weights.get(path, 1.0) for path in paths], with_strata=self.balance is not None)

    def _open(
        self, paths: Sequence[Path], file_weights: Sequence[float] | None = None, *, with_strata: bool = False
    ) -> Examples:
        max_rows = None if self._max_rows is None else max(1, self._max_rows // len(paths))
        return open_examples(
            paths, self.encoder, self.on_bad_row, max_rows, file_weights=file_weights, with_strata=with_strata
        )

    def _file_weights(self) -> dict[Path, float]:
        return {} if self.train_path is None else expand_weighted_paths(self.train_path)

    def _check_strata(self, train: ExampleSubset) -> None:
        if self.balance is None:
            return
        num_unknown = int(np.count_nonzero(train.strata() == UNKNOWN))
        if num_unknown == len(train):
            raise UserError(
                f"data.balance={self.balance}, but no training row has a prompt of a known style. Remove data.balance."
            )
        if num_unknown:
            logger.warning(
                "data.balance=%s: %d of %d training rows have a prompt of unknown style; they are drawn as one group",
                self.balance,
                num_unknown,
                len(train),
            )

    def _draw_probabilities(self) -> npt.NDArray[np.float64] | None:
        """Return the probability of each training row; None if all rows are equal."""
        train = self._train_subset
        if self.balance is None and not train.examples.has_weights():
            return None
        levels = [] if self.balance is None else balanced_levels(train.strata(), self.balance)
        return draw_probabilities(train.weights(), levels)

    def _read_prompts(self) -> list[Row]:
        if self.predict_path is None:
            raise UserError("data.predict_path is not set. Set it to a JSONL file with a 'prompt' in each row.")
        errors = RowErrors()
        rows = []
        for row in read_rows(expand_paths(self.predict_path), self.on_bad_row, require_completion=False, errors=errors):
            if rejection := self.encoder.check(row.prompt, source=row.source):
                errors.add(*rejection)
            else:
                rows.append(row)
        if self.on_bad_row == "error":
            errors.raise_if_any()
        elif errors:
            logger.warning("skipped %s", errors)
        if not rows:
            raise UserError(f"{self.predict_path}: no rows. Write one JSON object with a 'prompt' per line.")
        return rows

    def _stage(self) -> str:
        return "fit" if self.trainer is None or self.trainer.state.fn is None else self.trainer.state.fn.value

    def _needs_train_rows(self, stage: str) -> bool:
        return stage == "fit" or self.val_path is None

    def _generated_path(self) -> Path:
        return generated_data_path(
            self._generated_grid_size(),
            self.generated_teacher,
            self.generated_style,
            self.generated_games,
            self.generated_noise,
            self.seed,
            self.generated_noise_moves,
            self.generated_augment,
        )

    def _generated_grid_size(self) -> int:
        return DEFAULT_GRID_SIZE if self.grid_size is None else self.grid_size

    def _first_row_grid_size(self) -> int | None:
        row = self._first_row()
        return None if row is None else read_grid_size(row.prompt)

    def _first_row(self) -> Row | None:
        if self.train_path is not None:
            return peek_row(self.train_paths(), require_completion=False)
        path = self._generated_path()
        return peek_row(path) if path.exists() else None

    def _check_settings(self) -> None:
        check_choice("data.on_bad_row", self.on_bad_row, OnBadRow)
        check_choice("data.generated_noise_moves", self.generated_noise_moves, NoiseMoves)
        check_choice("data.generated_augment", self.generated_augment, Augmentation)
        if self.balance is not None:
            check_choice("data.balance", self.balance, Balance)
        if not isinstance(self.group_by_length, bool):
            raise UserError(f"data.group_by_length must be true or false (found: {self.group_by_length!r}).")
        limits: dict[str, tuple[int, float]] = {
            "batch_size": (1, math.inf),
            "generated_games": (1, math.inf),
            "num_workers": (0, max_processes()),
            "pad_to_multiple_of": (1, max(256, self.max_length)),
            "seed": (0, 2**32 - 1),
        }
        for name, (minimum, maximum) in limits.items():
            value = getattr(self, name)
            if name == "batch_size" and value == "auto":
                continue
            if value < minimum:
                raise UserError(f"data.{name} must be at least {minimum} (found: {value}).")
            if value > maximum:
                raise UserError(f"data.{name} must be at most {maximum:,} (found: {value:,}).")
        if isinstance(self._tokenizer, str):
            raise UserError(
                f"data.tokenizer must be a tokenizer object from Python (found: {self._tokenizer!r}). "
                "Set data.base_model instead."
            )

    def _check_grid_size(self) -> None:
        found = self._first_row_grid_size()
        if None not in (self.grid_size, found) and self.grid_size != found:
            raise UserError(
                f"data.grid_size={self.grid_size}, but the first training row has a {found}x{found} grid. "
                "Remove data.grid_size, or train on other rows."
            )

    @property
    def _rows_per_batch(self) -> int:
        if self.batch_size != "auto":
            return self.batch_size
        if self._stage() == "fit":
            raise UserError(
                "data.batch_size=auto: the largest batch size has not been searched. Add AutoBatchSize() to the "
                "trainer's callbacks, or set a number."
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

    def _sampler(self, subset: ExampleSubset, **settings: Any) -> LengthGroupedSampler:
        is_overfitting = self.trainer is not None and self.trainer.overfit_batches > 0  # type: ignore[attr-defined]
        sampler_class = FixedOrderSampler if is_overfitting else LengthGroupedSampler
        return sampler_class(subset.lengths(), self._rows_per_batch, seed=self.seed, **settings, **self._ranks())

    def _loader(self, subset: ExampleSubset, sampler: LengthGroupedSampler) -> LazyDataLoader:
        return LazyDataLoader(
            subset,
            sampler=sampler,
            batch_size=None,
            collate_fn=self._collate,
            num_workers=self.num_workers,
            persistent_workers=self.num_workers > 0,
            pin_memory=self.trainer is not None and self.trainer.strategy.root_device.type == "cuda",
            # Without a generator, each pass would draw the workers' seed from the global one and change training.
            generator=torch.Generator().manual_seed(self.seed),
        )

    def _ranks(self) -> dict[str, Any]:
        """Return rank and number of the processes that share the rows; under tensor parallelism some get the same."""
        return (self.trainer and self.trainer.distributed_sampler_kwargs) or {"num_replicas": 1, "rank": 0}
