"""Hostile inputs: for each one the command to run, its exit code and what its error message must mention."""

from __future__ import annotations

import gzip
import hashlib
import io
import json
import os
import zipfile
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from tests.e2e.bad_inputs.sandbox import Sandbox, safetensors_bytes

Builder = Callable[[Sandbox], list[str]]


@dataclass(frozen=True)
class Case:
    """One hostile input.

    Args:
        name: Short description of the input.
        build: Creates the input in the sandbox and returns the arguments of the command.
        mentions: Keys, values, names, numbers or ``path:line`` that the error message (stdout if the exit code is 0)
            must contain, in either case. Never a phrase: the wording of messages is free.
        exit_code: Expected exit code.
    """

    name: str
    build: Builder
    mentions: str | tuple[str, ...]
    exit_code: int = 2

    def missing_from(self, text: str) -> list[str]:
        """Return what ``text`` should mention and does not."""
        mentions = (self.mentions,) if isinstance(self.mentions, str) else self.mentions
        return [mention for mention in mentions if mention.lower() not in text.lower()]


GOOD = json.dumps({"prompt": "a", "completion": "b"})


def _audit(content: str | bytes, sandbox: Sandbox, name: str = "rows.jsonl") -> list[str]:
    return ["audit", sandbox.file(name, content)]


def _bad_row(name: str, line: str | bytes, *mentions: str) -> Case:
    return Case(f"row: {name}", partial(_audit, line), ("rows.jsonl:1", *mentions))


def _odd_row(name: str, line: str | bytes, *mentions: str) -> Case:
    return Case(f"row: {name}", partial(_audit, line), mentions, exit_code=0)


def _bad_row_to_fit(name: str, line: str, *mentions: str) -> Case:
    content = f"{GOOD}\n{line}\n"
    return Case(
        f"row to fit: {name}",
        lambda s: _fit(s, f"--data.train_path={s.file('rows.jsonl', content)}"),
        ("rows.jsonl:2", *mentions),
    )


def _prompting(prompt: str, completion: str = "UP") -> str:
    return json.dumps({"prompt": prompt, "completion": completion})


SNAKE = (
    "You are playing Snake on a {size}x{size} grid. The coordinate system is (0,0) at bottom-left to ({last},{last}) "
    "at top-right. Movement: UP=y+1, DOWN=y-1, RIGHT=x+1, LEFT=x-1.\n\nCurrent game state:\n"
    "- Snake head position: (1, 1)\n- Apple position: (2, 2)\n- Snake body positions: [{rest}]\n- Snake length: 1\n\n"
    "What is the best move to make? Consider:\n1. Path to the apple\n2. Avoiding collisions with walls and snake body\n"
    "3. Maximizing score and survival\n\nChoose from: UP, DOWN, LEFT, RIGHT"
)
CLAIMS = "".join(
    f"{label}: {filling * 10**6}\n"
    for label in (
        "Free space",
        "- Free space",
        "Valid moves",
        "Danger assessment",
        "Apple direction",
        "Metrics",
        "Rationale",
    )
    for filling in ("a", "'a", "a:")
)[: 9 * 10**6]
DRAWN = "Snake on 10x10 grid.\nHead: [1, 1], Apple: [2, 2], Length: 1.\n"
ROWS = [
    _bad_row("array", "[1, 2]", "not an object"),
    _bad_row("number", "17", "not an object"),
    _bad_row("string", '"prompt"', "not an object"),
    _bad_row("null", "null", "not an object"),
    _bad_row("true", "true", "not an object"),
    _bad_row("empty object", "{}", "missing key", "'prompt'"),
    _bad_row("no prompt", '{"completion": "b"}', "missing key", "'prompt'"),
    _bad_row("no completion", '{"prompt": "a"}', "missing key", "'completion'"),
    _bad_row("empty prompt", '{"prompt": "", "completion": "b"}', "empty", "'prompt'"),
    _bad_row("empty completion", '{"prompt": "a", "completion": ""}', "empty", "'completion'"),
    _bad_row("number as prompt", '{"prompt": 3, "completion": "b"}', "not a string", "'prompt'"),
    _bad_row("null as completion", '{"prompt": "a", "completion": null}', "not a string", "'completion'"),
    _bad_row("list as completion", '{"prompt": "a", "completion": ["b"]}', "not a string", "'completion'"),
    _bad_row("object as prompt", '{"prompt": {"a": 1}, "completion": "b"}', "not a string", "'prompt'"),
    _bad_row("truncated", '{"prompt": "a", "comple', "bad JSON"),
    _bad_row("single quotes", "{'prompt': 'a', 'completion': 'b'}", "bad JSON"),
    _bad_row("trailing comma", '{"prompt": "a", "completion": "b",}', "bad JSON"),
    _bad_row("two objects on a line", GOOD + GOOD, "bad JSON"),
    _bad_row("comment", "// " + GOOD, "bad JSON"),
    _bad_row("control character", '{"prompt": "a\x01", "completion": "b"}', "bad JSON"),
    _bad_row("NaN as prompt", '{"prompt": NaN, "completion": "b"}', "not a string", "'prompt'"),
    _odd_row("infinity in an ignored key", '{"prompt": "a", "completion": "b", "x": Infinity}', "none 100.0%"),
    _bad_row("duplicate keys", '{"prompt": "a", "prompt": "c", "completion": "b"}', "duplicate key", "'prompt'"),
    _bad_row("lone surrogate", '{"prompt": "\\ud800", "completion": "b"}', "lone surrogate", "'prompt'", "\\ud800"),
    _bad_row("not UTF-8", b'{"prompt": "\xff\xfe", "completion": "b"}', "not UTF-8", "0xff"),
    _bad_row("UTF-16", GOOD.encode("utf-16"), "not UTF-8", "0xff"),
    _bad_row("null bytes", b"\x00" * 64, "bad JSON"),
    _bad_row("nested 100,000 deep", "[" * 100_000 + "]" * 100_000, "bad JSON"),
    _bad_row("nested deeply in a key", '{"prompt": "a", "completion": "b", "x": ' + "[" * 50_000 + "}", "bad JSON"),
    _bad_row("10,000 digits", '{"prompt": "a", "completion": "b", "x": ' + "9" * 10_000 + "}", "bad JSON", "10000"),
    _bad_row("upper-case keys", '{"Prompt": "a", "Completion": "b"}', "missing key", "'prompt'", "Completion"),
    _bad_row(
        "terminal control codes in a key", '{"\\u001b[2J\\u0007\\u202e": 1}', "'prompt'", "\\u001b[2J\\u0007\\u202e"
    ),
    _bad_row("a key of 1 MiB", json.dumps({"k" * 2**20: 1}), "missing key", "'prompt'", "kkk"),
    _odd_row("a board of 10^12 cells", _prompting(SNAKE.format(size=999_999, last=999_998, rest="")), "999999x999999"),
    _odd_row("a snake of a million cells", _prompting("Snake9;0,0;5,5;" + "U" * 10**6 + "\n"), "9x9"),
    _odd_row("an unclosed list of positions", _prompting(SNAKE.format(size=10, last=9, rest="[, " * 10**5)), "10x10"),
    _odd_row("a board of a million lines", _prompting(DRAWN + "Board:\n" + ". S H A\n" * 10**6), "10x10"),
    _odd_row("100,000 conclusions", _prompting("a", "Conclusion: " * 10**5), "none 100.0%"),
    _odd_row("claims of a million letters", _prompting(SNAKE.format(size=10, last=9, rest=""), CLAIMS), "10x10"),
    _bad_row_to_fit("array", "[1, 2]", "not an object"),
    _bad_row_to_fit("truncated", '{"prompt": "a", "comple', "bad JSON"),
    _bad_row_to_fit("nested 100,000 deep", "[" * 100_000 + "]" * 100_000, "bad JSON"),
]


def _fit(sandbox: Sandbox, *flags: str) -> list[str]:
    return ["fit", "--config", "balanced.yaml", f"--model.base_model={sandbox.base}",
            f"--data.train_path={sandbox.rows}", "--data.max_length=1200", "--trainer.accelerator=cpu",
            "--trainer.max_steps=1", *flags]  # fmt: skip


def _symlink_loop(sandbox: Sandbox) -> str:
    a, b = sandbox.root / "a.jsonl", sandbox.root / "b.jsonl"
    a.symlink_to(b)
    b.symlink_to(a)
    return str(a)


def _fifo(sandbox: Sandbox) -> str:
    path = sandbox.root / "pipe.jsonl"
    os.mkfifo(path)
    return str(path)


def _file(name: str, build: Builder, *mentions: str) -> Case:
    return Case(f"file: {name}", build, mentions)


FILES = [
    _file("missing", lambda s: ["audit", str(s.root / "none.jsonl")], "none.jsonl"),
    _file("empty", partial(_audit, ""), "rows.jsonl"),
    _file("blank lines", partial(_audit, "\n\n  \n"), "rows.jsonl"),
    _file("a directory", lambda s: ["audit", str(s.root)], "sandbox", "directory"),
    _file("a loop of links", lambda s: ["audit", _symlink_loop(s)], "a.jsonl"),
    _file("a named pipe without a writer", lambda s: ["audit", _fifo(s)], "pipe.jsonl"),
    _file("an endless device", lambda s: ["audit", "/dev/zero"], "/dev/zero"),
    _file("a null byte in the path", lambda s: ["audit", "a\0b"], "a\\x00b"),
    _file("a name of 5,000 letters", lambda s: ["audit", "x" * 5000], "x" * 100),
    _file("terminal control codes in the name", lambda s: ["audit", "\x1b[2J\u202e"], "\\x1b[2J\\u202e"),
    _file("a glob that matches nothing", lambda s: ["audit", str(s.root / "*.jsonl")], "*.jsonl"),
    _file("gzip by name only", partial(_audit, GOOD, name="rows.jsonl.gz"), "rows.jsonl.gz"),
    _file("truncated gzip", partial(_audit, gzip.compress(GOOD.encode() * 999)[:-9], name="rows.jsonl.gz"),
          "rows.jsonl.gz"),
    _file("a gzip bomb", partial(_audit, gzip.compress(bytes(2**28), 1), name="rows.jsonl.gz"),
          "rows.jsonl.gz:1", "too large", "10 MiB"),
    Case("file: gzip without the suffix", partial(_audit, gzip.compress(GOOD.encode())), "none 100.0%", exit_code=0),
    _file("a PNG image", partial(_audit, b"\x89PNG\r\n\x1a\n" + bytes(range(256)) * 9),
          "rows.jsonl:1", "not UTF-8", "0x89"),
    _file("one line of 64 MiB", partial(_audit, b"x" * 2**26), "rows.jsonl:1", "too large", "10 MiB"),
    _file("a CSV file", partial(_audit, "prompt,completion\na,b\n"), "rows.jsonl:1", "bad JSON"),
    _file("missing, to fit", lambda s: _fit(s, "--data.train_path=none.jsonl"), "none.jsonl"),
    _file("empty, to fit", lambda s: _fit(s, f"--data.train_path={s.file('e.jsonl', '')}"), "e.jsonl"),
    _file("bad, to fit", lambda s: _fit(s, f"--data.train_path={s.file('b.jsonl', '17')}"), "b.jsonl:1"),
    _file("no prompts, to predict", lambda s: ["predict", *_fit(s)[1:-1], f"--adapter={s.good_adapter}"],
          "predict_path"),
]  # fmt: skip


def _config(content: str | bytes, sandbox: Sandbox) -> list[str]:
    return _fit(sandbox, "--config", sandbox.file("own.yaml", content))


def _yaml(name: str, content: str | bytes, *mentions: str) -> Case:
    return Case(f"config: {name}", partial(_config, content), mentions)


BOMB = "a: &a [x,x,x,x,x,x,x,x,x]\n" + "".join(
    f"{c}: &{c} [{','.join([f'*{p}'] * 9)}]\n" for p, c in zip("abcdefgh", "bcdefghi", strict=True)
)
CONFIGS = [
    _yaml("not YAML", "model: [", "own.yaml"),
    _yaml("tabs", "model:\n\tlora: 1\n", "own.yaml"),
    _yaml("a list", "- 1\n- 2\n", "own.yaml"),
    _yaml("a string", "hello", "own.yaml", "hello"),
    _yaml("not UTF-8", b"model: \xff\xfe", "own.yaml", "0xff"),
    _yaml("exponential aliases", BOMB, "own.yaml", "line 6", "100,000"),
    _yaml("nested 5,000 deep", "a: " + "[" * 5000 + "]" * 5000, "own.yaml"),
    _yaml("nested half a million deep", "a: " + "[" * 500_000, "own.yaml"),
    _yaml("an alias to itself", "a: &a [*a]", "own.yaml", "*a"),
    _yaml("larger than 16 MiB", b"# " + bytes(2**24), "own.yaml", "16 MiB"),
    _yaml("a binary number without digits", "data:\n  batch_size: 0b_\n", "own.yaml"),
    _yaml("a number of 10,000 digits", "data:\n  batch_size: " + "9" * 10_000, "own.yaml", "10000"),
    _yaml("a list as key", "data:\n  ? [a]\n  : 1\n", "own.yaml"),
    _yaml("a tag that calls a function", "model: !!python/object/apply:os.mkdir [canary]\n", "own.yaml", "os.mkdir"),
    _yaml("a tag that imports a module", "model: !!python/module:canary\n", "own.yaml", "canary"),
    _yaml("a class_path that is not a callback",
          "trainer:\n  callbacks:\n  - class_path: os.mkdir\n    init_args: {path: canary}\n",
          "own.yaml", "trainer.callbacks", "os.mkdir"),
    _yaml("unknown key", "model:\n  learning_rat: 1\n", "model.learning_rat'", "model.learning_rate"),
    _yaml("unknown group", "modle:\n  rank: 1\n", "modle"),
    _yaml("duplicate keys", "data:\n  batch_size: 1\n  batch_size: 2\n", "own.yaml", "line 3", "batch_size"),
    _yaml("a number in place of a group", "model: 3\n", "model"),
    _yaml("null as number", "data:\n  batch_size: null\n", "data.batch_size", "None"),
    _yaml("null as rank", "model:\n  lora:\n    rank: null\n", "model.lora.rank", "None"),
    Case("config: missing", lambda s: _fit(s, "--config", "none.yaml"), ("--config", "none.yaml", "balanced.yaml")),
    Case("config: outside by name", lambda s: _fit(s, "--config", "../../../etc/passwd"), ("--config", "etc/passwd")),
    Case("config: a directory", lambda s: _fit(s, "--config", str(s.root)), ("--config", "sandbox")),
    Case("config: empty name", lambda s: _fit(s, "--config", ""), "--config"),
    Case("config: no value", lambda s: [*_fit(s), "--config"], "--config"),
    Case("config: a named pipe", lambda s: _fit(s, "--config", _fifo(s)), ("--config", "pipe.jsonl")),
]  # fmt: skip


def _flag(flag: str, *mentions: str) -> Case:
    # The length tells apart flags whose first letters are the same.
    return Case(f"flag: {flag[:40]}{len(flag) if len(flag) > 40 else ''}", lambda s: _fit(s, flag), mentions)


NESTED_REPETITION = "(([a-z_.0-9])+)+!"
FLAGS = [
    _flag("--model.lora.rank=0", "model.lora", "rank", "0"),
    _flag("--model.lora.rank=-4", "model.lora", "rank", "-4"),
    _flag("--model.lora.rank=1.5", "model.lora.rank", "1.5"),
    _flag("--model.lora.rank=1000000000", "model.lora", "rank", "16,384"),
    _flag("--model.lora.alpha=0", "model.lora", "alpha"),
    _flag("--model.lora.alpha=nan", "model.lora.alpha", "nan"),
    _flag("--model.lora.dropout=1", "model.lora", "dropout"),
    _flag("--model.lora.dropout=-0.1", "model.lora", "dropout", "-0.1"),
    _flag("--model.lora.dropout=nan", "model.lora.dropout", "nan"),
    _flag("--model.lora.target_modules=[]", "target_modules"),
    _flag("--model.lora.target_modules=[nonsense]", "target_modules", "nonsense", "q_proj"),
    _flag("--model.lora.target_modules=(", "target_modules", "'('"),
    _flag("--model.learning_rate=-1", "model.learning_rate", "-1"),
    _flag("--model.learning_rate=0", "model.learning_rate"),
    _flag("--model.learning_rate=inf", "model.learning_rate", "inf"),
    _flag("--model.learning_rate=fast", "model.learning_rate", "fast"),
    _flag("--model.weight_decay=-1", "model.weight_decay", "-1"),
    _flag("--model.warmup_steps=-1", "model.warmup_steps", "-1"),
    _flag("--model.final_learning_rate_fraction=2", "model.final_learning_rate_fraction", "2"),
    _flag("--model.dtype=int8", "dtype", "int8", "bfloat16"),
    _flag("--model.adapter_type=none", "model.adapter_type", "none", "qlora"),
    _flag("--model.base_model=", "smollm2-135m"),
    _flag("--model.base_model=../../../../etc", "../../../../etc"),
    _flag("--model.base_model=a/b/c/d", "a/b/c/d"),
    _flag("--model.base_model=smollm", "'smollm'", "'smollm2-135m'"),
    _flag("--model.max_new_tokens=0", "model.max_new_tokens"),
    _flag("--model.loss_chunk_tokens=0", "model.loss_chunk_tokens"),
    _flag(f"--model.loss_chunk_tokens={10**20}", "model.loss_chunk_tokens", "1,048,576"),
    _flag(f"--model.max_new_tokens={10**20}", "model.max_new_tokens", "1,048,576"),
    _flag("--model.betas=[1,2]", "model.betas"),
    _flag("--data.batch_size=0", "data.batch_size", "found: 0"),
    _flag("--data.batch_size=-1", "data.batch_size", "found: -1"),
    _flag("--data.max_length=0", "data.max_length", "found: 0"),
    _flag("--data.max_length=1", "data.max_length", "found: 1"),
    _flag("--data.val_fraction=1", "data.val_fraction", "found: 1"),
    _flag("--data.val_fraction=-0.5", "data.val_fraction", "found: -0.5"),
    _flag("--data.val_fraction=nan", "data.val_fraction", "nan"),
    _flag("--data.template=none", "data.template", "none", "instruction"),
    _flag("--data.on_bad_row=maybe", "data.on_bad_row", "maybe", "skip"),
    _flag("--data.on_overflow=maybe", "data.on_overflow", "maybe", "shorten"),
    _flag("--data.num_workers=-1", "data.num_workers", "found: -1"),
    _flag("--data.num_workers=100000", "data.num_workers", "found: 100,000"),
    _flag("--data.seed=-1", "data.seed", "found: -1"),
    _flag("--data.teacher=nobody", "data.teacher", "nobody"),
    _flag("--trainer.max_steps=-7", "max_steps", "-7"),
    _flag("--trainer.accumulate_grad_batches=0", "trainer.accumulate_grad_batches", "0"),
    _flag("--trainer.accelerator=quantum", "accelerator", "quantum"),
    _flag("--trainer.devices=0", "devices=0"),
    _flag("--trainer.precision=3", "trainer.precision"),
    _flag("--trainer.precision=bf16-mixed", "trainer.precision=bf16-mixed", "model.dtype=bfloat16"),
    _flag("--trainer.strategy=nonsense", "strategy", "nonsense"),
    _flag("--trainer.max_time=soon", "soon", "DD:HH:MM:SS"),
    _flag("--play.final_games=-1", "play.final_games", "-1"),
    _flag("--play.max_steps=0", "play.max_steps", "0"),
    _flag("--imitate.every_n_steps=-1", "imitate.every_n_steps", "-1"),
    _flag("--imitate.rows_share=2", "imitate.rows_share", "2"),
    _flag("--imitate.teacher=nobody", "imitate.teacher", "nobody"),
    _flag("--play.batch_size=0", "play.batch_size", "0"),
    _flag("--checkpoint.monitor=val/nothing", "checkpoint.monitor", "val/nothing", "val/loss"),
    _flag("--checkpoint.save_every_n_steps=-1", "checkpoint.save_every_n_steps"),
    _flag("--adapter_name=../../escape", "--adapter_name", "../../escape"),
    _flag("--adapter_name=/tmp/escape", "--adapter_name", "/tmp/escape"),
    _flag("--adapter_name=", "--adapter_name"),
    _flag("--adapter_name=a\nb", "--adapter_name"),
    _flag(f"--model.base_model={'x' * 5000}", "x" * 100),
    _flag(f"--model.base_model={'x/' * 5000}", "x/" * 100),
    _flag(f"--config={'x' * 5000}", "--config", "x" * 100),
    _flag(f"--ckpt_path={'x' * 5000}", "x" * 100),
    _flag(f"--root={'x' * 5000}", "--root", "x" * 100),
    _flag(f"--adapter_name={'x' * 5000}", "x" * 100),
    _flag(f"--adapter={'x' * 5000}", "x" * 100),
    _flag(f"--model.learning_rate={'9' * 5000}", "model.learning_rate", "5000"),
    _flag(f"--data.batch_size={'9' * 5000}", "data.batch_size", "5000"),
    _flag("--data.batch_size=0b_", "data.batch_size", "0b_"),
    _flag("--data.batch_size=\udcff", "data.batch_size", "\\udcff"),
    _flag("--data.train_path=\udcff", "\\udcff"),
    _flag(f"--model.lora.rank={'[' * 5000}", "model.lora.rank"),
    _flag("--nonsense", "--nonsense"),
    _flag("--model.lora.alpha=inf", "model.lora.alpha", "inf"),
    _flag(f"--model.lora.target_modules={NESTED_REPETITION}", "model.lora.target_modules", NESTED_REPETITION),
    _flag("--model.lora.rank_pattern={'(a|bb)+c': 4}", "rank_pattern", "(a|bb)+c"),
    _flag("--data.pad_to_multiple_of=1000000000", "data.pad_to_multiple_of", "found: 1,000,000,000"),
    _flag("--data.seed=99999999999999999999999", "data.seed", "4,294,967,295"),
    _flag("--seed_everything=-1", "seed_everything", "-1"),
    _flag("--play.grid_size=100000", "play.grid_size", "256", "100000"),
    _flag("--trainer.val_check_interval=9999999", "val_check_interval", "9999999"),
    _flag("--trainer.check_val_every_n_epoch=0", "trainer.check_val_every_n_epoch", "0"),
    _flag("--trainer.devices=9999", "trainer.devices", "9999"),
    _flag("--trainer.devices=-1", "devices=-1"),
    _flag("--trainer.strategy=ddp_spawn", "trainer.strategy", "ddp.yaml"),
    _flag("--early_stopping.monitor=val/nothing", "early_stopping.monitor", "val/nothing", "train/loss"),
    _flag("--hub_tokn=verysecretvalue", "--hub_tokn=***"),
    Case("flag: an adapter into a directory with other files",
         lambda s: _fit(s, f"--checkpoint.adapter_dir={Path(s.file('mine/dear', 'x')).parent}"),
         ("checkpoint.adapter_dir", "mine")),
    Case("flag: generate with a null byte in the name", lambda s: ["generate", "--out", "a\0b", "--games", "1"], "nul"),
    Case("flag: a file as root", lambda s: _fit(s, f"--root={s.file('own', '')}"), ("--root", "own")),
    Case("flag: generate no games", lambda s: ["generate", "--out", "x.jsonl", "--games", "0"], ("games", "found: 0")),
    Case("flag: generate a huge grid", lambda s: ["generate", "--out", "x", "--grid_size", "100000"],
         ("grid", "256", "100000")),
    Case("flag: generate a grid of one cell", lambda s: ["generate", "--out", "x", "--grid_size", "1"],
         ("grid", "2", "1")),
    Case("flag: generate into a directory", lambda s: ["generate", "--out", str(s.root), "--games", "1"],
         ("sandbox", "directory")),
    Case("flag: generate with an unknown teacher", lambda s: ["generate", "--out", "x", "--teacher", "zz"],
         ("teacher", "zz", "safe_greedy")),
    Case("flag: generate with an unknown style", lambda s: ["generate", "--out", "x", "--style", "zz"],
         ("style", "zz", "bfs-512")),
    Case("flag: unknown command", lambda s: ["trian"], ("trian", "generate")),
    Case("flag: merge without --out", lambda s: ["merge", "--adapter", str(s.good_adapter)], "--out"),
    Case("flag: merge into the adapter", lambda s: ["merge", "--adapter", str(s.adapter()), "--out", "adapter"],
         ("--out", "adapter")),
    Case("flag: adapters of a missing directory", lambda s: ["adapters", "nowhere"], "nowhere"),
]  # fmt: skip


Damage = Callable[[Sandbox, Path], object]
"""Changes a copy, in the sandbox, of a good adapter or base model."""


def _damaged_adapter(command: str, damage: Damage, sandbox: Sandbox) -> list[str]:
    adapter = sandbox.adapter()
    damage(sandbox, adapter)
    if command == "merge":
        return ["merge", "--adapter", str(adapter), "--out", "merged"]
    return [command, *_fit(sandbox)[1:-1], f"--adapter={adapter}"]


def _adapter(name: str, damage: Damage, *mentions: str, command: str = "merge") -> Case:
    return Case(f"adapter: {name}", partial(_damaged_adapter, command, damage), mentions)


def _metadata(**changes: object) -> Damage:
    return lambda s, a: s.edit_json(a / "adapter_metadata.json", **changes)


def _config_json(**changes: object) -> Damage:
    return lambda s, a: s.edit_json(a / "adapter_config.json", **changes)


def _weights(content: bytes) -> Damage:
    return lambda s, a: (a / "adapter_model.safetensors").write_bytes(content)


def _hashed_weights(content: Callable[[Sandbox], bytes]) -> Damage:
    """Replace the weights, and their hash in the metadata."""

    def damage(sandbox: Sandbox, adapter: Path) -> None:
        weights = content(sandbox)
        (adapter / "adapter_model.safetensors").write_bytes(weights)
        sandbox.edit_json(adapter / "adapter_metadata.json", weights_sha256=hashlib.sha256(weights).hexdigest())

    return damage


def _consistent_config(**changes: object) -> Damage:
    """Change ``adapter_config.json``, and its copy in the metadata."""

    def damage(sandbox: Sandbox, adapter: Path) -> None:
        sandbox.edit_json(adapter / "adapter_config.json", **changes)
        config = json.loads((adapter / "adapter_config.json").read_text())
        sandbox.edit_json(adapter / "adapter_metadata.json", peft_config=config)

    return damage


def _nan_weights(sandbox: Sandbox) -> bytes:
    return _times_nan((sandbox.good_adapter / "adapter_model.safetensors").read_bytes())


def _times_nan(weights: bytes) -> bytes:
    from safetensors.torch import load, save

    return save({name: values * float("nan") for name, values in load(weights).items()}, metadata={"format": "pt"})


def _truncate_weights(sandbox: Sandbox, directory: Path) -> None:
    (weights,) = directory.glob("*.safetensors")
    os.truncate(weights, 100)


ADAPTERS = [
    _adapter("no metadata", lambda s, a: (a / "adapter_metadata.json").unlink(), "adapter_metadata.json"),
    _adapter("no config", lambda s, a: (a / "adapter_config.json").unlink(), "adapter_config.json"),
    _adapter("no weights", lambda s, a: (a / "adapter_model.safetensors").unlink(), "adapter_model.safetensors"),
    _adapter("metadata empty", lambda s, a: (a / "adapter_metadata.json").write_text(""), "adapter_metadata.json"),
    _adapter("metadata a list", lambda s, a: (a / "adapter_metadata.json").write_text("[]"), "adapter_metadata.json"),
    _adapter("metadata nested deeply", lambda s, a: (a / "adapter_metadata.json").write_text("[" * 99_999),
             "adapter_metadata.json"),
    _adapter("metadata not UTF-8", lambda s, a: (a / "adapter_metadata.json").write_bytes(b"\xff"),
             "adapter_metadata.json", "UTF-8", "0xff"),
    _adapter("metadata of 17 MiB", lambda s, a: (a / "adapter_metadata.json").write_bytes(bytes(2**24 + 1)),
             "adapter_metadata.json", "16 MiB"),
    _adapter("metadata a link to itself", lambda s, a: ((a / "adapter_metadata.json").unlink(),
             (a / "adapter_metadata.json").symlink_to("adapter_metadata.json")), "adapter_metadata.json"),
    _adapter("base model outside the directory", _metadata(base_model_name="../../etc"), "../../etc"),
    _adapter("hash of another base model", _metadata(base_sha256="0" * 64), "--base_model", "000000000000"),
    _adapter("no hash of the weights", _metadata(weights_sha256=...), "adapter_model.safetensors", "sha256"),
    _adapter("another hash of the weights", _metadata(weights_sha256="0" * 64), "adapter_model.safetensors", "sha256"),
    _adapter("unknown adapter type", _metadata(adapter_type="os.system"), "adapter_type", "os.system", "qlora"),
    _adapter("adapter type a list", _metadata(adapter_type=["lora"]), "adapter_type", '["lora"]'),
    _adapter("another rank", _config_json(r=3), "adapter_config.json", "3", "16"),
    _adapter("a huge rank", _config_json(r=10**9), "adapter_config.json", "1000000000", "16"),
    _adapter("rank a string", _config_json(r="many"), "adapter_config.json", '"many"', "16"),
    _adapter("another PEFT type", _config_json(peft_type="PROMPT_TUNING"), "peft_type", "PROMPT_TUNING"),
    _adapter("a class to import", _config_json(auto_mapping={"base_model_class": "os"}), "auto_mapping"),
    _adapter("weights truncated", _truncate_weights, "adapter_model.safetensors"),
    _adapter("weights empty", _weights(b""), "adapter_model.safetensors"),
    _adapter("weights a pickle", lambda s, a: _weights(s.pickle_bytes())(s, a), "adapter_model.safetensors"),
    _adapter("weights a torch file", lambda s, a: _weights(s.torch_file())(s, a), "adapter_model.safetensors"),
    _adapter("weights with a huge header", _weights(safetensors_bytes({}, length=2**62)), "adapter_model.safetensors"),
    _adapter("weights with a false header", _weights(safetensors_bytes(
             {"x": {"dtype": "F32", "shape": [10**9], "data_offsets": [0, 4 * 10**9]}})), "adapter_model.safetensors"),
    _adapter("hashed weights empty", _hashed_weights(lambda s: b""), "adapter_model.safetensors", "header"),
    _adapter("hashed weights a pickle", _hashed_weights(lambda s: s.pickle_bytes()),
             "adapter_model.safetensors", "header"),
    _adapter("hashed weights a torch file", _hashed_weights(lambda s: s.torch_file()),
             "adapter_model.safetensors", "header"),
    _adapter("hashed weights with a huge header", _hashed_weights(lambda s: safetensors_bytes({}, length=2**62)),
             "adapter_model.safetensors", "header"),
    _adapter("hashed weights with a false header", _hashed_weights(lambda s: safetensors_bytes(
             {"x": {"dtype": "F32", "shape": [10**9], "data_offsets": [0, 4 * 10**9]}})),
             "adapter_model.safetensors", "header"),
    _adapter("hashed weights of a negative shape", _hashed_weights(lambda s: safetensors_bytes(
             {"x": {"dtype": "F32", "shape": [-1], "data_offsets": [0, 4]}}, bytes(4))),
             "adapter_model.safetensors", "-1"),
    _adapter("hashed weights that overlap", _hashed_weights(lambda s: safetensors_bytes(
             {n: {"dtype": "F32", "shape": [1], "data_offsets": [0, 4]} for n in "xy"}, bytes(4))),
             "adapter_model.safetensors", "header"),
    _adapter("hashed weights without tensors", _hashed_weights(lambda s: safetensors_bytes({})),
             "adapter_config.json", "16", "adapter_model.safetensors"),
    _adapter("consistent huge rank", _consistent_config(r=10**9),
             "adapter_config.json", "1000000000", "adapter_model.safetensors"),
    _adapter("consistent negative rank", _consistent_config(r=-1), "-1"),
    _adapter("consistent rank a string", _consistent_config(r="many"), "peft_config.r", '"many"'),
    _adapter("consistent unknown layers", _consistent_config(target_modules=["nonsense"]), "nonsense"),
    _adapter("consistent pattern with exponential matching", _consistent_config(target_modules="(a+)+$"),
             "target_modules", "(a+)+$"),
    _adapter("consistent pattern of nested repetitions", _consistent_config(target_modules=NESTED_REPETITION),
             "target_modules", NESTED_REPETITION),
    _adapter("consistent exclusion of nested repetitions", _consistent_config(exclude_modules=NESTED_REPETITION),
             "exclude_modules", NESTED_REPETITION),
    _adapter("consistent rank pattern of nested repetitions", _consistent_config(rank_pattern={NESTED_REPETITION: 3}),
             "rank_pattern", NESTED_REPETITION),
    _adapter("consistent pattern of many repetitions", _consistent_config(target_modules=".*" * 12 + "!"),
             "target_modules", ".*" * 12 + "!"),
    _adapter("consistent replication of layers", _consistent_config(layer_replication=[[0, 10**5]]), "adapter"),
    _adapter("consistent module to import", _consistent_config(megatron_config={"x": 1}, megatron_core="os"),
             "megatron"),
    _adapter("a password in the base model's URL", _metadata(base_model_name="https://me:dear@host/x"), "***@host"),
    _adapter("consistent path as PEFT type", _consistent_config(peft_type="../../x"), "peft_type", "../../x"),
    _adapter("a pickle among the files", lambda s, a: (a / "adapter_model.bin").write_bytes(s.pickle_bytes()),
             "adapter_model.bin"),
    _adapter("a program among the files", lambda s, a: (a / "modeling.py").write_text("open('canary', 'w')"),
             "modeling.py"),
    _adapter("weights NaN, to validate", _hashed_weights(_nan_weights), "adapter_model.safetensors", "finite", "lora_A",
             command="validate"),
    _adapter("unknown template, to validate", _metadata(data={"template": "x"}), "data.template", "'x'", "instruction",
             command="validate"),
    _adapter("a grid of 10^12 cells, to test", _metadata(grid_size=10**6), "grid_size", "256", "1000000",
             command="test"),
    Case("adapter: a file", lambda s: ["validate", *_fit(s)[1:-1], f"--adapter={s.rows}"], ("--adapter", ".jsonl")),
    _adapter("weights truncated, to validate", _truncate_weights, "adapter_model.safetensors", command="validate"),
    _adapter("weights truncated, to test", _truncate_weights, "adapter_model.safetensors", command="test"),
    Case("adapter: missing, to validate", lambda s: ["validate", *_fit(s)[1:-1], "--adapter=nowhere"],
         ("--adapter", "nowhere")),
    Case("adapter: missing, to merge", lambda s: ["merge", "--adapter", "nowhere", "--out", "m"],
         ("--adapter", "nowhere")),
    Case("adapter: missing, to test", lambda s: ["test", *_fit(s)[1:-1], "--adapter=nowhere"],
         ("--adapter", "nowhere")),
]  # fmt: skip


def _checkpoint(name: str, make: Callable[[Sandbox], bytes], *mentions: str) -> Case:
    return Case(
        f"checkpoint: {name}",
        # The good checkpoint was written after step 1.
        lambda s: _fit(s, f"--ckpt_path={s.file('own.ckpt', make(s))}", "--trainer.max_steps=2"),
        mentions or "own.ckpt",
    )


def _edited_checkpoint(name: str, edit: Callable[[dict], object], *mentions: str) -> Case:
    def make(sandbox: Sandbox) -> bytes:
        import torch

        checkpoint = torch.load(sandbox.good_checkpoint, weights_only=True)
        edit(checkpoint)
        buffer = io.BytesIO()
        torch.save(checkpoint, buffer)
        return buffer.getvalue()

    return _checkpoint(name, make, *mentions)


def _truncate_moment(checkpoint: dict) -> None:
    state = checkpoint["optimizer_states"][0]["state"][0]
    state["exp_avg"] = state["exp_avg"].flatten()[:3]


def _zip_bomb(checkpoint: Path) -> bytes:
    """Return the checkpoint with one part replaced by 64 MiB of zeros, deflated."""
    buffer = io.BytesIO()
    with zipfile.ZipFile(checkpoint) as good, zipfile.ZipFile(buffer, "w", zipfile.ZIP_DEFLATED) as bad:
        for part in good.infolist():
            bad.writestr(part.filename, bytes(2**26) if part.filename.endswith("/data/0") else good.read(part))
    return buffer.getvalue()


CHECKPOINTS = [
    _checkpoint("empty", lambda s: b""),
    _checkpoint("text", lambda s: b"hello"),
    _checkpoint("a pickle", lambda s: s.pickle_bytes()),
    _checkpoint("a torch file with a pickle", lambda s: s.torch_file()),
    _checkpoint("truncated", lambda s: s.good_checkpoint.read_bytes()[:-1000]),
    _checkpoint("a zip bomb", lambda s: _zip_bomb(s.good_checkpoint), "own.ckpt", "compressed"),
    _edited_checkpoint("without keys", lambda c: c.clear(), "own.ckpt", "state_dict"),
    _edited_checkpoint("fit loop a list", lambda c: c["loops"].update(fit_loop=[]), "own.ckpt", "loops"),
    _edited_checkpoint("loops a number", lambda c: c.update(loops=3), "own.ckpt", "loops"),
    _edited_checkpoint("no weights", lambda c: c.pop("state_dict"), "own.ckpt", "state_dict"),
    _edited_checkpoint("other weights", lambda c: c["state_dict"].popitem(), "layers.1.self_attn.o_proj.lora_B"),
    _edited_checkpoint("no optimizer", lambda c: c.pop("optimizer_states"), "own.ckpt", "optimizer_states"),
    _edited_checkpoint("no loops", lambda c: c.pop("loops"), "own.ckpt", "loops"),
    _edited_checkpoint("no optimizer states", lambda c: c["optimizer_states"].clear(), "own.ckpt", "optimizer_states"),
    _edited_checkpoint("a moment of another shape", _truncate_moment, "own.ckpt", "exp_avg", "[3]", "[16, 32]"),
    _edited_checkpoint(
        "one more parameter group", lambda c: c["optimizer_states"][0]["param_groups"].append({}), "own.ckpt", "groups"
    ),
    _edited_checkpoint("learning rate schedule a string", lambda c: c.update(lr_schedulers=["x"])),
    _edited_checkpoint("weights numbers", lambda c: c.update(state_dict=dict.fromkeys(c["state_dict"], 3))),
    _edited_checkpoint("a loop without counters", lambda c: c["loops"]["fit_loop"].clear(), "own.ckpt", "loops"),
    _edited_checkpoint(
        "counters a string", lambda c: c["loops"]["fit_loop"]["epoch_loop.batch_progress"].update(total="x")
    ),
    _edited_checkpoint("random state a string", lambda c: c["snake_lora_pl.run_state"].update(random=["x"])),
    _edited_checkpoint("run state a list", lambda c: c.update({"snake_lora_pl.run_state": []})),
    _edited_checkpoint("an invalid version", lambda c: c.update({"pytorch-lightning_version": "x"})),
    Case("checkpoint: missing", lambda s: _fit(s, "--ckpt_path=none.ckpt"), ("--ckpt_path", "none.ckpt")),
    Case("checkpoint: a directory", lambda s: _fit(s, f"--ckpt_path={s.root}"), ("--ckpt_path", "sandbox")),
    Case("checkpoint: last without a run", lambda s: _fit(s, "--ckpt_path=last"), ("--ckpt_path", "last", "--root")),
]


def _damaged_model(damage: Damage, sandbox: Sandbox) -> list[str]:
    model = sandbox.model()
    damage(sandbox, model)
    return [*_fit(sandbox), f"--model.base_model={model}"]


def _model(name: str, damage: Damage, *mentions: str) -> Case:
    return Case(f"base model: {name}", partial(_damaged_model, damage), mentions)


def _other_weights(sandbox: Sandbox, model: Path, name: str, content: bytes) -> None:
    (model / "model.safetensors").unlink()
    (model / name).write_bytes(content)


def _sharded(shard: str) -> Damage:
    """Move the weights out of the directory, and write an index that names ``shard`` as the file of all weights."""

    def damage(sandbox: Sandbox, model: Path) -> None:
        from safetensors import safe_open

        with safe_open(model / "model.safetensors", framework="pt") as file:
            index = {"metadata": {}, "weight_map": dict.fromkeys(file.keys(), shard)}
        (model / "model.safetensors").rename(model.parent / "outside.safetensors")
        (model / "model.safetensors.index.json").write_text(json.dumps(index))

    return damage


def _replace_by_pipe(path: Path) -> None:
    path.unlink()
    os.mkfifo(path)


def _shrink_vocabulary(sandbox: Sandbox, model: Path) -> None:
    from safetensors.torch import load, save

    weights = load((model / "model.safetensors").read_bytes())
    weights["model.embed_tokens.weight"] = weights["model.embed_tokens.weight"][:100].contiguous()
    (model / "model.safetensors").write_bytes(save(weights, metadata={"format": "pt"}))
    sandbox.edit_json(model / "config.json", vocab_size=100)


def _add_bos(sandbox: Sandbox, model: Path) -> None:
    """Add a token to the tokenizer that it puts before every text."""
    path = model / "tokenizer.json"
    token = {"content": "<bos>", "special": True, "single_word": False, "lstrip": False, "rstrip": False}
    added = json.loads(path.read_text())["added_tokens"] + [{"id": 384, "normalized": False, **token}]
    first, text = {"SpecialToken": {"id": "<bos>", "type_id": 0}}, {"Sequence": {"id": "A", "type_id": 0}}
    special_tokens = {"<bos>": {"id": "<bos>", "ids": [384], "tokens": ["<bos>"]}}
    processor = {"type": "TemplateProcessing", "single": [first, text], "pair": [first, text]}
    sandbox.edit_json(path, added_tokens=added, post_processor=processor | {"special_tokens": special_tokens})
    sandbox.edit_json(model / "tokenizer_config.json", bos_token="<bos>")


def _short_positions(sandbox: Sandbox) -> list[str]:
    """Return a run whose rows fit into the positions of its model, but not a prompt and its completion."""
    model = sandbox.model()
    sandbox.edit_json(model / "config.json", max_position_embeddings=64)
    rows, val = (
        sandbox.file("rows.jsonl", f"{GOOD}\n"),
        sandbox.file("val.jsonl", '{"prompt": "c", "completion": "d"}\n'),
    )
    return _fit(sandbox, f"--model.base_model={model}", f"--data.train_path={rows}", f"--data.val_path={val}")


def _write_nan_weights(sandbox: Sandbox, model: Path) -> None:
    path = model / "model.safetensors"
    path.write_bytes(_times_nan(path.read_bytes()))


def _custom_code(sandbox: Sandbox, model: Path) -> None:
    auto_map = {"AutoConfig": "own.Own", "AutoModelForCausalLM": "own.Own"}
    sandbox.edit_json(model / "config.json", model_type="own", auto_map=auto_map)
    (model / "own.py").write_text("import os; os.mkdir('canary')")


MODELS = [
    _model("no config", lambda s, m: (m / "config.json").unlink(), "config.json"),
    _model("config empty", lambda s, m: (m / "config.json").write_text(""), "config.json"),
    _model("config a list", lambda s, m: (m / "config.json").write_text("[]"), "config.json"),
    _model("config nested deeply", lambda s, m: (m / "config.json").write_text("[" * 99_999), "config.json"),
    _model("unknown architecture", lambda s, m: s.edit_json(m / "config.json", model_type="snake"), "`snake`"),
    _model("custom code", _custom_code, "model.trust_remote_code"),
    _model("hidden size of 0", lambda s, m: s.edit_json(m / "config.json", hidden_size=0),
           "config.json", "model.embed_tokens.weight"),
    _model("layers of another size", lambda s, m: s.edit_json(m / "config.json", intermediate_size=99),
           "config.json", "mlp.down_proj.weight"),
    _model("size a string", lambda s, m: s.edit_json(m / "config.json", hidden_size="big"), "hidden_size", "'big'"),
    _model("ten million layers", lambda s, m: s.edit_json(m / "config.json", num_hidden_layers=10**7),
           "config.json", "num_hidden_layers=10000000"),
    _model("a billion tokens", lambda s, m: s.edit_json(m / "config.json", vocab_size=10**9),
           "config.json", "vocab_size=1000000000"),
    _model("a hidden size of a million", lambda s, m: s.edit_json(m / "config.json", hidden_size=2**20),
           "config.json", "hidden_size=1048576"),
    _model("fewer embeddings than tokens", _shrink_vocabulary, "model.base_model", "384", "100"),
    _model("a token without an embedding", _add_bos, ".jsonl:", "'<bos>'", "384", "data.template"),
    _model("fewer positions than a row has tokens",
           lambda s, m: s.edit_json(m / "config.json", max_position_embeddings=64), ".jsonl:", "data.max_length=64"),
    Case("base model: fewer positions than a prompt and its completion have tokens", _short_positions,
         ("val.jsonl:1", "model.max_new_tokens", "64")),
    _model("weights NaN", _write_nan_weights, "model.base_model", "finite"),
    _model("tokenizer a named pipe", lambda s, m: _replace_by_pipe(m / "tokenizer.json"), "tokenizer.json"),
    _model("weights a named pipe", lambda s, m: _replace_by_pipe(m / "model.safetensors"), "model.safetensors"),
    _model("no weights", lambda s, m: (m / "model.safetensors").unlink(), "model.safetensors"),
    _model("weights truncated", _truncate_weights, "safetensor", "header"),
    _model("weights a pickle", lambda s, m: _other_weights(s, m, "pytorch_model.bin", s.torch_file()),
           "pytorch_model.bin", "safetensors"),
    _model("weights with a false header", lambda s, m: _other_weights(s, m, "model.safetensors", safetensors_bytes(
           {"x": {"dtype": "F32", "shape": [2**40], "data_offsets": [0, 2**42]}})), "safetensor", "header"),
    _model("shards outside the directory", _sharded("../outside.safetensors"), "../outside.safetensors"),
    _model("shards missing", _sharded("model-00001-of-00002.safetensors"), "model-00001-of-00002.safetensors"),
    _model("shard index a list", lambda s, m: (m / "model.safetensors.index.json").write_text("[]"),
           "model.safetensors.index.json"),
    _model("no tokenizer", lambda s, m: [p.unlink() for p in m.glob("token*")], "tokenizer.json"),
    _model("tokenizer empty", lambda s, m: (m / "tokenizer.json").write_text("{}"), "tokenizer"),
    _model("tokenizer not JSON", lambda s, m: (m / "tokenizer.json").write_text("{"), "tokenizer"),
    Case("base model: a file", lambda s: [*_fit(s), f"--model.base_model={s.rows}"], ".jsonl"),
    Case("base model: an empty directory", lambda s: [*_fit(s), f"--model.base_model={s.root}"], "config.json"),
]  # fmt: skip


def _damaged_run(file: str, content: str | bytes, sandbox: Sandbox) -> list[str]:
    sandbox.file("run/config.yaml", "{}")
    sandbox.file(f"run/{file}", content)
    return ["report", str(sandbox.root / "run")]


def _run(name: str, file: str, content: str | bytes) -> Case:
    return Case(f"run: {name}", partial(_damaged_run, file, content), "run")


RUNS = [
    Case("run: missing", lambda s: ["report", "nowhere"], "nowhere"),
    _run("metrics not UTF-8", "metrics.csv", b"step\n\xff"),
    _run("metrics strings", "metrics.csv", "step,train/loss\na,b\n"),
    _run("metrics of 200,000 digits", "metrics.csv", "step,train/loss\n1," + "9" * 200_000),
    _run("games table a list", "games/table.json", "[1]"),
    _run("validations empty", "validations.jsonl", "{}\n"),
    _run("games empty", "val_games.jsonl", "{}\n"),
]

CASES = [*ROWS, *FILES, *CONFIGS, *FLAGS, *ADAPTERS, *CHECKPOINTS, *MODELS, *RUNS]
