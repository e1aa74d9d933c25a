"""Cost and quality of each adapter type after the same number of steps, with the quickstart's recipe.

    python -m benchmarks.adapter_types --steps 200 --seeds 0 1 2

Each variant trains in a new process, one after the other, so that the others do not affect its peak memory. With the
same seed, all use the same rows in the same order; all use the same batch size and learning rate, and none is tuned.
Rows, rank, learning rate and warmup are those of quickstart.yaml; ``--rows`` trains on a file instead.
"""

from __future__ import annotations

import argparse
import json
import math
import multiprocessing
import os
import statistics
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from benchmarks.common import add_json_option, make_parser, markdown_table, settings_of, write_json

LORA = {"rank": 16, "alpha": 32, "dropout": 0.0}
# Name: (model.adapter_type, differences in model.lora, bits of the base model)
VARIANTS: dict[str, tuple[str, dict[str, Any], int | None]] = {
    "lora": ("lora", {}, None),
    "lora, use_rslora": ("lora", {"use_rslora": True}, None),
    "lora, all-linear": ("lora", {"target_modules": "all-linear"}, None),
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
    "trained_parameters": ("trained parameters", ",.0f"),
    "base_mib": ("base MiB", ".0f"),
    "peak_memory_gib": ("peak memory GiB", ".2f"),
    "seconds_per_step": ("s/step", ".2f"),
    "step_time_ratio": ("step time / lora's", ".2f"),
    "val_loss": ("val/loss", ".3f"),
    "val_move_accuracy": ("val/move_accuracy", ".3f"),
    "adapter_mib": ("adapter MiB", ".1f"),
    "checkpoint_mib": ("checkpoint MiB", ".1f"),
}


def quickstart_recipe() -> dict[str, Any]:
    """Return the keys of quickstart.yaml."""
    import yaml

    from snake_lora_pl.paths import shipped_configs

    recipe: dict[str, Any] = yaml.safe_load(shipped_configs()["quickstart.yaml"].read_text())
    return recipe


def measure(name: str, seed: int, options: argparse.Namespace) -> dict[str, float]:
    """Train one variant with one seed and return its results."""
    import lightning.pytorch as pl

    from snake_lora_pl import AdapterCheckpoint, LoRAConfig, LoRALightningModule, SnakeJSONLDataModule
    from snake_lora_pl.adapters import store
    from snake_lora_pl.evaluation.metrics import SnakeMoveMetrics
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

    recipe = quickstart_recipe()
    adapter_type, lora_options, bits = VARIANTS[name]
    if bits is not None:
        lora_options = {**lora_options, "quantization": QuantizationConfig(bits=bits)}
    pl.seed_everything(seed, verbose=False)
    module = LoRALightningModule(
        options.base_model,
        adapter_type,
        LoRAConfig(**{**LORA, "rank": options.rank, **lora_options}),
        learning_rate=options.learning_rate or recipe["model"]["learning_rate"],
        warmup_steps=recipe["model"]["warmup_steps"] if options.warmup_steps is None else options.warmup_steps,
        dtype=options.dtype,
        text_metrics=SnakeMoveMetrics(),
    )
    data = SnakeJSONLDataModule(
        base_model=options.base_model,
        train_path=options.rows,
        batch_size=options.batch_size,
        max_length=512,
        seed=seed,
        **{**recipe["data"], **({"generated_games": options.games} if options.games else {})},
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
            # Rows without a move have no such metric.
            "val_move_accuracy": float(trainer.callback_metrics.get("val/move_accuracy", math.nan)),
            "adapter_mib": weights_path.stat().st_size / 2**20,
            "checkpoint_mib": checkpoint_path.stat().st_size / 2**20,
        }


def _measure_to_file(name: str, seed: int, options: argparse.Namespace, path: str) -> None:
    Path(path).write_text(json.dumps(measure(name, seed, options)))


def measure_in_process(name: str, seed: int, options: argparse.Namespace) -> dict[str, float]:
    """Call ``measure`` in a new process."""
    with tempfile.TemporaryDirectory() as directory:
        path = f"{directory}/results.json"
        arguments = (name, seed, options, path)
        process = multiprocessing.get_context("spawn").Process(target=_measure_to_file, args=arguments)
        process.start()
        process.join()
        if process.exitcode != 0:
            raise SystemExit(f"variant '{name}' failed with exit code {process.exitcode}; see its output above")
        results: dict[str, float] = json.loads(Path(path).read_text())
        return results


def table(results: dict[str, dict[str, list[float]]]) -> str:
    """Return the Markdown table, one line per variant: the mean over the seeds, and the range of what varies.

    Args:
        results: For each variant, the values of each result, one per seed.
    """
    header = ["variant", *(column for column, _ in COLUMNS.values())]
    rows = []
    for name, result in results.items():
        cells = []
        for key, (_, number_format) in COLUMNS.items():
            mean, low, high = (format(f(result[key]), number_format) for f in (statistics.mean, min, max))
            cells.append(f"{mean} ({low} to {high})" if key.startswith("val_") and low != high else mean)
        rows.append([f"`{name}`", *cells])
    return markdown_table(header, rows)


def main(arguments: Sequence[str] | None = None) -> None:
    parser = make_parser("adapter_types", __doc__)
    parser.add_argument("--base_model", default="smollm2-135m")
    parser.add_argument("--rows", metavar="FILE", help="JSONL file of rows, instead of generated ones")
    parser.add_argument("--games", type=int, help="games of the generated rows (default: that of quickstart.yaml)")
    parser.add_argument("--steps", type=int, default=200, help="optimizer steps of each run (default: %(default)s)")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0], help="runs of each variant (default: 0)")
    parser.add_argument("--batch_size", type=int, default=8, help="rows per step (default: %(default)s)")
    parser.add_argument("--val_batches", type=int, default=40, help="batches of the validation (default: %(default)s)")
    parser.add_argument("--rank", type=int, default=LORA["rank"], help="model.lora.rank (default: %(default)s)")
    parser.add_argument("--learning_rate", type=float, help="(default: that of quickstart.yaml)")
    parser.add_argument("--warmup_steps", type=int, help="(default: that of quickstart.yaml)")
    parser.add_argument("--dtype", default="auto", choices=["auto", "bfloat16", "float32"])
    parser.add_argument(
        "--variants", nargs="*", default=list(VARIANTS), choices=list(VARIANTS), help="variants to train besides lora"
    )
    add_json_option(parser)
    options = parser.parse_args(arguments)
    os.environ["TOKENIZERS_PARALLELISM"] = "false"

    from snake_lora_pl.models import prepare_base_model

    prepare_base_model(options.base_model)
    results: dict[str, dict[str, list[float]]] = {}
    # Seed by seed, so that variants that are compared run close to each other in time.
    for seed in options.seeds:
        lora: dict[str, float] = {}
        for name in dict.fromkeys(["lora", *options.variants]):
            result = measure_in_process(name, seed, options)
            lora = lora or result
            result["step_time_ratio"] = result["seconds_per_step"] / lora["seconds_per_step"]
            print(f"{name}, seed {seed}: {json.dumps(result)}", flush=True)
            for key, value in result.items():
                results.setdefault(name, {}).setdefault(key, []).append(value)
    print(f"\n{table(results)}")
    write_json(options.json, {"settings": settings_of(options), "variants": results})


if __name__ == "__main__":
    main()
