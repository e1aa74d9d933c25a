"""The example that trains with TRL's GRPO: two steps of a tiny model on games that it plays through tool calls."""

from __future__ import annotations

import runpy
from pathlib import Path

import pytest

from snake_lora_pl.game import Game, get_style, get_teacher
from tests.documented import ROOT

pytest.importorskip("trl", reason="needs trl: pip install 'trl>=1.16'")
pytestmark = pytest.mark.filterwarnings("ignore")

EXAMPLE = runpy.run_path(str(ROOT / "examples" / "train_with_grpo.py"))


def test_the_environment_plays_the_game_of_its_row() -> None:
    environment = EXAMPLE["SnakeGame"]()
    game = Game(10, 7, max_steps=30)
    assert environment.reset(game_seed=7, prompt="ignored") == get_style("compact").write_prompt(game.board)
    while game.end is None:
        move = get_teacher("safe_greedy")(game.board)
        assert move is not None
        game.play(move)
        assert environment.move(move.name) == get_style("compact").write_prompt(game.board)
    assert environment.get_reward() == game.num_apples > 0
    with pytest.raises(ValueError, match="NORTH"):
        environment.move("NORTH")
    environment.reset(game_seed=7)
    assert environment.get_reward() == 0


def tool_call_bias(model_dir: Path) -> dict[tuple[int, ...], float]:
    """Return biases under which a random model writes tool calls with random directions."""
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(model_dir)
    bias: dict[tuple[int, ...], float] = {}
    for direction in ("UP", "RIGHT", "DOWN", "LEFT"):
        call = f'<tool_call>\n{{"name": "move", "arguments": {{"direction": "{direction}"}}}}\n</tool_call>'
        ids = [*tokenizer.encode(call, add_special_tokens=False), tokenizer.eos_token_id]
        for length in range(1, len(ids) + 1):
            # A longer match outweighs the shorter ones, so that the call continues.
            bias[tuple(ids[:length])] = 100.0 * length
    return bias


def test_two_steps_train_an_adapter_on_games_played_through_tool_calls(tiny_llama_dir: Path, tmp_path: Path) -> None:
    from safetensors.torch import load_file

    bias = [[list(ids), value] for ids, value in tool_call_bias(tiny_llama_dir).items()]
    trainer = EXAMPLE["train"](
        str(tiny_llama_dir),
        str(tmp_path / "grpo"),
        max_steps=2,
        num_generations=4,
        per_device_train_batch_size=4,
        max_completion_length=600,
        max_tool_calling_iterations=3,
        learning_rate=1e-2,
        logging_steps=1,
        report_to="none",
        use_cpu=True,
        bf16=False,
        generation_kwargs={"sequence_bias": bias},
    )
    logs = [entry for entry in trainer.state.log_history if "tools/call_frequency" in entry]
    assert [entry["step"] for entry in logs] == [1, 2]
    assert all(entry["tools/call_frequency"] > 0 for entry in logs)
    assert all(entry["tools/failure_frequency"] == 0 for entry in logs)
    tensors = load_file(tmp_path / "grpo" / "adapter_model.safetensors")
    assert any(tensor.abs().max() > 0 for name, tensor in tensors.items() if "lora_B" in name)
