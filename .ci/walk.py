"""The newcomer's walk: README's first commands and its tasks, word for word, in order, where nothing is installed yet.

    python3 .ci/walk.py DIRECTORY

Makes DIRECTORY with a copy of the project, a fresh virtual environment and an empty cache. The real base model is
trained; steps and games are cut to a few, and the log shows each command as it was run. Goes on after a command that
fails, and ends with the list of those.
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

SECTIONS = ("Start", "Tasks")


def copy_project(target: Path) -> None:
    """What is in the repository, and what would be after ``git add``."""
    command = ["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard"]
    listed = subprocess.run(command, cwd=ROOT, check=True, capture_output=True)
    for name in filter(None, listed.stdout.decode().split("\0")):
        if (ROOT / name).is_file():
            (target / name).parent.mkdir(parents=True, exist_ok=True)
            (target / name).write_bytes((ROOT / name).read_bytes())


def adapters(project: Path) -> list[Path]:
    """Adapter directories of the runs made so far, the newest first."""
    found = project.glob("logs/extensions/models/*/*/*/lora_adapters/model_artifacts")
    return sorted(found, key=lambda path: path.stat().st_mtime, reverse=True)


def filled_in(command: list[str], project: Path, cache: Path) -> list[str]:
    """The command with something for each placeholder."""
    names = {"DIRECTORY_OR_HUB_ID": str(cache / "base_models" / "smollm2-135m"), "OWNER/NAME": "me/snake"}
    names |= dict(zip(("DIR", "OTHER_DIR"), map(str, adapters(project)), strict=False))
    return [names.get(word, word) for word in command]


def main() -> int:
    """Walk; return the exit code."""
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
        # A hub that speaks LFS only, for `push`.
        "HF_ENDPOINT": hub.url,
        "HF_TOKEN": TOKEN,
        "HF_HOME": str(directory / "huggingface"),
        "HF_HUB_DISABLE_XET": "1",
    }

    failed = []
    walked = [e for e in documented.examples(documented.README) if e.section in SECTIONS and e.language == "bash"]
    for example in walked:
        for command in documented.commands(example):
            words = filled_in(documented.shortened(command), project, cache)
            print(f"\n{example.place} $ {shlex.join(words)}", flush=True)
            begin = time.monotonic()
            code = subprocess.run(words, cwd=project, env=environment, check=False).returncode
            print(f"{example.place} exit code {code} after {time.monotonic() - begin:.0f} s", flush=True)
            if code != 0:
                failed.append(shlex.join(command))
                break  # what `&&` joins
    print(f"\n{len(walked)} examples walked, {len(failed)} failed", *failed, sep="\n")
    return 1 if failed else 0


if __name__ == "__main__":
    raise SystemExit(main())
