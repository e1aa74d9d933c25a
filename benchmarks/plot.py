"""One picture of the step beside other trainers', from the figures that ``benchmarks.train_step --json`` wrote.

python -m benchmarks.plot step.json --out docs/step.svg
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path

OURS = "snake_lora_pl"


def main() -> None:
    import matplotlib

    matplotlib.use("svg")
    # The same figures give the same file, byte for byte.
    matplotlib.rcParams["svg.hashsalt"] = OURS
    import matplotlib.pyplot as plt

    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("figures", type=Path, help="JSON file of benchmarks.train_step")
    parser.add_argument("--out", type=Path, required=True, help="picture to write")
    options = parser.parse_args()
    contenders = json.loads(options.figures.read_text())["contenders"]
    names = sorted(contenders, key=lambda name: contenders[name]["tokens_per_second"])
    figure, axes = plt.subplots(1, 2, figsize=(9, 0.5 + 0.5 * len(names)), sharey=True, layout="constrained")
    for axis, key, label in (
        (axes[0], "tokens_per_second", "tokens per second (more is better)"),
        (axes[1], "peak_memory_gib", "peak memory, GiB (less is better)"),
    ):
        bars = axis.barh(
            names, [contenders[n][key] for n in names], color=["#2a7f62" if n == OURS else "#b0b7bf" for n in names]
        )
        axis.bar_label(bars, fmt="%.0f" if key == "tokens_per_second" else "%.1f", padding=3)
        axis.set_xlabel(label)
        axis.margins(x=0.15)
        axis.spines[["top", "right"]].set_visible(False)
    figure.savefig(options.out, metadata={"Date": None})


if __name__ == "__main__":
    main()
