"""Playing in lockstep compared with transformers' ``generate``, one board at a time."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from transformers import LlamaForCausalLM, PreTrainedTokenizerBase

from snake_lora_pl.data.encoding import Encoder
from snake_lora_pl.errors import UserError
from snake_lora_pl.evaluation import language_model
from snake_lora_pl.evaluation.language_model import LanguageModelPolicy
from snake_lora_pl.evaluation.policy import Answer
from snake_lora_pl.game import Board, Game, Move
from snake_lora_pl.game.teachers import get_teacher
from snake_lora_pl.game.text import get_style, read_move
from tests.architectures import build_model


@pytest.fixture(scope="module")
def model(tiny_llama_dir: Path) -> LlamaForCausalLM:
    return LlamaForCausalLM.from_pretrained(tiny_llama_dir, dtype=torch.float32).eval()


@pytest.fixture(scope="module")
def encoder(tiny_tokenizer: PreTrainedTokenizerBase) -> Encoder:
    return Encoder(tiny_tokenizer, max_length=4096)


def boards(num_boards: int, size: int = 10) -> list[Board]:
    """Return positions of one BFS game, whose prompts differ in length."""
    game, teacher, positions = Game(size, seed=5), get_teacher("bfs"), []
    while len(positions) < num_boards * 5:
        positions.append(game.board)
        game.play(teacher(game.board))
    return positions[::5]


def make_policy(model: torch.nn.Module, encoder: Encoder, style: str, **settings: object) -> LanguageModelPolicy:
    return LanguageModelPolicy(
        model, encoder.tokenizer, encoder.encode_prompts, get_style(style), name="tiny", **settings
    )  # type: ignore[arg-type]


def plain_completion(model: torch.nn.Module, encoder: Encoder, style: str, board: Board, max_new_tokens: int) -> str:
    """Complete one prompt with ``generate``."""
    ids = torch.tensor([encoder.encode_prompt(get_style(style).write_prompt(board))])
    output = model.generate(
        input_ids=ids,
        attention_mask=torch.ones_like(ids),
        max_new_tokens=max_new_tokens,
        do_sample=False,
        pad_token_id=encoder.tokenizer.pad_token_id,
    )[0, ids.shape[1] :].tolist()
    text = encoder.tokenizer.decode(output, skip_special_tokens=True)
    return text if output[-1] == encoder.tokenizer.eos_token_id else text + "..."


@pytest.mark.parametrize("style", ["bfs-512", "compact"])
@pytest.mark.parametrize("max_batch", [128, 3])
def test_completions_equal_those_of_generate(
    model: LlamaForCausalLM, encoder: Encoder, style: str, max_batch: int
) -> None:
    some = boards(8)
    answers = make_policy(model, encoder, style, max_new_tokens=7, max_batch=max_batch).answer(some, range(8))
    assert [a.completion for a in answers] == [plain_completion(model, encoder, style, board, 7) for board in some]
    assert len({a.completion for a in answers}) > 1


def test_answers_do_not_depend_on_the_batch(model: LlamaForCausalLM, encoder: Encoder) -> None:
    some = boards(6)
    policy = make_policy(model, encoder, "compact", max_new_tokens=5)
    together = policy.answer(some, range(6))
    assert [policy.answer([board], [0])[0] for board in some] == together


def test_each_grid_size_has_its_own_prefix(model: LlamaForCausalLM, encoder: Encoder) -> None:
    policy = make_policy(model, encoder, "bfs-512", max_new_tokens=5)
    for size in (10, 12, 10):
        board = boards(1, size)[0]
        assert policy.answer([board], [0])[0].completion == plain_completion(model, encoder, "bfs-512", board, 5)


def test_score_chooses_the_most_likely_move_at_the_first_different_token(
    model: LlamaForCausalLM, encoder: Encoder
) -> None:
    style, some = get_style("bfs-512"), boards(5)
    answers = make_policy(model, encoder, "bfs-512", reading="score").answer(some, range(5))
    for board, answer in zip(some, answers, strict=True):
        prompt = encoder.encode_prompt(style.write_prompt(board))
        lead = encoder.tokenizer("Moving", add_special_tokens=False)["input_ids"]
        scores = {}
        for move in Move:
            ids = encoder.tokenizer(f"Moving {move.name}", add_special_tokens=False)["input_ids"]
            assert ids[: len(lead)] == lead
            logits = model(input_ids=torch.tensor([prompt + ids])).logits[0]
            parting = next(i for i in range(len(ids)) if len({tuple(t[: i + 1]) for t in _all_moves(encoder)}) > 1)
            scores[move] = logits[len(prompt) + parting - 1, ids[parting]].item()
        assert answer.move == max(scores, key=scores.__getitem__)


@pytest.mark.parametrize(
    ("style", "completion", "context"),
    [
        ("compact", "UP", ""),
        ("compact", "42", ""),
        ("bfs-512", "Moving UP\n\nConclusion: The move is: UP", "Moving UP\n\nConclusion: The move is: "),
    ],
)
def test_probabilities_of_moves_are_those_at_the_place_of_the_conclusion(
    model: LlamaForCausalLM,
    encoder: Encoder,
    style: str,
    completion: str,
    context: str,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    policy, board = make_policy(model, encoder, style, max_new_tokens=4), boards(2)[1]
    with policy.playing():
        policy.answer([board], [0])
        monkeypatch.setattr(policy, "answer", lambda boards, seeds: [Answer(Move.UP, completion)])
        probabilities = policy.move_probabilities(board)
    prompt = encoder.encode_prompt(get_style(style).write_prompt(board))
    start = len(encoder.tokenizer(context, add_special_tokens=False)["input_ids"]) if context else 0
    assert probabilities is not None
    assert 0 < sum(probabilities.values()) < 1
    for move in Move:
        ids = encoder.tokenizer(context + move.name, add_special_tokens=False)["input_ids"]
        # The blank before the name may belong to the token of the name.
        first = next(i for i in range(len(ids)) if len(encoder.tokenizer.decode(ids[: i + 1])) > len(context))
        assert first <= start
        with torch.no_grad():
            logits = model(input_ids=torch.tensor([prompt + ids])).logits[0].log_softmax(-1)
        score = sum(logits[len(prompt) + i - 1, ids[i]].item() for i in range(first, len(ids)))
        assert probabilities[move] == pytest.approx(math.exp(score), rel=1e-3)


def test_completion_without_conclusion_has_no_probabilities(model: LlamaForCausalLM, encoder: Encoder) -> None:
    assert make_policy(model, encoder, "bfs-512", max_new_tokens=2).move_probabilities(boards(1)[0]) is None


def _all_moves(encoder: Encoder) -> list[list[int]]:
    return [encoder.tokenizer(f"Moving {m.name}", add_special_tokens=False)["input_ids"] for m in Move]


@pytest.mark.parametrize("model_type", ["bloom", "gpt_neo", "gpt_oss", "mamba", "rwkv", "recurrent_gemma", "lfm2"])
def test_models_that_cannot_be_decoded_in_lockstep_play_as_plain_generate_does(
    model_type: str, encoder: Encoder
) -> None:
    model, some = build_model(model_type), boards(3)
    answers = make_policy(model, encoder, "compact", max_new_tokens=5).answer(some, range(3))
    assert [a.completion for a in answers] == [plain_completion(model, encoder, "compact", board, 5) for board in some]
    scored = make_policy(model, encoder, "compact", reading="score").answer(some, range(3))
    for board, answer in zip(some, scored, strict=True):
        prompt = encoder.encode_prompt(get_style("compact").write_prompt(board))
        first = [encoder.tokenizer(f"{move.name}", add_special_tokens=False)["input_ids"][0] for move in Move]
        with torch.no_grad():
            logits = model(input_ids=torch.tensor([prompt])).logits[0, -1, first]
        assert answer.move == list(Move)[int(logits.argmax())]


def test_rwkv_plays_with_the_weights_that_it_scales_for_evaluation(encoder: Encoder) -> None:
    torch.manual_seed(1)
    base = build_model("rwkv", rescale_every=1)
    adapted = get_peft_model(base, LoraConfig(r=4, target_modules=["output", "value"], task_type="CAUSAL_LM"))
    for name, parameter in adapted.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter)
    adapted.train()
    before = {name: value.clone() for name, value in adapted.state_dict().items()}
    policy = make_policy(adapted, encoder, "compact", max_new_tokens=5)
    answers = policy.answer(boards(2), range(2))
    adapted(input_ids=torch.tensor([[5, 6]]))
    assert all(torch.equal(value, before[name]) for name, value in adapted.state_dict().items())
    adapted.eval()
    expected = [plain_completion(adapted, encoder, "compact", board, 5) for board in boards(2)]
    assert [answer.completion for answer in answers] == expected


def test_legal_mask_excludes_illegal_moves(model: LlamaForCausalLM, encoder: Encoder) -> None:
    policy = make_policy(model, encoder, "bfs-512", reading="score", legal_mask=True)
    some = boards(10)
    assert policy.reading == "score+mask"
    for board, answer in zip(some, policy.answer(some, range(10)), strict=True):
        assert answer.move in board.legal_moves()


@pytest.mark.parametrize(
    ("script", "completion", "move"),
    [
        (
            "Moving UP\n\nConclusion: The move is: LEFT\nand so on",
            "Moving UP\n\nConclusion: The move is: LEFT\n",
            "LEFT",
        ),
        ("Conclusion: LEFT\n\nConclusion: LEFT", "Conclusion: LEFT\n", "LEFT"),
        ("Conclusion: The move is: LEFTISH", "Conclusion: The move is: LEFTISH...", None),
        ("UP", "UP...", None),
    ],
)
def test_completion_ends_with_the_line_of_the_conclusion(
    model: LlamaForCausalLM, encoder: Encoder, script: str, completion: str, move: str | None
) -> None:
    (board,) = boards(1)
    tokens = encoder.tokenizer(script, add_special_tokens=False)["input_ids"]
    start = len(encoder.encode_prompt(get_style("bfs-512").write_prompt(board)))

    class Scripted(LlamaForCausalLM):
        """A model that generates the script after any prompt."""

        def forward(self, position_ids=None, **kwargs):  # type: ignore[no-untyped-def]
            output = super().forward(position_ids=position_ids, **kwargs)
            if kwargs["use_cache"] and len(position_ids) == 1:
                for column, position in enumerate(position_ids[0].tolist()[-output.logits.shape[1] :]):
                    output.logits[0, column] = torch.nn.functional.one_hot(
                        torch.tensor(tokens[min(max(0, position + 1 - start), len(tokens) - 1)]),
                        output.logits.shape[-1],
                    )
            return output

    scripted = Scripted(model.config).eval()
    (answer,) = make_policy(scripted, encoder, "bfs-512", max_new_tokens=len(tokens)).answer([board], [0])
    assert answer == (move and Move[move], completion)


@pytest.fixture(scope="module")
def adapted(tiny_llama_dir: Path) -> PeftModel:
    torch.manual_seed(1)
    base = LlamaForCausalLM.from_pretrained(tiny_llama_dir, dtype=torch.float32)
    peft_model = get_peft_model(base, LoraConfig(r=4, target_modules=["q_proj", "v_proj"], task_type="CAUSAL_LM"))
    for name, parameter in peft_model.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter)
    return peft_model.eval()


@pytest.mark.parametrize("style", ["bfs-512", "compact"])
def test_adapter_plays_merged_and_its_weights_are_restored(adapted: PeftModel, encoder: Encoder, style: str) -> None:
    some = boards(6)
    plain = [plain_completion(adapted, encoder, style, board, 7) for board in some]
    with adapted.disable_adapter():
        base = [plain_completion(adapted, encoder, style, board, 7) for board in some]
    before = {name: value.clone() for name, value in adapted.state_dict().items()}
    policy = make_policy(adapted, encoder, style, max_new_tokens=7)
    with policy.playing():
        assert not torch.equal(
            adapted.get_base_model().model.layers[0].self_attn.q_proj.base_layer.weight.data,
            before["base_model.model.model.layers.0.self_attn.q_proj.base_layer.weight"],
        )
        assert [a.completion for a in policy.answer(some, range(6))] == plain
    assert all(torch.equal(value, before[name]) for name, value in adapted.state_dict().items())
    assert adapted.get_base_model().config._attn_implementation == "sdpa"
    with adapted.disable_adapter():
        assert [a.completion for a in policy.answer(some, range(6))] == base
    assert plain != base


def test_changed_weights_are_used_in_the_next_games(adapted: PeftModel, encoder: Encoder) -> None:
    board, policy = boards(1)[0], make_policy(adapted, encoder, "compact", max_new_tokens=7)
    before = policy.answer([board], [0])[0].completion
    weight = adapted.get_base_model().model.layers[0].self_attn.v_proj.lora_B["default"].weight
    with torch.no_grad():
        weight.neg_()
    after = policy.answer([board], [0])[0].completion
    assert after == plain_completion(adapted, encoder, "compact", board, 7)
    assert after != before
    with torch.no_grad():
        weight.neg_()


def count_decoded(policy: LanguageModelPolicy, monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Return a list that collects the number of prompts that are encoded and decoded together."""
    nums: list[int] = []
    encode = policy._encode_prompts
    monkeypatch.setattr(policy, "_encode_prompts", lambda prompts: nums.append(len(prompts)) or encode(prompts))
    return nums


def test_different_boards_with_equal_prompts_are_decoded_once(
    model: LlamaForCausalLM, encoder: Encoder, monkeypatch: pytest.MonkeyPatch
) -> None:
    by_prompt: dict[str, set[Board]] = {}
    for cells in itertools.permutations(itertools.product(range(0, 10, 2), range(2)), 2):
        board = Board(10, cells[:1], cells[1])
        by_prompt.setdefault(get_style("cycle").write_prompt(board), set()).add(board)
    same = list(max(by_prompt.values(), key=len))
    assert len(same) > 1
    policy = make_policy(model, encoder, "cycle", max_new_tokens=3)
    num_decoded = count_decoded(policy, monkeypatch)
    with policy.playing():
        policy.check_prompts(10)
        num_decoded.clear()
        answers = policy.answer(same, range(len(same)))
        assert policy.answer(same[::-1], range(len(same))) == answers
    assert num_decoded[-1] == 1
    expected = plain_completion(model, encoder, "cycle", same[0], 3)
    assert {answer.completion for answer in answers} == {expected}


def test_legal_mask_distinguishes_boards_with_equal_prompts(
    model: LlamaForCausalLM, encoder: Encoder, monkeypatch: pytest.MonkeyPatch
) -> None:
    policy, some = make_policy(model, encoder, "compact", reading="score", legal_mask=True), boards(6)
    monkeypatch.setattr(policy._style, "write_prompt", lambda board: f"Snake{board.size}")
    answers = policy.answer(some, range(6))
    assert not set.intersection(*(set(board.legal_moves()) for board in some))
    for board, answer in zip(some, answers, strict=True):
        assert answer.move in board.legal_moves()


def test_only_the_latest_answers_are_remembered(
    model: LlamaForCausalLM, encoder: Encoder, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(language_model, "_MAX_ANSWERS", 2)
    policy, some = make_policy(model, encoder, "compact", max_new_tokens=3), boards(3)
    with policy.playing():
        expected = policy.answer(some, range(3))
        num_decoded = count_decoded(policy, monkeypatch)
        assert policy.answer(some, range(3)) == expected
    assert num_decoded == [1]


def test_equal_boards_are_decoded_once_while_playing(
    model: LlamaForCausalLM, encoder: Encoder, monkeypatch: pytest.MonkeyPatch
) -> None:
    policy, some = make_policy(model, encoder, "compact", max_new_tokens=3), boards(3)
    num_decoded = count_decoded(policy, monkeypatch)
    expected = policy.answer(some, range(3))
    with policy.playing():
        policy.answer(some[:1], [0])
        num_decoded.clear()
        assert policy.answer([some[0], some[1], some[1], some[2], some[0]], range(5)) == [
            expected[i] for i in (0, 1, 1, 2, 0)
        ]
        assert num_decoded == [2]


def test_layers_compiled_for_training_run_eagerly(tiny_llama_dir: Path, encoder: Encoder) -> None:
    graphs = []

    def backend(graph: torch.fx.GraphModule, inputs: list[torch.Tensor]) -> Callable[..., object]:
        graphs.append(graph)
        return graph.forward

    compiled = LlamaForCausalLM.from_pretrained(tiny_llama_dir, dtype=torch.float32).eval()
    expected = make_policy(compiled, encoder, "compact", max_new_tokens=5).answer(boards(3), range(3))
    for layer in compiled.model.layers:
        layer.compile(backend=backend)
    assert make_policy(compiled, encoder, "compact", max_new_tokens=5).answer(boards(3), range(3)) == expected
    assert not graphs
    compiled(input_ids=torch.tensor([[1, 2]]))
    assert graphs


def test_truncated_completions_name_no_move(model: LlamaForCausalLM, encoder: Encoder) -> None:
    answers = make_policy(model, encoder, "bfs-512", max_new_tokens=2).answer(boards(4), range(4))
    assert all(a.move is None and a.completion.endswith("...") for a in answers)
    assert read_move("UP...") is None


def test_the_model_is_left_in_the_mode_it_was_in(model: LlamaForCausalLM, encoder: Encoder) -> None:
    model.train()
    make_policy(model, encoder, "bfs-512", max_new_tokens=2).answer(boards(1), [0])
    assert model.training
    model.eval()


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"reading": "guess"}, r"play\.reading.*guess"),
        ({"legal_mask": True}, r"play\.legal_mask.*play\.reading=score"),
    ],
)
def test_invalid_settings_are_rejected(model: LlamaForCausalLM, encoder: Encoder, settings: dict, message: str) -> None:
    with pytest.raises(UserError, match=message):
        make_policy(model, encoder, "compact", **settings)


def test_score_rejects_a_style_whose_moves_do_not_differ_at_one_token(
    model: LlamaForCausalLM, encoder: Encoder, monkeypatch: pytest.MonkeyPatch
) -> None:
    style = get_style("compact")
    monkeypatch.setattr(type(style), "write_completion", lambda self, board, move: "UP" if move is Move.UP else "no")
    with pytest.raises(UserError, match=r"play\.reading=score.*'compact'"):
        make_policy(model, encoder, "compact", reading="score")


def test_position_whose_prompt_exceeds_the_model_names_no_move(encoder: Encoder) -> None:
    positions = boards(6)
    lengths = [len(encoder.encode_prompt(get_style("bfs-512").write_prompt(board))) for board in positions]
    assert min(lengths) < lengths[-1] == max(lengths)
    model = build_model("gpt2", n_positions=max(lengths) + 4 - 1)
    policy = make_policy(model, encoder, "bfs-512", max_new_tokens=4)
    *fitting, longest = policy.answer(positions, [0] * len(positions))
    assert longest == Answer(None, "")
    assert [bool(answer.completion) for answer in fitting] == [length < max(lengths) for length in lengths[:-1]]


def test_model_that_cannot_read_the_first_prompt_is_refused(encoder: Encoder) -> None:
    policy = make_policy(build_model("gpt2", n_positions=64), encoder, "bfs-512", max_new_tokens=4)
    with pytest.raises(UserError, match=r"bfs-512.*\b64\b"):
        policy.answer(boards(2), [0, 0])
    short = make_policy(build_model("gpt2", vocab_size=300), encoder, "bfs-512", max_new_tokens=4)
    with pytest.raises(UserError, match=r"bfs-512: token .*\b300\b"):
        short.answer(boards(2), [0, 0])
