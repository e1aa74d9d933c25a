"""Tables of ``docs/explanation/scaling.md``: computation, memory and communication of four model sizes.

    python -m benchmarks.scaling
    python -m benchmarks.scaling --measure

The first command computes the tables with ``cost_model`` and writes them into the page; it needs no GPU and loads no
weights. With ``--measure``, it trains SmolLM2-135M for a few steps on this machine's CPU instead, as one process and as
two, and prints predicted and measured memory and bytes sent (Linux, as root).
"""

from __future__ import annotations

import argparse
import json
import os
import sys
from pathlib import Path
from typing import Any

from torch.utils.data import DataLoader

from benchmarks.common import make_parser, markdown_table, process_memory_bytes, run_for_json
from benchmarks.cost_model import (
    CONFIGS,
    LENGTH,
    NUM_TARGETS,
    NUM_TOKENS,
    Step,
    count_step,
    make_module,
    sizes_of,
    step_of,
)
from snake_lora_pl.training.memory.estimate import blank_batch

PAGE_PATH = Path(__file__).parent.parent / "docs" / "explanation" / "scaling.md"
MIB, GIB, GIGA, TERA = 2**20, 2**30, 1e9, 1e12

NUM_PROCESSES = 8
# Operations of AdamW per parameter: seven for the moments; the rest is bias correction, root, quotient and decay.
OPTIMIZER_FLOPS = 15
# Assumed rates of a device: what an H100 reaches in bfloat16 in practice, one direction of NVLink, and a 400 Gbit/s
# network card.
DEVICE_FLOPS, NVLINK_BYTES, NETWORK_BYTES = 400 * TERA, 450 * GIGA, 50 * GIGA

MEASURED_ROWS, MEASURED_STEPS = 2, 3
# Name: number of processes
MEASURED_STRATEGIES = {"one process": 1, "ddp": 2, "fsdp": 2}


def compute_table(names: list[str]) -> str:
    """Return the table of operations per token, and of activations per token."""
    rows = []
    for name in names:
        step, own_layers = step_of(name), step_of(name, sharded=True)
        recomputed = step_of(name, sharded=True, gradient_checkpointing=True)
        rows.append(
            [
                name,
                f"{step.sizes.total / 1e6:,.0f} M",
                f"{step.adapter_parameters / 1e6:,.1f} M",
                f"{step.base_flops_per_token / GIGA:,.2f} G",
                f"{step.base_flops_per_token / step.sizes.in_layers:.2f}",
                f"{recomputed.base_flops_per_token / GIGA:,.2f} G",
                f"{step.adapter_flops_per_token / GIGA:,.3f} G",
                f"{OPTIMIZER_FLOPS * step.adapter_parameters / NUM_TOKENS / 1e6:,.3f} M",
                *(f"{s.memory.activations / NUM_TOKENS / 1024:,.0f} KiB" for s in (step, own_layers, recomputed)),
            ]
        )
    header = [
        "model",
        "base parameters",
        "adapter parameters",
        "base: FLOPs per token",
        "per parameter of its layers",
        "with checkpointing",
        "adapter: FLOPs per token",
        "optimizer: FLOPs per token",
        "activations per token, fused",
        "own layers",
        "checkpointing",
    ]
    return markdown_table(header, rows)


def memory_table(names: list[str]) -> str:
    """Return the table of the peak memory of a process, in GiB."""
    rows = []
    for name in names:
        step, step_4_bits = step_of(name), step_of(name, bits=4)
        values = [
            step.memory.weights,
            step_4_bits.memory.weights,
            step.trained_bytes,
            step.memory.activations,
            step.ddp_bytes,
            step_4_bits.ddp_bytes,
            *(_fsdp_step(name, bits).fsdp_bytes(NUM_PROCESSES) for bits in (16, 4)),
        ]
        rows.append([name, *(f"{value / GIB:,.2f}" for value in values)])
    header = ["model", "base in bfloat16", "4-bit base", "adapter, gradients, moments", "activations"]
    header += ["DDP", "DDP, 4 bits", f"FSDP on {NUM_PROCESSES}", f"FSDP on {NUM_PROCESSES}, 4 bits"]
    return markdown_table(header, rows)


def communication_table(names: list[str]) -> str:
    """Return the table of the bytes that a process sends, and of the tokens that take as long to compute."""
    rows = []
    for name in names:
        fsdp_steps = [_fsdp_step(name, bits) for bits in (16, 4)]
        sent = [step.fsdp_sent_bytes(NUM_PROCESSES) for step in fsdp_steps]
        tokens = [
            num_bytes / bandwidth * DEVICE_FLOPS * NUM_TOKENS / fsdp_steps[0].flops
            for num_bytes in sent
            for bandwidth in (NVLINK_BYTES, NETWORK_BYTES)
        ]
        rows.append(
            [
                name,
                f"{step_of(name).ddp_sent_bytes(NUM_PROCESSES) / MIB:,.1f} MiB",
                *(f"{value / GIB:,.2f} GiB" for value in sent),
                *(f"{value:,.0f}" for value in tokens),
            ]
        )
    header = ["model", "DDP, per step", "FSDP, per micro-batch", "FSDP, 4 bits, per micro-batch"]
    header += [f"tokens to hide it{bits}, {link}" for bits in ("", ", 4 bits") for link in ("NVLink", "network")]
    return markdown_table(header, rows)


def _fsdp_step(name: str, bits: int) -> Step:
    return step_of(name, bits=bits, sharded=True, gradient_checkpointing=True)


TABLES = {"compute": compute_table, "memory": memory_table, "communication": communication_table}


def update_page(page: str) -> str:
    """Return the page with new tables; each is between two comments with its name."""
    for name, make_table in TABLES.items():
        begin, end = (f"<!-- {mark} {name}: python -m benchmarks.scaling -->\n" for mark in ("begin", "end"))
        before, _, rest = page.partition(begin)
        _, _, after = rest.partition(end)
        page = f"{before}{begin}\n{make_table(list(CONFIGS))}\n\n{end}{after}"
    return page


def train_and_measure(strategy: str) -> None:
    """Train a few steps in this process, and in a second one for DDP and FSDP; print rank 0's measurements as JSON."""
    import lightning.pytorch as pl

    from snake_lora_pl.training.sharding import FullyShardedStrategy

    class LoopbackMeter(pl.Callback):
        """Records the bytes sent over the loopback device before each step."""

        def __init__(self) -> None:
            self.sent_bytes: list[int] = []

        def on_train_batch_start(self, trainer: pl.Trainer, *_: Any) -> None:
            trainer.strategy.barrier()
            (line,) = (line for line in Path("/proc/self/net/dev").read_text().splitlines() if "lo:" in line)
            self.sent_bytes.append(int(line.split()[9]))

    meter = LoopbackMeter()
    trainer = pl.Trainer(
        accelerator="cpu",
        strategy={"one process": "auto", "ddp": "ddp", "fsdp": FullyShardedStrategy()}[strategy],
        devices=MEASURED_STRATEGIES[strategy],
        max_steps=MEASURED_STEPS,
        use_distributed_sampler=False,
        callbacks=[meter],
        **dict.fromkeys(("logger", "enable_checkpointing", "enable_progress_bar", "enable_model_summary"), False),
    )
    loader = DataLoader([_measured_batch()] * MEASURED_STEPS, batch_size=None)  # type: ignore[arg-type]
    trainer.fit(_measured_module(strategy), loader)
    if trainer.is_global_zero:
        sent_bytes = meter.sent_bytes[-1] - meter.sent_bytes[-2]
        print(json.dumps({"peak_bytes": process_memory_bytes("VmHWM"), "sent_bytes": sent_bytes}))


def _measured_module(strategy: str) -> Any:
    return make_module("smollm2-135m", dtype="float32", fused_layers="never" if strategy == "fsdp" else "auto")


def _measured_batch() -> dict[str, Any]:
    return blank_batch(MEASURED_ROWS, LENGTH, NUM_TARGETS)


def measured_table() -> str:
    """Return the table of predicted and measured memory and bytes sent of SmolLM2-135M on a CPU."""
    rows = []
    sizes = sizes_of(CONFIGS["135M"])
    for strategy, num_processes in MEASURED_STRATEGIES.items():
        # In a separate network namespace, nothing else uses the loopback device.
        command = ["unshare", "--net", "sh", "-c", 'ip link set lo up && exec "$0" "$@"', sys.executable]
        command += ["-m", "benchmarks.scaling", f"--measure_here={strategy}"]
        measured = run_for_json(command, {**os.environ, "GLOO_SOCKET_IFNAME": "lo"})
        memory, flops = count_step(_measured_module(strategy), _measured_batch(), "cpu")
        step = Step(sizes, memory, flops, outside_bytes=4 * sizes.outside)
        if strategy == "fsdp":
            peak_bytes, sent_bytes = step.fsdp_bytes(num_processes), step.fsdp_sent_bytes(num_processes)
        else:
            peak_bytes, sent_bytes = float(step.ddp_bytes), step.ddp_sent_bytes(num_processes)
        rows.append(
            [
                {"one process": strategy, "ddp": "DDP, two", "fsdp": "FSDP, two"}[strategy],
                *(f"{value / GIB:.2f} GiB" for value in (peak_bytes, measured["peak_bytes"])),
                # The bytes of all processes pass the one loopback device.
                *(f"{value / MIB:,.1f} MiB" for value in (num_processes * sent_bytes, measured["sent_bytes"])),
            ]
        )
    header = ["processes", "peak memory of each, predicted", "measured", "bytes sent per step, predicted", "measured"]
    return markdown_table(header, rows)


def main() -> None:
    parser = make_parser("scaling", __doc__)
    parser.add_argument("--measure", action="store_true", help="train, and print predictions and measurements")
    parser.add_argument("--measure_here", choices=list(MEASURED_STRATEGIES), help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.measure_here:
        train_and_measure(options.measure_here)
    elif options.measure:
        print(measured_table())
    else:
        PAGE_PATH.write_text(update_page(PAGE_PATH.read_text(encoding="utf-8")), encoding="utf-8")
        print("\n\n".join(make_table(list(CONFIGS)) for make_table in TABLES.values()))


if __name__ == "__main__":
    main()
