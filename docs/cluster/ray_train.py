"""The command ``fit`` under Ray Train: ``python docs/cluster/ray_train.py --workers 16 --gpu -- [options of fit]``.

Ray starts the workers, connects them and starts them again when one dies; Lightning trains in each of them. What stands
behind ``--`` is handed to ``fit`` as it is. Needs ``pip install 'ray[train]'``.
"""

from __future__ import annotations

import argparse
from typing import Any

import ray.train
import ray.train.torch

from snake_lora_pl.cli.run import run


def train_on_worker(config: dict[str, Any]) -> None:
    """What each worker does: ``fit``, with Ray's own placement of processes and devices."""
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
        raise RuntimeError(f"fit ended with exit code {code}")


def main() -> None:
    """Start the workers and wait for them."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--workers", type=int, default=2, help="processes in all")
    parser.add_argument("--gpu", action="store_true", help="give each worker a GPU")
    parser.add_argument("--storage", required=True, help="absolute directory that all nodes share; the runs lie in it")
    parser.add_argument("--max_failures", type=int, default=3, help="times that the workers are started again")
    parser.add_argument("options", nargs=argparse.REMAINDER, metavar="-- OPTIONS", help="options of fit")
    arguments = parser.parse_args()
    options = [option for option in arguments.options if option != "--"]
    trainer = ray.train.torch.TorchTrainer(
        train_on_worker,
        # One root for one job: a worker that is started again goes on from its last.ckpt.
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
