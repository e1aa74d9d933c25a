"""Cost model of a training step: memory, operations and bytes sent, from the shapes of a model alone.

Models are built from their configs on the meta device, the step runs without data (``training/memory``), and its
operations are counted meanwhile. What several processes hold and send follows from the sizes of the layers.
"""

from __future__ import annotations

import copy
import tempfile
from dataclasses import asdict, dataclass
from functools import cache
from typing import Any

import torch
from torch.utils.flop_counter import FlopCounterMode, sdpa_backward_flop_count, sdpa_flop_count
from transformers import AutoModelForCausalLM, LlamaConfig, PretrainedConfig, Qwen2Config

from snake_lora_pl.adapters.config import LoRAConfig
from snake_lora_pl.models import repeated_layers
from snake_lora_pl.models.quantization import QuantizationConfig
from snake_lora_pl.training.memory.estimate import MemoryEstimate, blank_batch, estimate_memory
from snake_lora_pl.training.module import LoRALightningModule

# A micro-batch: 8 rows of 512 tokens, 160 of them targets, as in a bfs-512 row.
BATCH_SIZE, LENGTH, NUM_TARGETS = 8, 512, 160
NUM_TOKENS = BATCH_SIZE * LENGTH
# Costs are computed for this number of layers and twice as many, and extrapolated to the whole model.
FEW_LAYERS = 3

# The config.json files of HuggingFaceTB/SmolLM2-135M-Instruct, Qwen/Qwen2.5-1.5B-Instruct, Qwen/Qwen2.5-7B-Instruct and
# meta-llama/Llama-3.1-70B-Instruct, reduced to the values that affect the cost.
CONFIGS: dict[str, PretrainedConfig] = {
    "135M": LlamaConfig(
        vocab_size=49152, hidden_size=576, intermediate_size=1536, num_hidden_layers=30, num_attention_heads=9,
        num_key_value_heads=3, tie_word_embeddings=True,
    ),
    "1.5B": Qwen2Config(
        vocab_size=151936, hidden_size=1536, intermediate_size=8960, num_hidden_layers=28, num_attention_heads=12,
        num_key_value_heads=2, tie_word_embeddings=True,
    ),
    "7B": Qwen2Config(
        vocab_size=152064, hidden_size=3584, intermediate_size=18944, num_hidden_layers=28, num_attention_heads=28,
        num_key_value_heads=4, tie_word_embeddings=False,
    ),
    "70B": LlamaConfig(
        vocab_size=128256, hidden_size=8192, intermediate_size=28672, num_hidden_layers=80, num_attention_heads=64,
        num_key_value_heads=8, tie_word_embeddings=False,
    ),
}  # fmt: skip


def _attention_flops(query: torch.Size, key: torch.Size, value: torch.Size, *_: Any, **__: Any) -> int:
    return sdpa_flop_count(query, key, value)


def _attention_backward_flops(
    gradient: torch.Size, query: torch.Size, key: torch.Size, value: torch.Size, *_: Any, **__: Any
) -> int:
    return sdpa_backward_flop_count(gradient, query, key, value)


# torch counts the attention operators of GPUs only; those of the CPU take the same arguments.
_CPU_ATTENTION = {
    torch.ops.aten._scaled_dot_product_flash_attention_for_cpu: _attention_flops,
    torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward: _attention_backward_flops,
}


@dataclass(frozen=True)
class Sizes:
    """Numbers of parameters of a base model, inside its layers, which FSDP shards, and outside them."""

    in_layers: int
    outside: int
    num_layers: int

    @property
    def total(self) -> int:
        """Number of all parameters."""
        return self.in_layers + self.outside


@dataclass(frozen=True)
class Step:
    """Cost of one micro-batch in a process that holds the whole model.

    Attributes:
        sizes: Parameters of the base model.
        memory: Peak memory by use.
        flops: Floating-point operations of the forward and backward pass.
        outside_bytes: Weights of the base model outside its layers.
    """

    sizes: Sizes
    memory: MemoryEstimate
    flops: int
    outside_bytes: int

    @property
    def adapter_parameters(self) -> int:
        """Number of trained parameters; they are float32."""
        return self.memory.adapter // 4

    @property
    def adapter_flops_per_token(self) -> int:
        """Operations of the adapter: one product forward and two backward, each two operations per parameter."""
        return 6 * self.adapter_parameters

    @property
    def base_flops_per_token(self) -> float:
        """All other operations, including the LM head at the targets."""
        return self.flops / NUM_TOKENS - self.adapter_flops_per_token

    @property
    def layer_bytes(self) -> int:
        """Weights of all layers of the base model."""
        return self.memory.weights - self.outside_bytes

    @property
    def trained_bytes(self) -> int:
        """The adapter, its gradients and the optimizer's moments."""
        return self.memory.adapter + self.memory.gradients + self.memory.optimizer

    @property
    def ddp_bytes(self) -> int:
        """Peak memory of a process under DDP, which holds the whole model."""
        return self.memory.total

    def fsdp_bytes(self, num_processes: int) -> float:
        """Return the peak memory of a process under FSDP2: its shards, what is not sharded, and two whole layers.

        One layer computes while the next one is gathered.
        """
        sharded = self.layer_bytes + self.trained_bytes
        gathered = 2 * self.layer_bytes / self.sizes.num_layers
        return sharded / num_processes + gathered + self.memory.total - sharded

    def ddp_sent_bytes(self, num_processes: int) -> float:
        """Return the bytes that a process sends per optimizer step under DDP: a ring all-reduce of the gradients."""
        return 2 * (num_processes - 1) / num_processes * self.memory.gradients

    def fsdp_sent_bytes(self, num_processes: int) -> float:
        """Return the bytes that a process sends per micro-batch under FSDP2.

        Layers and adapter are gathered in the forward pass and again in the backward pass; the adapter's gradients are
        reduced to shards.
        """
        gathered = 2 * (self.layer_bytes + self.memory.adapter)
        return (num_processes - 1) / num_processes * (gathered + self.memory.gradients)


def sizes_of(config: PretrainedConfig) -> Sizes:
    """Count a base model's parameters without allocating them."""
    with torch.device("meta"):
        base = AutoModelForCausalLM.from_config(config)
    layers = repeated_layers(base)
    in_layers = sum(p.numel() for layer in layers for p in layer.parameters())
    return Sizes(in_layers, sum(p.numel() for p in base.parameters()) - in_layers, len(layers))


def make_module(base_model: str, *, bits: int = 16, **settings: Any) -> LoRALightningModule:
    """Return the module of ``balanced.yaml``, or with 4 bits of ``balanced.yaml`` and ``qlora.yaml``."""
    return LoRALightningModule(
        base_model=base_model,
        adapter_type="qlora" if bits == 4 else "lora",
        lora=LoRAConfig(rank=16, alpha=32, dropout=0.05, quantization=QuantizationConfig()),
        **settings,
    )


def count_step(module: LoRALightningModule, batch: dict[str, Any], device_type: str) -> tuple[MemoryEstimate, int]:
    """Return the peak memory and the number of operations of one micro-batch."""
    memory = estimate_memory(module, batch, device_type)
    # A second run, because the counter keeps references to tensors that gradient checkpointing recomputes.
    with FlopCounterMode(display=False, custom_mapping=_CPU_ATTENTION) as counter:
        estimate_memory(module, batch, device_type)
    return memory, counter.get_total_flops()


@cache
def step_of(name: str, *, bits: int = 16, sharded: bool = False, gradient_checkpointing: bool = False) -> Step:
    """Return the cost of one micro-batch of a model of ``CONFIGS`` on a GPU.

    All layers are equal, so the cost is linear in their number and can be extrapolated from two smaller models.

    Args:
        name: Key of ``CONFIGS``.
        bits: 16 for a base in bfloat16, 4 for a 4-bit base.
        sharded: Whether to run the model's own layers, as FSDP requires, instead of the fused ones.
        gradient_checkpointing: Whether to recompute layers in the backward pass.
    """
    config = CONFIGS[name]
    settings = {
        "bits": bits,
        "fused_layers": "never" if sharded else "auto",
        "gradient_checkpointing": gradient_checkpointing,
    }
    few, twice = (_count_step_of_layers(config, num, **settings) for num in (FEW_LAYERS, 2 * FEW_LAYERS))
    factor = config.num_hidden_layers / FEW_LAYERS - 1

    def extrapolate(first: int, second: int) -> int:
        return round(first + factor * (second - first))

    few_memory, twice_memory = asdict(few[0]), asdict(twice[0])
    device = few_memory.pop("device")
    memory = {part: extrapolate(value, twice_memory[part]) for part, value in few_memory.items()}
    sizes = sizes_of(config)
    # QLoRA converts the parts that it does not quantize to float32.
    outside_bytes = sizes.outside * (4 if bits == 4 else 2)
    return Step(sizes, MemoryEstimate(device, **memory), extrapolate(few[1], twice[1]), outside_bytes)


def _count_step_of_layers(
    config: PretrainedConfig, num_layers: int, *, bits: int, **settings: Any
) -> tuple[MemoryEstimate, int]:
    config = copy.deepcopy(config)
    config.num_hidden_layers = num_layers
    if getattr(config, "layer_types", None):
        config.layer_types = config.layer_types[:num_layers]
    config.architectures = [type(config).__name__.replace("Config", "ForCausalLM")]
    with tempfile.TemporaryDirectory() as directory:
        config.save_pretrained(directory)
        module = make_module(directory, bits=bits, dtype="bfloat16", **settings)
        return count_step(module, blank_batch(BATCH_SIZE, LENGTH, NUM_TARGETS), "cuda")
