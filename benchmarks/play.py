"""Moves per second: games in lockstep against one game at a time with transformers' ``generate`` on the PEFT model.

    python -m benchmarks.play --adapter path/to/model_artifacts

Without an adapter one is trained first, for a few steps: its words have the form of its rows, which is what the speed
depends on. The contenders take turns (see ``contest``) and play the same games, which begin where a snake has grown to
some length: few of the positions of whole games are beginnings.

Moves are compared twice. In the turns themselves, which run in the type that the model plays in: in bfloat16 two tokens
can be equally likely to the last bit, and then the order of a sum decides, so that the share of equal moves is printed.
And in float32, where words and moves must be the same; otherwise the run fails.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import math
import os
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from benchmarks.contest import Referee, Turn, ratio, run_contest

if TYPE_CHECKING:
    from snake_lora_pl.evaluation.language_model import LanguageModelPolicy
    from snake_lora_pl.game import Board, Game, Move

GENERATE = "generate, 1 game"
GRID_SIZE = 10
MAX_NEW_TOKENS = 192
GOLDEN_RATIO = (math.sqrt(5) - 1) / 2


class Slots:
    """Games side by side; where one ends the next begins, so that there are always as many.

    The first snakes of any number of slots have lengths spread evenly from 1 to the longest.
    """

    def __init__(self, num_slots: int, longest: int) -> None:
        self._longest = longest
        self._num_started = [0] * num_slots
        self.games = [self._start(slot) for slot in range(num_slots)]
        self.moves: list[list[str]] = [[] for _ in range(num_slots)]

    def _start(self, slot: int) -> Game:
        from snake_lora_pl.game import Game, get_teacher

        length = 1 + int(slot * GOLDEN_RATIO % 1 * self._longest)
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
        """Where the games stand."""
        return [game.board for game in self.games]

    def play(self, slot: int, move: Move | None) -> None:
        """One move in one game."""
        self.moves[slot].append("none" if move is None else move.name)
        if self.games[slot].play(move) is not None:
            self.games[slot] = self._start(slot)


class Plain:
    """One game at a time, as one would write it with transformers and PEFT."""

    def __init__(self, adapter: str, dtype: str) -> None:
        from peft import PeftModel

        from snake_lora_pl.models import load_base_model

        metadata, self.tokenizer, self.encoder, self.style = read_adapter(adapter)
        self.model = PeftModel.from_pretrained(load_base_model(metadata.base_model_name, dtype=dtype), adapter).eval()

    def words(self, board: Board) -> str:
        """What the model says of a board."""
        import torch

        ids = torch.tensor([self.encoder.encode_prompt(self.style.write_prompt(board))])
        with torch.no_grad():
            output = self.model.generate(
                input_ids=ids,
                attention_mask=torch.ones_like(ids),
                max_new_tokens=MAX_NEW_TOKENS,
                do_sample=False,
                pad_token_id=self.tokenizer.pad_token_id,
            )
        return self.tokenizer.decode(output[0, ids.shape[1] :], skip_special_tokens=True)


def read_adapter(adapter: str) -> tuple[Any, Any, Any, Any]:
    """Metadata, tokenizer, encoder and style of an adapter."""
    from snake_lora_pl.adapters import store
    from snake_lora_pl.data.encoding import Encoder
    from snake_lora_pl.game import get_style
    from snake_lora_pl.models import load_tokenizer

    metadata = store.read_metadata(adapter)
    tokenizer = load_tokenizer(metadata.base_model_name)
    return metadata, tokenizer, Encoder(tokenizer, metadata.data["template"]), get_style(metadata.data["prompt_format"])


@contextlib.contextmanager
def open_policy(adapter: str, dtype: str) -> Iterator[LanguageModelPolicy]:
    """This project's player."""
    import torch

    from snake_lora_pl.api.player import load_player

    player = load_player(adapter, dtype=dtype, device="cpu", max_new_tokens=MAX_NEW_TOKENS)
    with torch.no_grad():
        yield player.policy


def run_generate(
    referee: Referee, adapter: str, num_slots: int, num_moves: int, longest: int, dtype: str, rounds: int
) -> None:
    import torch

    from snake_lora_pl.game import read_move
    from snake_lora_pl.training.callbacks.throughput import peak_memory_gib

    plain, slots = Plain(adapter, dtype), Slots(num_slots, longest)
    for _ in range(rounds):
        referee.start_turn()
        for slot in range(num_slots):
            for _ in range(num_moves):
                slots.play(slot, read_move(plain.words(slots.games[slot].board)))
        memory = peak_memory_gib(torch.device("cpu"))
        referee.end_turn(num_slots * num_moves, math.nan, memory, slots.moves)


def run_lockstep(
    referee: Referee, adapter: str, num_slots: int, num_moves: int, longest: int, dtype: str, rounds: int
) -> None:
    import torch

    from snake_lora_pl.training.callbacks.throughput import peak_memory_gib

    slots = Slots(num_slots, longest)
    with open_policy(adapter, dtype) as policy:
        for _ in range(rounds):
            referee.start_turn()
            play_rounds(policy, slots, num_moves)
            memory = peak_memory_gib(torch.device("cpu"))
            referee.end_turn(num_slots * num_moves, math.nan, memory, slots.moves)


def play_rounds(policy: LanguageModelPolicy, slots: Slots, num_moves: int) -> None:
    for _ in range(num_moves):
        for slot, answer in enumerate(policy.answer(slots.boards, range(len(slots.games)))):
            slots.play(slot, answer.move)


def count_equal_moves(moves: list[list[str]], others: list[list[str]]) -> tuple[int, int]:
    """Moves that are equal, and moves that were compared: each game's up to the first that differs."""
    equal = compared = 0
    for ours, theirs in zip(moves, others, strict=False):
        for move, other in zip(ours, theirs, strict=False):
            compared += 1
            if move != other:
                break
            equal += 1
    return equal, compared


def check_same_words(adapter: str, num_boards: int, longest: int) -> None:
    """Compare words in float32.

    Raises:
        SystemExit: If they differ.
    """
    from snake_lora_pl.game import read_move

    plain, boards = Plain(adapter, "float32"), Slots(num_boards, longest).boards
    with open_policy(adapter, "float32") as policy:
        for board, answer in zip(boards, policy.answer(boards, range(num_boards)), strict=True):
            words = plain.words(board)
            # Ours stops behind the conclusion; what is cut off ends in dots.
            if answer.move is not read_move(words) or not words.startswith(answer.completion.removesuffix("...")):
                raise SystemExit(f"float32: not the same words on {board}:\n{answer.completion!r}\n{words!r}")
    print(f"float32: the same words and moves on {num_boards} boards")


def matrix_product_share(adapter: str, num_slots: int, longest: int, dtype: str) -> dict[str, float]:
    """Shares of the computing time of a lockstep round that matrix products and attention take."""
    from torch.profiler import ProfilerActivity, profile

    slots = Slots(num_slots, longest)
    with open_policy(adapter, dtype) as policy:
        play_rounds(policy, slots, 1)
        with profile(activities=[ProfilerActivity.CPU]) as profiler:
            play_rounds(policy, slots, 1)
    times: dict[str, float] = {event.key: event.self_cpu_time_total for event in profiler.key_averages()}
    total = sum(times.values())
    names = {"matrix products": ("aten::mm", "aten::addmm", "aten::bmm"), "attention": ("flash", "efficient")}
    return {
        name: sum(time for key, time in times.items() if any(part in key for part in parts)) / total
        for name, parts in names.items()
    }


def train_adapter(directory: Path, style: str, num_steps: int) -> str:
    """A few steps of training on generated rows."""
    command = [
        sys.executable, "-m", "snake_lora_pl", "fit", "--config", "balanced.yaml", "--trainer.accelerator=cpu",
        f"--trainer.max_steps={num_steps}", f"--data.generated_style={style}", "--data.generated_games=30",
        "--data.generated_noise=0.1", "--model.learning_rate=2e-3", "--model.lora.dropout=0",
        "--trainer.limit_val_batches=1", f"--trainer.default_root_dir={directory}",
    ]  # fmt: skip
    root = str(Path(__file__).parents[1])
    path = os.pathsep.join(filter(None, [root, os.environ.get("PYTHONPATH")]))
    subprocess.run(command, check=True, cwd=directory, env={**os.environ, "PYTHONPATH": path})
    (artifacts,) = directory.glob("**/model_artifacts")
    return str(artifacts)


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.play", description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--adapter", default=None, help="model_artifacts directory; without it one is trained")
    parser.add_argument("--style", default="bfs-512", help="style of the adapter that is trained (default: bfs-512)")
    parser.add_argument("--train_steps", type=int, default=40, help="optimizer steps of that training (default: 40)")
    parser.add_argument(
        "--games", type=int, nargs="+", default=[1, 16, 64], help="games in lockstep (default: 1 16 64)"
    )
    parser.add_argument("--plain_games", type=int, default=4, help="games of the plain contender, one after the other")
    parser.add_argument("--moves", type=int, default=1, help="moves of each game in a turn (default: 1)")
    parser.add_argument("--longest", type=int, default=20, help="longest snake that a game begins with (default: 20)")
    parser.add_argument("--rounds", type=int, default=5, help="counted turns of each contender (default: 5)")
    parser.add_argument("--dtype", default="auto", choices=["auto", "bfloat16", "float32"])
    parser.add_argument("--check_boards", type=int, default=4, help="boards that are compared in float32 (default: 4)")
    parser.add_argument("--json", type=Path, default=None, help="also write the figures here")
    options = parser.parse_args()
    os.environ["TOKENIZERS_PARALLELISM"] = "false"

    with tempfile.TemporaryDirectory() as directory:
        adapter = options.adapter or train_adapter(Path(directory), options.style, options.train_steps)
        contenders = {GENERATE: partial(run_generate, num_slots=options.plain_games)}
        contenders |= {f"lockstep, {n} games": partial(run_lockstep, num_slots=n) for n in options.games}
        turns = run_contest(
            contenders,
            options.rounds,
            {"adapter": adapter, "num_moves": options.moves, "longest": options.longest, "dtype": options.dtype},
        )
        figures = report(turns, options)
        shares = matrix_product_share(adapter, max(options.games), options.longest, options.dtype)
        print(
            f"of a round of {max(options.games)} games: {', '.join(f'{n} {share:.0%}' for n, share in shares.items())}"
        )
        if options.json is not None:
            options.json.write_text(json.dumps(figures | {"time_shares": shares}, indent=2) + "\n")
        if options.check_boards:
            check_same_words(adapter, options.check_boards, options.longest)


def report(turns: dict[str, list[Turn]], options: argparse.Namespace) -> dict[str, Any]:
    """Print the table; the figures in it."""
    figures: dict[str, Any] = {"settings": {k: str(v) for k, v in vars(options).items()}, "contenders": {}}
    print(f"\n{'':18} {'moves/s':>8} {'ratio':>6} {'least':>6} {'most':>6} {'peak GiB':>9} {'equal moves':>12}")
    plain = turns[GENERATE]
    for name, done in turns.items():
        rate = statistics.median(turn.tokens / turn.seconds for turn in done)
        median, least, greatest = ratio(done, plain)
        memory = max(turn.peak_memory_gib for turn in done)
        equal, compared = count_equal_moves(done[-1].report, plain[-1].report)
        ratios = f"{median:6.1f} {least:6.1f} {greatest:6.1f}"
        print(f"{name:18} {rate:8.3f} {ratios} {memory:9.2f} {f'{equal}/{compared}':>12}")
        figures["contenders"][name] = {
            "moves_per_second": rate, "peak_memory_gib": memory, "equal_moves": equal, "compared_moves": compared,
            "ratio_to_generate": {"median": median, "min": least, "max": greatest},
        }  # fmt: skip
    print(flush=True)
    return figures


if __name__ == "__main__":
    main()
