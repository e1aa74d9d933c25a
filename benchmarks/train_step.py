"""Time of the training step against TRL's SFTTrainer, on the same model, rows, batches, dtype and LoRA settings.

    python -m benchmarks.train_step --rows tests/data/heuristics_v0.04/grid-size-10/bfs-512/BFS-512_dataset.jsonl

Both trainers run their own loops; the two take turns (see ``contest``). TRL's gradient checkpointing, which it turns on
by default and which costs it time, is off.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import tempfile
from pathlib import Path
from typing import Any

from benchmarks.contest import Referee, Turn, ratio, run_contest

LORA = {"rank": 16, "alpha": 32, "dropout": 0.05}
LEARNING_RATE = 2e-4


def read_examples(rows_path: str, num_rows: int) -> list[dict[str, str]]:
    with open(rows_path, encoding="utf-8") as file:
        rows = [json.loads(line) for line in file]
    # From the middle of the file: snakes of middling length. Repeated where the file is short.
    start = len(rows) // 3
    return [rows[(start + i) % len(rows)] for i in range(num_rows)]


def run_ours(
    referee: Referee, base_model: str, rows_path: str, batch_size: int, steps: int, rounds: int, dtype: str
) -> None:
    import lightning.pytorch as pl
    from torch.utils.data import DataLoader

    from snake_lora_pl import LoRAConfig, LoRALightningModule
    from snake_lora_pl.data.batching import collate
    from snake_lora_pl.data.encoding import Encoder
    from snake_lora_pl.data.jsonl import Row
    from snake_lora_pl.models import load_tokenizer
    from snake_lora_pl.training.throughput import count_tokens, peak_memory_gib

    tokenizer = load_tokenizer(base_model)
    encoder = Encoder(tokenizer, template="instruction", max_length=512, on_overflow="error")
    rows = read_examples(rows_path, batch_size * steps * rounds)
    examples = encoder.encode([Row(r["prompt"], r["completion"], None, rows_path, i) for i, r in enumerate(rows)])

    class TakeTurns(pl.Callback):
        tokens = 0
        losses: list[float] = []  # noqa: RUF012

        def on_train_batch_start(self, trainer: Any, module: Any, batch: Any, batch_idx: int) -> None:
            if batch_idx % steps == 0:
                self.tokens, self.losses = 0, []
                referee.start_turn()

        def on_train_batch_end(self, trainer: Any, module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
            self.tokens += count_tokens(batch["labels"])[0]
            self.losses.append(float(trainer.callback_metrics["train/loss"]))
            if batch_idx % steps == steps - 1:
                referee.end_turn(self.tokens, statistics.mean(self.losses), peak_memory_gib(module.device))

    pl.seed_everything(0, verbose=False)
    module = LoRALightningModule(
        base_model=base_model, lora=LoRAConfig(**LORA), learning_rate=LEARNING_RATE, warmup_steps=0, dtype=dtype
    )
    loader = DataLoader(
        examples,  # type: ignore[arg-type]
        batch_size=batch_size,
        collate_fn=lambda batch: collate(batch, pad_id=tokenizer.pad_token_id, pad_to_multiple_of=1),
    )
    with tempfile.TemporaryDirectory() as directory:
        trainer = pl.Trainer(
            max_epochs=1, logger=False, enable_checkpointing=False, enable_progress_bar=False, callbacks=[TakeTurns()],
            enable_model_summary=False, gradient_clip_val=1.0, default_root_dir=directory,
        )  # fmt: skip
        trainer.fit(module, loader)


def run_trl(
    referee: Referee, base_model: str, rows_path: str, batch_size: int, steps: int, rounds: int, dtype: str
) -> None:
    import torch
    from datasets import Dataset
    from peft import LoraConfig
    from torch.utils.data import SequentialSampler
    from transformers import TrainerCallback
    from trl import SFTConfig, SFTTrainer

    from snake_lora_pl.models import load_base_model, load_tokenizer
    from snake_lora_pl.training.throughput import peak_memory_gib

    template = "### Instruction:\n{prompt}\n\n### Response:\n"
    rows = [
        {"prompt": template.format(prompt=row["prompt"]), "completion": row["completion"]}
        for row in read_examples(rows_path, batch_size * steps * rounds)
    ]

    class InOrder(SFTTrainer):
        tokens = 0

        def _get_train_sampler(self, *args: Any) -> Any:
            return SequentialSampler(self.train_dataset)

        def training_step(self, model: Any, inputs: Any, *args: Any) -> Any:
            self.tokens += int(inputs["attention_mask"].sum())
            return super().training_step(model, inputs, *args)

    class TakeTurns(TrainerCallback):
        losses: list[float] = []  # noqa: RUF012

        def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            if state.global_step % steps == 0:
                trainer.tokens, self.losses = 0, []
                referee.start_turn()

        def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, **kwargs: Any) -> None:
            if "loss" in logs:
                self.losses.append(float(logs["loss"]))
                if state.global_step % steps == 0:
                    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
                    referee.end_turn(trainer.tokens, statistics.mean(self.losses), peak_memory_gib(device))

    with tempfile.TemporaryDirectory() as directory:
        trainer = InOrder(
            model=load_base_model(base_model, dtype=dtype),
            processing_class=load_tokenizer(base_model),
            train_dataset=Dataset.from_list(rows),
            peft_config=LoraConfig(
                r=LORA["rank"], lora_alpha=LORA["alpha"], lora_dropout=LORA["dropout"], task_type="CAUSAL_LM",
                target_modules=["q_proj", "k_proj", "v_proj", "o_proj"],
            ),
            args=SFTConfig(
                output_dir=directory, per_device_train_batch_size=batch_size, num_train_epochs=1, max_length=512,
                learning_rate=LEARNING_RATE, lr_scheduler_type="cosine", completion_only_loss=True, packing=False,
                gradient_checkpointing=False, bf16=dtype == "bfloat16", use_cpu=not torch.cuda.is_available(),
                logging_steps=1, save_strategy="no", report_to=[], disable_tqdm=True, seed=0,
                max_steps=steps * rounds,
            ),
            callbacks=[TakeTurns()],
        )  # fmt: skip
        trainer.train()


CONTENDERS = {"snake_lora_pl": run_ours, "TRL SFTTrainer": run_trl}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--base_model", default="smollm2-135m")
    parser.add_argument(
        "--rows", default="tests/data/heuristics_v0.04/grid-size-10/bfs-512/BFS-512_dataset.jsonl", help="JSONL file"
    )
    parser.add_argument("--batch_size", type=int, default=8)
    parser.add_argument("--steps", type=int, default=2, help="optimiser steps a turn")
    parser.add_argument("--rounds", type=int, default=5, help="counted turns of each contender")
    parser.add_argument("--dtype", default="bfloat16", choices=["bfloat16", "float32"])
    parser.add_argument("--json", type=Path, default=None, help="also write the figures here")
    options = parser.parse_args()
    os.environ["TOKENIZERS_PARALLELISM"] = "false"

    from snake_lora_pl.models import prepare_base_model

    prepare_base_model(options.base_model)
    turns = run_contest(
        CONTENDERS,
        options.rounds,
        {
            "base_model": options.base_model, "rows_path": options.rows, "batch_size": options.batch_size,
            "steps": options.steps, "dtype": options.dtype,
        },
    )  # fmt: skip
    report(turns, options)


def report(turns: dict[str, list[Turn]], options: argparse.Namespace) -> None:
    figures: dict[str, Any] = {"settings": {k: str(v) for k, v in vars(options).items()}, "contenders": {}}
    print(f"\n{'':16} {'tokens/s':>9} {'s/step':>7} {'mean loss':>10} {'peak GiB':>9}")
    for name, done in turns.items():
        rate = statistics.median(t.tokens / t.seconds for t in done)
        seconds = statistics.median(t.seconds for t in done) / options.steps
        loss, memory = statistics.mean(t.loss for t in done), max(t.peak_memory_gib for t in done)
        print(f"{name:16} {rate:9.0f} {seconds:7.2f} {loss:10.4f} {memory:9.2f}")
        figures["contenders"][name] = {
            "tokens_per_second": rate, "seconds_per_step": seconds, "mean_loss": loss, "peak_memory_gib": memory,
        }  # fmt: skip
    median, least, greatest = ratio(turns["snake_lora_pl"], turns["TRL SFTTrainer"])
    figures["ratio_to_trl"] = {"median": median, "min": least, "max": greatest}
    print(f"\nsnake_lora_pl / TRL, tokens per second: {median:.2f} (from {least:.2f} to {greatest:.2f})")
    if options.json is not None:
        options.json.write_text(json.dumps(figures, indent=2) + "\n")


if __name__ == "__main__":
    main()
