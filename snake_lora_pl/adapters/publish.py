"""Upload of an adapter directory to the Hugging Face Hub."""

from __future__ import annotations

import logging
import os
from pathlib import Path
from typing import NamedTuple

from snake_lora_pl.adapters import store
from snake_lora_pl.errors import UserError, one_line

logger = logging.getLogger(__name__)

_LOG_IN = "Log in with `hf auth login`, or set HF_TOKEN to a token with write access"


class Published(NamedTuple):
    """The result of ``push``.

    Attributes:
        repo_id: ``owner/name``.
        url: URL of the commit.
    """

    repo_id: str
    url: str


def push(adapter_dir: str | os.PathLike[str], repo: str, *, private: bool = False) -> Published:
    """Verify an adapter and upload all its files in one commit; the model repository is created if necessary.

    The endpoint is the hub or ``HF_ENDPOINT``; the token is the one that ``huggingface_hub`` finds.

    Args:
        adapter_dir: The adapter directory.
        repo: ``owner/name``, or a name, for the owner of the token.
        private: Whether a new repository is private.

    Raises:
        UserError: If the adapter is damaged, or the hub rejects the upload or cannot be reached.
    """
    from huggingface_hub import HfApi, get_token
    from huggingface_hub.errors import HFValidationError, OfflineModeIsEnabled

    metadata = store.verify(adapter_dir)
    if os.path.isabs(metadata.base_model):
        logger.warning(
            "The adapter's base model is a local directory (%s), which other users do not have. Document in the "
            "repository where to get it.",
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
        raise UserError(f"--repo {repo}: {one_line(error)}. Use the form owner/name.") from error
    except OfflineModeIsEnabled as error:
        raise UserError("HF_HUB_OFFLINE is set, so nothing can be uploaded. Unset it.") from error
    except Exception as error:  # network errors; their classes belong to an HTTP library that may change
        reason = one_line(error)
        if token := get_token():
            reason = reason.replace(token, "***")
        raise UserError(f"--repo {repo}: not uploaded to {api.endpoint}: {reason}. {_fix(error)}.") from error
    return Published(repo_id, str(commit.commit_url))


def _fix(error: Exception) -> str:
    from huggingface_hub.errors import HfHubHTTPError

    if isinstance(error, HfHubHTTPError):
        status = error.response.status_code
        if status == 401:
            return _LOG_IN
        if status in (403, 404):
            return f"The token has no write access: choose a repository that you own. {_LOG_IN}"
    return "Check the network and HF_ENDPOINT, and try again; uploaded files are not sent again"
