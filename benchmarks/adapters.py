"""What each kind of adapter costs and learns in the same number of steps on the same real rows.

    python -m benchmarks.adapters

Each kind runs in a process of its own, one after the other, so that its peak memory is its own. All see the same rows
in the same order, batches of the same size and one learning rate; none was tuned.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import os
import statistics
import tempfile
import time
from pathlib import Path
from typing import Any

ROWS = "tests/data/heuristics_v0.04/grid-size-10/bfs-512/BFS-512_dataset.jsonl"
LORA = {"rank": 16, "alpha": 32, "dropout": 0.0}
# name: (model.adapter_type, what differs in model.lora, bits of the base)
KINDS: dict[str, tuple[str, dict[str, Any], int | None]] = {
    "lora": ("lora", {}, None),
    "lora, use_dora": ("lora", {"use_dora": True}, None),
    "lora, init pissa": ("lora", {"init_lora_weights": "pissa"}, None),
    "lora, loraplus_lr_ratio 8": ("lora", {"loraplus_lr_ratio": 8.0}, None),
    "qlora, 4 bits": ("qlora", {}, 4),
    "qlora, 8 bits": ("qlora", {}, 8),
    "adalora": ("adalora", {}, None),
}
COLUMNS = {
    "trained_parameters": "trained parameters",
    "base_mib": "base MiB",
    "peak_memory_gib": "peak memory GiB",
    "seconds_per_step": "s/step",
    "val_loss": "val loss",
    "adapter_mib": "adapter MiB",
    "checkpoint_mib": "checkpoint MiB",
}


def measure(name: str, options: argparse.Namespace) -> dict[str, float]:
    """Train one kind and measure it."""
    import lightning.pytorch as pl

    from snake_lora_pl import AdapterCheckpoint, LoRAConfig, LoRALightningModule, SnakeJSONLDataModule
    from snake_lora_pl.adapters import store
    from snake_lora_pl.models import QuantizationConfig
    from snake_lora_pl.models.quantization import weight_bytes
    from snake_lora_pl.training.callbacks.throughput import peak_memory_gib

    class Clock(pl.Callback):
        def __init__(self) -> None:
            self.seconds: list[float] = []

        def on_train_batch_start(self, *args: Any) -> None:
            self.start = time.perf_counter()

        def on_train_batch_end(self, *args: Any) -> None:
            self.seconds.append(time.perf_counter() - self.start)

    adapter_type, differs, bits = KINDS[name]
    if bits is not None:
        differs = {**differs, "quantization": QuantizationConfig(bits=bits)}
    pl.seed_everything(0, verbose=False)
    module = LoRALightningModule(
        options.base_model, adapter_type, LoRAConfig(**LORA, **differs), learning_rate=options.learning_rate,
        warmup_steps=0, dtype=options.dtype,
    )  # fmt: skip
    data = SnakeJSONLDataModule(
        base_model=options.base_model, train_path=options.rows, batch_size=options.batch_size, max_length=512, seed=0
    )
    clock = Clock()
    with tempfile.TemporaryDirectory() as directory:
        checkpoint = AdapterCheckpoint(f"{directory}/checkpoints", f"{directory}/adapter", monitor=None)
        trainer = pl.Trainer(
            max_steps=options.steps, max_epochs=-1, val_check_interval=options.steps, check_val_every_n_epoch=None,
            limit_val_batches=options.val_batches, num_sanity_val_steps=0, gradient_clip_val=1.0, logger=False,
            enable_progress_bar=False, enable_model_summary=False, default_root_dir=directory,
            callbacks=[clock, checkpoint],
        )  # fmt: skip
        trainer.fit(module, data)
        weights = Path(f"{directory}/adapter") / store.WEIGHTS_FILE
        last = Path(f"{directory}/checkpoints/last.ckpt")
        trained = store.read_metadata(weights.parent).trainable_parameters
        return {
            "trained_parameters": trained,
            "base_mib": weight_bytes(module.peft_model.unload()) / 2**20,
            "peak_memory_gib": peak_memory_gib(module.device),
            # The first step warms up.
            "seconds_per_step": statistics.median(clock.seconds[1:]),
            "val_loss": float(trainer.callback_metrics["val/loss"]),
            "adapter_mib": weights.stat().st_size / 2**20,
            "checkpoint_mib": last.stat().st_size / 2**20,
        }


def _measure_into(name: str, options: argparse.Namespace, path: str) -> None:
    Path(path).write_text(json.dumps(measure(name, options)))


def in_process(name: str, options: argparse.Namespace) -> dict[str, float]:
    """``measure`` in a fresh process."""
    with tempfile.TemporaryDirectory() as directory:
        path = f"{directory}/figures.json"
        process = multiprocessing.get_context("spawn").Process(target=_measure_into, args=(name, options, path))
        process.start()
        process.join()
        if process.exitcode != 0:
            raise SystemExit(f"{name}: ended with exit code {process.exitcode}")
        figures: dict[str, float] = json.loads(Path(path).read_text())
        return figures


def table(figures: dict[str, dict[str, float]]) -> str:
    """A Markdown table, a line a kind."""
    lines = [f"| kind | {' | '.join(COLUMNS.values())} |", "|---" * (len(COLUMNS) + 1) + "|"]
    for name, row in figures.items():
        cells = [
            f"{row['trained_parameters']:,}", f"{row['base_mib']:.0f}", f"{row['peak_memory_gib']:.2f}",
            f"{row['seconds_per_step']:.2f}", f"{row['val_loss']:.3f}", f"{row['adapter_mib']:.1f}",
            f"{row['checkpoint_mib']:.1f}",
        ]  # fmt: skip
        lines.append(f"| `{name}` | {' | '.join(cells)} |")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--base_model", default="smollm2-135m")
    parser.add_argument("--rows", default=ROWS, help="JSONL file")
    parser.add_argument("--steps", type=int, default=20, help="optimizer steps of each kind")
    parser.add_argument("--batch_size", type=int, default=4)
    parser.add_argument("--val_batches", type=int, default=4)
    parser.add_argument("--learning_rate", type=float, default=1e-3)
    parser.add_argument("--dtype", default="auto", choices=["auto", "bfloat16", "float32"])
    parser.add_argument("--kinds", nargs="*", default=list(KINDS), choices=list(KINDS))
    parser.add_argument("--json", type=Path, default=None, help="also write the figures here")
    options = parser.parse_args()
    os.environ["TOKENIZERS_PARALLELISM"] = "false"

    from snake_lora_pl.models import prepare_base_model

    prepare_base_model(options.base_model)
    figures = {}
    for name in options.kinds:
        figures[name] = in_process(name, options)
        print(f"{name}: {json.dumps(figures[name])}", flush=True)
    print(f"\n{table(figures)}")
    if options.json is not None:
        settings = {key: str(value) for key, value in vars(options).items()}
        options.json.write_text(json.dumps({"settings": settings, "kinds": figures}, indent=2) + "\n")


if __name__ == "__main__":
    main()
