from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from snake_lora_pl import LoRAConfig, LoRALightningModule
from snake_lora_pl.data.batching import collate
from snake_lora_pl.data.encoding import Encoder
from snake_lora_pl.data.jsonl import read_rows_at
from snake_lora_pl.training.fused import FusedDecoder, int8
from snake_lora_pl.training.fused.int8 import Int8Weight, largest_columns, quantize_rows
from snake_lora_pl.training.torch_internals import has_vnni
from tests.training.fused.test_decoder import fused_loss, gradients, make_batch, make_model

ROWS = Path(__file__).parents[2] / "data/heuristics_v0.04/grid-size-10/bfs-512/BFS-512_dataset.jsonl"

needs_vnni = pytest.mark.skipif(not has_vnni(), reason="needs AVX512-VNNI")


def compare(grads: dict[str, Tensor], expected: dict[str, Tensor]) -> dict[str, tuple[float, float]]:
    """Return cosine and ratio of norms of each gradient, and of all together under the name ``all``."""
    both = {name: (grads[name].flatten(), expected[name].flatten()) for name in expected}
    both["all"] = tuple(torch.cat(parts) for parts in zip(*both.values(), strict=True))
    return {
        name: (float(torch.cosine_similarity(a, b, dim=0)), float(a.norm() / b.norm())) for name, (a, b) in both.items()
    }


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("chunk", [64, 2**17])
def test_rows_are_rounded_to_255_values_of_their_own(
    monkeypatch: pytest.MonkeyPatch, dtype: torch.dtype, chunk: int
) -> None:
    monkeypatch.setattr(int8, "_CHUNK_ELEMENTS", chunk)
    x = torch.randn(9, 32) * torch.logspace(-6, 3, 9)[:, None]
    x[4] = 0
    x = x.to(dtype)
    quantized, scales = quantize_rows(x)
    assert 1 <= quantized.min() <= quantized.max() <= 255
    error = ((quantized.float() - 128) * scales.float() - x.float()).abs()
    assert (error <= scales.float() * 0.501).all()
    assert (quantized[4] == 128).all()
    assert scales.dtype == dtype


def test_skipped_columns_are_zero_and_do_not_widen_the_scale() -> None:
    x = torch.randn(80, 64)
    x[:, 5] *= 1000
    assert 5 in largest_columns(x)
    quantized, scales = quantize_rows(x, torch.tensor([5]))
    assert (quantized[:, 5] == 128).all()
    assert scales.max() < 0.1


@needs_vnni
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("transposed", [False, True])
def test_product_agrees_with_float(dtype: torch.dtype, transposed: bool) -> None:
    weight, x = torch.randn(96, 64, dtype=dtype), torch.randn(33, 64, dtype=dtype)
    weight *= torch.logspace(-3, 3, 96)[:, None].to(dtype)
    weight_int8 = Int8Weight(weight.t().contiguous().t() if transposed else weight)
    expected = x.float() @ weight.float().t()
    error = (weight_int8.multiply(x).float() - expected).norm(dim=0) / expected.norm(dim=0)
    assert error.max() < 0.03


@needs_vnni
def test_nonfinite_activations_stay_visible() -> None:
    x = torch.randn(4, 64)
    x[1, 3], x[2, 3] = torch.nan, torch.inf
    output = Int8Weight(torch.randn(8, 64)).multiply(x)
    assert output[[0, 3]].isfinite().all()
    assert not output[[1, 2]].isfinite().any()


@needs_vnni
@pytest.mark.parametrize("architecture", ["llama", "llama-with-biases", "qwen2"])
@pytest.mark.parametrize("targets", [["q_proj", "v_proj"], "all-linear"])
def test_gradients_agree_with_float(architecture: str, targets: Any) -> None:
    model, batch = make_model(architecture, targets), make_batch()
    expected_loss, loss = (fused_loss(model, *batch, trains_in_int8=in_int8) for in_int8 in (False, True))
    assert loss != expected_loss
    torch.testing.assert_close(loss, expected_loss, rtol=1e-2, atol=0)
    for name, (cosine, ratio) in compare(gradients(model, loss), gradients(model, expected_loss)).items():
        assert cosine > 0.99, name
        assert ratio == pytest.approx(1, abs=0.05), name


@needs_vnni
def test_gradient_checkpointing_recomputes_in_int8() -> None:
    model, batch = make_model(), make_batch()
    losses = [fused_loss(model, *batch, trains_in_int8=True, gradient_checkpointing=c) for c in (False, True)]
    grads = [gradients(model, loss) for loss in losses]
    assert torch.equal(*losses)
    assert all(torch.equal(grads[0][name], grads[1][name]) for name in grads[0])


@needs_vnni
def test_without_gradients_products_are_float() -> None:
    model, batch = make_model(), make_batch()
    with torch.no_grad():
        assert torch.equal(fused_loss(model, *batch, trains_in_int8=True), fused_loss(model, *batch))


@needs_vnni
def test_copies_exist_only_where_a_gradient_passes() -> None:
    model = make_model()
    nn.Module.requires_grad_(model.get_base_model().base_model.layers[0].self_attn, False)
    decoder = FusedDecoder(model, trains_in_int8=True)
    first, *_, last = decoder._training_layers
    assert first.qkv._transposed_int8 is None
    assert all(p._transposed_int8 is not None for p in list(first.projections.values())[1:])
    assert all(p._transposed_int8 is not None for p in last.projections.values())


@pytest.mark.slow
@needs_vnni
def test_gradients_of_the_real_model_agree_with_float() -> None:
    module = LoRALightningModule(lora=LoRAConfig(dropout=0.0), dtype="float32")
    module.configure_model()
    generator = torch.Generator().manual_seed(0)
    for name, parameter in module.named_parameters():
        if "lora_" in name:
            parameter.data.normal_(std=0.01, generator=generator)
    # From the middle of the file, where snakes are of medium length.
    examples = Encoder(module.tokenizer, "instruction").encode(read_rows_at(ROWS, range(300, 308)))
    batch: Any = module.on_before_batch_transfer(collate(examples, pad_id=module.tokenizer.pad_token_id), 0)
    grads = []
    for trains_in_int8 in (False, True):
        module._fused = FusedDecoder(module.peft_model, trains_in_int8=trains_in_int8)
        module.training_step(batch, 0).backward()
        grads.append({name: p.grad for name, p in module.named_parameters() if p.grad is not None})
        module.zero_grad(set_to_none=True)
    results = compare(grads[1], grads[0])
    assert min(cosine for cosine, _ in results.values()) > 0.98
    assert results["all"][0] > 0.99
    assert results["all"][1] == pytest.approx(1, abs=0.02)
