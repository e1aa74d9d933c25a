"""A trained adapter as a player, prompted as in its training."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from snake_lora_pl import LoRALightningModule, Player, load_player
from snake_lora_pl.adapters import store
from snake_lora_pl.adapters.config import LoRAConfig
from snake_lora_pl.errors import UserError
from snake_lora_pl.evaluation.game_loop import play_games
from snake_lora_pl.game import Board, Move, get_style
from snake_lora_pl.models.quantization import QuantizationConfig, quantization_of

BOARD = Board(5, ((2, 2), (2, 1)), (4, 4))


def save_adapter(directory: Path, base: Path, adapter_type: str = "lora", **data: str) -> Path:
    """Save an adapter with random non-zero weights, as a run does."""
    torch.manual_seed(1)
    module = LoRALightningModule(str(base), adapter_type, LoRAConfig(rank=4), dtype="float32")
    module.configure_model()
    for name, parameter in module.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter)
    metadata = module.adapter_metadata()
    metadata.data.update(data)
    return store.save(module.peft_model, directory, metadata)


@pytest.fixture(scope="module")
def adapter_dir(tiny_llama_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("adapter") / "model_artifacts"
    return save_adapter(directory, tiny_llama_dir, prompt_format="compact", template="raw")


@pytest.fixture(scope="module")
def player(adapter_dir: Path) -> Player:
    return load_player(adapter_dir, reading="score", dtype="float32", device="cpu")


def test_move_has_the_highest_likelihood_after_the_trained_prompt(
    player: Player, adapter_dir: Path, tiny_llama_dir: Path, tiny_tokenizer
) -> None:
    from peft import PeftModel
    from transformers import AutoModelForCausalLM

    plain = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(tiny_llama_dir), adapter_dir).eval()
    style = get_style("compact")
    for board in (BOARD, Board(5, ((0, 0),), (3, 1)), Board(5, ((4, 4), (4, 3), (3, 3)), (0, 2))):
        prompt = tiny_tokenizer(style.write_prompt(board), add_special_tokens=False)["input_ids"]
        scores = {}
        for move in Move:
            ids = prompt + tiny_tokenizer(style.write_completion(board, move), add_special_tokens=False)["input_ids"]
            logits = plain(torch.tensor([ids])).logits[0].log_softmax(-1)
            scores[move] = float(logits[len(prompt) - 1, ids[len(prompt)]])
        assert player.move(board) is max(scores, key=lambda move: scores[move])
        assert player.explain(board) == player.move(board).name  # type: ignore[union-attr]


def test_explanation_is_the_generated_completion(adapter_dir: Path) -> None:
    player = load_player(adapter_dir, dtype="float32", device="cpu", max_new_tokens=6)
    completion = player.explain(BOARD)
    assert completion == player.policy.answer([BOARD], [0])[0].completion
    assert completion
    assert player.move(BOARD) is None  # a random model names no move


def test_move_and_explanation_share_one_answer(player: Player, monkeypatch: pytest.MonkeyPatch) -> None:
    answered = []
    answer = player.policy.answer
    monkeypatch.setattr(player.policy, "answer", lambda boards, seeds: answered.extend(boards) or answer(boards, seeds))
    other = Board(5, ((1, 1),), (0, 3))
    player.move(BOARD.with_apple((0, 4)))
    player.explain(BOARD.with_apple((0, 4)))
    player.move(other)
    assert answered == [BOARD.with_apple((0, 4)), other]


def test_policy_plays_whole_games(player: Player) -> None:
    games = play_games(player.policy, [1, 2, 3], grid_size=5, max_steps=4)
    assert [game.seed for game in games] == [1, 2, 3]


def test_style_and_template_are_required_when_the_metadata_names_none(
    tiny_llama_dir: Path, tmp_path: Path, player: Player
) -> None:
    adapter_dir = save_adapter(tmp_path / "no_style", tiny_llama_dir)
    with pytest.raises(UserError, match='style="bfs-512"'):
        load_player(adapter_dir, template="raw")
    with pytest.raises(UserError, match="template.*instruction, chat, raw"):
        load_player(adapter_dir, style="compact")
    named = load_player(adapter_dir, style="compact", template="raw", reading="score", dtype="float32", device="cpu")
    assert named.move(BOARD) is player.move(BOARD)


@pytest.mark.parametrize(
    ("settings", "part"),
    [
        ({"style": "compct"}, "'compact'"),
        ({"template": "chatty"}, "template"),
        ({"reading": "guess"}, "play.reading"),
        ({"legal_mask": True}, "play.reading=score"),
        ({"device": "abacus"}, "device='abacus'"),
        ({"dtype": "float8"}, "float8"),
        ({"base_model": "smolm2-135m"}, "'smollm2-135m'"),
    ],
)
def test_invalid_setting_is_one_line(adapter_dir: Path, settings: dict, part: str) -> None:
    with pytest.raises(UserError) as caught:
        load_player(adapter_dir, **settings)
    assert part in str(caught.value)
    assert "\n" not in str(caught.value)


def test_board_without_apple_is_refused(player: Player) -> None:
    with pytest.raises(UserError, match="no apple"):
        player.move(Board(2, ((0, 0), (0, 1), (1, 1), (1, 0)), None))


def test_missing_directory_is_refused(tmp_path: Path, adapter_dir: Path) -> None:
    with pytest.raises(UserError, match="nowhere"):
        load_player(tmp_path / "nowhere")
    metadata = json.loads((adapter_dir / store.METADATA_FILE).read_text())
    assert metadata["data"]["prompt_format"] == "compact"


def test_adapter_of_a_quantized_base_plays_on_a_quantized_base(tiny_llama_dir: Path, tmp_path: Path) -> None:
    adapter_dir = save_adapter(
        tmp_path / "qlora", tiny_llama_dir, adapter_type="qlora", prompt_format="compact", template="raw"
    )
    settings: dict[str, Any] = {"reading": "score", "dtype": "float32", "device": "cpu"}
    player = load_player(adapter_dir, **settings)
    assert quantization_of(player.policy._model.get_base_model()) == QuantizationConfig()
    assert player.move(BOARD) in Move
    plain = load_player(adapter_dir, **settings, full_precision_base=True)
    assert quantization_of(plain.policy._model.get_base_model()) is None
    assert plain.move(BOARD) in Move
