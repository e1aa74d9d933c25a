"""Fused decoder: which models it supports, and its layers over a packed batch."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from snake_lora_pl.training.fused.attention import HeadLayout, attend
from snake_lora_pl.training.fused.functions import NormProjection, ProjectionResidual, SwiGLU
from snake_lora_pl.training.fused.int8 import Int8Projection
from snake_lora_pl.training.fused.projection import Projection
from snake_lora_pl.training.packing import PackedBatch
from snake_lora_pl.training.torch_internals import has_forward_hooks

# Architectures whose layers are norm, attention with rotary positions, norm, gated SiLU, with residuals around both.
MODEL_TYPES = ("llama", "mistral", "qwen2")


def fusion_obstacle(peft_model: Any) -> str | None:
    """Return why a model cannot run fused, as a clause for messages, or None if it can.

    Args:
        peft_model: A PEFT causal language model with one active adapter.
    """
    config = peft_model.get_base_model().config
    if config.model_type not in MODEL_TYPES:
        return f"its architecture is {config.model_type}, not one of {', '.join(MODEL_TYPES)}"
    if getattr(config, "sliding_window", None) and getattr(config, "use_sliding_window", True):
        return "its attention uses a sliding window"
    if config.hidden_act != "silu":
        return f"its activation is {config.hidden_act}, not silu"
    if getattr(config, "attention_dropout", 0.0):
        return "its attention uses dropout"
    decoder = peft_model.get_base_model().base_model
    for name, module in decoder.named_modules():
        if has_forward_hooks(module):
            return f"{name or 'the decoder'} has a hook on its forward pass"
        obstacle = _linear_obstacle(module)
        if obstacle:
            return f"{name} {obstacle}"
    return None


def _linear_obstacle(module: nn.Module) -> str | None:
    from peft.tuners.lora import Linear as LoRALinear
    from peft.tuners.tuners_utils import BaseTunerLayer

    if isinstance(module, BaseTunerLayer):
        if type(module) is not LoRALinear or type(module.base_layer) is not nn.Linear:
            return f"is a {type(module).__module__}.{type(module).__name__}, not plain LoRA on a linear layer"
        if len(module.active_adapters) != 1 or module.merged or module.disable_adapters:
            return "does not have exactly one active, unmerged adapter"
        name = module.active_adapters[0]
        if name in module.lora_variant or module.lora_bias.get(name):
            return "uses a LoRA variant (DoRA, or a bias on B)"
    if isinstance(module, nn.Linear) and type(module) is not nn.Linear:
        return f"is a {type(module).__name__}, whose weight is quantized"
    return None


@dataclass
class _Layer:
    input_norm: nn.Module
    qkv: Projection
    attention_output: Projection
    output_norm: nn.Module
    gate_up: Projection
    down: Projection

    @property
    def projections(self) -> dict[str, Projection]:
        """The projections by field, in the order in which they run."""
        return {
            "qkv": self.qkv,
            "attention_output": self.attention_output,
            "gate_up": self.gate_up,
            "down": self.down,
        }

    @property
    def is_trained(self) -> bool:
        """True if an adapter changes this layer."""
        return any(projection.factors for projection in self.projections.values())

    def in_int8(self, input_has_gradient: bool) -> _Layer:
        """Return this layer with products in int8."""
        has_gradient = input_has_gradient
        projections: dict[str, Any] = {}
        for name, projection in self.projections.items():
            projections[name] = Int8Projection(projection, needs_input_gradient=has_gradient)
            has_gradient = has_gradient or bool(projection.factors)
        return replace(self, **projections)


class FusedDecoder:
    """Forward pass of a Llama-like decoder over a packed batch.

    It reads the weights of the model's own modules and changes none of their values, so the model remains usable.

    Args:
        peft_model: A model for which ``fusion_obstacle`` returns None.
        gradient_checkpointing: Keep only the input of each layer and recompute the layer in the backward pass.
        trains_in_int8: Multiply by the frozen weights in int8 where gradients are computed, and in float elsewhere.
    """

    def __init__(self, peft_model: Any, *, gradient_checkpointing: bool = False, trains_in_int8: bool = False) -> None:
        self._decoder = peft_model.get_base_model().base_model
        self._gradient_checkpointing = gradient_checkpointing
        config = self._decoder.config
        attention = self._decoder.layers[0].self_attn
        self._layout = HeadLayout(
            config.num_attention_heads, config.num_key_value_heads, attention.head_dim, float(attention.scaling)
        )
        self._layers = [
            _Layer(
                layer.input_layernorm,
                Projection([layer.self_attn.q_proj, layer.self_attn.k_proj, layer.self_attn.v_proj]),
                Projection([layer.self_attn.o_proj]),
                layer.post_attention_layernorm,
                Projection([layer.mlp.gate_proj, layer.mlp.up_proj]),
                Projection([layer.mlp.down_proj]),
            )
            for layer in self._decoder.layers
        ]
        self._training_layers = self._layers
        if trains_in_int8:
            self._training_layers, has_gradient = [], False
            for layer in self._layers:
                self._training_layers.append(layer.in_int8(has_gradient))
                has_gradient = has_gradient or layer.is_trained

    def target_states(self, batch: PackedBatch) -> Tensor:
        """Return the hidden state, after the last norm, that predicts each target; (num_targets, hidden_size)."""
        decoder = self._decoder
        # Autocast would cast the parameters again at every use; the functions cast where necessary.
        with torch.autocast(batch.token_ids.device.type, enabled=False):
            x = decoder.embed_tokens(batch.token_ids)  # (T, hidden_size)
            cos, sin = decoder.rotary_emb(x[None], batch.position_ids[None])
            cos, sin = cos[0].unsqueeze(1), sin[0].unsqueeze(1)  # (T, 1, head_size)
            layers = self._training_layers if torch.is_grad_enabled() else self._layers
            for index, layer in enumerate(layers):
                is_last = index == len(layers) - 1
                if self._gradient_checkpointing and torch.is_grad_enabled():
                    x = torch.utils.checkpoint.checkpoint(
                        self._run, layer, x, cos, sin, batch, is_last, use_reentrant=False
                    )
                else:
                    x = self._run(layer, x, cos, sin, batch, is_last)
            states: Tensor = decoder.norm(x)
            return states

    def _run(self, layer: _Layer, x: Tensor, cos: Tensor, sin: Tensor, batch: PackedBatch, is_last: bool) -> Tensor:
        norm = layer.input_norm
        qkv = NormProjection.apply(x, norm.weight, norm.variance_epsilon, layer.qkv, *layer.qkv.factors)
        attended = attend(qkv, cos, sin, self._layout, batch)  # (T, num_queries * head_size)
        if is_last:
            # After the last attention only the positions that predict a target are used.
            attended, x = attended[batch.target_index], x[batch.target_index]
        output = layer.attention_output
        x = ProjectionResidual.apply(attended, x, output, *output.factors)
        norm = layer.output_norm
        gate_up = NormProjection.apply(x, norm.weight, norm.variance_epsilon, layer.gate_up, *layer.gate_up.factors)
        return ProjectionResidual.apply(SwiGLU.apply(gate_up), x, layer.down, *layer.down.factors)
