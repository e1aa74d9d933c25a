"""Time of the training step beside other trainers', on the same model, rows, batches, dtype and LoRA settings.

    python -m benchmarks.train_step --rows tests/data/heuristics_v0.04/grid-size-10/bfs-512/BFS-512_dataset.jsonl

Each trainer runs its own loop; they take turns (see ``contest``). The gradient checkpointing that TRL turns on by
default, and which costs it time, is off. Two more tables: how the step grows, and what share of it is matrix products.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import tempfile
import time
from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from benchmarks.contest import Referee, Turn, ratio, run_contest

LORA = {"rank": 16, "alpha": 32, "dropout": 0.05}
LEARNING_RATE = 2e-4
TEMPLATE = "### Instruction:\n{prompt}\n\n### Response:\n"
OURS = "snake_lora_pl"


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
    from snake_lora_pl.training.callbacks.throughput import count_tokens, peak_memory_gib

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
    from snake_lora_pl.models import load_base_model, load_tokenizer

    # Its default loss computes logits a chunk at a time ("chunked_nll" is an alias of it).
    model, tokenizer = load_base_model(base_model, dtype=dtype), load_tokenizer(base_model)
    _train_with_trl(referee, model, tokenizer, rows_path, batch_size, steps, rounds, dtype)


def run_trl_packed(
    referee: Referee, base_model: str, rows_path: str, batch_size: int, steps: int, rounds: int, dtype: str
) -> None:
    """TRL at its best: no padding, and Liger Kernel's layers and loss on a GPU where it is installed.

    A pack holds up to ``max_length`` tokens, so that a turn has another number of rows. Without FlashAttention, as on
    a CPU, TRL lets rows of a pack see each other, and says so.
    """
    import torch

    from snake_lora_pl.models import load_base_model, load_tokenizer

    model, tokenizer = load_base_model(base_model, dtype=dtype), load_tokenizer(base_model)
    usable = {name for name in ("flash_attn", "liger_kernel") if torch.cuda.is_available() and find_spec(name)}
    if "flash_attn" in usable:
        model.set_attn_implementation("flash_attention_2")
    settings = {"packing": True, "use_liger_kernel": "liger_kernel" in usable}
    _train_with_trl(referee, model, tokenizer, rows_path, batch_size, steps, rounds, dtype, **settings)


def run_unsloth(
    referee: Referee, base_model: str, rows_path: str, batch_size: int, steps: int, rounds: int, dtype: str
) -> None:
    """Unsloth, as its documentation has it: its model and layers in TRL's trainer, which its import patches."""
    from unsloth import FastLanguageModel  # isort: skip - before TRL
    import torch

    from snake_lora_pl.models import prepare_base_model

    model, tokenizer = FastLanguageModel.from_pretrained(
        prepare_base_model(base_model).path_or_id, max_seq_length=512, dtype=getattr(torch, dtype), load_in_4bit=False
    )
    settings = {name: value for name, value in _peft_settings().items() if name != "task_type"}
    model = FastLanguageModel.get_peft_model(model, use_gradient_checkpointing=False, random_state=0, **settings)
    _train_with_trl(referee, model, tokenizer, rows_path, batch_size, steps, rounds, dtype)


def _train_with_trl(
    referee: Referee, model: Any, tokenizer: Any, rows_path: str, batch_size: int, steps: int, rounds: int, dtype: str,
    **settings: Any,
) -> None:  # fmt: skip
    """TRL's SFTTrainer on a model that has its adapter, or gets it here."""
    from datasets import Dataset
    from peft import LoraConfig, PeftModel
    from torch.utils.data import SequentialSampler
    from trl import SFTConfig, SFTTrainer

    rows = [
        {"prompt": TEMPLATE.format(prompt=row["prompt"]), "completion": row["completion"]}
        for row in read_examples(rows_path, batch_size * steps * rounds)
    ]

    class InOrder(SFTTrainer):
        def _get_train_sampler(self, *args: Any) -> Any:
            return SequentialSampler(self.train_dataset)

    with tempfile.TemporaryDirectory() as directory:
        arguments = _hf_arguments(directory, batch_size, steps * rounds, dtype)
        trainer = InOrder(
            model=model,
            processing_class=tokenizer,
            train_dataset=Dataset.from_list(rows),
            peft_config=None if isinstance(model, PeftModel) else LoraConfig(**_peft_settings()),
            args=SFTConfig(max_length=512, completion_only_loss=True, **settings, **arguments),
        )
        _take_turns(referee, trainer, steps)


def run_transformers(
    referee: Referee, base_model: str, rows_path: str, batch_size: int, steps: int, rounds: int, dtype: str
) -> None:
    from datasets import Dataset
    from peft import LoraConfig, get_peft_model
    from torch.utils.data import SequentialSampler
    from transformers import DataCollatorForSeq2Seq, Trainer, TrainingArguments

    from snake_lora_pl.models import load_base_model, load_tokenizer

    tokenizer = load_tokenizer(base_model)
    rows = []
    for row in read_examples(rows_path, batch_size * steps * rounds):
        prompt = tokenizer(TEMPLATE.format(prompt=row["prompt"]))["input_ids"]
        completion = tokenizer(row["completion"])["input_ids"] + [tokenizer.eos_token_id]
        rows.append({"input_ids": prompt + completion, "labels": [-100] * len(prompt) + completion})

    class InOrder(Trainer):
        def _get_train_sampler(self, *args: Any) -> Any:
            return SequentialSampler(self.train_dataset)

    with tempfile.TemporaryDirectory() as directory:
        trainer = InOrder(
            model=get_peft_model(load_base_model(base_model, dtype=dtype), LoraConfig(**_peft_settings())),
            train_dataset=Dataset.from_list(rows),
            data_collator=DataCollatorForSeq2Seq(tokenizer),
            args=TrainingArguments(**_hf_arguments(directory, batch_size, steps * rounds, dtype)),
        )
        _take_turns(referee, trainer, steps)


def _peft_settings() -> dict[str, Any]:
    return {
        "r": LORA["rank"], "lora_alpha": LORA["alpha"], "lora_dropout": LORA["dropout"], "task_type": "CAUSAL_LM",
        "target_modules": ["q_proj", "k_proj", "v_proj", "o_proj"],
    }  # fmt: skip


def _hf_arguments(directory: str, batch_size: int, max_steps: int, dtype: str) -> dict[str, Any]:
    import torch

    return {
        "output_dir": directory, "per_device_train_batch_size": batch_size, "num_train_epochs": 1,
        "learning_rate": LEARNING_RATE, "lr_scheduler_type": "cosine", "gradient_checkpointing": False,
        "bf16": dtype == "bfloat16", "use_cpu": not torch.cuda.is_available(), "logging_steps": 1,
        "save_strategy": "no", "report_to": [], "disable_tqdm": True, "seed": 0, "max_steps": max_steps,
    }  # fmt: skip


def _take_turns(referee: Referee, trainer: Any, steps: int) -> None:
    """Let a trainer of Hugging Face's kind take its turns."""
    import torch
    from transformers import TrainerCallback

    from snake_lora_pl.training.callbacks.throughput import peak_memory_gib

    tokens, losses = 0, []
    own_step = trainer.training_step

    def counting_step(model: Any, inputs: Any, *args: Any) -> Any:
        nonlocal tokens
        mask = inputs.get("attention_mask")
        tokens += inputs["input_ids"].numel() if mask is None else int(mask.sum())  # packs have no padding
        return own_step(model, inputs, *args)

    class TakeTurns(TrainerCallback):
        def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            nonlocal tokens
            if state.global_step % steps == 0:
                tokens = 0
                losses.clear()
                referee.start_turn()

        def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, **kwargs: Any) -> None:
            if "loss" in logs:
                losses.append(float(logs["loss"]))
                if state.global_step % steps == 0:
                    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
                    referee.end_turn(tokens, statistics.mean(losses), peak_memory_gib(device))

    trainer.training_step = counting_step
    trainer.add_callback(TakeTurns())
    trainer.train()


def run_litgpt(
    referee: Referee, base_model: str, rows_path: str, batch_size: int, steps: int, rounds: int, dtype: str
) -> None:
    """LitGPT's LoRA: its model, its layers, the step of its ``finetune/lora.py``."""
    import torch
    from litgpt.lora import GPT, Config, mark_only_lora_as_trainable
    from litgpt.scripts.convert_hf_checkpoint import convert_hf_checkpoint
    from litgpt.utils import chunked_cross_entropy

    from snake_lora_pl.models import load_tokenizer, prepare_base_model
    from snake_lora_pl.training.callbacks.throughput import peak_memory_gib

    source = prepare_base_model(base_model)
    name = source.canonical_id.rpartition("/")[2]
    tokenizer = load_tokenizer(base_model)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    with tempfile.TemporaryDirectory() as directory:
        checkpoint = Path(directory) / name
        checkpoint.mkdir()
        for file in Path(source.path_or_id).iterdir():
            (checkpoint / file.name).symlink_to(file.resolve())
        convert_hf_checkpoint(checkpoint, model_name=name, dtype=dtype)
        weights = torch.load(checkpoint / "lit_model.pth", weights_only=True, mmap=True)
        config = Config.from_name(
            name, lora_r=LORA["rank"], lora_alpha=LORA["alpha"], lora_dropout=LORA["dropout"], lora_query=True,
            lora_key=True, lora_value=True, lora_projection=True,
        )  # fmt: skip
        with torch.device(device):
            model = GPT(config).to(getattr(torch, dtype))
        model.load_state_dict(weights, strict=False)
    mark_only_lora_as_trainable(model)
    model.max_seq_length = 512
    trained = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=LEARNING_RATE, weight_decay=0.0)
    rows = read_examples(rows_path, batch_size * steps * rounds)
    for turn in range(rounds):
        referee.start_turn()
        tokens, losses = 0, []
        for step in range(turn * steps, (turn + 1) * steps):
            batch = rows[step * batch_size : (step + 1) * batch_size]
            prompts = [tokenizer(TEMPLATE.format(prompt=row["prompt"]))["input_ids"] for row in batch]
            texts = [tokenizer(row["completion"])["input_ids"] + [tokenizer.eos_token_id] for row in batch]
            width = max(len(p) + len(t) for p, t in zip(prompts, texts, strict=True))
            input_ids = torch.full((batch_size, width), tokenizer.pad_token_id)
            labels = torch.full((batch_size, width), -100)
            for i, (prompt, text) in enumerate(zip(prompts, texts, strict=True)):
                input_ids[i, : len(prompt) + len(text)] = torch.tensor(prompt + text)
                labels[i, len(prompt) : len(prompt) + len(text)] = torch.tensor(text)
                tokens += len(prompt) + len(text)
            logits = model(input_ids.to(device), lm_head_chunk_size=128)
            logits[-1] = logits[-1][..., :-1, :]
            loss = chunked_cross_entropy(logits, labels[..., 1:].to(device))
            loss.backward()
            torch.nn.utils.clip_grad_norm_(trained, 1.0)
            optimizer.step()
            optimizer.zero_grad()
            losses.append(float(loss))
        referee.end_turn(tokens, statistics.mean(losses), peak_memory_gib(device))


CONTENDERS = {
    "trl": run_trl, "trl_packed": run_trl_packed, "transformers": run_transformers, "litgpt": run_litgpt,
    "unsloth": run_unsloth,
}  # fmt: skip


def installed_contenders(names: list[str]) -> dict[str, Any]:
    """Ours and the named ones, but those that are missing: both pin other versions of our dependencies."""
    import torch

    reasons = {}
    if find_spec("litgpt") is None:
        reasons["litgpt"] = "LitGPT takes no part; pip install --no-deps litgpt adds it."
    if find_spec("unsloth") is None or not torch.cuda.is_available():
        reasons["unsloth"] = "Unsloth takes no part; it needs a GPU and pip install unsloth."
    for name in names:
        if name in reasons:
            print(reasons[name])
    return {OURS: run_ours} | {name: CONTENDERS[name] for name in names if name not in reasons}


def make_step(base_model: str, rank: int, dtype: str) -> Callable[[dict[str, Any]], None]:
    """One optimization step of ours without a trainer around it, as a function of a batch."""
    import torch

    from snake_lora_pl import LoRAConfig, LoRALightningModule
    from snake_lora_pl.training.allocator import keep_freed_memory

    keep_freed_memory()
    module = LoRALightningModule(
        base_model=base_model, lora=LoRAConfig(rank=rank, alpha=2 * rank, dropout=LORA["dropout"]), dtype=dtype
    )
    module.configure_model()
    module.to("cuda" if torch.cuda.is_available() else "cpu")
    optimizer = torch.optim.AdamW([p for p in module.parameters() if p.requires_grad], lr=LEARNING_RATE, fused=True)

    def step(batch: dict[str, Any]) -> None:
        from lightning.fabric.utilities import move_data_to_device

        batch = module.on_before_batch_transfer(dict(batch), 0)
        batch = move_data_to_device(batch, module.device)
        module.training_step(batch, 0).backward()
        module.step_loss.clear()
        optimizer.step()
        optimizer.zero_grad()
        if module.device.type == "cuda":
            torch.cuda.synchronize()

    return step


def seconds_of(step: Callable[[dict[str, Any]], None], batch: dict[str, Any], repeats: int = 3) -> float:
    """Least time of a step; the first, which also sizes buffers, does not count."""
    step(batch)
    times = []
    for _ in range(repeats):
        start = time.perf_counter()
        step(batch)
        times.append(time.perf_counter() - start)
    return min(times)


def print_growth(options: argparse.Namespace) -> list[dict[str, Any]]:
    """How the step grows with batch, length and rank, one at a time; rows have nothing in common."""
    figures = []
    print(f"\n{'batch':>5} {'length':>6} {'rank':>4} {'s/step':>7} {'tokens/s':>9}")
    middle = {"batch_size": 4, "length": 256, "rank": 16}
    changes: list[dict[str, int]] = [
        *({"batch_size": n} for n in (1, 2, 4, 8)), *({"length": n} for n in (128, 512, 1024)),
        *({"rank": n} for n in (4, 64)),
    ]  # fmt: skip
    steps: dict[int, Any] = {}
    for change in changes:
        size = middle | change
        if size["rank"] not in steps:
            steps = {size["rank"]: make_step(options.base_model, size["rank"], options.dtype)}
        from snake_lora_pl.training.memory.estimate import blank_batch

        batch = blank_batch(size["batch_size"], size["length"], size["length"] // 3)
        seconds = seconds_of(steps[size["rank"]], batch, repeats=2)
        rate = size["batch_size"] * size["length"] / seconds
        print(f"{size['batch_size']:5} {size['length']:6} {size['rank']:4} {seconds:7.2f} {rate:9.0f}")
        figures.append({**size, "seconds_per_step": seconds})
    return figures


def print_share(options: argparse.Namespace) -> dict[str, float]:
    """Share of the step in matrix products, and its rate over that of one large product."""
    import torch
    from torch.profiler import ProfilerActivity, profile
    from torch.utils.flop_counter import FlopCounterMode

    from snake_lora_pl.data.batching import collate
    from snake_lora_pl.data.encoding import Encoder
    from snake_lora_pl.data.jsonl import Row
    from snake_lora_pl.models import load_tokenizer

    tokenizer = load_tokenizer(options.base_model)
    rows = read_examples(options.rows, options.batch_size)
    examples = Encoder(tokenizer).encode(
        [Row(r["prompt"], r["completion"], None, options.rows, i) for i, r in enumerate(rows)]
    )
    batch: Any = collate(examples, pad_id=tokenizer.pad_token_id)
    step = make_step(options.base_model, int(LORA["rank"]), options.dtype)
    square = torch.randn(4096, 4096, dtype=getattr(torch, options.dtype))
    square = square.to("cuda" if torch.cuda.is_available() else "cpu")

    def product(_: Any) -> None:
        square @ square
        if square.is_cuda:
            torch.cuda.synchronize()

    rates = []
    for _ in range(3):
        seconds = seconds_of(step, batch, repeats=1)
        rates.append((seconds, 2 * 4096**3 / seconds_of(product, {}, repeats=2)))
    with FlopCounterMode(display=False) as counter:
        step(batch)
    activity = ProfilerActivity.CUDA if square.is_cuda else ProfilerActivity.CPU
    with profile(activities=[activity]) as profiled:
        step(batch)
    times = {e.key: e.self_device_time_total if square.is_cuda else e.self_cpu_time_total
             for e in profiled.key_averages()}  # fmt: skip
    products = ("aten::mm", "aten::addmm", "aten::addmm_", "aten::bmm", "aten::baddbmm", "aten::baddbmm_", "gemm")
    share = sum(t for key, t in times.items() if key in products or "gemm" in key) / sum(times.values())
    seconds, plain_rate = (statistics.median(column) for column in zip(*rates, strict=True))
    figures = {
        "seconds_per_step": seconds, "share_of_matrix_products": share, "flops_per_step": counter.get_total_flops(),
        "flops_per_second": counter.get_total_flops() / seconds, "plain_product_flops_per_second": plain_rate,
    }  # fmt: skip
    print(
        f"\nmatrix products: {share:.0%} of a step of {seconds:.2f} s with {figures['flops_per_step'] / 1e12:.2f} TFLOP"
    )
    print(f"{figures['flops_per_second'] / 1e9:.0f} GFLOP/s, {figures['flops_per_second'] / plain_rate:.0%} of the "
          f"{plain_rate / 1e9:.0f} GFLOP/s of a product of two 4096 x 4096 matrices")  # fmt: skip
    return figures


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--base_model", default="smollm2-135m")
    parser.add_argument(
        "--rows", default="tests/data/heuristics_v0.04/grid-size-10/bfs-512/BFS-512_dataset.jsonl", help="JSONL file"
    )
    parser.add_argument("--batch_size", type=int, default=8)
    parser.add_argument("--steps", type=int, default=2, help="optimizer steps a turn")
    parser.add_argument("--rounds", type=int, default=5, help="counted turns of each contender")
    parser.add_argument("--dtype", default="bfloat16", choices=["bfloat16", "float32"])
    parser.add_argument("--against", nargs="+", choices=list(CONTENDERS), default=list(CONTENDERS))
    parser.add_argument(
        "--tables", nargs="+", choices=["contest", "growth", "share"], default=["contest", "growth", "share"]
    )
    parser.add_argument("--json", type=Path, default=None, help="also write the figures here")
    options = parser.parse_args()
    os.environ["TOKENIZERS_PARALLELISM"] = "false"

    from snake_lora_pl.models import prepare_base_model

    prepare_base_model(options.base_model)
    figures: dict[str, Any] = {"settings": {k: str(v) for k, v in vars(options).items()}}
    if "contest" in options.tables:
        contenders = installed_contenders(options.against)
        arguments = {
            "base_model": options.base_model, "rows_path": options.rows, "batch_size": options.batch_size,
            "steps": options.steps, "dtype": options.dtype,
        }  # fmt: skip
        figures |= print_contest(run_contest(contenders, options.rounds, arguments), options.steps)
    if "growth" in options.tables:
        figures["growth"] = print_growth(options)
    if "share" in options.tables:
        figures["share"] = print_share(options)
    if options.json is not None:
        options.json.write_text(json.dumps(figures, indent=2) + "\n")


def print_contest(turns: dict[str, list[Turn]], steps: int) -> dict[str, Any]:
    """Speed, loss and memory side by side, and the ratios of speed round by round."""
    figures: dict[str, Any] = {}
    memory_of_ours = max(t.peak_memory_gib for t in turns[OURS])
    print(
        f"\n{'':20} {'tokens/s':>9} {'s/step':>7} {'mean loss':>10} {'peak GiB':>9} "
        f"{'ours is faster by':>22} {'our memory':>11}"
    )
    for name, done in turns.items():
        rate = statistics.median(t.tokens / t.seconds for t in done)
        seconds = statistics.median(t.seconds for t in done) / steps
        loss, memory = statistics.mean(t.loss for t in done), max(t.peak_memory_gib for t in done)
        median, least, greatest = ratio(turns[OURS], done)
        factor = "" if name == OURS else f"{median:.2f} ({least:.2f} to {greatest:.2f})"
        share = "" if name == OURS else f"{memory_of_ours / memory:.0%}"
        print(f"{name:20} {rate:9.0f} {seconds:7.2f} {loss:10.4f} {memory:9.2f} {factor:>22} {share:>11}")
        figures[name] = {
            "tokens_per_second": rate, "seconds_per_step": seconds, "mean_loss": loss, "peak_memory_gib": memory,
            "ours_is_faster_by": {"median": median, "min": least, "max": greatest},
        }  # fmt: skip
    return {"contenders": figures}


if __name__ == "__main__":
    main()
