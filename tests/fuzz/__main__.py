"""``python -m tests.fuzz TARGET [-max_total_time=60 ...]``: search with Atheris for inputs that violate a target.

Requires ``pip install -e .[fuzz]``. The options are libFuzzer's. An input that violates the target is written to
``crash-*`` in the working directory, and the exit code is not 0.
"""

from __future__ import annotations

import subprocess
import sys
import tempfile
from pathlib import Path

# Initial corpus by target.
SEEDS = {
    "rows": [
        b'{"prompt": "a", "completion": "b"}\n',
        b'\xef\xbb\xbf{"prompt": "\\u00e9", "game": 3}\r\n',
        b"\x1f\x8b\x08",
    ],
    "prompts": [
        b"Snake9;4,4;5,5;UUR\n",
        b"Snake on 2x2 grid.\nHead: [0, 0], Apple: [1, 1], Length: 1.\nBoard:\n. A\nH .\n",
        b"Moving UP from [1, 2]\n- Valid moves: ['UP']\n- Free space: {'up': 1, 'down': 2, 'left': 3}\nConclusion: UP",
    ],
    "metadata": [
        b'{"adapter_type": "lora", "base_model": "b", "base_model_name": "b", "base_revision": null,'
        b' "base_sha256": null, "trainable_parameters": 1,'
        b' "total_parameters": 2, "metrics": {"val/loss": 1.5}, "play": {}}'
    ],
    "configs": [b"balanced.yaml", b"model: &m\n  lora: {rank: 4}\ndata: *m\n", b"- !!int '0b_'\n"],
}


def main() -> int:
    """Run Atheris in a subprocess, because it exits the process, on a temporary corpus."""
    name, *options = sys.argv[1:]
    with tempfile.TemporaryDirectory() as corpus:
        for number, seed in enumerate(SEEDS[name]):
            Path(corpus, str(number)).write_bytes(seed)
        command = [sys.executable, "-m", "tests.fuzz.harness", name, *options, corpus]
        return subprocess.run(command, check=False).returncode


if __name__ == "__main__":
    sys.exit(main())
