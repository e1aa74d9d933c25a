"""The dashboard of a W&B project as code: ``python -m snake_lora_pl.reporting.wandb_workspace --entity NAME``.

It saves a view of the project in which the panels are laid out; ``--json`` prints it instead, and needs no network.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from typing import TYPE_CHECKING

from snake_lora_pl.errors import one_line

if TYPE_CHECKING:
    from wandb_workspaces.workspaces import Workspace

STEP = "trainer/global_step"

# Sections in their order: panels by title with the metrics drawn in each; * ends the name of a group.
LINE_PLOTS: dict[str, dict[str, list[str]]] = {
    "Playing": {
        "Apples a game": ["play/apples_mean", "play/apples_median"],
        "Fatal and unreadable moves": ["play/fatal_move_rate", "play/unparseable_rate"],
        "As the teacher": ["play/teacher_agreement", "play/optimal_agreement"],
        "Games won": ["play/win_rate"],
        "Steps": ["play/steps_mean"],
    },
    "Learning": {
        "Loss": ["train/loss", "val/loss"],
        "Accuracy on validation rows": ["val/decision_accuracy", "val/move_accuracy", "val/legal_move_rate"],
        "Tokens and whole completions": ["val/token_accuracy", "val/exact_match"],
        "Learning rate": ["train/learning_rate"],
        "Gradient norm": ["train/gradient_norm"],
        "Rank budget (AdaLoRA)": ["train/rank_budget"],
    },
    "Speed and memory": {
        "Throughput": ["perf/tokens_per_second", "perf/target_tokens_per_second"],
        "Peak memory, GiB": ["perf/peak_memory_gib"],
        "Moves a second": ["play/moves_per_second"],
    },
}
# Groups of metrics whose members depend on the model.
GROUPS = {"Weight norms": "adapter/weight_norm/", "Update norms": "adapter/update_norm/"}
MEDIA = [
    *(f"{games}/{which}" for games in ("final_games", "games") for which in ("best", "median", "worst")),
    *(f"{games}/{which}_video" for games in ("final_games", "games") for which in ("best", "median", "worst")),
]


def workspace(entity: str, project: str) -> Workspace:
    """The view, not yet saved."""
    import wandb_workspaces.reports.v2 as wr
    import wandb_workspaces.workspaces as ws

    sections = [
        ws.Section(
            name=name,
            is_open=True,
            panels=[wr.LinePlot(title=title, x=STEP, y=list(metrics)) for title, metrics in plots.items()],
        )
        for name, plots in LINE_PLOTS.items()
    ]
    norms = [
        wr.LinePlot(title=title, x=STEP, metric_regex=f"^{prefix}.*", ignore_outliers=False)
        for title, prefix in GROUPS.items()
    ]
    sections.insert(2, ws.Section(name="Adapter", is_open=True, panels=norms))
    games = [wr.MediaBrowser(title="Games", media_keys=MEDIA)]
    sections.insert(1, ws.Section(name="Games to step through", is_open=True, panels=games))
    return ws.Workspace(entity=entity, project=project, name="snake_lora_pl", sections=sections)


def main(arguments: Sequence[str] | None = None) -> int:
    """Save the view on the server that wandb knows, or print it."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--entity", required=True, help="user or team")
    parser.add_argument("--project", default="snake_lora_pl")
    parser.add_argument("--json", action="store_true", help="print the view and save nothing")
    options = parser.parse_args(arguments)
    try:
        import wandb
        from wandb.sdk.lib.service.service_connection import WandbApiFailedError

        view = workspace(options.entity, options.project)
    except ModuleNotFoundError as error:
        parser.exit(2, f"error: {error.name} is not installed: pip install 'snake_lora_pl[wandb]'.\n")
    if options.json:
        print(view._to_model().model_dump_json(indent=2))
        return 0
    try:
        print(view.save().url)
    except (wandb.Error, WandbApiFailedError) as error:
        told = f"error: W&B did not save the layout: {one_line(error)}."
        parser.exit(2, f"{told} Mend the key (wandb login) or --entity.\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
