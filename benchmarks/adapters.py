"""Cost and validation loss of each adapter type after the same number of steps on the same upstream rows.

    python -m benchmarks.adapters

Each variant trains in a new process, one after the other, so that the others do not affect its peak memory. All use the
same rows in the same order, the same batch size and the same learning rate; none is tuned.
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

from benchmarks.common import UPSTREAM_ROWS, add_json_option, make_parser, markdown_table, settings_of, write_json

LORA = {"rank": 16, "alpha": 32, "dropout": 0.0}
# Name: (model.adapter_type, differences in model.lora, bits of the base model)
VARIANTS: dict[str, tuple[str, dict[str, Any], int | None]] = {
    "lora": ("lora", {}, None),
    "lora, use_dora": ("lora", {"use_dora": True}, None),
    "lora, init pissa": ("lora", {"init_lora_weights": "pissa"}, None),
    "lora, loraplus_lr_ratio 8": ("lora", {"loraplus_lr_ratio": 8.0}, None),
    "qlora, 4 bits": ("qlora", {}, 4),
    "qlora, 8 bits": ("qlora", {}, 8),
    "adalora": ("adalora", {}, None),
    # Neither type has an alpha; other values than the default are refused.
    "miss": ("miss", {"alpha": 32}, None),
    "shira": ("shira", {"alpha": 32, "dropout": 0.05}, None),
}
# Result: (column of the table, number format)
COLUMNS = {
    "trained_parameters": ("trained parameters", ",d"),
    "base_mib": ("base MiB", ".0f"),
    "peak_memory_gib": ("peak memory GiB", ".2f"),
    "seconds_per_step": ("s/step", ".2f"),
    "val_loss": ("val loss", ".3f"),
    "adapter_mib": ("adapter MiB", ".1f"),
    "checkpoint_mib": ("checkpoint MiB", ".1f"),
}


def measure(name: str, options: argparse.Namespace) -> dict[str, float]:
    """Train one variant and return its results."""
    import lightning.pytorch as pl

    from snake_lora_pl import AdapterCheckpoint, LoRAConfig, LoRALightningModule, SnakeJSONLDataModule
    from snake_lora_pl.adapters import store
    from snake_lora_pl.models import QuantizationConfig
    from snake_lora_pl.models.quantization import weight_bytes
    from snake_lora_pl.training.callbacks.token_throughput import peak_memory_gib

    class StepTimer(pl.Callback):
        def __init__(self) -> None:
            self.durations_s: list[float] = []

        def on_train_batch_start(self, *args: Any) -> None:
            self.start = time.perf_counter()

        def on_train_batch_end(self, *args: Any) -> None:
            self.durations_s.append(time.perf_counter() - self.start)

    adapter_type, lora_options, bits = VARIANTS[name]
    if bits is not None:
        lora_options = {**lora_options, "quantization": QuantizationConfig(bits=bits)}
    pl.seed_everything(0, verbose=False)
    module = LoRALightningModule(
        options.base_model,
        adapter_type,
        LoRAConfig(**LORA, **lora_options),
        learning_rate=options.learning_rate,
        warmup_steps=0,
        dtype=options.dtype,
    )
    data = SnakeJSONLDataModule(
        base_model=options.base_model, train_path=options.rows, batch_size=options.batch_size, max_length=512, seed=0
    )
    timer = StepTimer()
    with tempfile.TemporaryDirectory() as directory:
        checkpoint = AdapterCheckpoint(f"{directory}/checkpoints", f"{directory}/adapter", monitor=None)
        trainer = pl.Trainer(
            max_steps=options.steps,
            max_epochs=-1,
            val_check_interval=options.steps,
            check_val_every_n_epoch=None,
            limit_val_batches=options.val_batches,
            num_sanity_val_steps=0,
            gradient_clip_val=1.0,
            logger=False,
            enable_progress_bar=False,
            enable_model_summary=False,
            default_root_dir=directory,
            callbacks=[timer, checkpoint],
        )
        trainer.fit(module, data)
        weights_path = Path(f"{directory}/adapter") / store.WEIGHTS_FILE
        checkpoint_path = Path(f"{directory}/checkpoints/last.ckpt")
        trained_parameters = store.read_metadata(weights_path.parent).trainable_parameters
        return {
            "trained_parameters": trained_parameters,
            "base_mib": weight_bytes(module.peft_model.unload()) / 2**20,
            "peak_memory_gib": peak_memory_gib(module.device),
            # Without the first step, which warms up.
            "seconds_per_step": statistics.median(timer.durations_s[1:]),
            "val_loss": float(trainer.callback_metrics["val/loss"]),
            "adapter_mib": weights_path.stat().st_size / 2**20,
            "checkpoint_mib": checkpoint_path.stat().st_size / 2**20,
        }


def _measure_to_file(name: str, options: argparse.Namespace, path: str) -> None:
    Path(path).write_text(json.dumps(measure(name, options)))


def measure_in_process(name: str, options: argparse.Namespace) -> dict[str, float]:
    """Call ``measure`` in a new process."""
    with tempfile.TemporaryDirectory() as directory:
        path = f"{directory}/results.json"
        process = multiprocessing.get_context("spawn").Process(target=_measure_to_file, args=(name, options, path))
        process.start()
        process.join()
        if process.exitcode != 0:
            raise SystemExit(f"variant '{name}' failed with exit code {process.exitcode}; see its output above")
        results: dict[str, float] = json.loads(Path(path).read_text())
        return results


def table(results: dict[str, dict[str, float]]) -> str:
    """Return the Markdown table, one line per variant."""
    header = ["variant", *(column for column, _ in COLUMNS.values())]
    rows = [
        [f"`{name}`", *(format(result[key], number_format) for key, (_, number_format) in COLUMNS.items())]
        for name, result in results.items()
    ]
    return markdown_table(header, rows)


def main() -> None:
    parser = make_parser("adapters", __doc__)
    parser.add_argument("--base_model", default="smollm2-135m")
    parser.add_argument(
        "--rows", default=UPSTREAM_ROWS, metavar="FILE", help="JSONL file of rows (default: %(default)s)"
    )
    parser.add_argument("--steps", type=int, default=20, help="optimizer steps of each variant (default: 20)")
    parser.add_argument("--batch_size", type=int, default=4, help="rows per step (default: 4)")
    parser.add_argument("--val_batches", type=int, default=4, help="batches of the validation (default: 4)")
    parser.add_argument("--learning_rate", type=float, default=1e-3)
    parser.add_argument("--dtype", default="auto", choices=["auto", "bfloat16", "float32"])
    parser.add_argument(
        "--variants", "--kinds", nargs="*", default=list(VARIANTS), choices=list(VARIANTS), help="variants to train"
    )
    add_json_option(parser)
    options = parser.parse_args()
    os.environ["TOKENIZERS_PARALLELISM"] = "false"

    from snake_lora_pl.models import prepare_base_model

    prepare_base_model(options.base_model)
    results = {}
    for name in options.variants:
        results[name] = measure_in_process(name, options)
        print(f"{name}: {json.dumps(results[name])}", flush=True)
    print(f"\n{table(results)}")
    write_json(options.json, {"settings": settings_of(options), "variants": results})


if __name__ == "__main__":
    main()
