"""Runs commands in children of one process that has imported everything: a fresh Python and torch cost seconds each.

``python -m tests.e2e.bad_inputs.runner`` answers each line of JSON on stdin with one on stdout.
"""

from __future__ import annotations

import contextlib
import gc
import importlib
import io
import json
import os
import resource
import select
import signal
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NoReturn

REPOSITORY = Path(__file__).parents[3]
MAX_SECONDS = 20
MAX_MEMORY_BYTES = 2 * 2**30
# Above what is allowed, so that a case which asks for more than the machine has fails alone.
_DATA_LIMIT_BYTES = 4 * 2**30
_PROGRAMS = ("os.system", "os.exec", "os.posix_spawn", "os.fork", "os.forkpty", "subprocess.Popen", "pty.spawn")
_CHANGES = ("os.mkdir", "os.remove", "os.rmdir", "os.truncate", "os.chmod")
_WRITES = os.O_WRONLY | os.O_RDWR | os.O_CREAT | os.O_TRUNC | os.O_APPEND


@dataclass(frozen=True)
class Outcome:
    """How a command ended.

    Attributes:
        code: The exit code; 128 + the signal's number where one ended it.
        out: What it wrote to stdout.
        err: What it wrote to stderr.
        seconds: How long it took.
        memory_bytes: The most it held at once, the imported libraries included.
        forbidden: Programs started, connections made and files changed outside its directory.
    """

    code: int
    out: str
    err: str
    seconds: float
    memory_bytes: int
    forbidden: list[str]


class Runner:
    """Commands of ``snake_lora_pl`` in warm processes; each has a directory of its own to live in."""

    def __init__(self, server: subprocess.Popen[str]) -> None:
        self._server = server

    def run(self, arguments: Sequence[str], directory: Path) -> Outcome:
        """Run one command with ``directory`` as its working directory, home, cache and place for temporary files."""
        assert self._server.stdin is not None
        assert self._server.stdout is not None
        print(json.dumps([list(arguments), str(directory)]), file=self._server.stdin, flush=True)
        return Outcome(**json.loads(self._server.stdout.readline()))


@contextlib.contextmanager
def warm_runner() -> Iterator[Runner]:
    """Start the process whose children run the commands, and end it."""
    with subprocess.Popen(
        [sys.executable, "-m", __spec__.name], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, cwd=REPOSITORY,
        env={**os.environ, **environment(Path(os.devnull)), "OMP_NUM_THREADS": "1"},
    ) as server:  # fmt: skip
        yield Runner(server)
        assert server.stdin is not None
        server.stdin.close()


def environment(directory: Path) -> Mapping[str, str]:
    """The variables that keep what a command writes in its directory, and it off the network."""
    return {
        "HOME": str(directory),
        "TMPDIR": str(directory),
        "XDG_CACHE_HOME": str(directory),
        "HF_HOME": str(directory / "hf"),
        "SNAKE_LORA_PL_CACHE": str(directory / "cache"),
        "HF_HUB_OFFLINE": "1",
        "TOKENIZERS_PARALLELISM": "false",
        "PYTHONDONTWRITEBYTECODE": "1",  # what a first import leaves is not the command's doing
    }


def _serve() -> None:
    import_everything()
    (threads,) = (line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith("Threads"))
    assert threads.split() == ["Threads:", "1"], f"{threads}: a fork would hang"
    for line in sys.stdin:
        arguments, directory = json.loads(line)
        print(json.dumps(_run(arguments, Path(directory))), flush=True)


def import_everything() -> None:
    """Import what the commands import when they need it."""
    for name in (
        "snake_lora_pl.cli.app", "snake_lora_pl.cli.commands.adapters", "snake_lora_pl.cli.commands.audit",
        "snake_lora_pl.cli.commands.generate", "snake_lora_pl.cli.commands.merge",
        "transformers.models.llama.modeling_llama", "transformers.models.auto.modeling_auto",
        "transformers.models.auto.tokenization_auto", "peft", "gguf", "safetensors.torch",
    ):  # fmt: skip
        importlib.import_module(name)
    # Building the parser fills caches of what it found out about signatures.
    from snake_lora_pl.__main__ import main

    with contextlib.redirect_stderr(io.StringIO()):
        main(["fit", "--data.train_path", "none.jsonl"])
    gc.freeze()


def _run(arguments: list[str], directory: Path) -> dict[str, Any]:
    with contextlib.ExitStack() as files:
        read_end, write_end = os.pipe()
        out, err = (files.enter_context(open(os.memfd_create(name), "w+b")) for name in ("out", "err"))
        begin = time.monotonic()
        child = os.fork()
        if not child:
            os.close(read_end)
            os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
            os.dup2(out.fileno(), 1)
            os.dup2(err.fileno(), 2)
            _live(arguments, directory, write_end)
        os.close(write_end)
        status, usage = _wait(child)
        seconds = time.monotonic() - begin
        with open(read_end, encoding="utf-8") as told:
            forbidden = told.read().splitlines()
        texts = []
        for file in (out, err):
            file.seek(0)
            texts.append(file.read().decode("utf-8", "backslashreplace"))
    code = os.waitstatus_to_exitcode(status)
    return {
        "code": code if code >= 0 else 128 - code,
        "out": texts[0],
        "err": texts[1],
        "seconds": seconds,
        "memory_bytes": usage.ru_maxrss * 1024,
        "forbidden": forbidden,
    }


def _wait(child: int) -> tuple[int, resource.struct_rusage]:
    """The child's end, which comes after ``MAX_SECONDS`` at the latest."""
    handle = os.pidfd_open(child)
    try:
        if not select.select([handle], [], [], MAX_SECONDS)[0]:
            os.kill(child, signal.SIGKILL)
        _, status, usage = os.wait4(child, 0)
    finally:
        os.close(handle)
    return status, usage


def _live(arguments: list[str], directory: Path, write_end: int) -> NoReturn:
    """The child's whole life: the command as ``__main__`` runs it, under guard."""
    code = 70
    try:
        os.chdir(directory)
        os.environ.update(environment(directory))
        resource.setrlimit(resource.RLIMIT_DATA, (_DATA_LIMIT_BYTES, _DATA_LIMIT_BYTES))
        _guard(directory, write_end)
        from snake_lora_pl.__main__ import main

        code = main(arguments)
    except SystemExit as stop:  # what argparse ends with
        code = stop.code if isinstance(stop.code, int) else 1
    except BaseException:
        sys.excepthook(*sys.exc_info())
        code = 1
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)


def _guard(directory: Path, write_end: int) -> None:
    """Report programs that are started, connections, and files changed outside ``directory``.

    Python's hooks miss what native code does; for that the caller compares directories.
    """
    root = os.path.realpath(directory)

    def watch(event: str, values: tuple[Any, ...]) -> None:
        if event in _PROGRAMS or event in ("socket.connect", "socket.getaddrinfo"):
            os.write(write_end, f"{event} {values!r}\n".encode())
        elif event in ("os.rename", "os.link"):
            check(event, *values[:2])
        elif event == "os.symlink":
            check(event, values[1])
        elif event in _CHANGES:
            check(event, values[0])
        elif event == "open" and isinstance(values[2], int) and values[2] & _WRITES:
            check(event, values[0])

    def check(event: str, *paths: Any) -> None:
        for path in paths:
            if isinstance(path, (str, bytes, os.PathLike)):
                full = os.path.realpath(os.fsdecode(path))
                if full not in (root, os.devnull) and not full.startswith(root + os.sep):
                    os.write(write_end, f"{event} {full}\n".encode("utf-8", "backslashreplace"))

    sys.addaudithook(watch)


if __name__ == "__main__":
    _serve()
