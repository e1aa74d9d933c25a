"""Downloads of base models from the Hugging Face Hub, with errors that are raised within seconds."""

from __future__ import annotations

import logging
from pathlib import Path

from snake_lora_pl.constants import DEFAULT_BASE_MODEL
from snake_lora_pl.errors import UserError, one_line

logger = logging.getLogger(__name__)

PROBE_TIMEOUT_S = 5.0

_LIGHT_FILES = ["*.json", "*.txt", "*.model", "*.jinja", "*.py"]
# Subdirectories hold other formats of the same model (onnx/, original/); consolidated* is a copy of the weights.
_IGNORED_FILES = ["*/*", "consolidated*"]


def fetch_snapshot(repo_id: str, revision: str | None, *, with_weights: bool) -> Path:
    """Return the local snapshot of a hub model, downloaded if necessary; the directory is named after the commit.

    A short request checks first that the hub responds, because the download itself retries for minutes. If the hub
    cannot be reached, a complete snapshot in the local cache is used.

    Args:
        repo_id: ``owner/name``.
        revision: Branch, tag or commit; the default branch if None.
        with_weights: False for config and tokenizer only.

    Raises:
        UserError: If the repository is missing, gated or has no safetensors, or if it is neither reachable nor in the
            local cache.
    """
    from huggingface_hub import HfApi
    from huggingface_hub.errors import (
        GatedRepoError,
        HfHubHTTPError,
        HFValidationError,
        OfflineModeIsEnabled,
        RepositoryNotFoundError,
        RevisionNotFoundError,
    )

    where = f"base model '{repo_id}'"
    try:
        info = HfApi().model_info(repo_id, revision=revision, timeout=PROBE_TIMEOUT_S)
        names = [file.rfilename for file in info.siblings or []]
        if with_weights and not any(name.endswith(".safetensors") and "/" not in name for name in names):
            raise UserError(
                f"{where}: the hub repository has no safetensors weights; pickled weights can run code when they are "
                "loaded. Set model.revision to a revision with safetensors, or convert a copy you trust with "
                "transformers and pass its directory."
            )
        return _snapshot(repo_id, revision, with_weights=with_weights, local_files_only=False)
    except UserError:
        raise
    except GatedRepoError as error:
        raise UserError(
            f"{where} is gated. Accept its terms at https://huggingface.co/{repo_id} and log in with `hf auth login`."
        ) from error
    except RepositoryNotFoundError as error:
        raise UserError(
            f"{where}: not found as a directory, and on the hub it does not exist or is private. "
            "Check the spelling, or log in with `hf auth login`."
        ) from error
    except RevisionNotFoundError as error:
        raise UserError(f"{where}: the hub has no revision '{revision}' of it. Change model.revision.") from error
    except HFValidationError as error:
        raise UserError(f"{where} is neither a directory nor a hub id: {one_line(error)}.") from error
    except Exception as error:
        if isinstance(error, HfHubHTTPError) and error.response.status_code in (401, 403):
            raise UserError(
                f"{where}: the hub denied access: {one_line(error)}. Log in with `hf auth login`."
            ) from error
        # All network errors; their classes belong to an HTTP library that the hub client may replace.
        snapshot_dir = _cached_snapshot(repo_id, revision, with_weights=with_weights)
        if snapshot_dir is not None:
            logger.warning("%s: cannot reach the hub; using the snapshot in %s.", where, snapshot_dir)
            return snapshot_dir
        alternatives = f"use {DEFAULT_BASE_MODEL} (from the Python package index) or a local model directory"
        if isinstance(error, OfflineModeIsEnabled):
            raise UserError(
                f"{where} is not complete in the local cache and HF_HUB_OFFLINE is set. Unset it, or {alternatives}."
            ) from error
        raise UserError(
            f"{where} is not complete in the local cache and cannot be downloaded: {one_line(error)}. "
            f"Check the network, or {alternatives}."
        ) from error


def _snapshot(repo_id: str, revision: str | None, *, with_weights: bool, local_files_only: bool) -> Path:
    from huggingface_hub import snapshot_download

    patterns = [*_LIGHT_FILES, "*.safetensors"] if with_weights else _LIGHT_FILES
    return Path(
        snapshot_download(
            repo_id,
            revision=revision,
            allow_patterns=patterns,
            ignore_patterns=_IGNORED_FILES,
            etag_timeout=PROBE_TIMEOUT_S,
            local_files_only=local_files_only,
        )
    )


def _cached_snapshot(repo_id: str, revision: str | None, *, with_weights: bool) -> Path | None:
    from huggingface_hub.errors import LocalEntryNotFoundError

    try:
        return _snapshot(repo_id, revision, with_weights=with_weights, local_files_only=True)
    except LocalEntryNotFoundError:
        return None
