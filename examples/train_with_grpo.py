"""Train a chat model with GRPO on whole games of Snake, in TRL's environment interface: each move is a tool call.

python examples/train_with_grpo.py --model DIRECTORY_OR_HUB_ID

Needs `pip install 'snake_lora_pl[gym]' 'trl>=1.16'`. A model that already calls tools, such as Qwen/Qwen3-0.6B, plays
from the first step; another one has to find the syntax by chance.
"""

import argparse
from typing import Any

from snake_lora_pl.game.env import MOVES, SnakeEnv

TASK = "Play Snake: eat as many apples as you can. Call the tool `move` until the game ends. The board:\n\n"


class SnakeGame:
    """One game for one completion. TRL offers the public methods to the model as tools."""

    def __init__(self) -> None:
        self._env = SnakeEnv(observation="text", style="compact")
        self._reward = 0.0

    def reset(self, game_seed: int, **row: Any) -> str:
        """Start the game of a row; the first board is appended to the prompt."""
        self._reward = 0.0
        board, _ = self._env.reset(options={"game_seed": game_seed})
        return str(board)

    def move(self, direction: str) -> str:
        """Move the snake by one cell.

        Args:
            direction: UP, RIGHT, DOWN or LEFT.

        Returns:
            The board after the move, or how the game ended.
        """
        names = [move.name for move in MOVES]
        if direction not in names:
            raise ValueError(f"direction must be one of {', '.join(names)} (found: {direction!r})")
        board, reward, terminated, truncated, info = self._env.step(names.index(direction))
        self._reward += reward
        return f"Game over: {info['end']}" if terminated or truncated else str(board)

    def get_reward(self) -> float:
        """Return the apples, minus one if the game was lost."""
        return self._reward


def train(model_dir: str, output_dir: str, **settings: Any) -> Any:
    """Train a LoRA adapter and save it.

    Args:
        model_dir: Directory or hub id of a model with a ChatML tokenizer.
        output_dir: Directory of the adapter.
        settings: Arguments of `trl.GRPOConfig`.

    Returns:
        The trainer.
    """
    from datasets import Dataset
    from peft import LoraConfig
    from transformers import AutoTokenizer
    from trl import GRPOConfig, GRPOTrainer
    from trl.chat_template_utils import qwen3_chat_template

    tokenizer = AutoTokenizer.from_pretrained(model_dir)
    if "tools" not in (tokenizer.chat_template or ""):
        tokenizer.chat_template = qwen3_chat_template
    rows = [{"prompt": [{"role": "user", "content": TASK}], "game_seed": seed} for seed in range(1000)]
    trainer = GRPOTrainer(
        model=model_dir,
        args=GRPOConfig(output_dir=output_dir, **settings),
        train_dataset=Dataset.from_list(rows),
        processing_class=tokenizer,
        peft_config=LoraConfig(r=16, lora_alpha=32, target_modules=["q_proj", "k_proj", "v_proj", "o_proj"]),
        environment_factory=SnakeGame,
    )
    trainer.train()
    trainer.save_model()
    return trainer


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", required=True, help="directory or hub id")
    parser.add_argument("--out", default="grpo", help="directory of the adapter (default: %(default)s)")
    parser.add_argument("--max_steps", type=int, default=200, help="optimizer steps (default: %(default)s)")
    parser.add_argument(
        "--num_generations", type=int, default=8, help="completions of each game (default: %(default)s)"
    )
    parser.add_argument(
        "--max_completion_length",
        type=int,
        default=4096,
        help="tokens of a game, boards included (default: %(default)s)",
    )
    arguments = parser.parse_args()
    trainer = train(
        arguments.model,
        arguments.out,
        max_steps=arguments.max_steps,
        num_generations=arguments.num_generations,
        per_device_train_batch_size=arguments.num_generations,
        max_completion_length=arguments.max_completion_length,
        learning_rate=1e-5,
        logging_steps=1,
        report_to="none",
    )
    print(f"{trainer.state.global_step} steps: {arguments.out}")


if __name__ == "__main__":
    main()
