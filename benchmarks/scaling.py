"""Cost model behind ``docs/explanation/scaling.md``; ``python -m benchmarks.scaling`` computes and updates its tables.

Nothing is loaded: models are built from their configs on the meta device, the step runs on shapes
(``training/memory.py``), and its matrix products are counted meanwhile. What several processes hold and send follows
from the sizes of the layers. ``--measure`` trains instead, on this machine's CPU, in one process and in two, and prints
what the model says beside what was measured.
"""

from __future__ import annotations

import argparse
import copy
import json
import os
import subprocess
import sys
import tempfile
from dataclasses import asdict, dataclass
from functools import cache
from pathlib import Path
from typing import Any

import torch
from torch.utils.data import DataLoader
from torch.utils.flop_counter import FlopCounterMode, sdpa_backward_flop_count, sdpa_flop_count
from transformers import AutoModelForCausalLM, LlamaConfig, PretrainedConfig, Qwen2Config

from snake_lora_pl.adapters.config import LoRAConfig
from snake_lora_pl.models import repeated_layers
from snake_lora_pl.models.quantization import QuantizationConfig
from snake_lora_pl.training.memory.estimate import MemoryEstimate, blank_batch, estimate_memory
from snake_lora_pl.training.module import LoRALightningModule

PAGE_PATH = Path(__file__).parent.parent / "docs" / "explanation" / "scaling.md"
MIB, GIB, GIGA, TERA = 2**20, 2**30, 1e9, 1e12

# A micro-batch: 8 rows of 512 tokens, of which 160 carry loss, as in a bfs-512 row.
BATCH_SIZE, LENGTH, NUM_TARGETS = 8, 512, 160
NUM_TOKENS = BATCH_SIZE * LENGTH
NUM_PROCESSES = 8
# Layers that a step is worked out for; those of the whole model follow.
FEW_LAYERS = 3
# AdamW on one parameter: two moments of three and four operations, their correction, root, quotient and decay.
OPTIMIZER_FLOPS = 15
# A device and its wires, to set products and bytes against each other: what an H100 reaches in bfloat16 in practice,
# and one direction of NVLink between the devices of a machine and of a 400 Gbit/s card between machines.
DEVICE_FLOPS, NVLINK_BYTES, NETWORK_BYTES = 400 * TERA, 450 * GIGA, 50 * GIGA

# The config.json files of HuggingFaceTB/SmolLM2-135M-Instruct, Qwen/Qwen2.5-1.5B-Instruct, Qwen/Qwen2.5-7B-Instruct and
# meta-llama/Llama-3.1-70B-Instruct, as far as the cost depends on them.
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


# torch counts the attention of GPUs only; the CPU's operators take the same arguments.
_CPU_ATTENTION = {
    torch.ops.aten._scaled_dot_product_flash_attention_for_cpu: _attention_flops,
    torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward: _attention_backward_flops,
}


@dataclass(frozen=True)
class Sizes:
    """Parameters of a base model, by where they stand: in its layers, which are cut into slices, and outside them."""

    in_layers: int
    outside: int
    num_layers: int

    @property
    def total(self) -> int:
        """All of them."""
        return self.in_layers + self.outside


@dataclass(frozen=True)
class Step:
    """One micro-batch through a model that a process holds whole.

    Attributes:
        sizes: The base's parameters.
        memory: Peak memory, by what holds it.
        flops: Floating-point operations of the forward and backward pass.
        outside_bytes: Weights of the base outside its layers.
    """

    sizes: Sizes
    memory: MemoryEstimate
    flops: int
    outside_bytes: int

    @property
    def adapter_parameters(self) -> int:
        """Trained parameters; they are float32."""
        return self.memory.adapter // 4

    @property
    def adapter_flops_per_token(self) -> int:
        """Of the adapter's products: one forward, two backward, each two operations a parameter."""
        return 6 * self.adapter_parameters

    @property
    def base_flops_per_token(self) -> float:
        """Of all other products, the output head's at the targets included."""
        return self.flops / NUM_TOKENS - self.adapter_flops_per_token

    @property
    def layer_bytes(self) -> int:
        """Weights of all layers of the base."""
        return self.memory.weights - self.outside_bytes

    @property
    def trained_bytes(self) -> int:
        """The adapter, its gradients and the optimiser's moments."""
        return self.memory.adapter + self.memory.gradients + self.memory.optimizer

    def bytes_whole(self) -> int:
        """Peak memory of a process under DDP: all of it."""
        return self.memory.total

    def bytes_in_slices(self, num_processes: int) -> float:
        """Peak memory of a process under FSDP2: its slices, what is never cut, and two layers whole.

        One layer computes while the next one is on its way.
        """
        sliced = (self.layer_bytes + self.trained_bytes) / num_processes
        gathered = 2 * self.layer_bytes / self.sizes.num_layers
        return sliced + gathered + self.outside_bytes + self.memory.activations + self.memory.process + self.memory.heap

    def bytes_sent_whole(self, num_processes: int) -> float:
        """What a process sends in an optimizer step under DDP: a ring all-reduce of the adapter's gradients."""
        return 2 * (num_processes - 1) / num_processes * self.memory.gradients

    def bytes_sent_in_slices(self, num_processes: int) -> float:
        """What a process sends in a micro-batch under FSDP2.

        Layers and adapter are gathered in the forward pass and again in the backward pass; the adapter's gradients are
        reduced to slices.
        """
        gathered = 2 * (self.layer_bytes + self.memory.adapter)
        return (num_processes - 1) / num_processes * (gathered + self.memory.gradients)


def sizes_of(config: PretrainedConfig) -> Sizes:
    """Count a base model's parameters without making them."""
    with torch.device("meta"):
        base = AutoModelForCausalLM.from_config(config)
    layers = repeated_layers(base)
    in_layers = sum(p.numel() for layer in layers for p in layer.parameters())
    return Sizes(in_layers, sum(p.numel() for p in base.parameters()) - in_layers, len(layers))


def make_module(base_model: str, *, bits: int = 16, **settings: Any) -> LoRALightningModule:
    """What ``balanced.yaml`` trains, or with 4 bits ``qlora.yaml`` on top of it."""
    return LoRALightningModule(
        base_model=base_model,
        adapter_type="qlora" if bits == 4 else "lora",
        lora=LoRAConfig(rank=16, alpha=32, dropout=0.05, quantization=QuantizationConfig()),
        **settings,
    )


def count_step(module: LoRALightningModule, batch: dict[str, Any], device_type: str) -> tuple[MemoryEstimate, int]:
    """Peak memory and operations of one micro-batch, from shapes alone."""
    memory = estimate_memory(module, batch, device_type)
    # Again: the counter holds on to tensors that checkpointed layers compute anew.
    with FlopCounterMode(display=False, custom_mapping=_CPU_ATTENTION) as counter:
        estimate_memory(module, batch, device_type)
    return memory, counter.get_total_flops()


@cache
def step_of(name: str, *, bits: int = 16, in_slices: bool = False, gradient_checkpointing: bool = False) -> Step:
    """One micro-batch of a model of ``CONFIGS`` on a GPU.

    Layers are alike, so each adds the same: what a few layers and twice as many cost gives what all of them do.

    Args:
        name: Which.
        bits: 16 for a base in bfloat16, 4 for QLoRA's.
        in_slices: Whether the model's own layers run, as they must where processes share them, and not fused ones.
        gradient_checkpointing: Whether layers are computed again in the backward pass.
    """
    config = CONFIGS[name]
    settings = {
        "bits": bits,
        "fused_layers": "never" if in_slices else "auto",
        "gradient_checkpointing": gradient_checkpointing,
    }
    few, twice = (step_of_layers(config, num_layers, **settings) for num_layers in (FEW_LAYERS, 2 * FEW_LAYERS))
    more = config.num_hidden_layers / FEW_LAYERS - 1

    def extended(first: int, second: int) -> int:
        return round(first + more * (second - first))

    memory = {
        part: extended(getattr(few[0], part), value) for part, value in asdict(twice[0]).items() if part != "device"
    }
    sizes = sizes_of(config)
    # QLoRA brings what it does not quantize to float32.
    outside_bytes = sizes.outside * (4 if bits == 4 else 2)
    return Step(sizes, MemoryEstimate("cuda", **memory), extended(few[1], twice[1]), outside_bytes)


def step_of_layers(
    config: PretrainedConfig, num_layers: int, *, bits: int, **settings: Any
) -> tuple[MemoryEstimate, int]:
    """Peak memory and operations of one micro-batch of a model with so many layers."""
    config = copy.deepcopy(config)
    config.num_hidden_layers = num_layers
    if getattr(config, "layer_types", None):
        config.layer_types = config.layer_types[:num_layers]
    config.architectures = [type(config).__name__.replace("Config", "ForCausalLM")]
    with tempfile.TemporaryDirectory() as directory:
        config.save_pretrained(directory)
        module = make_module(directory, bits=bits, dtype="bfloat16", **settings)
        return count_step(module, blank_batch(BATCH_SIZE, LENGTH, NUM_TARGETS), "cuda")


def table(header: list[str], rows: list[list[str]]) -> str:
    """A Markdown table."""
    lines = [header, ["---"] * len(header), *rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def work_table(names: list[str]) -> str:
    """What a token costs in operations, and what it leaves in memory until the backward pass."""
    rows = []
    for name in names:
        whole, own = step_of(name), step_of(name, in_slices=True)
        again = step_of(name, in_slices=True, gradient_checkpointing=True)
        rows.append(
            [
                name,
                f"{whole.sizes.total / 1e6:,.0f} M",
                f"{whole.adapter_parameters / 1e6:,.1f} M",
                f"{whole.base_flops_per_token / GIGA:,.2f} G",
                f"{whole.base_flops_per_token / whole.sizes.in_layers:.2f}",
                f"{again.base_flops_per_token / GIGA:,.2f} G",
                f"{whole.adapter_flops_per_token / GIGA:,.3f} G",
                f"{OPTIMIZER_FLOPS * whole.adapter_parameters / NUM_TOKENS / 1e6:,.3f} M",
                *(f"{step.memory.activations / NUM_TOKENS / 1024:,.0f} KiB" for step in (whole, own, again)),
            ]
        )
    header = ["model", "base", "adapter", "base: FLOPs a token", "a parameter of its layers", "with checkpointing"]
    header += ["adapter: FLOPs a token", "optimizer: FLOPs a token", "activations a token, fused", "own layers"]
    return table([*header, "checkpointing"], rows)


def memory_table(names: list[str]) -> str:
    """What a process holds at its peak, in GiB."""
    rows = []
    for name in names:
        whole, quantized = step_of(name), step_of(name, bits=4)
        sliced, sliced_4 = (step_of(name, bits=bits, in_slices=True, gradient_checkpointing=True) for bits in (16, 4))
        held = [whole.memory.weights, quantized.memory.weights, whole.trained_bytes, whole.memory.activations]
        held += [whole.bytes_whole(), quantized.bytes_whole()]
        held += [step.bytes_in_slices(NUM_PROCESSES) for step in (sliced, sliced_4)]
        rows.append([name, *(f"{value / GIB:,.2f}" for value in held)])
    header = ["model", "base in bfloat16", "base in 4 bits", "adapter, gradients, moments", "activations"]
    header += ["DDP", "DDP, 4 bits", f"FSDP on {NUM_PROCESSES}", f"FSDP on {NUM_PROCESSES}, 4 bits"]
    return table(header, rows)


def wire_table(names: list[str]) -> str:
    """What a process sends, and how many tokens it must compute meanwhile so that nothing waits."""
    rows = []
    for name in names:
        whole = step_of(name)
        sliced, sliced_4 = (step_of(name, bits=bits, in_slices=True, gradient_checkpointing=True) for bits in (16, 4))
        sent = [step.bytes_sent_in_slices(NUM_PROCESSES) for step in (sliced, sliced_4)]
        tokens = [
            num_bytes / bandwidth * DEVICE_FLOPS * NUM_TOKENS / sliced.flops
            for num_bytes in sent
            for bandwidth in (NVLINK_BYTES, NETWORK_BYTES)
        ]
        rows.append(
            [
                name,
                f"{whole.bytes_sent_whole(NUM_PROCESSES) / MIB:,.1f} MiB",
                *(f"{value / GIB:,.2f} GiB" for value in sent),
                *(f"{value:,.0f}" for value in tokens),
            ]
        )
    header = ["model", "DDP, a step", "FSDP, a micro-batch", "FSDP, 4 bits, a micro-batch"]
    header += [f"tokens to hide it{bits}, {wire}" for bits in ("", ", 4 bits") for wire in ("NVLink", "network")]
    return table(header, rows)


TABLES = {"work": work_table, "memory": memory_table, "wire": wire_table}


def put_into_page(page: str) -> str:
    """The page with its tables worked out anew; each stands between two comments that name it."""
    for name, write in TABLES.items():
        begin, end = (f"<!-- {mark} {name}: python -m benchmarks.scaling -->\n" for mark in ("begin", "end"))
        before, _, rest = page.partition(begin)
        _, _, after = rest.partition(end)
        page = f"{before}{begin}\n{write(list(CONFIGS))}\n\n{end}{after}"
    return page


# ---------------------------------------------------------------------- against measurement

MEASURED_ROWS, MEASURED_STEPS = 2, 3
MEASURED_STRATEGIES = ("one process", "ddp", "fsdp")


def measure_here(strategy: str) -> None:
    """Train a few steps on the CPU in this process, with one more beside it; the first prints what came of it."""
    import lightning.pytorch as pl

    from snake_lora_pl.training.sharding import FullyShardedStrategy

    class Meter(pl.Callback):
        """Bytes that went over the loopback device until each step began."""

        def __init__(self) -> None:
            self.sent: list[int] = []

        def on_train_batch_start(self, trainer: pl.Trainer, *_: Any) -> None:
            trainer.strategy.barrier()
            (line,) = (line for line in Path("/proc/self/net/dev").read_text().splitlines() if "lo:" in line)
            self.sent.append(int(line.split()[9]))

    meter = Meter()
    trainer = pl.Trainer(
        accelerator="cpu",
        strategy={"one process": "auto", "ddp": "ddp", "fsdp": FullyShardedStrategy()}[strategy],
        devices=1 if strategy == "one process" else 2,
        max_steps=MEASURED_STEPS,
        use_distributed_sampler=False,
        callbacks=[meter],
        **dict.fromkeys(("logger", "enable_checkpointing", "enable_progress_bar", "enable_model_summary"), False),
    )
    module = make_module("smollm2-135m", dtype="float32", fused_layers="never" if strategy == "fsdp" else "auto")
    batch = blank_batch(MEASURED_ROWS, LENGTH, NUM_TARGETS)
    loader = DataLoader([batch] * MEASURED_STEPS, batch_size=None)  # type: ignore[arg-type]
    trainer.fit(module, loader)
    if trainer.is_global_zero:
        status = dict(line.split(":", 1) for line in Path("/proc/self/status").read_text().splitlines())
        peak_bytes = 1024 * int(status["VmHWM"].split()[0])
        print(json.dumps({"peak_bytes": peak_bytes, "sent_bytes": meter.sent[-1] - meter.sent[-2]}))


def measured_table() -> str:
    """What the model says of SmolLM2-135M on a CPU, beside what was measured."""
    rows = []
    for strategy in MEASURED_STRATEGIES:
        # In a network namespace of its own nothing else goes over the loopback device.
        command = ["unshare", "--net", "sh", "-c", 'ip link set lo up && exec "$0" "$@"', sys.executable]
        command += ["-m", "benchmarks.scaling", f"--measure_here={strategy}"]
        environment = {**os.environ, "GLOO_SOCKET_IFNAME": "lo"}
        done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True, env=environment)
        found = json.loads(done.stdout.splitlines()[-1])
        in_slices = strategy == "fsdp"
        module = make_module("smollm2-135m", dtype="float32", fused_layers="never" if in_slices else "auto")
        memory, flops = count_step(module, blank_batch(MEASURED_ROWS, LENGTH, NUM_TARGETS), "cpu")
        sizes = sizes_of(CONFIGS["135M"])
        step = Step(sizes, memory, flops, 4 * sizes.outside)
        sent = {"one process": 0, "ddp": step.bytes_sent_whole(2), "fsdp": step.bytes_sent_in_slices(2)}[strategy]
        held = step.bytes_in_slices(2) if in_slices else step.bytes_whole()
        rows.append(
            [
                {"one process": strategy, "ddp": "DDP, two", "fsdp": "FSDP, two"}[strategy],
                *(f"{value / GIB:.2f} GiB" for value in (held, found["peak_bytes"])),
                # Both processes' bytes go over the one loopback device.
                *(f"{value / MIB:,.1f} MiB" for value in (2 * sent, found["sent_bytes"])),
            ]
        )
    return table(["processes", "peak memory of each, model", "measured", "bytes sent a step, model", "measured"], rows)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--measure", action="store_true", help="train, and print the model beside the measurement")
    parser.add_argument("--measure_here", choices=MEASURED_STRATEGIES, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.measure_here:
        measure_here(options.measure_here)
    elif options.measure:
        print(measured_table())
    else:
        PAGE_PATH.write_text(put_into_page(PAGE_PATH.read_text(encoding="utf-8")), encoding="utf-8")
        print("\n\n".join(write(list(CONFIGS)) for write in TABLES.values()))


if __name__ == "__main__":
    main()
