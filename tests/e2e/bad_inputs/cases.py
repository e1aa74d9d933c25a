"""The corpus: what is given, what exit code and which words must come back.

A case's builder makes its bad thing in the sandbox and returns the command's arguments.
"""

from __future__ import annotations

import gzip
import hashlib
import json
import os
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
        name: What is wrong.
        build: Makes it, and returns the arguments of the command.
        message: A piece of what must be said on stderr (stdout where the exit code is 0).
        code: The exit code.
    """

    name: str
    build: Builder
    message: str
    code: int = 2


GOOD = json.dumps({"prompt": "a", "completion": "b"})


def _audit(content: str | bytes, sandbox: Sandbox, name: str = "rows.jsonl") -> list[str]:
    return ["audit", sandbox.file(name, content)]


def _row(name: str, line: str | bytes, message: str, code: int = 2) -> Case:
    return Case(f"row: {name}", partial(_audit, line), message, code)


def _row_to_fit(name: str, line: str | bytes, message: str) -> Case:
    content = GOOD.encode() + b"\n" + (line.encode() if isinstance(line, str) else line) + b"\n"
    return Case(f"row to fit: {name}", lambda s: _fit(s, f"--data.train_path={s.file('rows.jsonl', content)}"), message)


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
    _row("array", "[1, 2]", "object"),
    _row("number", "17", "object"),
    _row("string", '"prompt"', "object"),
    _row("null", "null", "object"),
    _row("true", "true", "object"),
    _row("empty object", "{}", "prompt"),
    _row("no prompt", '{"completion": "b"}', "prompt"),
    _row("no completion", '{"prompt": "a"}', "completion"),
    _row("empty prompt", '{"prompt": "", "completion": "b"}', "prompt"),
    _row("empty completion", '{"prompt": "a", "completion": ""}', "completion"),
    _row("prompt a number", '{"prompt": 3, "completion": "b"}', "prompt"),
    _row("completion null", '{"prompt": "a", "completion": null}', "completion"),
    _row("completion a list", '{"prompt": "a", "completion": ["b"]}', "completion"),
    _row("prompt an object", '{"prompt": {"a": 1}, "completion": "b"}', "prompt"),
    _row("truncated", '{"prompt": "a", "comple', "JSON"),
    _row("single quotes", "{'prompt': 'a', 'completion': 'b'}", "JSON"),
    _row("trailing comma", '{"prompt": "a", "completion": "b",}', "JSON"),
    _row("two objects on a line", GOOD + GOOD, "JSON"),
    _row("comment", "// " + GOOD, "JSON"),
    _row("control character", '{"prompt": "a\x01", "completion": "b"}', "JSON"),
    _row("NaN", '{"prompt": NaN, "completion": "b"}', "a number"),
    _row("infinity in a key that is ignored", '{"prompt": "a", "completion": "b", "x": Infinity}', "rows", code=0),
    _row("duplicate keys", '{"prompt": "a", "prompt": "c", "completion": "b"}', "prompt"),
    _row("lone surrogate", '{"prompt": "\\ud800", "completion": "b"}', "half a character"),
    _row("not UTF-8", b'{"prompt": "\xff\xfe", "completion": "b"}', "UTF-8"),
    _row("UTF-16", GOOD.encode("utf-16"), "UTF-8"),
    _row("null bytes", b"\x00" * 64, "JSON"),
    _row("nested 100,000 deep", "[" * 100_000 + "]" * 100_000, "deep"),
    _row("nested deep within a row", '{"prompt": "a", "completion": "b", "x": ' + "[" * 50_000 + "}", "deep"),
    _row("a number of 10,000 digits", '{"prompt": "a", "completion": "b", "x": ' + "9" * 10_000 + "}", "digits"),
    _row("upper-case keys", '{"Prompt": "a", "Completion": "b"}', "prompt"),
    _row("keys that steer a terminal", '{"\\u001b[2J\\u0007\\u202e": 1}', "missing key 'prompt'"),
    _row("a key of 1 MiB", json.dumps({"k" * 2**20: 1}), "missing key 'prompt'"),
    _row("a grid of a million a side", _prompting(SNAKE.format(size=999_999, last=999_998, rest="")), "rows", code=0),
    _row("a snake of a million cells", _prompting("Snake9;0,0;5,5;" + "U" * 10**6 + "\n"), "rows", code=0),
    _row("a body that never ends", _prompting(SNAKE.format(size=10, last=9, rest="[, " * 10**5)), "rows", code=0),
    _row("a drawing of a million lines", _prompting(DRAWN + "Board:\n" + ". S H A\n" * 10**6), "rows", code=0),
    _row("100,000 conclusions", _prompting("a", "Conclusion: " * 10**5), "rows", code=0),
    _row("claims that never end", _prompting(SNAKE.format(size=10, last=9, rest=""), CLAIMS), "rows", code=0),
    _row_to_fit("array", "[1, 2]", "rows.jsonl:2: not a JSON object"),
    _row_to_fit("truncated", '{"prompt": "a", "comple', "rows.jsonl:2: bad JSON"),
    _row_to_fit("nested 100,000 deep", "[" * 100_000 + "]" * 100_000, "rows.jsonl:2: JSON nested too deep"),
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


def _file(name: str, build: Builder, message: str) -> Case:
    return Case(f"file: {name}", build, message)


FILES = [
    _file("missing", lambda s: ["audit", str(s.root / "none.jsonl")], "none.jsonl"),
    _file("empty", partial(_audit, ""), "holds no row"),
    _file("blank lines", partial(_audit, "\n\n  \n"), "holds no row"),
    _file("a directory", lambda s: ["audit", str(s.root)], "directory"),
    _file("a loop of links", lambda s: ["audit", _symlink_loop(s)], "a.jsonl"),
    _file("a pipe nobody writes to", lambda s: ["audit", _fifo(s)], "pipe.jsonl"),
    _file("an endless device", lambda s: ["audit", "/dev/zero"], "/dev/zero"),
    _file("a path with a null byte", lambda s: ["audit", "a\0b"], "a\\x00b"),
    _file("a name of 5,000 letters", lambda s: ["audit", "x" * 5000], "xxx"),
    _file("a name that steers a terminal", lambda s: ["audit", "\x1b[2J\u202e"], "\\x1b[2J\\u202e"),
    _file("a pattern without files", lambda s: ["audit", str(s.root / "*.jsonl")], "*.jsonl"),
    _file("gzip by name only", partial(_audit, GOOD, name="rows.jsonl.gz"), "Not a gzipped file"),
    _file("truncated gzip", partial(_audit, gzip.compress(GOOD.encode() * 999)[:-9], name="rows.jsonl.gz"),
          "cannot be decompressed"),
    _file("a gzip bomb", partial(_audit, gzip.compress(bytes(2**28), 1), name="rows.jsonl.gz"), "more than 10 MiB"),
    Case("file: gzip under a plain name", partial(_audit, gzip.compress(GOOD.encode())), "rows", code=0),
    _file("a picture", partial(_audit, b"\x89PNG\r\n\x1a\n" + bytes(range(256)) * 9), "UTF-8"),
    _file("one line of 64 MiB", partial(_audit, b"x" * 2**26), "more than 10 MiB"),
    _file("a CSV file", partial(_audit, "prompt,completion\na,b\n"), "JSON"),
    _file("missing, to fit", lambda s: _fit(s, "--data.train_path=none.jsonl"), "none.jsonl"),
    _file("empty, to fit", lambda s: _fit(s, f"--data.train_path={s.file('e.jsonl', '')}"), "no row"),
    _file("bad, to fit", lambda s: _fit(s, f"--data.train_path={s.file('b.jsonl', '17')}"), "b.jsonl:1"),
    _file("prompts missing, to predict", lambda s: ["predict", *_fit(s)[1:-1], f"--adapter={s.good_adapter}"],
          "predict_path"),
]  # fmt: skip


def _config(content: str | bytes, sandbox: Sandbox) -> list[str]:
    return _fit(sandbox, "--config", sandbox.file("own.yaml", content))


def _yaml(name: str, content: str | bytes, message: str) -> Case:
    return Case(f"config: {name}", partial(_config, content), message)


BOMB = "a: &a [x,x,x,x,x,x,x,x,x]\n" + "".join(
    f"{c}: &{c} [{','.join([f'*{p}'] * 9)}]\n" for p, c in zip("abcdefgh", "bcdefghi", strict=True)
)
CONFIGS = [
    _yaml("not YAML", "model: [", "own.yaml"),
    _yaml("tabs", "model:\n\tlora: 1\n", "own.yaml"),
    _yaml("a list", "- 1\n- 2\n", "own.yaml"),
    _yaml("a string", "hello", "own.yaml"),
    _yaml("not UTF-8", b"model: \xff\xfe", "own.yaml"),
    _yaml("a bomb of aliases", BOMB, "own.yaml"),
    _yaml("nested 5,000 deep", "a: " + "[" * 5000 + "]" * 5000, "own.yaml"),
    _yaml("nested half a million deep", "a: " + "[" * 500_000, "own.yaml"),
    _yaml("an alias to itself", "a: &a [*a]", "own.yaml"),
    _yaml("larger than 16 MiB", b"# " + bytes(2**24), "larger than 16 MiB"),
    _yaml("a value that looks like a number", "data:\n  batch_size: 0b_\n", "cannot be read"),
    _yaml("a number of 10,000 digits", "data:\n  batch_size: " + "9" * 10_000, "own.yaml"),
    _yaml("a key that is a list", "data:\n  ? [a]\n  : 1\n", "own.yaml"),
    _yaml("code to run", "model: !!python/object/apply:os.mkdir [canary]\n", "own.yaml"),
    _yaml("code to import", "model: !!python/module:canary\n", "own.yaml"),
    _yaml(
        "a class to make", "trainer:\n  callbacks:\n  - class_path: os.mkdir\n    init_args: {path: canary}\n", "own"
    ),
    _yaml("unknown key", "model:\n  learning_rat: 1\n", "learning_rate"),
    _yaml("unknown group", "modle:\n  rank: 1\n", "modle"),
    _yaml("duplicate keys", "data:\n  batch_size: 1\n  batch_size: 2\n", "batch_size"),
    _yaml("a scalar for a group", "model: 3\n", "model is a group of keys"),
    _yaml("null for a number", "data:\n  batch_size: null\n", "batch_size"),
    _yaml("null for a rank", "model:\n  lora:\n    rank: null\n", "rank"),
    Case("config: missing", lambda s: _fit(s, "--config", "none.yaml"), "none.yaml"),
    Case("config: outside by name", lambda s: _fit(s, "--config", "../../../etc/passwd"), "passwd"),
    Case("config: a directory", lambda s: _fit(s, "--config", str(s.root)), "directory"),
    Case("config: empty name", lambda s: _fit(s, "--config", ""), "--config"),
    Case("config: no value", lambda s: [*_fit(s), "--config"], "--config"),
    Case("config: a pipe", lambda s: _fit(s, "--config", _fifo(s)), "pipe"),
]


def _flag(flag: str, message: str) -> Case:
    return Case(f"flag: {flag[:40]}{len(flag)}", lambda s: _fit(s, flag), message)


FLAGS = [
    _flag("--model.lora.rank=0", "rank"),
    _flag("--model.lora.rank=-4", "rank"),
    _flag("--model.lora.rank=1.5", "rank"),
    _flag("--model.lora.rank=1000000000", "rank"),
    _flag("--model.lora.alpha=0", "alpha"),
    _flag("--model.lora.alpha=nan", "alpha"),
    _flag("--model.lora.dropout=1", "dropout"),
    _flag("--model.lora.dropout=-0.1", "dropout"),
    _flag("--model.lora.dropout=nan", "dropout"),
    _flag("--model.lora.target_modules=[]", "target_modules"),
    _flag("--model.lora.target_modules=[nonsense]", "nonsense"),
    _flag("--model.lora.target_modules=(", "target_modules"),
    _flag("--model.learning_rate=-1", "learning_rate"),
    _flag("--model.learning_rate=0", "learning_rate"),
    _flag("--model.learning_rate=inf", "learning_rate"),
    _flag("--model.learning_rate=fast", "learning_rate"),
    _flag("--model.weight_decay=-1", "weight_decay"),
    _flag("--model.warmup_steps=-1", "warmup_steps"),
    _flag("--model.final_learning_rate_fraction=2", "final_learning_rate_fraction"),
    _flag("--model.dtype=int8", "dtype"),
    _flag("--model.adapter_type=none", "adapter_type"),
    _flag("--model.base_model=", "base model"),
    _flag("--model.base_model=../../../../etc", "etc"),
    _flag("--model.base_model=a/b/c/d", "a/b/c/d"),
    _flag("--model.base_model=smollm", "smollm2-135m"),
    _flag("--model.max_new_tokens=0", "max_new_tokens"),
    _flag("--model.loss_chunk_tokens=0", "loss_chunk_tokens"),
    _flag(f"--model.loss_chunk_tokens={10**20}", "at most"),
    _flag(f"--model.max_new_tokens={10**20}", "at most"),
    _flag("--model.betas=[1,2]", "betas"),
    _flag("--data.batch_size=0", "batch_size"),
    _flag("--data.batch_size=-1", "batch_size"),
    _flag("--data.max_length=0", "max_length"),
    _flag("--data.max_length=1", "max_length"),
    _flag("--data.val_fraction=1", "val_fraction"),
    _flag("--data.val_fraction=-0.5", "val_fraction"),
    _flag("--data.val_fraction=nan", "val_fraction"),
    _flag("--data.template=none", "template"),
    _flag("--data.on_bad_row=maybe", "on_bad_row"),
    _flag("--data.on_overflow=maybe", "on_overflow"),
    _flag("--data.num_workers=-1", "num_workers"),
    _flag("--data.num_workers=100000", "at most"),
    _flag("--data.seed=-1", "seed"),
    _flag("--data.teacher=nobody", "teacher"),
    _flag("--trainer.max_steps=-7", "max_steps"),
    _flag("--trainer.accumulate_grad_batches=0", "accumulate"),
    _flag("--trainer.accelerator=quantum", "quantum"),
    _flag("--trainer.devices=0", "devices"),
    _flag("--trainer.precision=3", "precision"),
    _flag("--trainer.strategy=nonsense", "strategy"),
    _flag("--trainer.max_time=soon", "DD:HH:MM:SS"),
    _flag("--play.final_games=-1", "final_games"),
    _flag("--play.max_steps=0", "max_steps"),
    _flag("--play.batch_size=0", "batch_size"),
    _flag("--checkpoint.monitor=val/nothing", "val/nothing"),
    _flag("--checkpoint.save_every_n_steps=-1", "save_every_n_steps"),
    _flag("--adapter_name=../../escape", "adapter_name"),
    _flag("--adapter_name=/tmp/escape", "adapter_name"),
    _flag("--adapter_name=", "adapter_name"),
    _flag("--adapter_name=a\nb", "adapter_name"),
    _flag(f"--model.base_model={'x' * 5000}", "too long for the name"),
    _flag(f"--model.base_model={'x/' * 5000}", "too long for the name"),
    _flag(f"--config={'x' * 5000}", "no such file"),
    _flag(f"--ckpt_path={'x' * 5000}", "too long"),
    _flag(f"--root={'x' * 5000}", "x"),
    _flag(f"--adapter_name={'x' * 5000}", "x"),
    _flag(f"--adapter={'x' * 5000}", "x"),
    _flag(f"--model.learning_rate={'9' * 5000}", "learning_rate"),
    _flag(f"--data.batch_size={'9' * 5000}", "batch_size"),
    _flag("--data.batch_size=0b_", "batch_size"),
    _flag("--data.batch_size=\udcff", "batch_size"),
    _flag("--data.train_path=\udcff", "\\udcff"),
    _flag(f"--model.lora.rank={'[' * 5000}", "rank"),
    _flag("--nonsense", "nonsense"),
    _flag("--model.lora.alpha=inf", "alpha"),
    _flag("--model.lora.target_modules=(([a-z_.0-9])+)+!", "may take for ever"),
    _flag("--model.lora.rank_pattern={'(a|bb)+c': 4}", "may take for ever"),
    _flag("--data.pad_to_multiple_of=1000000000", "pad_to_multiple_of"),
    _flag("--data.seed=99999999999999999999999", "seed"),
    _flag("--seed_everything=-1", "seed_everything"),
    _flag("--play.grid_size=100000", "at most 256"),
    _flag("--trainer.val_check_interval=9999999", "val_check_interval"),
    _flag("--trainer.check_val_every_n_epoch=0", "check_val_every_n_epoch"),
    _flag("--trainer.devices=9999", "cores"),
    _flag("--trainer.devices=-1", "devices=-1"),
    _flag("--trainer.strategy=ddp_spawn", "ddp.yaml"),
    _flag("--early_stopping.monitor=val/nothing", "early_stopping.monitor"),
    _flag("--hub_tokn=verysecretvalue", "--hub_tokn=***"),
    Case("flag: an adapter into a directory of other files",
         lambda s: _fit(s, f"--checkpoint.adapter_dir={Path(s.file('mine/dear', 'x')).parent}"), "would be replaced"),
    Case("flag: generate into a null byte", lambda s: ["generate", "--out", "a\0b", "--games", "1"], "null byte"),
    Case("flag: a root that is a file", lambda s: _fit(s, f"--root={s.file('own', '')}"), "--root"),
    Case("flag: generate no games", lambda s: ["generate", "--out", "x.jsonl", "--games", "0"], "games"),
    Case("flag: generate a huge grid", lambda s: ["generate", "--out", "x", "--grid_size", "100000"], "at most 256"),
    Case("flag: generate a grid of one", lambda s: ["generate", "--out", "x", "--grid_size", "1"], "at least 2"),
    Case("flag: generate into a directory", lambda s: ["generate", "--out", str(s.root), "--games", "1"], "directory"),
    Case("flag: generate by nobody", lambda s: ["generate", "--out", "x", "--teacher", "x"], "teacher"),
    Case("flag: generate in no style", lambda s: ["generate", "--out", "x", "--style", "x"], "style"),
    Case("flag: no command of ours", lambda s: ["trian"], "trian"),
    Case("flag: merge without a place", lambda s: ["merge", "--adapter", str(s.good_adapter)], "--out"),
    Case("flag: merge into the adapter", lambda s: ["merge", "--adapter", str(s.adapter()), "--out", "adapter"],
         "--out"),
    Case("flag: adapters of no directory", lambda s: ["adapters", "nowhere"], "nowhere"),
]  # fmt: skip


def _damaged_adapter(damage: Callable[[Sandbox, Path], object], sandbox: Sandbox) -> list[str]:
    adapter = sandbox.adapter()
    damage(sandbox, adapter)
    return ["merge", "--adapter", str(adapter), "--out", "merged"]


def _adapter(name: str, damage: Callable[[Sandbox, Path], object], message: str) -> Case:
    return Case(f"adapter: {name}", partial(_damaged_adapter, damage), message)


def _truncated_adapter(verb: str, sandbox: Sandbox) -> list[str]:
    adapter = sandbox.adapter()
    os.truncate(adapter / "adapter_model.safetensors", 100)
    return [verb, *_fit(sandbox)[1:-1], f"--adapter={adapter}"]


def _described(verb: str, changes: dict[str, object], sandbox: Sandbox) -> list[str]:
    adapter = sandbox.adapter()
    sandbox.edited_json(adapter / "adapter_metadata.json", **changes)
    return [verb, *_fit(sandbox)[1:-1], f"--adapter={adapter}"]


def _not_numbers(verb: str, sandbox: Sandbox) -> list[str]:
    from safetensors.torch import load, save

    weights = load((sandbox.good_adapter / "adapter_model.safetensors").read_bytes())
    content = save({name: values * float("nan") for name, values in weights.items()})
    adapter = sandbox.adapter()
    _vouched(lambda _: content)(sandbox, adapter)
    return [verb, *_fit(sandbox)[1:-1], f"--adapter={adapter}"]


def _metadata(**changes: object) -> Callable[[Sandbox, Path], object]:
    return lambda s, a: s.edited_json(a / "adapter_metadata.json", **changes)


def _settings(**changes: object) -> Callable[[Sandbox, Path], object]:
    return lambda s, a: s.edited_json(a / "adapter_config.json", **changes)


def _weights(content: bytes) -> Callable[[Sandbox, Path], object]:
    return lambda s, a: (a / "adapter_model.safetensors").write_bytes(content)


def _vouched(content: Callable[[Sandbox], bytes]) -> Callable[[Sandbox, Path], object]:
    """Weights whose hash stands in the metadata."""

    def damage(sandbox: Sandbox, adapter: Path) -> None:
        weights = content(sandbox)
        (adapter / "adapter_model.safetensors").write_bytes(weights)
        sandbox.edited_json(adapter / "adapter_metadata.json", weights_sha256=hashlib.sha256(weights).hexdigest())

    return damage


def _agreed(**changes: object) -> Callable[[Sandbox, Path], object]:
    """Settings that stand in the metadata too."""

    def damage(sandbox: Sandbox, adapter: Path) -> None:
        sandbox.edited_json(adapter / "adapter_config.json", **changes)
        settings = json.loads((adapter / "adapter_config.json").read_text())
        sandbox.edited_json(adapter / "adapter_metadata.json", peft_config=settings)

    return damage


ADAPTERS = [
    _adapter("no metadata", lambda s, a: (a / "adapter_metadata.json").unlink(), "adapter_metadata.json"),
    _adapter("no settings", lambda s, a: (a / "adapter_config.json").unlink(), "adapter_config.json"),
    _adapter("no weights", lambda s, a: (a / "adapter_model.safetensors").unlink(), "adapter_model.safetensors"),
    _adapter("metadata empty", lambda s, a: (a / "adapter_metadata.json").write_text(""), "adapter_metadata.json"),
    _adapter("metadata a list", lambda s, a: (a / "adapter_metadata.json").write_text("[]"), "adapter_metadata.json"),
    _adapter("metadata nested deep", lambda s, a: (a / "adapter_metadata.json").write_text("[" * 99_999), "too deep"),
    _adapter("metadata not UTF-8", lambda s, a: (a / "adapter_metadata.json").write_bytes(b"\xff"), "adapter_metadata"),
    _adapter("metadata of 17 MiB", lambda s, a: (a / "adapter_metadata.json").write_bytes(bytes(2**24 + 1)), "16 MiB"),
    _adapter("metadata a link to itself", lambda s, a: ((a / "adapter_metadata.json").unlink(),
             (a / "adapter_metadata.json").symlink_to("adapter_metadata.json")), "adapter_metadata.json"),
    _adapter("a base that is elsewhere", _metadata(base_model_name="../../etc"), "../../etc"),
    _adapter("another base's hash", _metadata(base_sha256="0" * 64), "base"),
    _adapter("no hash of the weights", _metadata(weights_sha256=...), "metadata says nothing"),
    _adapter("another hash of the weights", _metadata(weights_sha256="0" * 64), "adapter_model.safetensors"),
    _adapter("a kind that does not exist", _metadata(adapter_type="os.system"), "adapter_type"),
    _adapter("a kind of another type", _metadata(adapter_type=["lora"]), "adapter_type"),
    _adapter("another rank", _settings(r=3), "r"),
    _adapter("a huge rank", _settings(r=10**9), "r"),
    _adapter("rank a word", _settings(r="many"), "r"),
    _adapter("another PEFT type", _settings(peft_type="PROMPT_TUNING"), "peft_type"),
    _adapter("code of its own", _settings(auto_mapping={"base_model_class": "os"}), "auto_mapping"),
    _adapter("weights truncated", lambda s, a: os.truncate(a / "adapter_model.safetensors", 100), "safetensors"),
    _adapter("weights empty", _weights(b""), "safetensors"),
    _adapter("weights a pickle", lambda s, a: _weights(s.pickle_bytes())(s, a), "safetensors"),
    _adapter("weights a torch file", lambda s, a: _weights(s.torch_file())(s, a), "safetensors"),
    _adapter("weights with a huge header", _weights(safetensors_bytes({}, length=2**62)), "safetensors"),
    _adapter("weights with a lying header", _weights(safetensors_bytes(
             {"x": {"dtype": "F32", "shape": [10**9], "data_offsets": [0, 4 * 10**9]}})), "safetensors"),
    _adapter("vouched weights empty", _vouched(lambda s: b""), "no safetensors file"),
    _adapter("vouched weights a pickle", _vouched(lambda s: s.pickle_bytes()), "no safetensors file"),
    _adapter("vouched weights a torch file", _vouched(lambda s: s.torch_file()), "no safetensors file"),
    _adapter("vouched weights with a huge header", _vouched(lambda s: safetensors_bytes({}, length=2**62)),
             "no safetensors file"),
    _adapter("vouched weights with a lying header", _vouched(lambda s: safetensors_bytes(
             {"x": {"dtype": "F32", "shape": [10**9], "data_offsets": [0, 4 * 10**9]}})), "no safetensors file"),
    _adapter("vouched weights of a negative shape", _vouched(lambda s: safetensors_bytes(
             {"x": {"dtype": "F32", "shape": [-1], "data_offsets": [0, 4]}}, bytes(4))), "no safetensors file"),
    _adapter("vouched weights of an overlap", _vouched(lambda s: safetensors_bytes(
             {n: {"dtype": "F32", "shape": [1], "data_offsets": [0, 4]} for n in "xy"}, bytes(4))), "no safetensors"),
    _adapter("vouched weights of nothing", _vouched(lambda s: safetensors_bytes({})), "wider than 0"),
    _adapter("agreed huge rank", _agreed(r=10**9), "names rank 1000000000"),
    _adapter("agreed negative rank", _agreed(r=-1), "`r` should be a positive"),
    _adapter("agreed rank a word", _agreed(r="many"), "peft_config.r"),
    _adapter("agreed layers of no name", _agreed(target_modules=["nonsense"]), "nonsense"),
    _adapter("agreed layers by a pattern that never ends", _agreed(target_modules="(a+)+$"), "(a+)+$"),
    _adapter("agreed layers by nested repetitions", _agreed(target_modules="(([a-z_.0-9])+)+!"), "for ever"),
    _adapter("agreed layers to leave out, likewise", _agreed(exclude_modules="(([a-z_.0-9])+)+!"), "for ever"),
    _adapter("agreed ranks of such layers", _agreed(rank_pattern={"(([a-z_.0-9])+)+!": 3}), "for ever"),
    _adapter("agreed layers by many repetitions", _agreed(target_modules=".*" * 12 + "!"), "for ever"),
    _adapter("agreed copies of layers", _agreed(layer_replication=[[0, 10**5]]), "does not fit"),
    _adapter("agreed code of a parallel library", _agreed(megatron_config={"x": 1}, megatron_core="os"), "megatron"),
    _adapter("a base behind an address with a password", _metadata(base_model_name="https://me:dear@host/x"), "***@"),
    _adapter("agreed runtime settings of another kind", _agreed(peft_type="../../x"), "../../x"),
    _adapter("a pickle beside the weights", lambda s, a: (a / "adapter_model.bin").write_bytes(s.pickle_bytes()),
             "adapter_model.bin"),
    _adapter("a program beside the weights", lambda s, a: (a / "modeling.py").write_text("open('canary', 'w')"),
             "modeling.py"),
    Case("adapter: weights not numbers, to validate", partial(_not_numbers, "validate"), "not finite"),
    Case("adapter: a template of no name, to validate", partial(_described, "validate", {"data": {"template": "x"}}),
         "data.template is 'x'"),
    Case("adapter: a grid of a million a side, to test", partial(_described, "test", {"grid_size": 10**6}), "256"),
    Case("adapter: a file", lambda s: ["validate", *_fit(s)[1:-1], f"--adapter={s.rows}"], "adapter"),
    Case("adapter: weights truncated, to validate", partial(_truncated_adapter, "validate"), "safetensors"),
    Case("adapter: weights truncated, to test", partial(_truncated_adapter, "test"), "safetensors"),
    Case("adapter: nowhere", lambda s: ["validate", *_fit(s)[1:-1], "--adapter=nowhere"], "nowhere"),
    Case("adapter: none, to merge", lambda s: ["merge", "--adapter", "nowhere", "--out", "m"], "nowhere"),
    Case("adapter: none, to test", lambda s: ["test", *_fit(s)[1:-1], "--adapter=nowhere"], "nowhere"),
]  # fmt: skip


def _checkpoint(name: str, make: Callable[[Sandbox], bytes], message: str) -> Case:
    return Case(
        f"checkpoint: {name}",
        # The good one is of step 1.
        lambda s: _fit(s, f"--ckpt_path={s.file('own.ckpt', make(s))}", "--trainer.max_steps=2"),
        message,
    )


def _edited_checkpoint(sandbox: Sandbox, edit: Callable[[dict], object]) -> bytes:
    import io

    import torch

    checkpoint = torch.load(sandbox.good_checkpoint, weights_only=True)
    edit(checkpoint)
    buffer = io.BytesIO()
    torch.save(checkpoint, buffer)
    return buffer.getvalue()


def _cut_a_moment(checkpoint: dict) -> None:
    state = checkpoint["optimizer_states"][0]["state"][0]
    state["exp_avg"] = state["exp_avg"].flatten()[:3]


def _unpacking(checkpoint: Path) -> bytes:
    """A checkpoint of which one part is 64 MiB of zeros, deflated."""
    import io
    import zipfile

    buffer = io.BytesIO()
    with zipfile.ZipFile(checkpoint) as good, zipfile.ZipFile(buffer, "w", zipfile.ZIP_DEFLATED) as bad:
        for part in good.infolist():
            bad.writestr(part.filename, bytes(2**26) if part.filename.endswith("/data/0") else good.read(part))
    return buffer.getvalue()


CHECKPOINTS = [
    _checkpoint("empty", lambda s: b"", "own.ckpt"),
    _checkpoint("text", lambda s: b"hello", "own.ckpt"),
    _checkpoint("a pickle", lambda s: s.pickle_bytes(), "can run code"),
    _checkpoint("a torch file with a pickle", lambda s: s.torch_file(), "can run code"),
    _checkpoint("truncated", lambda s: s.good_checkpoint.read_bytes()[:-1000], "own.ckpt"),
    _checkpoint("a part that unpacks to far more", lambda s: _unpacking(s.good_checkpoint), "compressed"),
    _checkpoint("without anything", lambda s: _edited_checkpoint(s, lambda c: c.clear()), "'state_dict' is missing"),
    _checkpoint("fit loop a list", lambda s: _edited_checkpoint(s, lambda c: c["loops"].update(fit_loop=[])), "loops"),
    _checkpoint("loops a number", lambda s: _edited_checkpoint(s, lambda c: c.update(loops=3)), "loops"),
    _checkpoint(
        "no weights", lambda s: _edited_checkpoint(s, lambda c: c.pop("state_dict")), "'state_dict' is missing"
    ),
    _checkpoint("other weights", lambda s: _edited_checkpoint(s, lambda c: c["state_dict"].popitem()), "checkpoint"),
    _checkpoint(
        "no optimizer",
        lambda s: _edited_checkpoint(s, lambda c: c.pop("optimizer_states")),
        "'optimizer_states' is missing",
    ),
    _checkpoint("no loops", lambda s: _edited_checkpoint(s, lambda c: c.pop("loops")), "'loops' is missing"),
    _checkpoint(
        "an optimizer of nothing",
        lambda s: _edited_checkpoint(s, lambda c: c["optimizer_states"].clear()),
        "'optimizer_states' are empty",
    ),
    _checkpoint("moments of another shape", lambda s: _edited_checkpoint(s, _cut_a_moment), "exp_avg of shape [3]"),
    _checkpoint(
        "an optimizer of other groups",
        lambda s: _edited_checkpoint(s, lambda c: c["optimizer_states"][0]["param_groups"].append({})),
        "groups",
    ),
    _checkpoint(
        "a schedule that is a word", lambda s: _edited_checkpoint(s, lambda c: c.update(lr_schedulers=["x"])), "damaged"
    ),
    _checkpoint(
        "weights that are numbers",
        lambda s: _edited_checkpoint(s, lambda c: c.update(state_dict=dict.fromkeys(c["state_dict"], 3))),
        "damaged",
    ),
    _checkpoint(
        "a loop without counters",
        lambda s: _edited_checkpoint(s, lambda c: c["loops"]["fit_loop"].clear()),
        "'loops' are damaged",
    ),
    _checkpoint(
        "counters that are words",
        lambda s: _edited_checkpoint(
            s, lambda c: c["loops"]["fit_loop"]["epoch_loop.batch_progress"].update(total="x")
        ),
        "damaged",
    ),
    _checkpoint(
        "random numbers of a word",
        lambda s: _edited_checkpoint(s, lambda c: c["snake_lora_pl.run_state"].update(random=["x"])),
        "damaged",
    ),
    _checkpoint(
        "a state of the run that is a list",
        lambda s: _edited_checkpoint(s, lambda c: c.update({"snake_lora_pl.run_state": []})),
        "damaged",
    ),
    _checkpoint(
        "a version that is none",
        lambda s: _edited_checkpoint(s, lambda c: c.update({"pytorch-lightning_version": "x"})),
        "damaged",
    ),
    Case("checkpoint: missing", lambda s: _fit(s, "--ckpt_path=none.ckpt"), "none.ckpt"),
    Case("checkpoint: a directory", lambda s: _fit(s, f"--ckpt_path={s.root}"), "ckpt_path"),
    Case("checkpoint: last of no run", lambda s: _fit(s, "--ckpt_path=last"), "last"),
]


def _damaged_model(damage: Callable[[Sandbox, Path], object], sandbox: Sandbox) -> list[str]:
    model = sandbox.model()
    damage(sandbox, model)
    return [*_fit(sandbox), f"--model.base_model={model}"]


def _model(name: str, damage: Callable[[Sandbox, Path], object], message: str) -> Case:
    return Case(f"base model: {name}", partial(_damaged_model, damage), message)


def _no_weights_but(sandbox: Sandbox, model: Path, name: str, content: bytes) -> None:
    (model / "model.safetensors").unlink()
    (model / name).write_bytes(content)


def _sharded(shard: str) -> Callable[[Sandbox, Path], object]:
    """A model whose index says that all weights lie in one file, which stands outside the directory."""

    def damage(sandbox: Sandbox, model: Path) -> None:
        from safetensors import safe_open

        with safe_open(model / "model.safetensors", framework="pt") as file:
            index = {"metadata": {}, "weight_map": dict.fromkeys(file.keys(), shard)}
        (model / "model.safetensors").rename(model.parent / "outside.safetensors")
        (model / "model.safetensors.index.json").write_text(json.dumps(index))

    return damage


def _pipe(path: Path) -> None:
    path.unlink()
    os.mkfifo(path)


def _few_tokens(sandbox: Sandbox, model: Path) -> None:
    from safetensors.torch import load, save

    weights = load((model / "model.safetensors").read_bytes())
    weights["model.embed_tokens.weight"] = weights["model.embed_tokens.weight"][:100].contiguous()
    (model / "model.safetensors").write_bytes(save(weights, metadata={"format": "pt"}))
    sandbox.edited_json(model / "config.json", vocab_size=100)


def _damaged_weights(sandbox: Sandbox, model: Path) -> None:
    from safetensors.torch import load, save

    weights = load((model / "model.safetensors").read_bytes())
    content = save({name: values * float("nan") for name, values in weights.items()}, metadata={"format": "pt"})
    (model / "model.safetensors").write_bytes(content)


def _damaged_run(damage: Callable[[Path], object], sandbox: Sandbox) -> list[str]:
    run = sandbox.root / "run"
    run.mkdir()
    (run / "config.yaml").write_text("{}")
    damage(run)
    return ["report", str(run)]


def _run(name: str, file: str, content: str | bytes, message: str = "cannot be read") -> Case:
    def damage(run: Path) -> None:
        (run / file).parent.mkdir(exist_ok=True)
        (run / file).write_bytes(content.encode() if isinstance(content, str) else content)

    return Case(f"run: {name}", partial(_damaged_run, damage), message)


RUNS = [
    Case("run: nowhere", lambda s: ["report", "nowhere"], "no run lies here"),
    _run("metrics not UTF-8", "metrics.csv", b"step\n\xff", "cannot be read"),
    _run("metrics of words", "metrics.csv", "step,train/loss\na,b\n"),
    _run("metrics of one endless number", "metrics.csv", "step,train/loss\n1," + "9" * 200_000),
    _run("a table that is a list", "games/table.json", "[1]"),
    _run("validations of nothing", "validations.jsonl", "{}\n"),
    _run("games of nothing", "val_games.jsonl", "{}\n"),
]

MODELS = [
    _model("no config", lambda s, m: (m / "config.json").unlink(), "config.json"),
    _model("config empty", lambda s, m: (m / "config.json").write_text(""), "config.json"),
    _model("config a list", lambda s, m: (m / "config.json").write_text("[]"), "config.json"),
    _model("config nested deep", lambda s, m: (m / "config.json").write_text("[" * 99_999), "config.json"),
    _model("unknown architecture", lambda s, m: s.edited_json(m / "config.json", model_type="snake"), "snake"),
    _model("code of its own", lambda s, m: (s.edited_json(m / "config.json", model_type="own", auto_map={
           "AutoConfig": "own.Own", "AutoModelForCausalLM": "own.Own"}), (m / "own.py").write_text(
           "import os; os.mkdir('canary')")), "trust_remote_code"),
    _model("layers of no size", lambda s, m: s.edited_json(m / "config.json", hidden_size=0), "model"),
    _model("layers of another size", lambda s, m: s.edited_json(m / "config.json", intermediate_size=99), "model"),
    _model("size a word", lambda s, m: s.edited_json(m / "config.json", hidden_size="big"), "model"),
    _model("ten million layers", lambda s, m: s.edited_json(m / "config.json", num_hidden_layers=10**7), "at least"),
    _model("a billion tokens", lambda s, m: s.edited_json(m / "config.json", vocab_size=10**9), "at least"),
    _model("a million a layer", lambda s, m: s.edited_json(m / "config.json", hidden_size=2**20), "at least"),
    _model("fewer tokens than its tokenizer", _few_tokens, "its tokenizer knows 384 tokens"),
    _model("weights that are not numbers", _damaged_weights, "not finite"),
    _model("a pipe for a tokenizer", lambda s, m: _pipe(m / "tokenizer.json"), "tokenizer"),
    _model("a pipe for weights", lambda s, m: _pipe(m / "model.safetensors"), "model.safetensors"),
    _model("no weights", lambda s, m: (m / "model.safetensors").unlink(), "safetensors"),
    _model("weights truncated", lambda s, m: os.truncate(m / "model.safetensors", 999), "Safetensor"),
    _model("weights a pickle", lambda s, m: _no_weights_but(s, m, "pytorch_model.bin", s.torch_file()), "safetensors"),
    _model("weights with a lying header", lambda s, m: _no_weights_but(s, m, "model.safetensors", safetensors_bytes(
           {"x": {"dtype": "F32", "shape": [2**40], "data_offsets": [0, 2**42]}})), "Safetensor"),
    _model("shards that lie elsewhere", _sharded("../outside.safetensors"), "../outside.safetensors"),
    _model("shards that are missing", _sharded("model-00001-of-00002.safetensors"), "model-00001-of-00002.safetensors"),
    _model("an index of no shards", lambda s, m: (m / "model.safetensors.index.json").write_text("[]"), "index.json"),
    _model("no tokenizer", lambda s, m: [p.unlink() for p in m.glob("token*")], "tokenizer"),
    _model("tokenizer empty", lambda s, m: (m / "tokenizer.json").write_text("{}"), "tokenizer"),
    _model("tokenizer not JSON", lambda s, m: (m / "tokenizer.json").write_text("{"), "tokenizer"),
    Case("base model: a file", lambda s: [*_fit(s), f"--model.base_model={s.rows}"], "is a file"),
    Case("base model: an empty directory", lambda s: [*_fit(s), f"--model.base_model={s.root}"], "config.json"),
]  # fmt: skip

CASES = [*ROWS, *FILES, *CONFIGS, *FLAGS, *ADAPTERS, *CHECKPOINTS, *RUNS, *MODELS]
