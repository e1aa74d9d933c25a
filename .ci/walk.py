"""Run README's commands in order, in a copy of the project with a fresh virtual environment and an empty cache.

    python3 .ci/walk.py DIRECTORY [SECTION...]

Given sections, only those run; a directory of earlier sections is continued.
Trains the real base model with few steps and games; the log shows each command as it was run. Continues after a command
that fails, and ends with the list of failed commands.
"""

from __future__ import annotations

import json
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
    """Return the newest adapter directory, then those on the same base: others cannot play against it."""
    found = project.glob("logs/extensions/models/*/*/*/lora_adapters/model_artifacts")
    newest_first = sorted(found, key=lambda path: (path / "adapter_model.safetensors").stat().st_mtime, reverse=True)
    bases = {}
    for path in newest_first:
        metadata = json.loads((path / "adapter_metadata.json").read_text())
        bases[path] = metadata["base_model"], metadata["quantization"]
    return [path for path in newest_first if bases[path] == bases[newest_first[0]]]


def filled_in(command: list[str], project: Path, cache: Path) -> list[str]:
    """Return the command with values for its placeholders."""
    values = {"DIRECTORY_OR_HUB_ID": str(cache / "base_models" / "smollm2-135m"), "OWNER/NAME": "me/snake"}
    values |= dict(zip(("DIR", "OTHER_DIR"), map(str, adapters(project)), strict=False))
    return [values.get(word, word) for word in command]


def main() -> int:
    """Run the commands; return the exit code."""
    directory = Path(sys.argv[1]).absolute()
    project, cache = directory / "snake_lora_pl", directory / "cache"
    if not directory.exists():
        copy_project(project)
        venv.create(directory / "venv", with_pip=True)
    hub = FakeHub()
    threading.Thread(target=hub.serve_forever, daemon=True).start()
    environment = {
        **{name: value for name, value in os.environ.items() if not name.startswith(("PYTHON", "VIRTUAL_ENV"))},
        "PATH": f"{directory / 'venv' / 'bin'}:{os.environ['PATH']}",
        "SNAKE_LORA_PL_CACHE": str(cache),
        "PIP_QUIET": "2",
        # A local hub that implements LFS uploads only, for `push`.
        "HF_ENDPOINT": hub.url,
        "HF_TOKEN": TOKEN,
        "HF_HOME": str(directory / "huggingface"),
        "HF_HUB_DISABLE_XET": "1",
    }

    failed = []
    sections = sys.argv[2:] or SECTIONS
    examples = [e for e in documented.examples(documented.README) if e.section in sections and e.language == "bash"]
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
