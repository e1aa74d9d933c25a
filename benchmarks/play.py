"""Moves per second of games in lockstep, compared with ``generate`` of transformers and PEFT.

    python -m benchmarks.play --adapter path/to/model_artifacts

``generate`` plays one game at a time, games in batches, and games in batches whose common prefix is computed once.

Without ``--adapter``, an adapter is trained for a few steps first: the speed depends only on the format of its
completions. The contenders take turns (see ``interleaved``) on the CPU and play the same games, which start with snakes
of various lengths, because few positions of whole games are beginnings.

Moves are compared twice: in the turns, in the dtype of the model, where rounding can decide between equally likely
tokens, so the number of equal moves is printed; and in float32, where completions and moves must be equal, or the
command fails.

To add a contender, write a function ``run(timer, settings, num_turns, *, num_games)`` that plays ``settings.num_moves``
moves of each game per turn, and add it in ``main``.
"""

from __future__ import annotations

import argparse
import contextlib
import math
import os
import statistics
import subprocess
import tempfile
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from benchmarks.common import PROGRAM, add_json_option, make_parser, markdown_table, settings_of, write_json
from benchmarks.interleaved import Turn, TurnTimer, run_interleaved, speed_ratio

if TYPE_CHECKING:
    from snake_lora_pl.evaluation.language_model import LanguageModelPolicy
    from snake_lora_pl.game import Board, Game, Move

GENERATE = "generate, 1 game"
GRID_SIZE = 10
MAX_NEW_TOKENS = 192
GOLDEN_RATIO = (math.sqrt(5) - 1) / 2


@dataclass(frozen=True)
class PlaySettings:
    """Settings shared by all contenders.

    Attributes:
        adapter: Directory of the adapter.
        num_moves: Moves of each game in a turn.
        max_start_length: Maximum length of the snakes that games start with.
        dtype: Data type of the base model.
    """

    adapter: str
    num_moves: int
    max_start_length: int
    dtype: str


class GameSlots:
    """A constant number of concurrent games: when one ends, the next one starts in its slot.

    The initial lengths of the snakes are spread evenly from 1 to a maximum, for any number of slots.
    """

    def __init__(self, num_slots: int, max_start_length: int) -> None:
        self._max_start_length = max_start_length
        self._num_started = [0] * num_slots
        self.games = [self._start(slot) for slot in range(num_slots)]
        self.moves: list[list[str]] = [[] for _ in range(num_slots)]

    def _start(self, slot: int) -> Game:
        from snake_lora_pl.game import Game, get_teacher

        length = 1 + int(slot * GOLDEN_RATIO % 1 * self._max_start_length)
        teacher = get_teacher("safe_greedy")
        while True:
            game = Game(GRID_SIZE, slot + 1_000 * self._num_started[slot])
            self._num_started[slot] += 1
            while game.end is None and game.board.length < length:
                game.play(teacher(game.board))
            if game.end is None:
                return game

    @property
    def boards(self) -> list[Board]:
        """Current board of each game."""
        return [game.board for game in self.games]

    def play(self, slot: int, move: Move | None) -> None:
        """Play one move in one game."""
        self.moves[slot].append("none" if move is None else move.name)
        if self.games[slot].play(move) is not None:
            self.games[slot] = self._start(slot)


class PlainModel:
    """Implementation with transformers and PEFT: prompts of one or more games in one call of ``generate``."""

    def __init__(self, adapter: str, dtype: str) -> None:
        from peft import PeftModel

        from snake_lora_pl.adapters import store
        from snake_lora_pl.data.encoding import Encoder
        from snake_lora_pl.game import get_style
        from snake_lora_pl.models import load_base_model, load_tokenizer

        metadata = store.read_metadata(adapter)
        self.tokenizer = load_tokenizer(metadata.base_model_name)
        self.encoder = Encoder(self.tokenizer, metadata.data["template"])
        self.style = get_style(metadata.data["prompt_format"])
        self.model = PeftModel.from_pretrained(load_base_model(metadata.base_model_name, dtype=dtype), adapter).eval()

    def complete(self, board: Board) -> str:
        """Return the model's completion for a board."""
        return self.complete_batch([board])[0]

    def complete_batch(self, boards: list[Board], *, cache_prefix: bool = False) -> list[str]:
        """Return the model's completions, of prompts that are padded on the left.

        Args:
            boards: The boards.
            cache_prefix: Whether to compute the tokens that all prompts begin with once, for all rows.
        """
        import torch

        prompts = [self.encoder.encode_prompt(self.style.write_prompt(board)) for board in boards]
        prefix = prompts[0][: common_prefix_length(prompts)] if cache_prefix else []
        width = max(len(prompt) for prompt in prompts)
        # Padding is between the prefix and the rest of a prompt, so that the prefix has the same positions in all rows.
        gaps = [width - len(prompt) for prompt in prompts]
        rows = [
            prefix + [self.tokenizer.pad_token_id] * gap + p[len(prefix) :]
            for p, gap in zip(prompts, gaps, strict=True)
        ]
        ids, mask = torch.tensor(rows), torch.ones((len(rows), width), dtype=torch.int64)
        for row, gap in zip(mask, gaps, strict=True):
            row[len(prefix) : len(prefix) + gap] = 0
        with torch.no_grad():
            cache = {"past_key_values": self._cache_of(prefix, len(rows))} if prefix else {}
            output = self.model.generate(
                input_ids=ids,
                attention_mask=mask,
                max_new_tokens=MAX_NEW_TOKENS,
                do_sample=False,
                pad_token_id=self.tokenizer.pad_token_id,
                **cache,
            )
        return [self.tokenizer.decode(row[width:], skip_special_tokens=True) for row in output]

    def _cache_of(self, prefix: list[int], num_rows: int) -> Any:
        """Return the keys and values of a prefix for a number of equal rows."""
        import torch

        cache = self.model(input_ids=torch.tensor([prefix]), use_cache=True, logits_to_keep=1).past_key_values
        cache.batch_repeat_interleave(num_rows)
        return cache


def common_prefix_length(prompts: list[list[int]]) -> int:
    """Return how many tokens all prompts begin with, without the last token of the shortest."""
    longest = min(len(prompt) for prompt in prompts) - 1
    return next((i for i in range(longest) if len({prompt[i] for prompt in prompts}) > 1), longest)


@contextlib.contextmanager
def open_policy(adapter: str, dtype: str) -> Iterator[LanguageModelPolicy]:
    """Load this project's player."""
    import torch

    from snake_lora_pl.player import load_player

    player = load_player(adapter, dtype=dtype, device="cpu", max_new_tokens=MAX_NEW_TOKENS)
    with torch.no_grad():
        yield player.policy


def run_generate(timer: TurnTimer, settings: PlaySettings, num_turns: int, *, num_games: int) -> None:
    """Play games one after the other with ``PlainModel``."""
    from snake_lora_pl.game import read_move

    model = PlainModel(settings.adapter, settings.dtype)
    slots = GameSlots(num_games, settings.max_start_length)
    for _ in range(num_turns):
        timer.start()
        for slot in range(num_games):
            for _ in range(settings.num_moves):
                slots.play(slot, read_move(model.complete(slots.games[slot].board)))
        _stop(timer, settings, slots)


def run_batched_generate(
    timer: TurnTimer, settings: PlaySettings, num_turns: int, *, num_games: int, cache_prefix: bool
) -> None:
    """Play games in batches with ``PlainModel``."""
    from snake_lora_pl.game import read_move

    model = PlainModel(settings.adapter, settings.dtype)
    slots = GameSlots(num_games, settings.max_start_length)
    for _ in range(num_turns):
        timer.start()
        for _ in range(settings.num_moves):
            for slot, completion in enumerate(model.complete_batch(slots.boards, cache_prefix=cache_prefix)):
                slots.play(slot, read_move(completion))
        _stop(timer, settings, slots)


def run_lockstep(timer: TurnTimer, settings: PlaySettings, num_turns: int, *, num_games: int) -> None:
    """Play games in lockstep with this project's player."""
    slots = GameSlots(num_games, settings.max_start_length)
    with open_policy(settings.adapter, settings.dtype) as policy:
        for _ in range(num_turns):
            timer.start()
            play_rounds(policy, slots, settings.num_moves)
            _stop(timer, settings, slots)


def _stop(timer: TurnTimer, settings: PlaySettings, slots: GameSlots) -> None:
    import torch

    from snake_lora_pl.training.callbacks.token_throughput import peak_memory_gib

    num_moves = len(slots.games) * settings.num_moves
    timer.stop(num_moves, math.nan, peak_memory_gib(torch.device("cpu")), slots.moves)


def play_rounds(policy: LanguageModelPolicy, slots: GameSlots, num_rounds: int) -> None:
    """Play one move in every game, ``num_rounds`` times."""
    for _ in range(num_rounds):
        for slot, answer in enumerate(policy.answer(slots.boards, range(len(slots.games)))):
            slots.play(slot, answer.move)


def count_equal_moves(moves: list[list[str]], others: list[list[str]]) -> tuple[int, int]:
    """Return how many moves are equal and how many were compared: each game's moves up to the first difference."""
    num_equal = num_compared = 0
    for game_moves, other_moves in zip(moves, others, strict=False):
        for move, other in zip(game_moves, other_moves, strict=False):
            num_compared += 1
            if move != other:
                break
            num_equal += 1
    return num_equal, num_compared


def check_equal_completions(adapter: str, num_boards: int, max_start_length: int) -> None:
    """Compare completions and moves in float32.

    Raises:
        SystemExit: If they differ.
    """
    from snake_lora_pl.game import read_move

    model, boards = PlainModel(adapter, "float32"), GameSlots(num_boards, max_start_length).boards
    with open_policy(adapter, "float32") as policy:
        for board, answer in zip(boards, policy.answer(boards, range(num_boards)), strict=True):
            expected = model.complete(board)
            # The player stops after the conclusion, and marks truncated completions with dots.
            is_prefix = expected.startswith(answer.completion.removesuffix("..."))
            if answer.move is not read_move(expected) or not is_prefix:
                raise SystemExit(f"float32: completions differ on {board}:\n{answer.completion!r}\n{expected!r}")
    print(f"float32: equal completions and moves on {num_boards} boards")


def time_shares(adapter: str, num_games: int, max_start_length: int, dtype: str) -> dict[str, float]:
    """Return the shares of matrix products and attention in the CPU time of a lockstep round."""
    from torch.profiler import ProfilerActivity, profile

    slots = GameSlots(num_games, max_start_length)
    with open_policy(adapter, dtype) as policy:
        play_rounds(policy, slots, 1)
        with profile(activities=[ProfilerActivity.CPU]) as profiler:
            play_rounds(policy, slots, 1)
    times: dict[str, float] = {event.key: event.self_cpu_time_total for event in profiler.key_averages()}
    total = sum(times.values())
    operators = {"matrix products": ("aten::mm", "aten::addmm", "aten::bmm"), "attention": ("flash", "efficient")}
    return {
        name: sum(time for key, time in times.items() if any(part in key for part in parts)) / total
        for name, parts in operators.items()
    }


def train_adapter(directory: Path, style: str, num_steps: int) -> str:
    """Train an adapter for a few steps on generated rows and return its directory."""
    command = [
        *PROGRAM,
        "fit",
        "--config=balanced.yaml",
        "--trainer.accelerator=cpu",
        f"--trainer.max_steps={num_steps}",
        "--trainer.limit_val_batches=1",
        f"--trainer.default_root_dir={directory}",
        f"--data.generated_style={style}",
        "--data.generated_games=30",
        "--data.generated_noise=0.1",
        "--model.learning_rate=2e-3",
        "--model.lora.dropout=0",
    ]
    # The run must find the package from its own directory.
    root = str(Path(__file__).parents[1])
    path = os.pathsep.join(filter(None, [root, os.environ.get("PYTHONPATH")]))
    subprocess.run(command, check=True, cwd=directory, env={**os.environ, "PYTHONPATH": path})
    (artifacts,) = directory.glob("**/model_artifacts")
    return str(artifacts)


def main() -> None:
    parser = make_parser("play", __doc__)
    parser.add_argument("--adapter", metavar="DIR", help="model_artifacts directory; without it, one is trained")
    parser.add_argument("--style", default="bfs-512", help="style of the adapter that is trained (default: bfs-512)")
    parser.add_argument("--train_steps", type=int, default=40, help="optimizer steps of that training (default: 40)")
    parser.add_argument(
        "--games", type=int, nargs="+", default=[1, 16, 64], help="numbers of games in lockstep (default: 1 16 64)"
    )
    parser.add_argument("--plain_games", type=int, default=4, help="games played by generate (default: 4)")
    parser.add_argument(
        "--batched_games",
        type=int,
        nargs="*",
        default=[16],
        help="numbers of games in a batch of generate, without and with a cached prefix (default: 16)",
    )
    parser.add_argument("--moves", type=int, default=1, help="moves of each game in a turn (default: 1)")
    parser.add_argument("--longest", type=int, default=20, help="maximum initial length of a snake (default: 20)")
    parser.add_argument("--rounds", type=int, default=5, help="counted turns of each contender (default: 5)")
    parser.add_argument("--dtype", default="auto", choices=["auto", "bfloat16", "float32"])
    parser.add_argument("--check_boards", type=int, default=4, help="boards compared in float32 (default: 4)")
    add_json_option(parser)
    options = parser.parse_args()
    os.environ["TOKENIZERS_PARALLELISM"] = "false"

    with tempfile.TemporaryDirectory() as directory:
        adapter = options.adapter or train_adapter(Path(directory), options.style, options.train_steps)
        contenders: dict[str, Any] = {GENERATE: partial(run_generate, num_games=options.plain_games)}
        for n in options.batched_games:
            for suffix, cache_prefix in (("", False), (", cached prefix", True)):
                contenders[f"generate, {n} games{suffix}"] = partial(
                    run_batched_generate, num_games=n, cache_prefix=cache_prefix
                )
        contenders |= {f"lockstep, {n} games": partial(run_lockstep, num_games=n) for n in options.games}
        settings = PlaySettings(adapter, options.moves, options.longest, options.dtype)
        results = report(run_interleaved(contenders, settings, options.rounds), options)
        most_games = max(options.games)
        shares = time_shares(adapter, most_games, options.longest, options.dtype)
        print(f"\nCPU time of a round of {most_games} games: {', '.join(f'{s:.0%} {n}' for n, s in shares.items())}")
        write_json(options.json, results | {"time_shares": shares})
        if options.check_boards:
            check_equal_completions(adapter, options.check_boards, options.longest)


def report(turns: dict[str, list[Turn]], options: argparse.Namespace) -> dict[str, Any]:
    """Print the table of contenders and return its values."""
    results: dict[str, Any] = {}
    rows = []
    plain = turns[GENERATE]
    for name, taken in turns.items():
        moves_per_second = statistics.median(turn.speed for turn in taken)
        ratio = speed_ratio(taken, plain)
        memory = max(turn.peak_memory_gib for turn in taken)
        num_equal, num_compared = count_equal_moves(taken[-1].details, plain[-1].details)
        rows.append(
            [
                name,
                f"{moves_per_second:.3f}",
                f"{ratio.median:.1f} ({ratio.min:.1f} to {ratio.max:.1f})",
                f"{memory:.2f}",
                f"{num_equal} of {num_compared}",
            ]
        )
        results[name] = {
            "moves_per_second": moves_per_second,
            "peak_memory_gib": memory,
            "equal_moves": num_equal,
            "compared_moves": num_compared,
            "ratio_to_generate": asdict(ratio),
        }
    header = ["contender", "moves/s", "speedup over generate", "peak GiB", "equal moves"]
    print("\n" + markdown_table(header, rows), flush=True)
    return {"settings": settings_of(options), "contenders": results}


if __name__ == "__main__":
    main()
