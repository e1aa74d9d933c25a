"""Trainers that ``benchmarks.train_step`` compares: this project, TRL, transformers.Trainer, LitGPT and Unsloth.

A contender is a function ``run(timer, settings, num_turns)`` that trains on ``settings.read_rows(num_turns)`` in order
and wraps every ``settings.steps_per_turn`` optimizer steps in ``timer.start()`` and ``timer.stop()``. To add one, write
such a function and add it to ``CONTENDERS``.
"""

from __future__ import annotations

import json
import statistics
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any

from benchmarks.interleaved import TurnTimer
from snake_lora_pl.constants import IGNORE_INDEX

if TYPE_CHECKING:
    import torch

    from snake_lora_pl.training.base_compute import BaseCompute

LORA = {"rank": 16, "alpha": 32, "dropout": 0.05}
LEARNING_RATE = 2e-4
MAX_LENGTH = 512
TEMPLATE = "### Instruction:\n{prompt}\n\n### Response:\n"
OURS = "snake_lora_pl"


@dataclass(frozen=True)
class TrainSettings:
    """Settings shared by all contenders."""

    base_model: str
    rows_path: str
    batch_size: int
    steps_per_turn: int
    dtype: str
    base_compute: BaseCompute = "auto"
    """``model.base_compute`` of this project."""

    def read_rows(self, num_turns: int) -> list[dict[str, str]]:
        """Return the rows of a number of turns, in order."""
        return read_rows(self.rows_path, self.batch_size * self.steps_per_turn * num_turns)


@dataclass(frozen=True)
class Contender:
    """A trainer and its requirements.

    Attributes:
        run: The function that trains.
        packages: Packages that it imports and that this project does not depend on.
        install: Command that installs them.
        needs_gpu: Whether it requires a GPU.
    """

    run: Callable[[TurnTimer, TrainSettings, int], None]
    packages: tuple[str, ...] = ()
    install: str = ""
    needs_gpu: bool = False

    @property
    def missing(self) -> str | None:
        """The requirement that is not met, as a sentence; None if the contender can run."""
        import torch

        for package in self.packages:
            if find_spec(package) is None:
                return f"package '{package}' is not installed. Run: {self.install}"
        if self.needs_gpu and not torch.cuda.is_available():
            return "no GPU is available."
        return None


def read_rows(rows_path: str, num_rows: int) -> list[dict[str, str]]:
    """Return rows from the middle of a file, where snakes are of medium length; repeated if the file is short."""
    with open(rows_path, encoding="utf-8") as file:
        rows = [json.loads(line) for line in file]
    start = len(rows) // 3
    return [rows[(start + i) % len(rows)] for i in range(num_rows)]


def encode_rows(rows: list[dict[str, str]], tokenizer: Any, rows_path: str) -> list[Any]:
    """Return the rows as this project's examples."""
    from snake_lora_pl.data.encoding import Encoder
    from snake_lora_pl.data.jsonl import Row

    encoder = Encoder(tokenizer, template="instruction", max_length=MAX_LENGTH, on_overflow="error")
    return encoder.encode([Row(r["prompt"], r["completion"], None, rows_path, i) for i, r in enumerate(rows)])


def default_device() -> torch.device:
    """Return the GPU if there is one, else the CPU."""
    import torch

    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


def run_ours(timer: TurnTimer, settings: TrainSettings, num_turns: int) -> None:
    """Train with this project's module and Lightning's Trainer."""
    import lightning.pytorch as pl
    from torch.utils.data import DataLoader

    from snake_lora_pl import LoRAConfig, LoRALightningModule
    from snake_lora_pl.data.batching import collate
    from snake_lora_pl.models import load_tokenizer
    from snake_lora_pl.training.callbacks.token_throughput import peak_memory_gib

    tokenizer = load_tokenizer(settings.base_model)
    examples = encode_rows(settings.read_rows(num_turns), tokenizer, settings.rows_path)

    class TakeTurns(pl.Callback):
        num_tokens = 0
        losses: list[float] = []  # noqa: RUF012

        def on_train_batch_start(self, trainer: Any, module: Any, batch: Any, batch_idx: int) -> None:
            if batch_idx % settings.steps_per_turn == 0:
                self.num_tokens, self.losses = 0, []
                timer.start()

        def on_train_batch_end(self, trainer: Any, module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
            self.num_tokens += batch["targets"].num_tokens
            self.losses.append(float(trainer.callback_metrics["train/loss"]))
            if batch_idx % settings.steps_per_turn == settings.steps_per_turn - 1:
                timer.stop(self.num_tokens, statistics.mean(self.losses), peak_memory_gib(module.device))

    pl.seed_everything(0, verbose=False)
    module = LoRALightningModule(
        base_model=settings.base_model,
        lora=LoRAConfig(**LORA),
        learning_rate=LEARNING_RATE,
        warmup_steps=0,
        dtype=settings.dtype,
        base_compute=settings.base_compute,
    )
    loader = DataLoader(
        examples,  # type: ignore[arg-type]
        batch_size=settings.batch_size,
        collate_fn=lambda batch: collate(batch, pad_id=tokenizer.pad_token_id, pad_to_multiple_of=1),
    )
    with tempfile.TemporaryDirectory() as directory:
        trainer = pl.Trainer(
            max_epochs=1,
            logger=False,
            enable_checkpointing=False,
            enable_progress_bar=False,
            enable_model_summary=False,
            gradient_clip_val=1.0,
            default_root_dir=directory,
            callbacks=[TakeTurns()],
        )
        trainer.fit(module, loader)


def run_trl(timer: TurnTimer, settings: TrainSettings, num_turns: int) -> None:
    """Train with TRL's SFTTrainer. Its default loss computes logits in chunks ("chunked_nll" is an alias of it)."""
    from snake_lora_pl.models import load_base_model, load_tokenizer

    model = load_base_model(settings.base_model, dtype=settings.dtype)
    _train_with_trl(timer, settings, num_turns, model, load_tokenizer(settings.base_model))


def run_trl_packed(timer: TurnTimer, settings: TrainSettings, num_turns: int) -> None:
    """Train with TRL at its fastest: packed rows and, on a GPU, FlashAttention and Liger Kernel if installed.

    A pack holds up to ``MAX_LENGTH`` tokens, so the rows of a turn differ from those of other contenders. Without
    FlashAttention, as on a CPU, TRL lets the rows of a pack attend to each other, and warns about it.
    """
    import torch

    from snake_lora_pl.models import load_base_model, load_tokenizer

    model = load_base_model(settings.base_model, dtype=settings.dtype)
    usable = {name for name in ("flash_attn", "liger_kernel") if torch.cuda.is_available() and find_spec(name)}
    if "flash_attn" in usable:
        model.set_attn_implementation("flash_attention_2")
    options = {"packing": True, "use_liger_kernel": "liger_kernel" in usable}
    _train_with_trl(timer, settings, num_turns, model, load_tokenizer(settings.base_model), **options)


def run_unsloth(timer: TurnTimer, settings: TrainSettings, num_turns: int) -> None:
    """Train with Unsloth as documented: its model and layers in TRL's trainer, which its import patches."""
    from unsloth import FastLanguageModel  # isort: skip - before TRL
    import torch

    from snake_lora_pl.models import prepare_base_model

    model, tokenizer = FastLanguageModel.from_pretrained(
        prepare_base_model(settings.base_model).path_or_id,
        max_seq_length=MAX_LENGTH,
        dtype=getattr(torch, settings.dtype),
        load_in_4bit=False,
    )
    options = {name: value for name, value in _peft_options().items() if name != "task_type"}
    model = FastLanguageModel.get_peft_model(model, use_gradient_checkpointing=False, random_state=0, **options)
    _train_with_trl(timer, settings, num_turns, model, tokenizer)


def _train_with_trl(
    timer: TurnTimer, settings: TrainSettings, num_turns: int, model: Any, tokenizer: Any, **options: Any
) -> None:
    """Train a model, with or without an adapter, with TRL's SFTTrainer."""
    from datasets import Dataset
    from peft import LoraConfig, PeftModel
    from torch.utils.data import SequentialSampler
    from trl import SFTConfig, SFTTrainer

    rows = [
        {"prompt": TEMPLATE.format(prompt=row["prompt"]), "completion": row["completion"]}
        for row in settings.read_rows(num_turns)
    ]

    class InOrder(SFTTrainer):
        def _get_train_sampler(self, *args: Any) -> Any:
            return SequentialSampler(self.train_dataset)

    with tempfile.TemporaryDirectory() as directory:
        arguments = _hf_arguments(directory, settings, num_turns)
        trainer = InOrder(
            model=model,
            processing_class=tokenizer,
            train_dataset=Dataset.from_list(rows),
            peft_config=None if isinstance(model, PeftModel) else LoraConfig(**_peft_options()),
            args=SFTConfig(max_length=MAX_LENGTH, completion_only_loss=True, **options, **arguments),
        )
        _take_turns(timer, settings, trainer)


def run_transformers(timer: TurnTimer, settings: TrainSettings, num_turns: int) -> None:
    """Train with ``transformers.Trainer`` and PEFT."""
    from datasets import Dataset
    from peft import LoraConfig, get_peft_model
    from torch.utils.data import SequentialSampler
    from transformers import DataCollatorForSeq2Seq, Trainer, TrainingArguments

    from snake_lora_pl.models import load_base_model, load_tokenizer

    tokenizer = load_tokenizer(settings.base_model)
    rows = []
    for row in settings.read_rows(num_turns):
        prompt, completion = _tokenize(tokenizer, row)
        rows.append({"input_ids": prompt + completion, "labels": [IGNORE_INDEX] * len(prompt) + completion})

    class InOrder(Trainer):
        def _get_train_sampler(self, *args: Any) -> Any:
            return SequentialSampler(self.train_dataset)

    with tempfile.TemporaryDirectory() as directory:
        model = load_base_model(settings.base_model, dtype=settings.dtype)
        trainer = InOrder(
            model=get_peft_model(model, LoraConfig(**_peft_options())),
            train_dataset=Dataset.from_list(rows),
            data_collator=DataCollatorForSeq2Seq(tokenizer),
            args=TrainingArguments(**_hf_arguments(directory, settings, num_turns)),
        )
        _take_turns(timer, settings, trainer)


def _tokenize(tokenizer: Any, row: dict[str, str]) -> tuple[list[int], list[int]]:
    """Return the token ids of the prompt, and of the completion with EOS."""
    prompt = tokenizer(TEMPLATE.format(prompt=row["prompt"]))["input_ids"]
    return prompt, [*tokenizer(row["completion"])["input_ids"], tokenizer.eos_token_id]


def _peft_options() -> dict[str, Any]:
    return {
        "r": LORA["rank"],
        "lora_alpha": LORA["alpha"],
        "lora_dropout": LORA["dropout"],
        "task_type": "CAUSAL_LM",
        "target_modules": ["q_proj", "k_proj", "v_proj", "o_proj"],
    }


def _hf_arguments(directory: str, settings: TrainSettings, num_turns: int) -> dict[str, Any]:
    """Return the ``TrainingArguments``. Gradient checkpointing, TRL's default, is off because it costs time."""
    return {
        "output_dir": directory,
        "per_device_train_batch_size": settings.batch_size,
        "num_train_epochs": 1,
        "max_steps": settings.steps_per_turn * num_turns,
        "learning_rate": LEARNING_RATE,
        "lr_scheduler_type": "cosine",
        "gradient_checkpointing": False,
        "bf16": settings.dtype == "bfloat16",
        "use_cpu": default_device().type == "cpu",
        "logging_steps": 1,
        "save_strategy": "no",
        "report_to": [],
        "disable_tqdm": True,
        "seed": 0,
    }


def _take_turns(timer: TurnTimer, settings: TrainSettings, trainer: Any) -> None:
    """Train with a subclass of ``transformers.Trainer``, in turns."""
    from transformers import TrainerCallback

    from snake_lora_pl.training.callbacks.token_throughput import peak_memory_gib

    num_tokens, losses = 0, []
    training_step = trainer.training_step

    def counting_step(model: Any, inputs: Any, *args: Any) -> Any:
        nonlocal num_tokens
        mask = inputs.get("attention_mask")
        num_tokens += inputs["input_ids"].numel() if mask is None else int(mask.sum())  # packs have no padding
        return training_step(model, inputs, *args)

    class TakeTurns(TrainerCallback):
        def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            nonlocal num_tokens
            if state.global_step % settings.steps_per_turn == 0:
                num_tokens = 0
                losses.clear()
                timer.start()

        def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, **kwargs: Any) -> None:
            if "loss" in logs:
                losses.append(float(logs["loss"]))
                if state.global_step % settings.steps_per_turn == 0:
                    timer.stop(num_tokens, statistics.mean(losses), peak_memory_gib(default_device()))

    trainer.training_step = counting_step
    trainer.add_callback(TakeTurns())
    trainer.train()


def run_litgpt(timer: TurnTimer, settings: TrainSettings, num_turns: int) -> None:
    """Train with LitGPT's model and LoRA layers, and the step of its ``finetune/lora.py``."""
    import torch
    from litgpt.utils import chunked_cross_entropy

    from snake_lora_pl.models import load_tokenizer
    from snake_lora_pl.training.callbacks.token_throughput import peak_memory_gib

    tokenizer, device = load_tokenizer(settings.base_model), default_device()
    model = _load_litgpt(settings, device)
    trained = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=LEARNING_RATE, weight_decay=0.0)
    examples = [_tokenize(tokenizer, row) for row in settings.read_rows(num_turns)]
    batches = [examples[i : i + settings.batch_size] for i in range(0, len(examples), settings.batch_size)]
    for turn in range(num_turns):
        timer.start()
        num_tokens, losses = 0, []
        for batch in batches[turn * settings.steps_per_turn : (turn + 1) * settings.steps_per_turn]:
            lengths = [len(prompt) + len(completion) for prompt, completion in batch]
            input_ids = torch.full((len(batch), max(lengths)), tokenizer.pad_token_id)
            labels = torch.full((len(batch), max(lengths)), IGNORE_INDEX)
            for i, (prompt, completion) in enumerate(batch):
                input_ids[i, : lengths[i]] = torch.tensor(prompt + completion)
                labels[i, len(prompt) : lengths[i]] = torch.tensor(completion)
            num_tokens += sum(lengths)
            logits = model(input_ids.to(device), lm_head_chunk_size=128)
            logits[-1] = logits[-1][..., :-1, :]
            loss = chunked_cross_entropy(logits, labels[..., 1:].to(device))
            loss.backward()
            torch.nn.utils.clip_grad_norm_(trained, 1.0)
            optimizer.step()
            optimizer.zero_grad()
            losses.append(float(loss))
        timer.stop(num_tokens, statistics.mean(losses), peak_memory_gib(device))


def _load_litgpt(settings: TrainSettings, device: torch.device) -> Any:
    """Convert the base model to LitGPT's format and return it with LoRA layers."""
    import torch
    from litgpt.lora import GPT, Config, mark_only_lora_as_trainable
    from litgpt.scripts.convert_hf_checkpoint import convert_hf_checkpoint

    from snake_lora_pl.models import prepare_base_model

    source = prepare_base_model(settings.base_model)
    name = source.canonical_id.rpartition("/")[2]
    with tempfile.TemporaryDirectory() as directory:
        checkpoint = Path(directory) / name
        checkpoint.mkdir()
        for file in Path(source.path_or_id).iterdir():
            (checkpoint / file.name).symlink_to(file.resolve())
        convert_hf_checkpoint(checkpoint, model_name=name, dtype=settings.dtype)
        weights = torch.load(checkpoint / "lit_model.pth", weights_only=True, mmap=True)
        config = Config.from_name(
            name,
            lora_r=LORA["rank"],
            lora_alpha=LORA["alpha"],
            lora_dropout=LORA["dropout"],
            lora_query=True,
            lora_key=True,
            lora_value=True,
            lora_projection=True,
        )
        with torch.device(device):
            model = GPT(config).to(getattr(torch, settings.dtype))
        model.load_state_dict(weights, strict=False)
    mark_only_lora_as_trainable(model)
    model.max_seq_length = MAX_LENGTH
    return model


_BENCH_EXTRA = "pip install 'snake_lora_pl[bench]'"

CONTENDERS = {
    "trl": Contender(run_trl, ("trl", "datasets"), _BENCH_EXTRA),
    "trl_packed": Contender(run_trl_packed, ("trl", "datasets"), _BENCH_EXTRA),
    "transformers": Contender(run_transformers, ("datasets",), _BENCH_EXTRA),
    # LitGPT and Unsloth pin other versions of this project's dependencies.
    "litgpt": Contender(run_litgpt, ("litgpt",), "pip install --no-deps litgpt"),
    "unsloth": Contender(run_unsloth, ("unsloth",), "pip install unsloth", needs_gpu=True),
}
