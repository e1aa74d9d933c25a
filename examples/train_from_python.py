"""Train an adapter on a file of rows from Python, then ask it for a move.

python examples/train_from_python.py rows.jsonl
"""

import argparse

from snake_lora_pl import LoRAConfig, load_player, train_on_heuristic_data
from snake_lora_pl.game import Board


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("rows", help="JSONL file with prompts and completions")
    parser.add_argument("--max_steps", type=int, default=100, help="optimizer steps")
    arguments = parser.parse_args()

    result = train_on_heuristic_data(
        arguments.rows,
        LoRAConfig(rank=8, alpha=16),
        {
            "config": ["balanced.yaml", "quickstart.yaml"],
            "trainer.max_steps": arguments.max_steps,
            "play.final_games": 2,
        },
    )
    print(f"step {result.adapter_step}, val/loss {result.metrics['val/loss']:.3f}: {result.adapter_dir}")
    print(f"apples: {result.play['adapter']['apples_mean']}, base model: {result.play['base']['apples_mean']}")

    player = load_player(result.adapter_dir)
    board = Board(10, body=((5, 5), (5, 4)), apple=(2, 7))  # head first; (0, 0) is the bottom-left cell
    print(f"move: {player.move(board)}, completion: {player.explain(board)!r}")


if __name__ == "__main__":
    main()
