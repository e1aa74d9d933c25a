"""Models with their adapters, without them, a teacher and chance: all through the same loop and seeds."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import lightning.pytorch as pl

from snake_lora_pl.adapters.shared_base import SharedBase
from snake_lora_pl.errors import UserError
from snake_lora_pl.evaluation.distributed import PlayerResult, Ranks, play_shared, shares_model
from snake_lora_pl.evaluation.player_factory import PlayData, TrainedModule, find_style, make_player, shown_progress
from snake_lora_pl.evaluation.policy import Policy, TeacherPolicy
from snake_lora_pl.evaluation.settings import PlaySettings
from snake_lora_pl.game import STYLES
from snake_lora_pl.game.seeds import play_seeds

ADAPTER, BASE, RANDOM = "adapter", "base", "random_legal"


class PromptSpec(NamedTuple):
    """How boards reach a model; None stands for what settings and rows say.

    Attributes:
        style: Name of the format that they are written in.
        template: How prompt and completion become one text.
    """

    style: str | None = None
    template: str | None = None


class Contestant(NamedTuple):
    """An adapter that plays.

    Attributes:
        name: What to call it in tables and files.
        prompt_spec: How it was trained to be asked.
        adapter_dir: Where it lies; None for one that the module carries and that lies nowhere yet.
    """

    name: str = ADAPTER
    prompt_spec: PromptSpec = PromptSpec()
    adapter_dir: str | None = None


class Match(pl.LightningModule):
    """For ``Trainer.test``: every player plays the same games. The trainer places the model and starts the processes.

    Several adapters play one after the other on one base in memory, each prompted as it was trained. The base plays
    once for each way in which they are.

    Args:
        module: The trained module; it loads the first contestant.
        data: Its data module.
        settings: How games are played.
        num_games: Games for each player.
        contestants: The adapters that play; without any the base plays alone.

    Attributes:
        results: After the test: each player's result. In the first process they hold the games of all processes.
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
        try:
            self.seeds = play_seeds(num_games, settings.seed)
        except ValueError as error:
            raise UserError(f"--games: {error}") from error
        self.module = module
        self.data = data
        self.settings = settings
        self.contestants = [
            contestant._replace(prompt_spec=self._settled(contestant.prompt_spec)) for contestant in contestants
        ]
        own = [contestant.prompt_spec for contestant in self.contestants] or [self._settled(PromptSpec())]
        self.prompt_specs = list(dict.fromkeys(own))
        self.loop = settings.loop(settings.grid_size or data.resolved_grid_size)
        self.results: list[PlayerResult] = []
        self._shared: SharedBase | None = None

    def _settled(self, prompt_spec: PromptSpec) -> PromptSpec:
        style = find_style(self.settings, self.data) if prompt_spec.style is None else STYLES[prompt_spec.style]
        if style is None:
            raise UserError(
                "nothing says which style the prompts of these games are to be written in. Set play.style, or name "
                "data.train_path with rows of a known one."
            )
        return PromptSpec(style.name, prompt_spec.template or self.data.template)

    @property
    def title(self) -> str:
        """What was played, in words."""
        size, max_steps = self.loop["grid_size"], self.loop["max_steps"]
        limit = f" and {max_steps:,} in all" if max_steps is not None else ""
        styles = " and ".join(dict.fromkeys(str(prompt_spec.style) for prompt_spec in self.prompt_specs))
        return (
            f"{len(self.seeds):,} games on {size}x{size}, at most {self.loop['max_steps_without_apple']:,} steps "
            f"without an apple{limit}; prompts in {styles}, greedy decoding, teacher {self.settings.teacher}"
        )

    @property
    def conditions(self) -> dict[str, Any]:
        """Everything that the games follow from; what differs between adapters is left out."""
        loop = {name: value for name, value in self.loop.items() if name != "batch_size"}
        facts: dict[str, Any] = {
            "num_games": len(self.seeds),
            "seed": self.settings.seed,
            "first_game_seed": self.seeds[0],
            **loop,
            "decoding": "greedy",
        }
        if len(self.contestants) < 2:
            facts["adapter"] = self.contestants[0].adapter_dir if self.contestants else None
        if len(self.prompt_specs) == 1:
            facts |= self.prompt_specs[0]._asdict()
        return facts

    def prepare_data(self) -> None:
        """Fetch the base model, in one process."""
        self.data.trainer = self.trainer
        self.data.prepare_data()

    def configure_model(self) -> None:
        """Load the model, and all adapters onto it."""
        if len(self.contestants) > 1 and shares_model(self.trainer.strategy):
            raise UserError(
                "several adapters cannot play on a model that is cut into slices. Set --trainer.strategy=auto."
            )
        self.module.configure_model()
        if self._shared is None and len(self.contestants) > 1:
            self._shared = self._load_all()

    def _load_all(self) -> SharedBase:
        dirs = {
            contestant.name: contestant.adapter_dir
            for contestant in self.contestants
            if contestant.adapter_dir is not None
        }
        (first, first_dir), *others = dirs.items()
        module = self.module
        shared = SharedBase(module.peft_model, first, first_dir, full_precision_base=module.full_precision_base)
        for name, adapter_dir in others:
            shared.load(name, adapter_dir)
        return shared

    def test_dataloader(self) -> list[int]:
        """One step, in which everything is played."""
        return [0]

    def test_step(self, batch: int, batch_idx: int) -> None:
        """Let every player play."""
        ranks = Ranks.of(self.trainer)
        for player in self._players():
            with player as policy, shown_progress(self.trainer, policy.name) as progress:
                result = play_shared(policy, self.seeds, ranks, **self.loop, progress=progress)
            parts = ranks.gather_objects(result.games)
            if parts:
                result = result._replace(games=ranks.join(parts, len(self.seeds)))
            self.results.append(result)

    def _players(self) -> Iterator[contextlib.AbstractContextManager[Policy]]:
        for contestant in self.contestants:
            self._use(contestant)
            yield contextlib.nullcontext(self._player(contestant.name, contestant.prompt_spec))
            if self.settings.legal_mask:
                name = f"{contestant.name}+mask"
                yield contextlib.nullcontext(self._player(name, contestant.prompt_spec, legal_mask=True))
        for prompt_spec in self.prompt_specs:
            yield self._base_player(prompt_spec)
        for name in dict.fromkeys([self.settings.teacher, RANDOM]):
            yield contextlib.nullcontext(TeacherPolicy(name))

    def _use(self, contestant: Contestant) -> None:
        if self._shared is not None:
            self.module.model = self._shared.use(contestant.name)

    def _player(self, name: str, prompt_spec: PromptSpec, *, legal_mask: bool = False) -> Policy:
        assert prompt_spec.style is not None
        assert prompt_spec.template is not None
        encoder = self.data.encoder_of(prompt_spec.template)
        style = STYLES[prompt_spec.style]
        return make_player(self.module, encoder, style, self.settings.reading, name, legal_mask=legal_mask)

    @contextlib.contextmanager
    def _base_player(self, prompt_spec: PromptSpec) -> Iterator[Policy]:
        with self.module.peft_model.disable_adapter():
            yield self._player(self._base_name(prompt_spec), prompt_spec)

    def _base_name(self, prompt_spec: PromptSpec) -> str:
        if len(self.prompt_specs) == 1:
            return BASE
        styles = [other.style for other in self.prompt_specs]
        return f"{BASE} {prompt_spec.style}" + (
            f" {prompt_spec.template}" if styles.count(prompt_spec.style) > 1 else ""
        )
