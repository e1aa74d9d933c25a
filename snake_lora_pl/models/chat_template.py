"""Chat templates that render the current date: the date is fixed, so that prompts do not change from day to day."""

from __future__ import annotations

import re
from datetime import datetime
from pathlib import Path
from typing import TYPE_CHECKING

from snake_lora_pl.errors import UserError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

# The function that transformers gives to templates, called with a literal format. It cannot be replaced when a template
# is rendered, because transformers turns all arguments into plain data.
_CALL = re.compile(r"""\bstrftime_now\(\s*(["'])([^"'\\]*)\1\s*\)""")
_TEST = re.compile(r"\bstrftime_now\s+is\s+(not\s+)?defined\b")


def renders_date(chat_template: str) -> bool:
    """Return whether a template renders the current date."""
    return "strftime_now" in _TEST.sub("", chat_template)


def with_date(chat_template: str, date: datetime) -> str:
    """Return a template that renders a date in place of the current one.

    Raises:
        UserError: If the template computes the format of the date.
    """
    fixed = _CALL.sub(lambda call: repr(date.strftime(call[2])), chat_template)
    if renders_date(fixed):
        raise UserError(
            "data.template=chat: the chat template renders the current date in a format that it computes, so prompts "
            "would change from day to day. Set data.template=instruction."
        )
    return fixed


def parse_date(text: str | None) -> datetime:
    """Return midnight of a date as YYYY-MM-DD, of today for None.

    Raises:
        UserError: If the text is not such a date.
    """
    try:
        date = datetime.now() if text is None else datetime.strptime(text, "%Y-%m-%d")
    except ValueError as error:
        raise UserError(f"data.template_date must be a date as YYYY-MM-DD (found: {text!r}).") from error
    return date.replace(hour=0, minute=0, second=0, microsecond=0)


def save_tokenizer(tokenizer: PreTrainedTokenizerBase, directory: Path, template_date: str | None) -> None:
    """Write the files of a tokenizer; its chat template renders the date of the training, if one is given."""
    original = tokenizer.chat_template
    if template_date is not None:
        date = parse_date(template_date)
        is_named = isinstance(original, dict)
        tokenizer.chat_template = (
            {**original, "default": with_date(original["default"], date)} if is_named else with_date(original, date)
        )
    try:
        tokenizer.save_pretrained(str(directory))
    finally:
        tokenizer.chat_template = original
