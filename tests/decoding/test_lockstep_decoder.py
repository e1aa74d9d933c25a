"""Decoding in lockstep compared with transformers' ``generate``, one prompt at a time."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import pytest
import torch
from transformers import (
    GPT2Config,
    GPT2LMHeadModel,
    GPTNeoConfig,
    GPTNeoForCausalLM,
    LlamaConfig,
    LlamaForCausalLM,
    MistralConfig,
    MistralForCausalLM,
    PreTrainedModel,
    Qwen2Config,
    Qwen2ForCausalLM,
)
from typing_extensions import override

from snake_lora_pl.decoding.drafter import Drafter, DraftToken
from snake_lora_pl.decoding.lockstep_decoder import LockstepDecoder

EOS = 0
VOCAB_SIZE = 48
PREFIX = [5, 6, 7, 8, 9, 10]
SHAPE = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4}
# With a small initializer range a random model repeats one token, and every comparison passes.
COMMON = {"vocab_size": VOCAB_SIZE, "initializer_range": 0.4, "bos_token_id": 1, "eos_token_id": EOS}


def make_model(architecture: str) -> PreTrainedModel:
    torch.manual_seed(0)
    if architecture == "llama":
        model = LlamaForCausalLM(LlamaConfig(**SHAPE, **COMMON, num_key_value_heads=2))
    elif architecture == "mistral":
        model = MistralForCausalLM(MistralConfig(**SHAPE, **COMMON, num_key_value_heads=2, sliding_window=7))
    elif architecture == "qwen2":
        model = Qwen2ForCausalLM(Qwen2Config(**SHAPE, **COMMON, num_key_value_heads=4))
    elif architecture == "gpt2":
        model = GPT2LMHeadModel(GPT2Config(n_embd=32, n_layer=2, n_head=4, n_positions=128, **COMMON))
    else:  # does not use AttentionInterface
        config = GPTNeoConfig(hidden_size=32, num_layers=2, num_heads=4, attention_types=[[["global"], 2]], **COMMON)
        model = GPTNeoForCausalLM(config)
    return model.eval()


@pytest.fixture(scope="module")
def llama() -> PreTrainedModel:
    return make_model("llama")


def prompts() -> list[list[int]]:
    """Return prompts of different lengths: one without the prefix, one with a part of it, one with nothing else."""
    generator = torch.Generator().manual_seed(1)
    suffixes = [torch.randint(1, VOCAB_SIZE, (n,), generator=generator).tolist() for n in (9, 3, 1, 17, 5, 9)]
    return [*[PREFIX + suffix for suffix in suffixes], suffixes[3], [*PREFIX[:3], *suffixes[4]], list(PREFIX)]


@torch.no_grad()
def generate(model: PreTrainedModel, prompt: list[int], max_new_tokens: int) -> tuple[list[int], bool]:
    ids = torch.tensor([prompt])
    output = model.generate(
        input_ids=ids,
        attention_mask=torch.ones_like(ids),
        max_new_tokens=max_new_tokens,
        do_sample=False,
        pad_token_id=EOS,
    )[0, len(prompt) :].tolist()
    return (output[:-1], True) if output[-1] == EOS else (output, False)


class Oracle(Drafter):
    """Drafts known completions: ``num_right`` right tokens, then wrong ones if ``has_wrong``."""

    def __init__(self, completions: Sequence[list[int]], num_right: int, has_wrong: bool = False) -> None:
        super().__init__()
        self._completions = completions
        self._num_right = num_right
        self._has_wrong = has_wrong

    @override
    def draft(self, completion: Sequence[int], max_tokens: int) -> list[DraftToken]:
        start = len(completion)
        (rest, *_) = [known[start:] for known in self._completions if known[:start] == list(completion)] or [[]]
        right = rest[: self._num_right]
        wrong = [(token + 1) % VOCAB_SIZE for token in rest[self._num_right : self._num_right + 2]]
        return [DraftToken(token, 1.0) for token in (right + wrong if self._has_wrong else right)][:max_tokens]


def make_decoder(model: PreTrainedModel, drafter: Drafter | None = None, **settings: Any) -> LockstepDecoder:
    settings = {
        "prefix": PREFIX,
        "is_finished": lambda tokens: False,
        "max_new_tokens": 20,
    } | settings
    with torch.no_grad():
        return LockstepDecoder(model, drafter or Drafter(), pad_id=EOS, eos_id=EOS, **settings)


@torch.no_grad()
def complete(decoder: LockstepDecoder, some: list[list[int]]) -> list[tuple[list[int], bool]]:
    return [(completion.tokens, completion.is_complete) for completion in decoder.complete(some)]


def count_passes(model: PreTrainedModel, monkeypatch: pytest.MonkeyPatch) -> list[tuple[int, int]]:
    """Return a list that collects the input shapes of the model's forward passes."""
    shapes: list[tuple[int, int]] = []
    forward = model.forward

    def counting(*args: Any, **kwargs: Any) -> Any:
        shapes.append(tuple(kwargs["input_ids"].shape))
        return forward(*args, **kwargs)

    monkeypatch.setattr(model, "forward", counting)
    return shapes


@pytest.mark.parametrize("architecture", ["llama", "mistral", "qwen2", "gpt2", "gpt_neo"])
def test_completions_equal_those_of_generate(architecture: str) -> None:
    model = make_model(architecture)
    expected = [generate(model, prompt, 20) for prompt in prompts()]
    assert len({tuple(tokens) for tokens, _ in expected}) > 3
    decoder = make_decoder(model)
    assert complete(decoder, prompts()) == expected
    # Again, with used buffers and a drafter that has learned the completions.
    assert complete(decoder, prompts()) == expected
    assert complete(decoder, prompts()[:2]) == expected[:2]


@pytest.mark.parametrize("num_right", [0, 1, 3, 30])
@pytest.mark.parametrize("has_wrong", [False, True])
def test_right_and_wrong_drafts_do_not_change_completions(
    llama: PreTrainedModel, num_right: int, has_wrong: bool
) -> None:
    expected = [generate(llama, prompt, 20) for prompt in prompts()]
    oracle = Oracle([[*tokens, EOS] for tokens, _ in expected], num_right, has_wrong)
    assert complete(make_decoder(llama, oracle), prompts()) == expected


def test_right_drafts_save_forward_passes(llama: PreTrainedModel, monkeypatch: pytest.MonkeyPatch) -> None:
    prompt = prompts()[0]
    tokens, is_complete = generate(llama, prompt, 20)
    shapes = count_passes(llama, monkeypatch)
    for num_right, num_passes in ((0, 20), (1, 11), (30, 2)):
        decoder = make_decoder(llama, Oracle([tokens], num_right))
        shapes.clear()
        assert complete(decoder, [prompt]) == [(tokens, is_complete)]
        assert len(shapes) == num_passes  # the pass over the prompt generates the first token


def test_eos_is_predicted_and_not_read(llama: PreTrainedModel, monkeypatch: pytest.MonkeyPatch) -> None:
    prompt = prompts()[0]
    tokens, _ = generate(llama, prompt, 20)
    eos = next(token for token in tokens[1:] if token != tokens[0])
    expected = tokens[: tokens.index(eos)]
    decoder = make_decoder(llama, Oracle([[*expected, eos]], 30))
    monkeypatch.setattr(decoder, "_eos_id", eos)
    shapes = count_passes(llama, monkeypatch)
    assert complete(decoder, [prompt]) == [(expected, True)]
    assert [width for _, width in shapes[1:]] == [len(expected)]


def test_drafter_learns_completions(llama: PreTrainedModel, monkeypatch: pytest.MonkeyPatch) -> None:
    decoder = make_decoder(llama)
    shapes = count_passes(llama, monkeypatch)
    complete(decoder, prompts()[:1])
    first = len(shapes)
    for _ in range(3):
        shapes.clear()
        complete(decoder, prompts()[:1])
    assert len(shapes) < first / 3


def test_complete_rows_leave_the_batch(llama: PreTrainedModel, monkeypatch: pytest.MonkeyPatch) -> None:
    lengths = iter([4, 9, 2, 14, 7])
    ends: dict[int, int] = {}

    def is_finished(tokens: list[int]) -> bool:
        return len(tokens) >= ends.setdefault(id(tokens), next(lengths, 1))

    some = [prompt for prompt in prompts() if len(generate(llama, prompt, 20)[0]) == 20][:5]
    assert len(some) == 5
    expected = sorted((generate(llama, prompt, 20)[0] for prompt in some), key=lambda tokens: tokens[:3])
    shapes = count_passes(llama, monkeypatch)
    decoder = make_decoder(llama, Oracle([], 0), is_finished=is_finished)
    shapes.clear()
    results = sorted(complete(decoder, some), key=lambda result: result[0][:3])
    for (tokens, is_complete), whole in zip(results, expected, strict=True):
        assert is_complete
        assert tokens == whole[: len(tokens)]
    assert sorted(len(tokens) for tokens, _ in results) == [2, 4, 7, 9, 14]
    rows = [num_rows for num_rows, _ in shapes[1:]]
    assert rows == [sum(length > step for length in (2, 4, 7, 9, 14)) for step in range(1, 14)]


def test_completions_end_at_max_new_tokens(llama: PreTrainedModel) -> None:
    whole = [tokens for tokens, _ in (generate(llama, prompt, 20) for prompt in prompts())]
    for drafter in (Drafter(), Oracle(whole, 30)):
        results = complete(make_decoder(llama, drafter, max_new_tokens=3), prompts())
        assert [tokens for tokens, _ in results] == [tokens[:3] for tokens in whole]


def test_prompts_are_read_in_passes_of_limited_size(llama: PreTrainedModel, monkeypatch: pytest.MonkeyPatch) -> None:
    expected = [generate(llama, prompt, 6) for prompt in prompts()]
    decoder = make_decoder(llama, Oracle([], 0), max_new_tokens=6)
    monkeypatch.setattr(decoder, "_prompt_tokens", 20)
    shapes = count_passes(llama, monkeypatch)
    assert complete(decoder, prompts()) == expected
    reading = [rows * width for rows, width in shapes if width > 1]
    assert len(reading) > 2
    assert max(reading) <= 20


def test_cache_is_not_copied_during_decoding(llama: PreTrainedModel) -> None:
    decoder = make_decoder(llama, Oracle([], 0))
    complete(decoder, prompts())
    addresses = [buffer.data_ptr() for layer in decoder._cache.layers for buffer in layer._buffers]
    complete(decoder, prompts())
    layers = decoder._cache.layers
    assert [buffer.data_ptr() for layer in layers for buffer in layer._buffers] == addresses
    for layer in layers:
        for view, buffer in zip((layer.keys, layer.values), layer._buffers, strict=True):
            assert view.untyped_storage().data_ptr() == buffer.untyped_storage().data_ptr()


def test_prefix_is_read_once(llama: PreTrainedModel, monkeypatch: pytest.MonkeyPatch) -> None:
    shapes = count_passes(llama, monkeypatch)
    decoder = make_decoder(llama)
    assert shapes == [(1, len(PREFIX))]
    for _ in range(2):
        shapes.clear()
        with torch.no_grad():
            decoder.next_logits([[*PREFIX, 20, 21], [*PREFIX, 22]])
        assert shapes == [(2, 2)]


def test_next_logits_equal_those_of_a_plain_forward_pass(llama: PreTrainedModel) -> None:
    with torch.no_grad():
        logits = make_decoder(llama).next_logits(prompts())
        for row, prompt in zip(logits, prompts(), strict=True):
            torch.testing.assert_close(row, llama(torch.tensor([prompt])).logits[0, -1], rtol=1e-4, atol=1e-4)


def test_forced_logits_equal_those_of_a_plain_forward_pass(llama: PreTrainedModel) -> None:
    short, long, continuation = prompts()[2], prompts()[3], [3, 4, 5, 6]
    with torch.no_grad():
        logits = make_decoder(llama).forced_logits(short, long, continuation)
        for row, prompt in zip(logits, (short, long), strict=True):
            expected = llama(torch.tensor([prompt + continuation])).logits[0, len(prompt) - 1 :]
            torch.testing.assert_close(row, expected, rtol=1e-4, atol=1e-4)
