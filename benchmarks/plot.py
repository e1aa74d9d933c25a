"""Bar chart of the training step's speed and memory, from the results of ``benchmarks.train_step``.

    python -m benchmarks.plot step.json --out docs/step.svg

``step.json`` is written by ``python -m benchmarks.train_step --json step.json``. Needs the extra ``bench``.
"""

from __future__ import annotations

import json
from pathlib import Path

from benchmarks.common import make_parser
from benchmarks.trainers import OURS

OUR_COLOR, OTHER_COLOR = "#2a7f62", "#b0b7bf"


def main() -> None:
    parser = make_parser("plot", __doc__)
    parser.add_argument("results", type=Path, help="JSON file of benchmarks.train_step")
    parser.add_argument("--out", type=Path, required=True, metavar="FILE", help="SVG file to write")
    options = parser.parse_args()

    import matplotlib

    matplotlib.use("svg")
    # Makes the file a function of the results, byte for byte.
    matplotlib.rcParams["svg.hashsalt"] = OURS
    import matplotlib.pyplot as plt

    contenders = json.loads(options.results.read_text(encoding="utf-8"))["contenders"]
    names = sorted(contenders, key=lambda name: contenders[name]["tokens_per_second"])
    colors = [OUR_COLOR if name == OURS else OTHER_COLOR for name in names]
    figure, axes = plt.subplots(1, 2, figsize=(9, 0.5 + 0.5 * len(names)), sharey=True, layout="constrained")
    for axis, key, label, number_format in (
        (axes[0], "tokens_per_second", "tokens per second (higher is better)", "%.0f"),
        (axes[1], "peak_memory_gib", "peak memory, GiB (lower is better)", "%.1f"),
    ):
        bars = axis.barh(names, [contenders[name][key] for name in names], color=colors)
        axis.bar_label(bars, fmt=number_format, padding=3)
        axis.set_xlabel(label)
        axis.margins(x=0.15)
        axis.spines[["top", "right"]].set_visible(False)
    figure.savefig(options.out, metadata={"Date": None})


if __name__ == "__main__":
    main()
