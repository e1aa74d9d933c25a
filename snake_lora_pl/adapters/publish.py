"""An adapter directory on the Hugging Face hub, sent by the hub's own client."""

from __future__ import annotations

import logging
import os
from pathlib import Path
from typing import NamedTuple

from snake_lora_pl.adapters import store
from snake_lora_pl.errors import UserError, one_line

logger = logging.getLogger(__name__)

_LOG_IN = "Log in with `hf auth login`, or set HF_TOKEN to a token that may write"


class Published(NamedTuple):
    """Where ``push`` sent an adapter.

    Attributes:
        repo_id: ``owner/name``.
        url: Of the commit.
    """

    repo_id: str
    url: str


def push(adapter_dir: str | os.PathLike[str], repo: str, *, private: bool = False) -> Published:
    """Create a model repository if there is none, and send every file of a verified adapter in one go.

    The endpoint is the hub's, or ``HF_ENDPOINT``; the token is the one that the hub's client finds.

    Args:
        adapter_dir: The adapter directory.
        repo: ``owner/name``, or a name under the token's owner.
        private: Whether a new repository is private.

    Raises:
        UserError: If the adapter is damaged, or the hub refuses or cannot be reached.
    """
    from huggingface_hub import HfApi, get_token
    from huggingface_hub.errors import HFValidationError, OfflineModeIsEnabled

    metadata = store.verify(adapter_dir)
    if os.path.isabs(metadata.base_model):
        logger.warning(
            "The adapter names its base model by a directory of this machine (%s), which nobody else has: say in the "
            "repository where it can be had.",
            metadata.base_model,
        )
    api = HfApi()
    try:
        repo_id = api.create_repo(repo, private=private, exist_ok=True).repo_id
        commit = api.upload_folder(
            repo_id=repo_id,
            folder_path=Path(adapter_dir),
            ignore_patterns=[".*"],
            commit_message=f"{metadata.adapter_type} adapter, step {metadata.step}",
        )
    except HFValidationError as error:
        raise UserError(f"--repo {repo}: {one_line(error)}. It reads owner/name.") from error
    except OfflineModeIsEnabled as error:
        raise UserError("HF_HUB_OFFLINE forbids to send anything. Unset it.") from error
    except Exception as error:  # whatever a network can do; the classes belong to a library that the client may change
        reason = one_line(error)
        if token := get_token():
            reason = reason.replace(token, "***")
        raise UserError(f"--repo {repo}: not published at {api.endpoint}: {reason}. {_way_on(error)}.") from error
    return Published(repo_id, str(commit.commit_url))


def _way_on(error: Exception) -> str:
    from huggingface_hub.errors import HfHubHTTPError

    if isinstance(error, HfHubHTTPError):
        status = error.response.status_code
        if status == 401:
            return _LOG_IN
        if status in (403, 404):
            return f"The token may not write there: choose a repository of your own. {_LOG_IN}"
    return "Check the network, or HF_ENDPOINT, and try again: what has arrived is not sent twice"
