from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F  # noqa: N812
from peft import LoraConfig, get_peft_model
from torch import Tensor, nn
from transformers import (
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    MistralConfig,
    MistralForCausalLM,
    Qwen2Config,
    Qwen2ForCausalLM,
)

from snake_lora_pl.constants import IGNORE_INDEX
from snake_lora_pl.training.fused import FusedDecoder, fusion_obstacle, projection
from snake_lora_pl.training.loss import completion_loss
from snake_lora_pl.training.packing import pack

SIZES: dict[str, Any] = {
    "vocab_size": 97, "hidden_size": 48, "intermediate_size": 80, "num_hidden_layers": 2, "num_attention_heads": 6,
    "num_key_value_heads": 2, "max_position_embeddings": 64, "tie_word_embeddings": True,
}  # fmt: skip
ARCHITECTURES = {
    "llama": lambda: LlamaForCausalLM(LlamaConfig(**SIZES)),
    "llama-with-biases": lambda: LlamaForCausalLM(LlamaConfig(**SIZES, attention_bias=True, mlp_bias=True)),
    "qwen2": lambda: Qwen2ForCausalLM(Qwen2Config(**SIZES)),
    "mistral": lambda: MistralForCausalLM(MistralConfig(**SIZES, sliding_window=None, head_dim=8)),
}
ATTENTION = ["q_proj", "k_proj", "v_proj", "o_proj"]
TARGETS = {"attention": ATTENTION, "two of three": ["q_proj", "v_proj"], "all": "all-linear", "mlp": ["down_proj"]}


def make_model(architecture: str = "llama", targets: Any = ATTENTION, dropout: float = 0.0, **options: Any) -> Any:
    torch.manual_seed(0)
    base = ARCHITECTURES[architecture]()
    for name, parameter in base.named_parameters():
        if name.endswith("bias"):
            nn.init.normal_(parameter, std=0.1)
    config = LoraConfig(
        r=4, lora_alpha=8, lora_dropout=dropout, target_modules=targets, task_type="CAUSAL_LM", **options
    )
    model = get_peft_model(base, config)
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            nn.init.normal_(parameter, std=0.1)
    return model


def make_batch(num_rows: int = 4, prefix: int = 5) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(3)
    lengths = torch.randint(prefix + 4, 40, (num_rows,), generator=generator).tolist()
    input_ids = torch.randint(0, 97, (num_rows, max(lengths)), generator=generator)
    input_ids[:, :prefix] = input_ids[0, :prefix].clone()
    labels = input_ids.clone()
    for row, length in enumerate(lengths):
        labels[row, : length // 2] = IGNORE_INDEX
        labels[row, length:] = IGNORE_INDEX
    return input_ids, labels


def gradients(model: Any, loss: Tensor) -> dict[str, Tensor]:
    named = {name: p for name, p in model.named_parameters() if p.requires_grad}
    return dict(zip(named, torch.autograd.grad(loss, list(named.values())), strict=True))


def plain_loss(model: Any, input_ids: Tensor, labels: Tensor) -> Tensor:
    """Compute the loss with the model's own layers, an attention mask and whole logits."""
    mask = torch.ones_like(input_ids)
    for row, row_labels in enumerate(labels):
        mask[row, int((row_labels != IGNORE_INDEX).nonzero().max()) + 1 :] = 0
    logits = model(input_ids=input_ids, attention_mask=mask).logits
    return F.cross_entropy(logits[:, :-1].flatten(0, 1).float(), labels[:, 1:].flatten(), reduction="sum")


def fused_loss(model: Any, input_ids: Tensor, labels: Tensor, **options: Any) -> Tensor:
    batch = pack(input_ids, labels)
    assert batch is not None
    hidden = FusedDecoder(model, **options).target_states(batch)
    return completion_loss(hidden, batch.target_ids, model.get_base_model().get_output_embeddings())


def assert_same(model: Any, loss: Tensor, expected: Tensor, tolerance: float) -> None:
    torch.testing.assert_close(loss, expected, rtol=tolerance, atol=0)
    grads, expected_grads = gradients(model, loss), gradients(model, expected)
    assert all(grad.norm() > 0 for grad in expected_grads.values())
    whole, expected_whole = (torch.cat([g.flatten() for g in gs.values()]) for gs in (grads, expected_grads))
    assert (whole - expected_whole).norm() < tolerance * expected_whole.norm()
    for name, grad in grads.items():  # small gradients must not hide behind large ones
        assert (grad - expected_grads[name]).norm() < 10 * tolerance * expected_grads[name].norm(), name


@pytest.mark.parametrize("architecture", ARCHITECTURES)
@pytest.mark.parametrize("targets", TARGETS)
def test_fused_loss_and_gradients_equal_the_models_own(architecture: str, targets: str) -> None:
    model = make_model(architecture, TARGETS[targets])
    assert fusion_obstacle(model) is None
    batch = make_batch()
    assert_same(model, fused_loss(model, *batch), plain_loss(model, *batch), 1e-5)


@pytest.mark.parametrize("rows", [1, 4])
def test_fused_loss_in_bfloat16_agrees_within_its_precision(rows: int) -> None:
    model = make_model()
    for name, parameter in model.named_parameters():
        if "lora" not in name:
            parameter.data = parameter.data.bfloat16()
    batch = make_batch(rows)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert_same(model, fused_loss(model, *batch), plain_loss(model, *batch), 2e-2)


def test_gradient_checkpointing_changes_nothing_even_with_dropout() -> None:
    model = make_model(dropout=0.3).train()
    batch = make_batch()
    results = []
    for gradient_checkpointing in (False, True):
        torch.manual_seed(5)
        loss = fused_loss(model, *batch, gradient_checkpointing=gradient_checkpointing)
        results.append((loss, gradients(model, loss)))
    (loss, grads), (checkpointed_loss, checkpointed) = results
    assert torch.equal(loss, checkpointed_loss)
    assert all(torch.equal(grads[name], checkpointed[name]) for name in grads)


def test_rank_stabilized_scale_is_used() -> None:
    model = make_model(use_rslora=True)
    batch = make_batch()
    assert_same(model, fused_loss(model, *batch), plain_loss(model, *batch), 1e-5)


class FixedMask(nn.Module):
    def __init__(self, mask: Tensor, scale: float) -> None:
        super().__init__()
        self.mask, self.scale = mask, scale

    def forward(self, x: Tensor) -> Tensor:
        return x * self.mask[: x.shape[1]] * self.scale


def test_dropout_uses_the_same_mask_in_forward_and_backward(monkeypatch: pytest.MonkeyPatch) -> None:
    model = make_model(targets="all-linear", dropout=0.5).train()
    input_ids, labels = make_batch(1)
    tokens = int((labels[0] != IGNORE_INDEX).nonzero().max())
    masks = iter([(torch.rand(tokens, width) > 0.5).float() for width in [48, 48, 48, 80] * 2])
    drawn: list[Tensor] = []

    def draw(like: Tensor, probability: float) -> tuple[Tensor, float]:
        assert probability == 0.5
        drawn.append(next(masks)[-len(like) :])
        return drawn[-1], 1.5

    monkeypatch.setattr(projection, "draw_mask", draw)
    loss = fused_loss(model, input_ids[:, : tokens + 1], labels[:, : tokens + 1])
    assert len(drawn) == 8

    # Output projection and MLP of the last layer run only over positions that predict a target: the end of the row.
    filled = iter([torch.cat([torch.ones(tokens - len(m), m.shape[1]), m]) for m in drawn])
    for layer in model.get_base_model().model.layers:
        attention, mlp = layer.self_attn, layer.mlp
        for group in ([attention.q_proj, attention.k_proj, attention.v_proj], [attention.o_proj],
                      [mlp.gate_proj, mlp.up_proj], [mlp.down_proj]):  # fmt: skip
            mask = next(filled)
            for module in group:
                module.lora_dropout["default"] = FixedMask(torch.cat([mask, mask[-1:]]), 1.5)
    assert_same(model, loss, plain_loss(model, input_ids[:, : tokens + 1], labels[:, : tokens + 1]), 1e-5)


def test_dropout_mask_keeps_the_expected_fraction() -> None:
    torch.manual_seed(0)
    kept, scale = projection.draw_mask(torch.empty(501, 999), 0.05)
    assert kept.unique().tolist() == [0, 1]
    assert abs(kept.mean() - 0.95) < 0.002
    assert abs(kept[:, ::4].mean() - kept[:, 1::4].mean()) < 0.004  # no bias between elements that share a draw
    assert abs(scale - 1 / 0.95) < 1e-4
    again, _ = projection.draw_mask(torch.empty(501, 999), 0.05)
    assert not torch.equal(kept, again)


@pytest.mark.parametrize("prefix", [0, 6])
def test_rows_do_not_see_each_other(prefix: int) -> None:
    model = make_model()
    input_ids, labels = make_batch(4, prefix)
    changed = input_ids.clone()
    changed[2, prefix:] = (changed[2, prefix:] + 1) % 97
    states = []
    for ids in (input_ids, changed):
        batch = pack(ids, labels)
        assert batch is not None
        assert batch.prefix_length == prefix
        hidden = FusedDecoder(model).target_states(batch)
        row_sizes = (labels[:, 1:] != IGNORE_INDEX).sum(dim=1).tolist()
        states.append(model.get_base_model().lm_head(hidden).split(row_sizes))
    for row in (0, 1, 3):
        assert torch.equal(states[0][row], states[1][row])
    assert not torch.equal(states[0][2], states[1][2])


def test_model_remains_usable_and_unchanged() -> None:
    model = make_model(architecture="llama-with-biases").eval()
    input_ids, labels = make_batch()
    before, names = model(input_ids=input_ids).logits, list(model.state_dict())
    fused_loss(model, input_ids, labels).backward()
    assert list(model.state_dict()) == names
    assert torch.equal(model(input_ids=input_ids).logits, before)


def test_moved_weights_are_used() -> None:
    model = make_model()
    batch = make_batch()
    decoder = FusedDecoder(model)
    packed = pack(*batch)
    assert packed is not None
    first = decoder.target_states(packed)
    for parameter in model.parameters():
        parameter.data = parameter.data.clone() * 1.1
    torch.testing.assert_close(decoder.target_states(packed), FusedDecoder(model).target_states(packed), rtol=0, atol=0)
    assert not torch.equal(decoder.target_states(packed), first)


def obstacles() -> dict[str, Any]:
    disabled = make_model()
    disabled.base_model.disable_adapter_layers()
    two = make_model()
    two.add_adapter("other", two.peft_config["default"])
    two.base_model.set_adapter(["default", "other"])
    gpt2 = GPT2LMHeadModel(GPT2Config(vocab_size=97, n_embd=48, n_layer=1, n_head=2, n_positions=64))
    gpt2 = get_peft_model(gpt2, LoraConfig(r=2, target_modules=["c_attn"], fan_in_fan_out=True))
    windowed = MistralForCausalLM(MistralConfig(**SIZES, sliding_window=8, head_dim=8))
    hooked = make_model()
    hooked.get_base_model().model.layers[1].self_attn.q_proj.register_forward_hook(lambda *_: None)
    return {
        "layers.1.self_attn.q_proj has a hook": hooked,
        "DoRA": make_model(use_dora=True),
        "unmerged": disabled,
        "exactly one active": two,
        "architecture is gpt2": gpt2,
        "sliding window": get_peft_model(windowed, LoraConfig(r=2, target_modules=["q_proj"])),
    }


def test_fusion_obstacles_are_named() -> None:
    for expected, model in obstacles().items():
        obstacle = fusion_obstacle(model)
        assert obstacle is not None, expected
        assert expected in obstacle


def test_layers_below_the_lowest_adapter_have_no_graph() -> None:
    model, batch = (
        make_model("llama", [".".join(["model.layers.1.self_attn", name]) for name in ATTENTION]),
        make_batch(),
    )
    packed = pack(*batch)
    assert packed is not None
    decoder = FusedDecoder(model)
    requires_grad = []
    run = decoder._run

    def record(layer: Any, x: Tensor, *args: Any) -> Tensor:
        requires_grad.append(x.requires_grad)
        return run(layer, x, *args)

    decoder._run = record  # type: ignore[method-assign]
    states = decoder.target_states(packed)
    assert requires_grad == [False, False]  # the inputs of both layers
    assert states.requires_grad
    assert_same(model, fused_loss(model, *batch), plain_loss(model, *batch), 1e-5)
