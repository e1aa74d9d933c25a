"""Run README's commands in order, in a copy of the project with a fresh virtual environment and an empty cache.

    python3 .ci/walk.py DIRECTORY

Trains the real base model with few steps and games; the log shows each command as it was run. Continues after a command
that fails, and ends with the list of failed commands.
"""

from __future__ import annotations

import os
import shlex
import subprocess
import sys
import threading
import time
import venv
from pathlib import Path

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT))

from tests import documented  # noqa: E402
from tests.fake_hub import TOKEN, FakeHub  # noqa: E402

SECTIONS = ("Install", "Quickstart", "Commands", "Development")


def copy_project(target: Path) -> None:
    """Copy the files that are tracked, or would be after ``git add``."""
    command = ["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard"]
    listed = subprocess.run(command, cwd=ROOT, check=True, capture_output=True)
    for name in filter(None, listed.stdout.decode().split("\0")):
        if (ROOT / name).is_file():
            (target / name).parent.mkdir(parents=True, exist_ok=True)
            (target / name).write_bytes((ROOT / name).read_bytes())


def adapters(project: Path) -> list[Path]:
    """Return the adapter directories of all runs so far, the newest first."""
    found = project.glob("logs/extensions/models/*/*/*/lora_adapters/model_artifacts")
    return sorted(found, key=lambda path: path.stat().st_mtime, reverse=True)


def filled_in(command: list[str], project: Path, cache: Path) -> list[str]:
    """Return the command with values for its placeholders."""
    values = {"DIRECTORY_OR_HUB_ID": str(cache / "base_models" / "smollm2-135m"), "OWNER/NAME": "me/snake"}
    values |= dict(zip(("DIR", "OTHER_DIR"), map(str, adapters(project)), strict=False))
    return [values.get(word, word) for word in command]


def main() -> int:
    """Run the commands; return the exit code."""
    directory = Path(sys.argv[1]).absolute()
    project, cache = directory / "snake_lora_pl", directory / "cache"
    copy_project(project)
    venv.create(directory / "venv", with_pip=True)
    hub = FakeHub()
    threading.Thread(target=hub.serve_forever, daemon=True).start()
    environment = {
        **{name: value for name, value in os.environ.items() if not name.startswith(("PYTHON", "VIRTUAL_ENV"))},
        "PATH": f"{directory / 'venv' / 'bin'}:{os.environ['PATH']}",
        "SNAKE_LORA_PL_CACHE": str(cache),
        "PIP_QUIET": "1",
        # A local hub that implements LFS uploads only, for `push`.
        "HF_ENDPOINT": hub.url,
        "HF_TOKEN": TOKEN,
        "HF_HOME": str(directory / "huggingface"),
        "HF_HUB_DISABLE_XET": "1",
    }

    failed = []
    examples = [e for e in documented.examples(documented.README) if e.section in SECTIONS and e.language == "bash"]
    for example in examples:
        for command in documented.commands(example):
            words = filled_in(documented.shortened(command), project, cache)
            print(f"\n{example.place} $ {shlex.join(words)}", flush=True)
            begin = time.monotonic()
            code = subprocess.run(words, cwd=project, env=environment, check=False).returncode
            print(f"{example.place} exit code {code} after {time.monotonic() - begin:.0f} s", flush=True)
            if code != 0:
                failed.append(shlex.join(command))
                break  # commands that are joined by `&&`
    print(f"\n{len(examples)} examples run, {len(failed)} failed", *failed, sep="\n")
    return 1 if failed else 0


if __name__ == "__main__":
    raise SystemExit(main())
