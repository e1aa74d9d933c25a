"""A server that forks a child per command: importing torch in a fresh Python would cost seconds each time.

``python -m tests.e2e.bad_inputs.runner`` reads one JSON request per line from stdin and writes one JSON response per
line to stdout.
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
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any, NoReturn

REPOSITORY = Path(__file__).parents[3]
MAX_CPU_S = 20
# Ends a command that hangs without using the CPU; long, because other processes may keep the machine busy.
_TIMEOUT_S = 120
MAX_MEMORY_BYTES = 2 * 2**30
# Higher than MAX_MEMORY_BYTES: a case that would exhaust the machine's memory fails without affecting other processes.
_DATA_LIMIT_BYTES = 4 * 2**30
_PROGRAMS = ("os.system", "os.exec", "os.posix_spawn", "os.fork", "os.forkpty", "subprocess.Popen", "pty.spawn")
_CHANGES = ("os.mkdir", "os.remove", "os.rmdir", "os.truncate", "os.chmod")
_WRITES = os.O_WRONLY | os.O_RDWR | os.O_CREAT | os.O_TRUNC | os.O_APPEND


@dataclass(frozen=True)
class Outcome:
    """Result of a command.

    Attributes:
        exit_code: The exit code, or 128 plus the number of the signal that ended the process.
        stdout: Output on stdout.
        stderr: Output on stderr.
        cpu_s: CPU time.
        peak_memory_bytes: Peak resident memory, imported libraries included.
        violations: Programs started, connections made and files changed outside the command's directory.
    """

    exit_code: int
    stdout: str
    stderr: str
    cpu_s: float
    peak_memory_bytes: int
    violations: list[str]


class Runner:
    """Client of the server."""

    def __init__(self, requests: IO[str], responses: IO[str]) -> None:
        self._requests = requests
        self._responses = responses

    def run(self, arguments: Sequence[str], directory: Path) -> Outcome:
        """Run one command with ``directory`` as its working, home, cache and temporary directory."""
        print(json.dumps([list(arguments), str(directory)]), file=self._requests, flush=True)
        return Outcome(**json.loads(self._responses.readline()))


@contextlib.contextmanager
def warm_runner() -> Iterator[Runner]:
    """Start the server, and stop it at the end."""
    with subprocess.Popen(
        [sys.executable, "-m", __spec__.name], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, cwd=REPOSITORY,
        env={**os.environ, **environment(Path(os.devnull)), "OMP_NUM_THREADS": "1"},
    ) as server:  # fmt: skip
        assert server.stdin
        assert server.stdout
        yield Runner(server.stdin, server.stdout)
        server.stdin.close()


def environment(directory: Path) -> Mapping[str, str]:
    """Return environment variables that confine a command's files to its directory and keep it off the network."""
    return {
        "HOME": str(directory),
        "TMPDIR": str(directory),
        "XDG_CACHE_HOME": str(directory),
        "HF_HOME": str(directory / "hf"),
        "SNAKE_LORA_PL_CACHE": str(directory / "cache"),
        "HF_HUB_OFFLINE": "1",
        "TOKENIZERS_PARALLELISM": "false",
        "PYTHONDONTWRITEBYTECODE": "1",  # a bytecode file would be reported as a file changed outside the directory
    }


def _serve() -> None:
    import_everything()
    (threads,) = (line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith("Threads"))
    assert threads.split() == ["Threads:", "1"], f"{threads}: a fork may hang"
    for line in sys.stdin:
        arguments, directory = json.loads(line)
        print(json.dumps(_run(arguments, Path(directory))), flush=True)


def import_everything() -> None:
    """Import the modules that the commands import on demand."""
    for name in (
        "snake_lora_pl.cli.app", "snake_lora_pl.cli.commands.adapters", "snake_lora_pl.cli.commands.audit",
        "snake_lora_pl.cli.commands.generate", "snake_lora_pl.cli.commands.merge",
        "transformers.models.llama.modeling_llama", "transformers.models.auto.modeling_auto",
        "transformers.models.auto.tokenization_auto", "peft", "gguf", "safetensors.torch",
    ):  # fmt: skip
        importlib.import_module(name)
    # Building the parser fills its caches of inspected signatures.
    from snake_lora_pl.__main__ import main

    with contextlib.redirect_stderr(io.StringIO()):
        main(["fit", "--data.train_path", "none.jsonl"])
    gc.freeze()


def _run(arguments: list[str], directory: Path) -> dict[str, Any]:
    with contextlib.ExitStack() as files:
        read_end, write_end = os.pipe()
        out, err = (files.enter_context(open(os.memfd_create(name), "w+b")) for name in ("out", "err"))
        child = os.fork()
        if not child:
            os.close(read_end)
            os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
            os.dup2(out.fileno(), 1)
            os.dup2(err.fileno(), 2)
            _run_child(arguments, directory, write_end)
        os.close(write_end)
        status, usage = _wait(child)
        with open(read_end, encoding="utf-8") as report:
            violations = report.read().splitlines()
        texts = []
        for file in (out, err):
            file.seek(0)
            texts.append(file.read().decode("utf-8", "backslashreplace"))
    code = os.waitstatus_to_exitcode(status)
    return {
        "exit_code": code if code >= 0 else 128 - code,
        "stdout": texts[0],
        "stderr": texts[1],
        "cpu_s": usage.ru_utime + usage.ru_stime,
        "peak_memory_bytes": usage.ru_maxrss * 1024,
        "violations": violations,
    }


def _wait(child: int) -> tuple[int, resource.struct_rusage]:
    """Wait for the child, and kill it after ``_TIMEOUT_S``."""
    handle = os.pidfd_open(child)
    try:
        if not select.select([handle], [], [], _TIMEOUT_S)[0]:
            os.kill(child, signal.SIGKILL)
        _, status, usage = os.wait4(child, 0)
    finally:
        os.close(handle)
    return status, usage


def _run_child(arguments: list[str], directory: Path, write_end: int) -> NoReturn:
    """Run the command as ``__main__`` does, under watch, and exit."""
    code = 70
    try:
        os.chdir(directory)
        os.environ.update(environment(directory))
        resource.setrlimit(resource.RLIMIT_DATA, (_DATA_LIMIT_BYTES, _DATA_LIMIT_BYTES))
        resource.setrlimit(resource.RLIMIT_CPU, (MAX_CPU_S, MAX_CPU_S))
        _report_violations(directory, write_end)
        from snake_lora_pl.__main__ import main

        code = main(arguments)
    except SystemExit as stop:  # raised by argparse
        code = stop.code if isinstance(stop.code, int) else 1
    except BaseException:
        sys.excepthook(*sys.exc_info())
        code = 1
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)


def _report_violations(directory: Path, write_end: int) -> None:
    """Write to the pipe each program started, each connection and each file changed outside ``directory``.

    Python's audit hooks do not see native code; for that, the tests compare directories.
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
