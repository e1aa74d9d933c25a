"""Private names of W&B.

No other module uses such a name. Each function links the upstream source and has a test that fails when the function is
no longer needed.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import wandb


def check_api_key(run: wandb.Run) -> None:
    """Let an online run validate its API key now instead of at its first table or artifact.

    W&B validates the key once per run, and raises if the server is unreachable at that moment. After a successful
    check, tables and artifacts are stored on disk while the server is unreachable and are sent later.

    Source: ``Run._public_api`` in https://github.com/wandb/wandb/blob/v0.31.0/wandb/sdk/wandb_run.py

    Raises:
        wandb.Error: If the server rejects the key or cannot be reached.
    """
    run._public_api()


def declare_input_artifact(run: wandb.Run, artifact: wandb.Artifact) -> None:
    """Log an artifact as an input of a run, offline as well.

    ``Run.use_artifact`` makes the same call, but raises a TypeError for an offline run.

    Source: ``Run.use_artifact`` in https://github.com/wandb/wandb/blob/v0.31.0/wandb/sdk/wandb_run.py
    """
    run._log_artifact(artifact, is_user_created=True, use_after_commit=True)


def api_errors() -> tuple[type[Exception], ...]:
    """Return the exceptions that a failed upload of an artifact raises.

    ``WandbApiFailedError`` has no public name.

    Source: https://github.com/wandb/wandb/blob/v0.31.0/wandb/sdk/lib/service/service_connection.py
    """
    import wandb
    from wandb.sdk.lib.service.service_connection import WandbApiFailedError

    return (wandb.Error, WandbApiFailedError, ValueError)
