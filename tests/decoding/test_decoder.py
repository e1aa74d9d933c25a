"""The choice between lockstep and ``generate``, compared with ``generate`` on one prompt at a time.

``tests/test_architectures.py`` compares every architecture.
"""

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
from tests.architecture_proof import EOS, NUM_NEW, PAD, PREFIX, PROMPTS, plain_completion
from tests.architectures import build_model


@pytest.fixture(autouse=True)
def _log_again() -> None:
    decoder_module._log_fallback.cache_clear()
    generate_decoder._log_smaller_batches.cache_clear()


def make_decoder(model: PreTrainedModel, **settings: Any) -> Decoder:
    settings = {"is_finished": lambda tokens: False, "max_new_tokens": NUM_NEW} | settings
    return Decoder(model, Drafter(), PREFIX, pad_id=PAD, eos_id=EOS, **settings)


def complete(decoder: Decoder | GenerateDecoder, prompts: list[list[int]]) -> list[tuple[list[int], bool]]:
    return [(completion.tokens, completion.is_complete) for completion in decoder.complete(prompts)]


@pytest.mark.parametrize("model_type", ["gpt_neo", "mistral", "mamba", "rwkv", "recurrent_gemma", "bloom"])
@torch.no_grad()
def test_generate_decoder_pads_or_divides_batches_as_the_architecture_allows(model_type: str) -> None:
    model = build_model(model_type)
    decoder = GenerateDecoder(model, pad_id=PAD, eos_id=EOS, max_new_tokens=NUM_NEW)
    assert complete(decoder, PROMPTS) == [plain_completion(model, prompt) for prompt in PROMPTS]
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
        assert complete(decoder, [prompt]) == [plain_completion(model, prompt)]
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
    assert complete(make_decoder(model), PROMPTS[:1]) == [plain_completion(model, PROMPTS[0])]
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
        expected = [(plain_completion(model, prompt)[0][:2], True) for prompt in PROMPTS]
        decoder = make_decoder(model, is_finished=lambda tokens: len(tokens) >= 2)
        assert complete(decoder, PROMPTS) == expected


@torch.no_grad()
def test_generation_settings_of_the_model_are_neither_used_nor_changed() -> None:
    model = build_model("bloom")
    expected = [plain_completion(model, prompt) for prompt in PROMPTS]
    model.generation_config.update(repetition_penalty=5.0, do_sample=True, num_beams=2, min_length=50)
    before = model.generation_config.to_dict()
    assert complete(make_decoder(model), PROMPTS) == expected
    assert model.generation_config.to_dict() == before


@pytest.mark.parametrize("error", [torch.OutOfMemoryError, MemoryError, KeyError])
@torch.no_grad()
def test_error_with_another_cause_is_not_taken_for_a_limit_of_the_architecture(
    error: type[Exception], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(LockstepDecoder, "forced_logits", lambda *args: (_ for _ in ()).throw(error("full")))
    with pytest.raises(error, match="full"):
        make_decoder(build_model("llama")).complete(PROMPTS)


@torch.no_grad()
def test_lockstep_is_tried_out_once_for_a_model(monkeypatch: pytest.MonkeyPatch) -> None:
    model, num_calls = build_model("llama"), 0

    def forced_logits(self: Any, *args: Any, plain: Any = LockstepDecoder.forced_logits) -> Any:
        nonlocal num_calls
        num_calls += 1
        return plain(self, *args)

    monkeypatch.setattr(LockstepDecoder, "forced_logits", forced_logits)
    for _ in range(3):
        make_decoder(model).complete(PROMPTS)
    assert num_calls == 1
