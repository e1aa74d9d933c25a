"""Exact resume of two ranks that are killed together, within an epoch or within an accumulated step."""

from __future__ import annotations

import functools
import json
import os
import signal
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch

from benchmarks.run_comparison import differences
from snake_lora_pl.data.generated_rows import write_dataset
from snake_lora_pl.paths import RunPaths
from tests.e2e.test_resume import BASE, RUN_PATTERN
from tests.ranks import run_ranks

# On a busy machine the start alone may take minutes; HANGS_S ends a deadlock.
pytestmark = [pytest.mark.slow, pytest.mark.timeout(1000)]


def kill_or_save(rank: int, kill_at: int | None, root: Path) -> None:
    """Make this rank kill itself at a training batch, or save its trained adapter."""
    from snake_lora_pl.training.callbacks.adapter_checkpoint import AdapterCheckpoint
    from snake_lora_pl.training.module import LoRALightningModule

    num_batches = 0
    training_step = LoRALightningModule.training_step
    on_train_end = AdapterCheckpoint.on_train_end

    def step_or_kill(self: LoRALightningModule, batch: dict[str, Any], batch_idx: int) -> Any:
        nonlocal num_batches
        num_batches += 1
        if num_batches == kill_at:
            os.kill(os.getpid(), signal.SIGKILL)
        return training_step(self, batch, batch_idx)

    def save_adapter(self: AdapterCheckpoint, trainer: Any, module: Any) -> None:
        on_train_end(self, trainer, module)
        model = module.peft_model
        trained = {name: value.detach() for name, value in model.named_parameters() if value.requires_grad}
        torch.save(trained, root / f"trained-{rank}.pt")
        (root / f"ranks-{rank}.json").write_text(
            json.dumps(getattr(model.peft_config["default"], "rank_pattern", None))
        )

    LoRALightningModule.training_step = step_or_kill  # type: ignore[method-assign]
    AdapterCheckpoint.on_train_end = save_adapter  # type: ignore[method-assign]


def run_two(root: Path, arguments: Sequence[str], kill_at: int | None = None) -> None:
    """Run two ranks until they end or kill themselves."""
    prepare = functools.partial(kill_or_save, kill_at=kill_at, root=root)
    code = 0 if kill_at is None else -signal.SIGKILL
    run_ranks(root, [*arguments, f"--root={root}", "--ckpt_path=auto"], prepare=prepare, code=code)


# There are 17 batches per epoch and rank. A step takes two batches, or the last one alone.
@pytest.mark.parametrize(
    ("adapter_type", "kill_batches"), [("lora", [12, 5, 18]), ("qlora", [9, 16]), ("adalora", [12, 5, 18])]
)
def test_two_ranks_killed_together_resume_exactly(
    tiny_llama_dir: Path, tmp_path: Path, adapter_type: str, kill_batches: list[int]
) -> None:
    rows_path = tmp_path / "rows.jsonl"
    write_dataset(rows_path, 4, 5, "bfs", "compact", 0)
    arguments = ["fit", "--config=balanced.yaml", "--config=ddp.yaml", *BASE, "--trainer.devices=2"]
    arguments += [f"--model.base_model={tiny_llama_dir}", f"--data.train_path={rows_path}"]
    arguments += ["--trainer.accumulate_grad_batches=2", "--trainer.limit_train_batches=1.0"]
    arguments += [f"--model.adapter_type={adapter_type}"]
    run_two(tmp_path / "straight", arguments)
    for batch in kill_batches:
        run_two(tmp_path / "killed", arguments, batch)
    run_two(tmp_path / "killed", arguments)
    straight, killed = (RunPaths(next((tmp_path / name).glob(RUN_PATTERN))) for name in ("straight", "killed"))
    assert differences(straight.run_dir, killed.run_dir) == []

    ends = [torch.load(tmp_path / name / f"trained-{rank}.pt") for name in ("straight", "killed") for rank in range(2)]
    for end in ends[1:]:
        assert all(torch.equal(end[name], value) for name, value in ends[0].items())
    patterns = [json.loads((tmp_path / "killed" / f"ranks-{rank}.json").read_text()) for rank in range(2)]
    assert patterns[0] == patterns[1]
    if adapter_type == "adalora":
        kept = [sum(ranks) for ranks in patterns[0].values()]
        assert len(set(kept)) > 1, "AdaLoRA pruned no ranks, or the same number in every layer"
