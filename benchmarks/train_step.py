"""Speed and memory of the training step, compared with other trainers.

    python -m benchmarks.train_step
    python -m benchmarks.train_step --tables comparison --against trl --rows rows.jsonl

Every trainer gets the same model, rows, batches, dtype and LoRA settings, and they take turns (see ``interleaved``).
The contenders are in ``trainers``. Two more tables show how the step scales with batch size, length and rank, and which
share of it is matrix products. Runs on the GPU if there is one. Needs the extra ``bench``.
"""

from __future__ import annotations

import argparse
import os
import statistics
import time
from collections.abc import Callable, Iterable
from dataclasses import asdict
from typing import Any

from benchmarks.common import UPSTREAM_ROWS, add_json_option, make_parser, markdown_table, settings_of, write_json
from benchmarks.interleaved import Turn, run_interleaved, speed_ratio
from benchmarks.trainers import (
    CONTENDERS,
    LEARNING_RATE,
    LORA,
    OURS,
    TrainSettings,
    default_device,
    encode_rows,
    read_rows,
    run_ours,
)

TABLES = ["comparison", "growth", "share"]
GROWTH_BASE = {"batch_size": 4, "length": 256, "rank": 16}
GROWTH_CHANGES: list[dict[str, int]] = [
    *({"batch_size": n} for n in (1, 2, 4, 8)),
    *({"length": n} for n in (128, 512, 1024)),
    *({"rank": n} for n in (4, 64)),
]
MATRIX_PRODUCTS = {"aten::mm", "aten::addmm", "aten::addmm_", "aten::bmm", "aten::baddbmm", "aten::baddbmm_"}
"""Operators whose time counts as that of matrix products."""
SQUARE_SIZE = 4096


def main() -> None:
    parser = make_parser("train_step", __doc__)
    parser.add_argument("--base_model", default="smollm2-135m")
    parser.add_argument(
        "--rows", default=UPSTREAM_ROWS, metavar="FILE", help="JSONL file of rows (default: %(default)s)"
    )
    parser.add_argument("--batch_size", type=int, default=8, help="rows per step (default: 8)")
    parser.add_argument("--steps", type=int, default=2, help="optimizer steps per turn (default: 2)")
    parser.add_argument("--rounds", type=int, default=5, help="counted turns of each trainer (default: 5)")
    parser.add_argument(
        "--dtype",
        default="auto",
        choices=["auto", "bfloat16", "float32"],
        help="dtype of the base of every trainer (default: bfloat16 if the machine computes it fast, else float32)",
    )
    parser.add_argument(
        "--base_compute",
        default="auto",
        choices=["auto", "float", "int8"],
        help="model.base_compute of this project in the comparison (default: auto)",
    )
    parser.add_argument(
        "--against", nargs="+", choices=list(CONTENDERS), default=list(CONTENDERS), help="trainers to compare with"
    )
    parser.add_argument(
        "--tables",
        nargs="+",
        choices=TABLES,
        default=TABLES,
        # The former name of the table.
        type=lambda name: "comparison" if name == "contest" else name,
        help="tables to measure (default: all)",
    )
    add_json_option(parser)
    options = parser.parse_args()
    os.environ["TOKENIZERS_PARALLELISM"] = "false"

    from snake_lora_pl.models import choose_dtype, prepare_base_model

    options.dtype = str(choose_dtype(options.dtype, default_device().type)).removeprefix("torch.")
    print(f"dtype of the base: {options.dtype}")
    prepare_base_model(options.base_model)
    results: dict[str, Any] = {"settings": settings_of(options)}
    if "comparison" in options.tables:
        settings = TrainSettings(
            options.base_model, options.rows, options.batch_size, options.steps, options.dtype, options.base_compute
        )
        turns = run_interleaved(select_contenders(options.against), settings, options.rounds)
        results["contenders"] = print_comparison(turns, options.steps)
    if "growth" in options.tables:
        results["growth"] = print_growth(options)
    if "share" in options.tables:
        results["share"] = print_share(options)
    write_json(options.json, results)


def select_contenders(names: list[str]) -> dict[str, Any]:
    """Return the functions of this project and of the named contenders that can run; report the others."""
    functions = {OURS: run_ours}
    for name in names:
        missing = CONTENDERS[name].missing
        if missing is None:
            functions[name] = CONTENDERS[name].run
        else:
            print(f"Skipping {name}: {missing}")
    return functions


def print_comparison(turns: dict[str, list[Turn]], num_steps: int) -> dict[str, Any]:
    """Print speed, loss and memory of each trainer, and return them."""
    results: dict[str, Any] = {}
    rows = []
    our_memory = max(turn.peak_memory_gib for turn in turns[OURS])
    for name, taken in turns.items():
        tokens_per_second = statistics.median(turn.speed for turn in taken)
        seconds_per_step = statistics.median(turn.duration_s for turn in taken) / num_steps
        loss = statistics.mean(turn.loss for turn in taken)
        memory = max(turn.peak_memory_gib for turn in taken)
        ratio = speed_ratio(turns[OURS], taken)
        row = [name, f"{tokens_per_second:.0f}", f"{seconds_per_step:.2f}", f"{loss:.4f}", f"{memory:.2f}"]
        if name != OURS:
            row += [f"{ratio.median:.2f} ({ratio.min:.2f} to {ratio.max:.2f})", f"{our_memory / memory:.0%}"]
        rows.append([*row, *[""] * (7 - len(row))])
        results[name] = {
            "tokens_per_second": tokens_per_second,
            "seconds_per_step": seconds_per_step,
            "mean_loss": loss,
            "peak_memory_gib": memory,
            "our_speedup": asdict(ratio),
        }
    header = ["trainer", "tokens/s", "s/step", "mean loss", "peak GiB", "our speedup", "our memory"]
    print("\n" + markdown_table(header, rows))
    return results


def make_step(base_model: str, rank: int, dtype: str) -> Callable[[dict[str, Any]], None]:
    """Return one optimization step of this project, without a trainer, as a function of a batch."""
    import torch
    from lightning.fabric.utilities import move_data_to_device

    from snake_lora_pl import LoRAConfig, LoRALightningModule
    from snake_lora_pl.training.allocator import keep_freed_memory

    keep_freed_memory()
    lora = LoRAConfig(rank=rank, alpha=2 * rank, dropout=LORA["dropout"])
    module = LoRALightningModule(base_model=base_model, lora=lora, dtype=dtype)
    module.configure_model()
    module.to(default_device())
    optimizer = torch.optim.AdamW([p for p in module.parameters() if p.requires_grad], lr=LEARNING_RATE, fused=True)

    def step(batch: dict[str, Any]) -> None:
        batch = module.on_before_batch_transfer(dict(batch), 0)
        batch = move_data_to_device(batch, module.device)
        module.training_step(batch, 0).backward()
        module.step_loss.clear()
        optimizer.step()
        optimizer.zero_grad()
        if module.device.type == "cuda":
            torch.cuda.synchronize()

    return step


def min_duration_s(function: Callable[[Any], None], argument: Any, num_repeats: int = 3) -> float:
    """Return the minimum duration of a function over several calls, after a warm-up call."""
    function(argument)
    durations = []
    for _ in range(num_repeats):
        start = time.perf_counter()
        function(argument)
        durations.append(time.perf_counter() - start)
    return min(durations)


def print_growth(options: argparse.Namespace) -> list[dict[str, Any]]:
    """Print how the step scales with batch size, length and rank, one at a time; rows share no prefix."""
    from snake_lora_pl.training.memory.estimate import blank_batch

    results: list[dict[str, Any]] = []
    step, rank = None, None
    for change in GROWTH_CHANGES:
        size = GROWTH_BASE | change
        if step is None or rank != size["rank"]:
            rank = size["rank"]
            step = make_step(options.base_model, rank, options.dtype)
        batch = blank_batch(size["batch_size"], size["length"], size["length"] // 3)
        results.append({**size, "seconds_per_step": min_duration_s(step, batch, num_repeats=2)})
    rows = [
        [
            *(str(result[name]) for name in GROWTH_BASE),
            f"{result['seconds_per_step']:.2f}",
            f"{result['batch_size'] * result['length'] / result['seconds_per_step']:.0f}",
        ]
        for result in results
    ]
    print("\n" + markdown_table(["batch size", "length", "rank", "s/step", "tokens/s"], rows))
    return results


def product_share(events: Iterable[Any], *, on_gpu: bool) -> float:
    """Return the share of matrix products in the time of profiled events.

    On a GPU, a kernel counts as a product if a matrix operator launched it. Its name does not say so: libraries name
    their kernels differently for each generation of GPUs.

    Args:
        events: Averages by operator and, on a GPU, by kernel.
        on_gpu: Whether to use times of the GPU.
    """
    from torch.autograd import DeviceType

    products = total = 0.0
    for event in events:
        # An operator's time on the GPU is that of its kernels, which are events as well.
        duration = event.self_device_time_total if on_gpu else event.self_cpu_time_total
        if (event.device_type != DeviceType.CPU) == on_gpu:
            total += duration
        if event.device_type == DeviceType.CPU and event.key in MATRIX_PRODUCTS:
            products += duration
    return products / total


def print_share(options: argparse.Namespace) -> dict[str, float]:
    """Print the share of matrix products in the step, and its FLOP/s relative to a single large product."""
    import torch
    from torch.profiler import ProfilerActivity, profile
    from torch.utils.flop_counter import FlopCounterMode

    from snake_lora_pl.data.batching import collate
    from snake_lora_pl.models import load_tokenizer

    tokenizer = load_tokenizer(options.base_model)
    examples = encode_rows(read_rows(options.rows, options.batch_size), tokenizer, options.rows)
    batch: Any = collate(examples, pad_id=tokenizer.pad_token_id)
    step = make_step(options.base_model, int(LORA["rank"]), options.dtype)
    on_gpu = default_device().type == "cuda"
    square = torch.randn(SQUARE_SIZE, SQUARE_SIZE, dtype=getattr(torch, options.dtype)).to(default_device())

    def multiply(matrix: torch.Tensor) -> None:
        matrix @ matrix
        if on_gpu:
            torch.cuda.synchronize()

    # Interleaved, because the speed of the machine drifts.
    step_durations, product_durations = [], []
    for _ in range(3):
        step_durations.append(min_duration_s(step, batch, num_repeats=1))
        product_durations.append(min_duration_s(multiply, square, num_repeats=2))
    with FlopCounterMode(display=False) as counter:
        step(batch)
    activities = [ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if on_gpu else [])]
    with profile(activities=activities) as profiler:
        step(batch)
    seconds_per_step = statistics.median(step_durations)
    results = {
        "seconds_per_step": seconds_per_step,
        "share_of_matrix_products": product_share(profiler.key_averages(), on_gpu=on_gpu),
        "flops_per_step": counter.get_total_flops(),
        "flops_per_second": counter.get_total_flops() / seconds_per_step,
        "plain_product_flops_per_second": 2 * SQUARE_SIZE**3 / statistics.median(product_durations),
    }
    row = [
        f"{seconds_per_step:.2f}",
        f"{results['share_of_matrix_products']:.0%}",
        f"{results['flops_per_step'] / 1e12:.2f}",
        f"{results['flops_per_second'] / 1e9:.0f}",
        f"{results['plain_product_flops_per_second'] / 1e9:.0f}",
        f"{results['flops_per_second'] / results['plain_product_flops_per_second']:.0%}",
    ]
    header = [
        "s/step",
        "in matrix products",
        "TFLOP/step",
        "GFLOP/s",
        f"GFLOP/s of one {SQUARE_SIZE}² product",
        "ratio",
    ]
    print("\n" + markdown_table(header, [row]))
    return results


if __name__ == "__main__":
    main()
