"""Decoding in lockstep against its plain twin: one prompt at a time through transformers' own ``generate``."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import pytest
import torch
from transformers import (
    BloomConfig,
    BloomForCausalLM,
    GPT2Config,
    GPT2LMHeadModel,
    GPTJConfig,
    GPTJForCausalLM,
    LlamaConfig,
    LlamaForCausalLM,
    MistralConfig,
    MistralForCausalLM,
    PreTrainedModel,
    Qwen2Config,
    Qwen2ForCausalLM,
)

from snake_lora_pl.decoding.drafter import Drafter, Guess
from snake_lora_pl.decoding.lockstep_decoder import LockstepDecoder
from snake_lora_pl.errors import UserError

EOS = 0
VOCABULARY = 48
HEAD = [5, 6, 7, 8, 9, 10]
SHAPE = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4}
# A random model needs logits that differ, or it writes one token for ever and every comparison passes.
COMMON = {"vocab_size": VOCABULARY, "initializer_range": 0.4, "bos_token_id": 1, "eos_token_id": EOS}


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
    else:  # attention of its own
        model = GPTJForCausalLM(GPTJConfig(n_embd=32, n_layer=2, n_head=4, rotary_dim=8, n_positions=128, **COMMON))
    return model.eval()


@pytest.fixture(scope="module")
def llama() -> PreTrainedModel:
    return make_model("llama")


def prompts() -> list[list[int]]:
    """Prompts of different lengths, one of them without the head and one that leaves it in the middle."""
    generator = torch.Generator().manual_seed(1)
    tails = [torch.randint(1, VOCABULARY, (n,), generator=generator).tolist() for n in (9, 3, 1, 17, 5, 9)]
    return [*[HEAD + tail for tail in tails], tails[3], [*HEAD[:3], *tails[4]], list(HEAD)]


@torch.no_grad()
def plain(model: PreTrainedModel, prompt: list[int], max_new_tokens: int) -> tuple[list[int], bool]:
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
    """Knows what will be written, and is wrong wherever it is told to be."""

    def __init__(self, texts: Sequence[list[int]], num_right: int, is_wrong_then: bool = False) -> None:
        super().__init__()
        self._texts = texts
        self._num_right = num_right
        self._is_wrong_then = is_wrong_then

    def guess(self, text: Sequence[int], max_tokens: int) -> list[Guess]:
        (rest, *_) = [known[len(text) :] for known in self._texts if known[: len(text)] == list(text)] or [[]]
        right = rest[: self._num_right]
        wrong = [(token + 1) % VOCABULARY for token in rest[self._num_right : self._num_right + 2]]
        return [Guess(token, 1.0) for token in (right + wrong if self._is_wrong_then else right)][:max_tokens]


def make_decoder(model: PreTrainedModel, drafter: Drafter | None = None, **settings: Any) -> LockstepDecoder:
    settings = {
        "head": HEAD,
        "sample": [*HEAD, 11, 12],
        "ends_text": lambda tokens: False,
        "max_new_tokens": 20,
    } | settings
    with torch.no_grad():
        return LockstepDecoder(model, drafter or Drafter(), pad_id=EOS, eos_id=EOS, **settings)


@torch.no_grad()
def written(decoder: LockstepDecoder, some: list[list[int]]) -> list[tuple[list[int], bool]]:
    return [(w.tokens, w.is_complete) for w in decoder.write(some)]


def count_passes(model: PreTrainedModel, monkeypatch: pytest.MonkeyPatch) -> list[tuple[int, int]]:
    """Shapes of what the model reads from now on."""
    shapes: list[tuple[int, int]] = []
    forward = model.forward

    def counting(*args: Any, **kwargs: Any) -> Any:
        shapes.append(tuple(kwargs["input_ids"].shape))
        return forward(*args, **kwargs)

    monkeypatch.setattr(model, "forward", counting)
    return shapes


@pytest.mark.parametrize("architecture", ["llama", "mistral", "qwen2", "gpt2", "gptj"])
def test_it_writes_what_generate_writes_for_each_prompt_alone(architecture: str) -> None:
    model = make_model(architecture)
    expected = [plain(model, prompt, 20) for prompt in prompts()]
    assert len({tuple(tokens) for tokens, _ in expected}) > 3
    decoder = make_decoder(model)
    assert written(decoder, prompts()) == expected
    # Once more, with buffers that are full of what was, and a drafter that has learnt it.
    assert written(decoder, prompts()) == expected
    assert written(decoder, prompts()[:2]) == expected[:2]


@pytest.mark.parametrize("num_right", [0, 1, 3, 30])
@pytest.mark.parametrize("is_wrong_then", [False, True])
def test_guesses_change_no_word_whether_they_are_right_or_wrong(
    llama: PreTrainedModel, num_right: int, is_wrong_then: bool
) -> None:
    expected = [plain(llama, prompt, 20) for prompt in prompts()]
    oracle = Oracle([[*tokens, EOS] for tokens, _ in expected], num_right, is_wrong_then)
    assert written(make_decoder(llama, oracle), prompts()) == expected


def test_right_guesses_save_passes(llama: PreTrainedModel, monkeypatch: pytest.MonkeyPatch) -> None:
    prompt = prompts()[0]
    tokens, is_complete = plain(llama, prompt, 20)
    shapes = count_passes(llama, monkeypatch)
    for num_right, num_passes in ((0, 20), (1, 11), (30, 2)):
        decoder = make_decoder(llama, Oracle([tokens], num_right))
        shapes.clear()
        assert written(decoder, [prompt]) == [(tokens, is_complete)]
        assert len(shapes) == num_passes  # the first token comes with the prompt


def test_the_drafter_learns_what_is_written(llama: PreTrainedModel, monkeypatch: pytest.MonkeyPatch) -> None:
    decoder = make_decoder(llama)
    shapes = count_passes(llama, monkeypatch)
    written(decoder, prompts()[:1])
    first = len(shapes)
    for _ in range(3):
        shapes.clear()
        written(decoder, prompts()[:1])
    assert len(shapes) < first / 3


def test_rows_that_are_complete_leave_the_batch(llama: PreTrainedModel, monkeypatch: pytest.MonkeyPatch) -> None:
    lengths = iter([4, 9, 2, 14, 7])
    ends: dict[int, int] = {}

    def ends_text(tokens: list[int]) -> bool:
        return len(tokens) >= ends.setdefault(id(tokens), next(lengths, 1))

    some = [prompt for prompt in prompts() if len(plain(llama, prompt, 20)[0]) == 20][:5]
    assert len(some) == 5
    expected = sorted((plain(llama, prompt, 20)[0] for prompt in some), key=lambda tokens: tokens[:3])
    shapes = count_passes(llama, monkeypatch)
    decoder = make_decoder(llama, Oracle([], 0), ends_text=ends_text)
    shapes.clear()
    results = sorted(written(decoder, some), key=lambda result: result[0][:3])
    for (tokens, is_complete), whole in zip(results, expected, strict=True):
        assert is_complete
        assert tokens == whole[: len(tokens)]
    assert sorted(len(tokens) for tokens, _ in results) == [2, 4, 7, 9, 14]
    rows = [num_rows for num_rows, _ in shapes[1:]]
    assert rows == [sum(length > step for length in (2, 4, 7, 9, 14)) for step in range(1, 14)]


def test_a_text_is_cut_at_its_longest(llama: PreTrainedModel) -> None:
    whole = [tokens for tokens, _ in (plain(llama, prompt, 20) for prompt in prompts())]
    for drafter in (Drafter(), Oracle(whole, 30)):
        results = written(make_decoder(llama, drafter, max_new_tokens=3), prompts())
        assert [tokens for tokens, _ in results] == [tokens[:3] for tokens in whole]


def test_prompts_are_read_in_passes_of_bounded_size(llama: PreTrainedModel, monkeypatch: pytest.MonkeyPatch) -> None:
    expected = [plain(llama, prompt, 6) for prompt in prompts()]
    decoder = make_decoder(llama, Oracle([], 0), max_new_tokens=6)
    monkeypatch.setattr(decoder, "_prompt_tokens", 20)
    shapes = count_passes(llama, monkeypatch)
    assert written(decoder, prompts()) == expected
    reading = [rows * width for rows, width in shapes if width > 1]
    assert len(reading) > 2
    assert max(reading) <= 20


def test_the_cache_is_never_copied_while_writing(llama: PreTrainedModel) -> None:
    decoder = make_decoder(llama, Oracle([], 0))
    written(decoder, prompts())
    places = [buffer.data_ptr() for layer in decoder._cache.layers for buffer in layer._buffers]
    written(decoder, prompts())
    layers = decoder._cache.layers
    assert [buffer.data_ptr() for layer in layers for buffer in layer._buffers] == places
    for layer in layers:
        for view, buffer in zip((layer.keys, layer.values), layer._buffers, strict=True):
            assert view.untyped_storage().data_ptr() == buffer.untyped_storage().data_ptr()


def test_the_head_is_read_once(llama: PreTrainedModel, monkeypatch: pytest.MonkeyPatch) -> None:
    shapes = count_passes(llama, monkeypatch)
    decoder = make_decoder(llama)
    assert shapes == [(1, len(HEAD) + 2), (1, len(HEAD)), (2, 2)]  # the check's plain pass, the head, the check
    for _ in range(2):
        shapes.clear()
        with torch.no_grad():
            decoder.next_logits([[*HEAD, 20, 21], [*HEAD, 22]])
        assert shapes == [(2, 2)]


def test_logits_after_each_prompt_are_the_model_s_own(llama: PreTrainedModel) -> None:
    with torch.no_grad():
        ours = make_decoder(llama).next_logits(prompts())
        for row, prompt in zip(ours, prompts(), strict=True):
            torch.testing.assert_close(row, llama(torch.tensor([prompt])).logits[0, -1], rtol=1e-4, atol=1e-4)


class OfItsOwnMind(LlamaForCausalLM):
    """Counts positions itself."""

    def forward(self, position_ids: torch.Tensor | None = None, **kwargs: Any) -> Any:
        return super().forward(**kwargs)


def test_a_model_that_makes_its_own_of_masks_and_positions_is_refused() -> None:
    bloom = BloomForCausalLM(BloomConfig(hidden_size=32, n_layer=2, n_head=4, **COMMON)).eval()
    with pytest.raises(UserError, match="BloomForCausalLM cannot play"):
        make_decoder(bloom)
    with pytest.raises(UserError, match="OfItsOwnMind cannot play"):
        make_decoder(OfItsOwnMind(make_model("llama").config).eval())


class Shifted(LlamaForCausalLM):
    """Adds to all logits alike what differs between two ways of computing them."""

    shift = 3.0

    def forward(self, input_ids: torch.Tensor, **kwargs: Any) -> Any:
        output = super().forward(input_ids=input_ids, **kwargs)
        output.logits += self.shift * len(input_ids)
        return output


def test_what_leaves_every_choice_as_it_was_is_no_reason_to_refuse(monkeypatch: pytest.MonkeyPatch) -> None:
    make_decoder(Shifted(make_model("llama").config).eval())
    monkeypatch.setattr(Shifted, "shift", torch.nan)
    with pytest.raises(UserError, match="Shifted cannot play"):
        make_decoder(Shifted(make_model("llama").config).eval())
