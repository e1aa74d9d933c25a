"""Support of one base model, measured on a tiny one: each step is compared with a plain twin.

The twins use transformers and PEFT only, one row or prompt at a time.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import NamedTuple

import lightning.pytorch as pl
import torch
import torch.nn.functional as F  # noqa: N812 - the common alias
from peft import PeftModel
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel

from snake_lora_pl.adapters.config import LoRAConfig
from snake_lora_pl.adapters.merge import merge
from snake_lora_pl.data.datamodule import SnakeJSONLDataModule
from snake_lora_pl.decoding.decoder import Decoder
from snake_lora_pl.decoding.drafter import Drafter
from snake_lora_pl.decoding.lockstep_decoder import LockstepDecoder
from snake_lora_pl.errors import UserError
from snake_lora_pl.evaluation.player_factory import make_player
from snake_lora_pl.game import Board, Game, get_style
from snake_lora_pl.game.teachers import get_teacher
from snake_lora_pl.training.callbacks.adapter_checkpoint import AdapterCheckpoint
from snake_lora_pl.training.module import LoRALightningModule
from tests.training.conftest import make_trainer

PAD = EOS = 2
NUM_NEW = 6
STYLE = get_style("compact")

NOTES = {
    "gpt_neo": "lockstep for texts within the local window",
    "llama4_text": "lockstep for texts within an attention chunk",
    "mamba": "a layer's weight is used without calling the layer, which 4-bit weights do not allow",
    "rwkv": "scales its weights in place, which 4-bit weights do not allow",
    "zamba2": "layers with adapters share weights, so an adapter cannot be added to them",
    "gemma3": "text decoder only",
    "gemma4": "text decoder only",
    "mllama": "text decoder only; transformers has no automatic class that would load it alone",
}


class Support(NamedTuple):
    """A row of the table in ``docs/reference/base-models.md``."""

    model_type: str
    layers: str
    targets: str
    games: str
    qlora: str
    merge: str

    def __str__(self) -> str:
        return f"| `{self.model_type}` | {' | '.join(self[1:])} | {NOTES.get(self.model_type, '')} |"


class Run(NamedTuple):
    """A short run.

    Attributes:
        module: The trained module.
        data: Its data.
        val_loss: Loss of the last validation.
        adapter_dir: The adapter that was validated.
    """

    module: LoRALightningModule
    data: SnakeJSONLDataModule
    val_loss: float
    adapter_dir: Path


def random_tokens(num_tokens: int, seed: int) -> list[int]:
    return torch.randint(3, 380, (num_tokens,), generator=torch.Generator().manual_seed(seed)).tolist()


PREFIX = random_tokens(12, seed=0)
# Shorter and much longer than the windows of 8 and 16 tokens, two of equal length, one with a part of the prefix.
PROMPTS = [PREFIX + random_tokens(n, seed=n) for n in (3, 60, 30)]
PROMPTS += [PREFIX + random_tokens(30, seed=1), PREFIX[:5] + random_tokens(4, seed=2)]


def boards(num_boards: int) -> list[Board]:
    """Return every second position of a game on a small grid, whose prompts differ in length."""
    game, teacher, positions = Game(5, seed=5), get_teacher("bfs"), []
    for _ in range(2 * num_boards):
        positions.append(game.board)
        game.play(teacher(game.board))
    return positions[::2]


def write_rows(directory: Path) -> Path:
    """Write ``train.jsonl`` and ``val.jsonl``, and return their directory."""
    teacher = get_teacher("bfs")
    lines = [
        json.dumps({"prompt": STYLE.write_prompt(board), "completion": STYLE.write_completion(board, teacher(board))})
        for board in boards(12)
    ]
    (directory / "train.jsonl").write_text("\n".join(lines[:8]))
    (directory / "val.jsonl").write_text("\n".join(lines[8:]))
    return directory


def fit(base_dir: Path, rows: Path, root: Path, adapter_type: str = "lora") -> Run:
    """Train two steps with the default layers of the architecture, and validate."""
    pl.seed_everything(7, verbose=False)
    data = SnakeJSONLDataModule(
        str(base_dir), train_path=str(rows / "train.jsonl"), val_path=str(rows / "val.jsonl"), batch_size=4
    )
    module = LoRALightningModule(
        str(base_dir),
        adapter_type,
        LoRAConfig(rank=2, alpha=4, dropout=0.0),
        learning_rate=1e-2,
        warmup_steps=0,
        dtype="float32",
        max_new_tokens=NUM_NEW,
    )
    checkpoint = AdapterCheckpoint(str(root / "checkpoints"), monitor=None, save_every_n_steps=0)
    trainer = make_trainer(root, enable_checkpointing=True, callbacks=[checkpoint], max_steps=2, max_epochs=-1)
    trainer.fit(module, datamodule=data)
    assert checkpoint.adapter_dir is not None
    return Run(module, data, float(trainer.callback_metrics["val/loss"]), checkpoint.adapter_dir)


@torch.no_grad()
def plain_loss(model: PreTrainedModel, base_dir: Path, rows: Path) -> float:
    """Return the mean cross-entropy of the tokens of the validation rows' completions and their EOS."""
    tokenizer = AutoTokenizer.from_pretrained(base_dir)
    losses = []
    for row in map(json.loads, (rows / "val.jsonl").read_text().splitlines()):
        prompt = tokenizer(f"### Instruction:\n{row['prompt']}\n\n### Response:\n")["input_ids"]
        completion = tokenizer(row["completion"])["input_ids"] + [tokenizer.eos_token_id]
        ids = torch.tensor([prompt + completion])
        logits = model(input_ids=ids, use_cache=False).logits[0, len(prompt) - 1 : -1]
        losses.append(F.cross_entropy(logits, torch.tensor(completion), reduction="none"))
    return float(torch.cat(losses).mean())


def plain_completion(model: PreTrainedModel, prompt: list[int]) -> tuple[list[int], bool]:
    """Return the tokens before EOS that ``generate`` appends, and whether it appended EOS."""
    ids = torch.tensor([prompt])
    mask = torch.ones_like(ids)
    output = model.generate(
        input_ids=ids, attention_mask=mask, max_new_tokens=NUM_NEW, do_sample=False, pad_token_id=PAD
    )
    tokens = output[0, len(prompt) :].tolist()
    return (tokens[:-1], True) if tokens[-1] == EOS else (tokens, False)


def check_games(run: Run, plain: PreTrainedModel) -> None:
    """Compare the answers to the boards of a game."""
    positions = boards(3)
    player = make_player(run.module, run.data.encoder, STYLE, "generate", "adapter")
    for board, answer in zip(positions, player.answer(positions, [0] * len(positions)), strict=True):
        tokens, is_complete = plain_completion(plain, run.data.encoder.encode_prompt(STYLE.write_prompt(board)))
        text: str = run.data.encoder.tokenizer.decode(tokens, skip_special_tokens=True)
        assert answer.completion == (text if is_complete else text + "...")


def check_decoder(model: PreTrainedModel) -> str:
    """Compare completions and logits of prompts of very different lengths; return how they are decoded."""
    decoder = Decoder(
        model, Drafter(), PREFIX, pad_id=PAD, eos_id=EOS, is_finished=lambda tokens: False, max_new_tokens=NUM_NEW
    )
    expected = [plain_completion(model, prompt) for prompt in PROMPTS]
    # The rows of equal length again, alone, with used buffers and a drafter that has learned the completions.
    for part in (slice(None), slice(2, 4)):
        completions = [(completion.tokens, completion.is_complete) for completion in decoder.complete(PROMPTS[part])]
        assert completions == expected[part]
    for logits, prompt in zip(decoder.next_logits(PROMPTS), PROMPTS, strict=True):
        plain = model(input_ids=torch.tensor([prompt])).logits[0, -1]
        torch.testing.assert_close(logits, plain, rtol=1e-3, atol=1e-3)
    return "lockstep" if isinstance(decoder._choose(PROMPTS, NUM_NEW), LockstepDecoder) else "generate"


def check_merge(run: Run, plain: PreTrainedModel, out: Path) -> str:
    """Compare the logits of the merged model; return whether it can be written."""
    ids = torch.tensor([PROMPTS[1]])
    expected = plain(input_ids=ids).logits
    try:
        merge(run.adapter_dir, out)
    except UserError as refusal:
        if not str(refusal).startswith(f"--out {out}: not written"):
            raise
        return "no"
    merged = AutoModelForCausalLM.from_pretrained(out, dtype=torch.float32)
    torch.testing.assert_close(merged(input_ids=ids).logits, expected, rtol=1e-3, atol=1e-3)
    return "yes"


def check_qlora(base_dir: Path, rows: Path, root: Path) -> str:
    """Compare the loss on a base in 4 bits; return whether it can be trained."""
    try:
        run = fit(base_dir, rows, root, "qlora")
    except UserError as refusal:
        if "model.adapter_type=lora" not in str(refusal):
            raise
        return "no"
    expected = plain_loss(run.module.peft_model.eval(), base_dir, rows)
    assert abs(run.val_loss - expected) < 1e-4 * expected
    return "yes"


def measure(model_type: str, base_dir: Path, rows: Path, root: Path) -> Support:
    """Train, validate, play, merge, and train in 4 bits; raise an AssertionError where a result is wrong."""
    run = fit(base_dir, rows, root / "lora")
    base = AutoModelForCausalLM.from_pretrained(base_dir, dtype=torch.float32)
    plain = PeftModel.from_pretrained(base, run.adapter_dir).eval()
    untrained = [name for name, parameter in plain.named_parameters() if "lora_B" in name and not parameter.any()]
    assert untrained == []
    with torch.no_grad():
        expected = plain_loss(plain, base_dir, rows)
        assert abs(run.val_loss - expected) < 1e-4 * expected
        check_games(run, plain)
        games = check_decoder(plain)
        merged = check_merge(run, plain, root / "merged")
    targets = {target.rsplit(".", 1)[-1] for target in run.module.peft_model.peft_config["default"].target_modules}
    return Support(
        model_type,
        "fused" if run.module.packs_rows else "own",
        ", ".join(f"`{target}`" for target in sorted(targets)),
        games,
        check_qlora(base_dir, rows, root / "qlora"),
        merged,
    )
