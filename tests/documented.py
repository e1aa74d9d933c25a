"""Commands and examples in README and docs, in the order of the pages.

Standard library only: ``.ci/walk.py`` reads them before anything is installed.
"""

from __future__ import annotations

import re
import shlex
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).parents[1]
README = ROOT / "README.md"
PAGES = [README, *sorted((ROOT / "docs").rglob("*.md"))]
LANGUAGES = {"bash", "python", "text"}

_CODE = re.compile(
    r"^```(?P<language>\w*)\n(?P<block>.*?)^```$"
    r"|(?<!`)`(?P<inline>(?:python -m snake_lora_pl [a-z]|python examples/|pip install )[^`]+)`",
    flags=re.MULTILINE | re.DOTALL,
)


class Example(NamedTuple):
    """A fenced code block, or a command in a sentence or table.

    Attributes:
        place: ``file:line``.
        section: Title of the enclosing second-level section.
        language: ``bash``, ``python`` or ``text``.
        text: The code.
    """

    place: str
    section: str
    language: str
    text: str


def examples(page: Path) -> list[Example]:
    """Return the code of a page."""
    text = page.read_text()
    found = []
    for match in _CODE.finditer(text):
        before = text[: match.start()]
        headings = re.findall(r"^## (.*)$", re.sub(r"^```.*?^```$", "", before, flags=re.M | re.S), flags=re.M)
        place = f"{page.relative_to(ROOT)}:{before.count(chr(10)) + 1}"
        inline = match["inline"]
        language = "bash" if inline else match["language"]
        code = " ".join(inline.split()) if inline else match["block"]
        found.append(Example(place, headings[-1] if headings else "", language, code))
    return found


def commands(example: Example) -> list[list[str]]:
    """Split a ``bash`` example at line ends and ``&&`` into commands, each a list of words."""
    lexer = shlex.shlex(
        example.text.replace("\\\n", " ").replace("\n", " ; ") + ";", posix=True, punctuation_chars=";&|"
    )
    lexer.commenters = "#"
    lexer.whitespace_split = True
    found: list[list[str]] = [[]]
    for word in lexer:
        if set(word) <= set(";&|"):
            found.append([])
        else:
            found[-1].append(word)
    return [command for command in found if command]


SMALL_RUN = {
    "--trainer.limit_val_batches": "1",
    "--play.max_steps": "3",
    "--data.generated_games": "4",
    "--data.batch_size": "2",
    "--model.max_new_tokens": "4",
}
"""Options that make a run short; of two equal options the last one wins."""


def arguments(command: list[str]) -> list[str] | None:
    """Return the arguments of this project's program, or None if the command runs another program."""
    if command[:3] == ["python", "-m", "snake_lora_pl"]:
        return command[3:]
    if command[0] == "python" and command[1].startswith("examples/"):
        return command[2:]
    return None


def shortened(command: list[str]) -> list[str]:
    """Return the command with options that reduce it to a few steps, rows and games."""
    given = arguments(command)
    if given is None or "--help" in given:
        return command
    if command[1] == "examples/train_from_python.py":
        return [*command, "--max_steps", "2"]
    if command[1] == "examples/train_with_grpo.py":
        return [*command, "--max_steps", "2", "--num_generations", "2", "--max_completion_length", "16"]
    extra: dict[str, str] = {}
    if given[0] in ("fit", "validate", "test", "predict", "memory"):
        extra = dict(SMALL_RUN)
    if given[0] in ("fit", "memory"):
        extra["--trainer.max_steps"] = "3" if "--ckpt_path" in given else "2"
        extra["--trainer.val_check_interval"] = "2"
        extra["--trainer.check_val_every_n_epoch"] = "null"
        extra["--num_sample_rows"] = "1"
        extra["--play.final_games"] = "2"
    if "shira.yaml" in given:
        # The tiny model of the tests has fewer weights per layer than the preset's rank trains.
        extra["--model.lora.rank"] = "4"
    if given[0] == "predict":
        extra["--trainer.limit_predict_batches"] = "1"
    if given[0] == "test":
        extra["--play.test_games"] = "2"
    if given[0] == "generate":
        extra["--games"] = "6"
    return [*command, *(word for pair in extra.items() for word in pair)]
