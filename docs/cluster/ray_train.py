"""The command ``fit`` under Ray Train.

    python docs/cluster/ray_train.py --workers 16 --gpu --storage /shared/runs -- [options of fit]

Ray starts and connects the workers, and restarts them when one fails; Lightning trains in each of them. The options
after ``--`` are passed to ``fit`` unchanged. Needs ``pip install 'ray[train]'``.
"""

from __future__ import annotations

import argparse
from typing import Any

import ray.train
import ray.train.torch

from snake_lora_pl.cli.run import run


def train_on_worker(config: dict[str, Any]) -> None:
    """Run ``fit`` on one worker, with the processes and devices that Ray assigns."""
    code = run(
        [
            "fit",
            *config["options"],
            '--trainer.strategy={"class_path": "ray.train.lightning.RayDDPStrategy"}',
            '--trainer.plugins=[{"class_path": "ray.train.lightning.RayLightningEnvironment"}]',
            "--trainer.devices=auto",
        ]
    )
    if code != 0:
        raise RuntimeError(f"fit failed with exit code {code}")


def main() -> None:
    """Start the workers and wait for them."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--workers", type=int, default=2, help="total number of processes")
    parser.add_argument("--gpu", action="store_true", help="give each worker a GPU")
    parser.add_argument("--storage", required=True, help="absolute path of a directory that all nodes share")
    parser.add_argument("--max_failures", type=int, default=3, help="number of restarts of the workers")
    parser.add_argument("options", nargs=argparse.REMAINDER, metavar="-- OPTIONS", help="options of fit")
    arguments = parser.parse_args()
    options = [option for option in arguments.options if option != "--"]
    trainer = ray.train.torch.TorchTrainer(
        train_on_worker,
        # One root per job: restarted workers resume from its last.ckpt.
        train_loop_config={"options": [*options, f"--root={arguments.storage}/runs", "--ckpt_path=auto"]},
        scaling_config=ray.train.ScalingConfig(num_workers=arguments.workers, use_gpu=arguments.gpu),
        run_config=ray.train.RunConfig(
            storage_path=arguments.storage,
            failure_config=ray.train.FailureConfig(max_failures=arguments.max_failures),
        ),
    )
    trainer.fit()


if __name__ == "__main__":
    main()
