"""The commands and examples that README and docs show, in the order in which they stand there.

Standard library only: the newcomer's walk (``.ci/walk.py``) reads them before anything is installed.
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

_SHOWN = re.compile(
    r"^```(?P<language>\w*)\n(?P<block>.*?)^```$"
    r"|(?<!`)`(?P<inline>(?:python -m snake_lora_pl [a-z]|python loha\.py|pip install )[^`]+)`",
    flags=re.MULTILINE | re.DOTALL,
)


class Example(NamedTuple):
    """One fenced block, or one command within a sentence or a table.

    Attributes:
        place: ``file:line``.
        section: The heading of the second level that it stands under.
        language: ``bash``, ``python`` or ``text``.
        text: What it says.
    """

    place: str
    section: str
    language: str
    text: str


def examples(page: Path) -> list[Example]:
    """Everything that a page shows as code."""
    text = page.read_text()
    found = []
    for match in _SHOWN.finditer(text):
        before = text[: match.start()]
        headings = re.findall(r"^## (.*)$", re.sub(r"^```.*?^```$", "", before, flags=re.M | re.S), flags=re.M)
        place = f"{page.relative_to(ROOT)}:{before.count(chr(10)) + 1}"
        inline = match["inline"]
        language = "bash" if inline else match["language"]
        text_of = " ".join(inline.split()) if inline else match["block"]
        found.append(Example(place, headings[-1] if headings else "", language, text_of))
    return found


def commands(example: Example) -> list[list[str]]:
    """The simple commands of a ``bash`` example, as words: lines, and what ``&&`` joins."""
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
}
"""What makes a run short; the last of two equal options wins."""


def shortened(command: list[str]) -> list[str]:
    """The same command with less to do: a few steps in place of hours, a few games in place of a thousand."""
    if command[:3] != ["python", "-m", "snake_lora_pl"] and command[:2] != ["python", "loha.py"]:
        return command
    verb = command[2] if command[1] == "loha.py" else command[3]
    extra: dict[str, str] = {}
    if verb in ("fit", "validate", "test", "predict"):
        extra = dict(SMALL_RUN)
    if verb == "fit":
        extra["--trainer.max_steps"] = "3" if "--ckpt_path" in command else "2"
        extra["--trainer.val_check_interval"] = "2"
        extra["--trainer.check_val_every_n_epoch"] = "null"
    if verb == "predict":
        extra["--trainer.limit_predict_batches"] = "1"
    if verb == "test":
        extra["--games"] = "2"
    if verb == "generate":
        extra["--games"] = "6"
    return [*command, *(word for pair in extra.items() for word in pair)]
