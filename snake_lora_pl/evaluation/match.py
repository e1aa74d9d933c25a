"""Match between adapters, the base model, a teacher and a random policy: same game loop, same seeds."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import lightning.pytorch as pl
from typing_extensions import override

from snake_lora_pl.adapters.shared_base import SharedBase
from snake_lora_pl.collectives import gather_objects
from snake_lora_pl.errors import UserError
from snake_lora_pl.evaluation.distributed import PlayerResult, Ranks, play_shared, shares_model
from snake_lora_pl.evaluation.player_factory import PlayData, TrainedModule, find_style, make_player, shown_progress
from snake_lora_pl.evaluation.policy import Policy, TeacherPolicy
from snake_lora_pl.evaluation.settings import PlaySettings
from snake_lora_pl.game import STYLES, Style
from snake_lora_pl.game.seeds import play_seeds

ADAPTER, BASE, RANDOM = "adapter", "base", "random_legal"
"""Names of players in tables and files."""


class PromptSpec(NamedTuple):
    """Style and template of prompts; None takes the value from settings and rows.

    Attributes:
        style: Name of the style of the prompts.
        template: Template that joins prompt and completion.
        template_date: Date that a chat template renders.
    """

    style: str | None = None
    template: str | None = None
    template_date: str | None = None

    def known(self) -> dict[str, str]:
        """Return the fields that are not None."""
        return {name: value for name, value in self._asdict().items() if value is not None}


class Contestant(NamedTuple):
    """An adapter that plays.

    Attributes:
        name: Name in tables and files.
        prompt_spec: How it was prompted in training.
        adapter_dir: Its directory; None for an adapter in memory that is not saved.
    """

    name: str = ADAPTER
    prompt_spec: PromptSpec = PromptSpec()
    adapter_dir: str | None = None


class Match(pl.LightningModule):
    """LightningModule for ``Trainer.test`` in which every player plays the same games.

    The trainer places the model and starts the ranks. Several adapters play in turn on one base model in memory, each
    prompted as in its training. The base model plays once for each prompt spec of the adapters.

    Args:
        module: The trained module; it loads the first contestant.
        data: Its data module.
        settings: Settings of the games.
        num_games: Number of games of each player.
        contestants: The adapters that play; if empty, the base model plays without adapters.

    Attributes:
        contestants: The adapters, with complete prompt specs.
        results: Result of each player after the test, with the games of all ranks.

    Raises:
        UserError: If the style of the prompts is unknown.
    """

    def __init__(
        self,
        module: TrainedModule,
        data: PlayData,
        settings: PlaySettings,
        num_games: int,
        contestants: Sequence[Contestant] = (Contestant(),),
    ) -> None:
        super().__init__()
        self.seeds = play_seeds(num_games, settings.seed)
        self.module = module
        self.data = data
        self.settings = settings
        self.contestants = [
            contestant._replace(prompt_spec=self._complete(contestant.prompt_spec)) for contestant in contestants
        ]
        specs = [contestant.prompt_spec for contestant in self.contestants] or [self._complete(PromptSpec())]
        self._prompt_specs = list(dict.fromkeys(specs))
        self.loop = settings.loop(settings.grid_size or data.resolved_grid_size)
        self.results: list[PlayerResult] = []
        self._shared: SharedBase | None = None

    def _resolve(self, spec: PromptSpec) -> tuple[Style, str]:
        style = find_style(self.settings, self.data) if spec.style is None else STYLES[spec.style]
        if style is None:
            raise UserError(
                "the style of the prompts is unknown. Set play.style, or set data.train_path to rows of a known style."
            )
        return style, spec.template or self.data.template

    def _complete(self, spec: PromptSpec) -> PromptSpec:
        style, template = self._resolve(spec)
        return PromptSpec(style.name, template, spec.template_date)

    @property
    def title(self) -> str:
        """Description of the games."""
        size, max_steps = self.loop["grid_size"], self.loop["max_steps"]
        limit = f" and {max_steps:,} in all" if max_steps is not None else ""
        styles = " and ".join(dict.fromkeys(str(spec.style) for spec in self._prompt_specs))
        return (
            f"{len(self.seeds):,} games on {size}x{size}, at most {self.loop['max_steps_without_apple']:,} steps "
            f"without an apple{limit}; prompts in {styles}, greedy decoding, teacher {self.settings.teacher}"
        )

    @property
    def conditions(self) -> dict[str, Any]:
        """Everything that determines the games, as plain JSON, without what differs between adapters."""
        loop = {name: value for name, value in self.loop.items() if name != "batch_size"}
        conditions: dict[str, Any] = {
            "num_games": len(self.seeds),
            "seed": self.settings.seed,
            "first_game_seed": self.seeds[0],
            **loop,
            "decoding": "greedy",
        }
        if len(self.contestants) < 2:
            conditions["adapter"] = self.contestants[0].adapter_dir if self.contestants else None
        if len(self._prompt_specs) == 1:
            conditions |= self._prompt_specs[0].known()
        return conditions

    @override
    def prepare_data(self) -> None:
        self.data.trainer = self.trainer
        self.data.prepare_data()

    @override
    def configure_model(self) -> None:
        if len(self.contestants) > 1 and shares_model(self.trainer.strategy):
            raise UserError("several adapters cannot play on a sharded model. Set --trainer.strategy=auto.")
        self.module.configure_model()
        if self._shared is None and len(self.contestants) > 1:
            self._shared = self._load_all()

    def _load_all(self) -> SharedBase:
        dirs = {player.name: player.adapter_dir for player in self.contestants if player.adapter_dir is not None}
        (first, first_dir), *others = dirs.items()
        module = self.module
        shared = SharedBase(module.peft_model, first, first_dir, full_precision_base=module.full_precision_base)
        for name, adapter_dir in others:
            shared.load(name, adapter_dir)
        return shared

    @override
    def test_dataloader(self) -> list[int]:
        return [0]  # one step plays all games

    @override
    def test_step(self, batch: int, batch_idx: int) -> None:
        ranks = Ranks.of(self.trainer)
        for player in self._players():
            with player as policy, shown_progress(self.trainer, policy.name) as progress:
                result = play_shared(policy, self.seeds, ranks, **self.loop, progress=progress)
            if ranks.size > 1:
                parts = gather_objects(self.trainer, result.games)
                result = result._replace(games=ranks.join(parts, len(self.seeds)))
            self.results.append(result)

    def _players(self) -> Iterator[contextlib.AbstractContextManager[Policy]]:
        for contestant in self.contestants:
            if self._shared is not None:
                self.module.model = self._shared.use(contestant.name)
            name, spec, _ = contestant
            yield contextlib.nullcontext(self._model_player(name, spec))
            if self.settings.legal_mask:
                yield contextlib.nullcontext(self._model_player(f"{name}+mask", spec, legal_mask=True))
        for spec in self._prompt_specs:
            yield self._base_player(spec)
        for name in dict.fromkeys([self.settings.teacher, RANDOM]):
            yield contextlib.nullcontext(TeacherPolicy(name))

    def _model_player(self, name: str, spec: PromptSpec, *, legal_mask: bool = False) -> Policy:
        style, template = self._resolve(spec)
        encoder = self.data.encoder_of(template, spec.template_date)
        return make_player(self.module, encoder, style, self.settings.reading, name, legal_mask=legal_mask)

    @contextlib.contextmanager
    def _base_player(self, spec: PromptSpec) -> Iterator[Policy]:
        with self.module.peft_model.disable_adapter():
            yield self._model_player(self._base_name(spec), spec)

    def _base_name(self, spec: PromptSpec) -> str:
        if len(self._prompt_specs) == 1:
            return BASE
        is_ambiguous = [other.style for other in self._prompt_specs].count(spec.style) > 1
        details = [spec.template, spec.template_date] if is_ambiguous else []
        return " ".join(filter(None, [BASE, spec.style, *details]))
