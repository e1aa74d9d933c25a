"""Every architecture compared with transformers' ``generate``, one prompt at a time."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from transformers import LlamaForCausalLM, PreTrainedModel

from snake_lora_pl.decoding import decoder as decoder_module
from snake_lora_pl.decoding import generate_decoder
from snake_lora_pl.decoding.decoder import Decoder
from snake_lora_pl.decoding.drafter import Drafter
from snake_lora_pl.decoding.generate_decoder import GenerateDecoder
from snake_lora_pl.decoding.lockstep_decoder import LockstepDecoder
from tests.architectures import CONFIGS, build_model

PAD = EOS = 2
NUM_NEW = 6

BY_GENERATE = {
    *("bloom", "falcon", "gemma2", "gpt_neo", "gpt_oss", "llama4_text"),
    *("mamba", "mamba2", "falcon_mamba", "rwkv", "recurrent_gemma"),
    *("lfm2", "jamba", "zamba2", "bamba", "granitemoehybrid", "falcon_h1", "qwen3_next", "qwen3_5_text"),
}
"""Architectures that cannot be decoded in lockstep."""


@pytest.fixture(autouse=True)
def _log_again() -> None:
    decoder_module._log_fallback.cache_clear()
    generate_decoder._log_smaller_batches.cache_clear()


def random_tokens(num_tokens: int, seed: int) -> list[int]:
    return torch.randint(3, 380, (num_tokens,), generator=torch.Generator().manual_seed(seed)).tolist()


PREFIX = random_tokens(12, seed=0)
# Shorter and much longer than the windows of 8 and 16 tokens, two of equal length, one with a part of the prefix.
PROMPTS = [PREFIX + random_tokens(n, seed=n) for n in (3, 60, 30)]
PROMPTS += [PREFIX + random_tokens(30, seed=1), PREFIX[:5] + random_tokens(4, seed=2)]


def make_decoder(model: PreTrainedModel, **settings: Any) -> Decoder:
    settings = {"is_finished": lambda tokens: False, "max_new_tokens": NUM_NEW} | settings
    return Decoder(model, Drafter(), PREFIX, pad_id=PAD, eos_id=EOS, **settings)


def generate(model: PreTrainedModel, prompt: list[int]) -> tuple[list[int], bool]:
    """Return the tokens before EOS that ``generate`` appends, and whether it appended EOS."""
    ids = torch.tensor([prompt])
    mask = torch.ones_like(ids)
    output = model.generate(ids, attention_mask=mask, max_new_tokens=NUM_NEW, do_sample=False, pad_token_id=PAD)
    tokens = output[0, len(prompt) :].tolist()
    return (tokens[:-1], True) if tokens[-1] == EOS else (tokens, False)


def complete(decoder: Decoder | GenerateDecoder, prompts: list[list[int]]) -> list[tuple[list[int], bool]]:
    return [(completion.tokens, completion.is_complete) for completion in decoder.complete(prompts)]


@pytest.mark.parametrize("model_type", CONFIGS)
@torch.no_grad()
@pytest.mark.e2e
def test_completions_and_logits_equal_those_of_the_plain_model(
    model_type: str, caplog: pytest.LogCaptureFixture
) -> None:
    model = build_model(model_type)
    expected = [generate(model, prompt) for prompt in PROMPTS]
    decoder = make_decoder(model)
    assert complete(decoder, PROMPTS) == expected
    # The rows of equal length alone, with used buffers and a drafter that has learned the completions.
    assert complete(decoder, PROMPTS[2:4]) == expected[2:4]
    for logits, prompt in zip(decoder.next_logits(PROMPTS), PROMPTS, strict=True):
        torch.testing.assert_close(logits, model(torch.tensor([prompt])).logits[0, -1], rtol=1e-3, atol=1e-3)
    logged = [record.getMessage() for record in caplog.records if record.name == decoder_module.__name__]
    assert len(logged) == (model_type in BY_GENERATE)
    assert all(message.startswith(type(model).__name__) for message in logged)


@pytest.mark.parametrize("model_type", ["gpt_neo", "mistral", "mamba", "rwkv", "recurrent_gemma", "bloom"])
@torch.no_grad()
def test_generate_decoder_pads_or_divides_batches_as_the_architecture_allows(model_type: str) -> None:
    model = build_model(model_type)
    decoder = GenerateDecoder(model, pad_id=PAD, eos_id=EOS, max_new_tokens=NUM_NEW)
    assert complete(decoder, PROMPTS) == [generate(model, prompt) for prompt in PROMPTS]
    sizes = {"rwkv": [1, 1, 1, 1, 1], "recurrent_gemma": [1, 1, 2, 1]}.get(model_type, [5])
    assert [len(batch) for batch in decoder._batches(PROMPTS, NUM_NEW)] == sizes


@torch.no_grad()
def test_lockstep_is_used_up_to_the_length_at_which_it_fails(monkeypatch: pytest.MonkeyPatch) -> None:
    used: list[str] = []
    for decoder_class in (LockstepDecoder, GenerateDecoder):

        def complete_and_note(self: Any, prompts: Any, plain: Any = decoder_class.complete) -> Any:
            used.append(type(self).__name__)
            return plain(self, prompts)

        monkeypatch.setattr(decoder_class, "complete", complete_and_note)
    model = build_model("gpt_neo", window_size=30)
    decoder = make_decoder(model)
    for prompt, name in ((PROMPTS[0], "LockstepDecoder"), (PROMPTS[1], "GenerateDecoder")):
        used.clear()
        assert complete(decoder, [prompt]) == [generate(model, prompt)]
        assert used == [name]
    # Prompts inside the window, completions beyond it.
    assert complete(make_decoder(model, max_new_tokens=40), [PROMPTS[0]])
    assert used[-1] == "GenerateDecoder"


@torch.no_grad()
def test_lockstep_fails_by_less_than_the_rounding_errors_of_bfloat16(caplog: pytest.LogCaptureFixture) -> None:
    class NearlyExact(LlamaForCausalLM):
        """A model whose logits depend a little on the number of rows."""

        def forward(self, input_ids: torch.Tensor, **kwargs: Any) -> Any:
            output = super().forward(input_ids=input_ids, **kwargs)
            output.logits[..., ::2] *= 1 + 0.01 * (len(input_ids) - 1)
            return output

    model = NearlyExact(build_model("llama").config).to(torch.bfloat16).eval()
    assert complete(make_decoder(model), PROMPTS[:1]) == [generate(model, PROMPTS[0])]
    assert "NearlyExact" in caplog.text
    assert {parameter.dtype for parameter in model.parameters()} == {torch.bfloat16}


class Shifted(LlamaForCausalLM):
    """A model with an offset common to all logits, which depends on the batch size."""

    shift = 3.0

    def forward(self, input_ids: torch.Tensor, **kwargs: Any) -> Any:
        output = super().forward(input_ids=input_ids, **kwargs)
        output.logits += self.shift * len(input_ids)
        return output


@torch.no_grad()
def test_common_offset_of_logits_is_accepted(caplog: pytest.LogCaptureFixture) -> None:
    make_decoder(Shifted(build_model("llama").config).eval()).complete(PROMPTS)
    assert not caplog.records


@torch.no_grad()
def test_is_finished_ends_completions_in_both_decoders() -> None:
    for model_type in ("llama", "bloom"):
        model = build_model(model_type)
        expected = [(generate(model, prompt)[0][:2], True) for prompt in PROMPTS]
        decoder = make_decoder(model, is_finished=lambda tokens: len(tokens) >= 2)
        assert complete(decoder, PROMPTS) == expected


@torch.no_grad()
def test_generation_settings_of_the_model_are_neither_used_nor_changed() -> None:
    model = build_model("bloom")
    expected = [generate(model, prompt) for prompt in PROMPTS]
    model.generation_config.update(repetition_penalty=5.0, do_sample=True, num_beams=2, min_length=50)
    before = model.generation_config.to_dict()
    assert complete(make_decoder(model), PROMPTS) == expected
    assert model.generation_config.to_dict() == before


@torch.no_grad()
def test_exhausted_memory_is_not_taken_for_a_limit_of_the_architecture(monkeypatch: pytest.MonkeyPatch) -> None:
    model = build_model("llama")
    monkeypatch.setattr(model, "forward", lambda **kwargs: (_ for _ in ()).throw(torch.OutOfMemoryError("full")))
    with pytest.raises(torch.OutOfMemoryError, match="full"):
        make_decoder(model).complete(PROMPTS)
