"""Encoding of rows as token ids: template, BOS, appended EOS, and rows that are too long.

Prompt and completion are tokenized separately, so their boundary is exact and a prompt has the same ids in training and
in play. The end of a completion is never truncated: an example keeps its move and its EOS, or the row is rejected.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, Literal, NamedTuple, TypeAlias, cast, get_args

import numpy as np
import numpy.typing as npt

from snake_lora_pl.data.jsonl import Row
from snake_lora_pl.data.line_tokenizer import LineTokenizer, splits_at_lines
from snake_lora_pl.errors import UserError
from snake_lora_pl.models.chat_template import parse_date, renders_date, with_date

if TYPE_CHECKING:
    from tokenizers import Tokenizer
    from transformers import PreTrainedTokenizerBase

TemplateName: TypeAlias = Literal["instruction", "chat", "raw"]
OnOverflow: TypeAlias = Literal["error", "drop", "shorten"]

TOO_LONG = "too long"
SPECIAL_TOKEN = "special token in the text"

_INSTRUCTION_PROMPT = "### Instruction:\n{prompt}\n\n### Response:\n"


class Example(NamedTuple):
    """An encoded row.

    Attributes:
        input_ids: Ids of prompt, completion and EOS.
        num_prompt: Number of leading ids that belong to the prompt; the others are trained on.
        source: The row's ``path:line``.
    """

    input_ids: Sequence[int] | npt.NDArray[np.unsignedinteger[Any]]
    num_prompt: int
    source: str


class Rejection(NamedTuple):
    """The reason why a row was not encoded.

    Attributes:
        source: The row's ``path:line``.
        reason: ``TOO_LONG`` or ``SPECIAL_TOKEN``.
        message: What was found, and what to do.
    """

    source: str
    reason: str
    message: str


class Encoder:
    r"""Encoder of prompts and rows with one tokenizer and one template.

    Templates:
        - ``instruction``: ``### Instruction:\n{prompt}\n\n### Response:\n``, followed by the completion.
        - ``chat``: the tokenizer's chat template, with the prompt as user turn and the completion as assistant turn.
        - ``raw``: the prompt followed by the completion.

    A chat template may contain the date. It is fixed here, because the prompts of one adapter must not change from day
    to day.

    Every example ends with EOS. With ``instruction`` and ``raw`` it begins with BOS if calling the tokenizer adds BOS;
    a chat template contains its own.

    The text of a special token in a row is encoded as text, so that no row can end a turn by containing
    ``<|im_end|>``. With ``chat`` the rendered text has to be parsed for special tokens, so such a row is rejected.

    Args:
        tokenizer: A Hugging Face tokenizer with an EOS token.
        template: Name of the template.
        max_length: Maximum number of tokens per example, EOS included.
        on_overflow: How to handle longer rows. ``shorten`` removes whole lines from the middle of the completion; the
            last line stays, and the first line too if both fit. ``error`` and ``drop`` reject the row.
        template_date: Date that a chat template renders, as YYYY-MM-DD; None for today.

    Attributes:
        template_date: The date in the prompts; None if the template contains none.

    Raises:
        UserError: If a setting is unknown or out of range, or if the tokenizer lacks EOS or a chat template.
    """

    def __init__(
        self,
        tokenizer: PreTrainedTokenizerBase,
        template: TemplateName = "instruction",
        max_length: int = 512,
        on_overflow: OnOverflow = "shorten",
        template_date: str | None = None,
    ) -> None:
        check_choice("data.template", template, TemplateName)
        check_choice("data.on_overflow", on_overflow, OnOverflow)
        if max_length < 2:
            raise UserError(f"data.max_length must be at least 2, for one token and EOS (found: {max_length}).")
        if tokenizer.eos_token_id is None:
            raise UserError("the tokenizer has no EOS token. Set one, or use another base model.")
        if template == "chat" and not tokenizer.chat_template:
            raise UserError("data.template=chat: the tokenizer has no chat template. Set data.template=instruction.")
        self.tokenizer = tokenizer
        self.template = template
        self.max_length = max_length
        self.on_overflow = on_overflow
        self.template_date: str | None = None
        self._chat_template: str | None = None
        if template == "chat" and renders_date(chat_template := tokenizer.get_chat_template()):
            date = parse_date(template_date)
            self.template_date = date.date().isoformat()
            self._chat_template = with_date(chat_template, date)
        self._eos_id: int = tokenizer.eos_token_id
        self._prefix_ids = [] if template == "chat" else _prefix_ids(tokenizer)
        self._special = _special_pattern(tokenizer) if template == "chat" else None
        self._backend = _copy_backend(tokenizer, parse_special=template == "chat")
        self._line_tokenizer: LineTokenizer | None = None
        if self._backend is not None and splits_at_lines(self._backend):
            self._line_tokenizer = LineTokenizer(self._backend)

    def encode_prompt(self, prompt: str) -> list[int]:
        """Return the ids that precede a completion: the input of the model in play.

        Raises:
            UserError: If the template is ``chat`` and the prompt contains the text of a special token.
        """
        if rejection := self.check(prompt):
            raise UserError(f"the prompt {rejection.message}")
        return self.encode_prompts([prompt])[0]

    def encode_prompts(self, prompts: Sequence[str]) -> list[list[int]]:
        """Return the ids of prompts that ``check`` accepts."""
        return [[*self._prefix_ids, *ids] for ids in self._tokenize([self.render_prompt(prompt) for prompt in prompts])]

    def check(self, *texts: str, source: str = "") -> Rejection | None:
        """Return why one of the texts cannot be encoded, whatever its length; None if all can."""
        if self._special is None:
            return None
        for text in texts:
            if match := self._special.search(text):
                return Rejection(
                    source,
                    SPECIAL_TOKEN,
                    f"contains {match[0]!r}, which template 'chat' would parse as a special token. "
                    "Change the text, or set data.template=instruction.",
                )
        return None

    def encode(self, rows: Sequence[Row]) -> list[Example | Rejection]:
        """Encode rows; batches of about a thousand keep the tokenizer's threads busy.

        Returns:
            An example or a rejection for each row, in order.
        """
        rejections = [self.check(row.prompt, row.completion, source=row.source) for row in rows]
        texts = [
            ("", "") if rejection else self._render(row.prompt, row.completion)
            for row, rejection in zip(rows, rejections, strict=True)
        ]
        ids = self._tokenize([text for pair in texts for text in pair])
        return [
            rejection or self._fit(row, self._concatenate(prompt_ids, completion_ids, row.source))
            for row, rejection, prompt_ids, completion_ids in zip(rows, rejections, ids[::2], ids[1::2], strict=True)
        ]

    def render_prompt(self, prompt: str) -> str:
        """Return the text that precedes a completion, with the special tokens of a chat template as text."""
        if self.template == "chat":
            return self._render_chat([{"role": "user", "content": prompt}], add_generation_prompt=True)
        return _INSTRUCTION_PROMPT.format(prompt=prompt) if self.template == "instruction" else prompt

    def render_prompt_without_bos(self, prompt: str) -> str:
        """Return ``render_prompt`` for a program that, like the tokenizer, may add BOS before every text itself."""
        text = self.render_prompt(prompt)
        bos = self.tokenizer.bos_token
        adds_bos = bos is not None and self.tokenizer.bos_token_id in _prefix_ids(self.tokenizer)
        return text.removeprefix(bos) if adds_bos and self.template == "chat" else text

    @property
    def adds_bos(self) -> bool:
        """True if BOS precedes the text of ``render_prompt_without_bos`` in training."""
        bos = self.tokenizer.bos_token
        if bos is None or self.render_prompt_without_bos("p").startswith(bos):
            return False
        return bool(self.encode_prompts(["p"])[0][0] == self.tokenizer.bos_token_id)

    def fingerprint(self) -> str:
        """Return a hash of everything that determines the ids of a row."""
        import tokenizers

        tokenizer = self.tokenizer
        if self._backend is None:
            vocabulary = json.dumps([type(tokenizer).__name__, sorted(tokenizer.get_vocab().items())])
        else:
            vocabulary = self._backend.to_str()
        settings = {
            "prefix": self._prefix_ids,
            "eos": self._eos_id,
            "special": sorted(tokenizer.all_special_tokens),
            "chat_template": tokenizer.chat_template if self.template == "chat" else None,
            "template": self.template,
            "template_date": self.template_date,
            "instruction": _INSTRUCTION_PROMPT,
            "max_length": self.max_length,
            "on_overflow": self.on_overflow,
            "tokenizers": tokenizers.__version__,
        }
        return hashlib.blake2b((vocabulary + json.dumps(settings, sort_keys=True)).encode(), digest_size=16).hexdigest()

    def _concatenate(self, prompt_ids: list[int], completion_ids: list[int], source: str) -> Example:
        """Join BOS, prompt and completion, and append EOS unless the completion already ends with it."""
        eos = [] if completion_ids[-1:] == [self._eos_id] else [self._eos_id]
        input_ids = [*self._prefix_ids, *prompt_ids, *completion_ids, *eos]
        return Example(input_ids, len(self._prefix_ids) + len(prompt_ids), source)

    def _fit(self, row: Row, example: Example) -> Example | Rejection:
        num_tokens = len(example.input_ids)
        if num_tokens <= self.max_length:
            return example
        if self.on_overflow == "shorten":
            return self._shorten(row, num_tokens)
        return Rejection(
            row.source,
            TOO_LONG,
            f"{num_tokens:,} tokens, more than data.max_length={self.max_length}. "
            f"Set data.max_length to {num_tokens} or more, or data.on_overflow to shorten or drop.",
        )

    def _shorten(self, row: Row, num_tokens: int) -> Example | Rejection:
        """Remove as few lines from the middle of the completion as necessary."""
        *lines, last = row.completion.rstrip().split("\n")
        best = self._encode_one(row, last)
        if len(best.input_ids) > self.max_length:
            return Rejection(
                row.source,
                TOO_LONG,
                f"{num_tokens:,} tokens, {len(best.input_ids):,} with only the last line of the completion, more than "
                f"data.max_length={self.max_length}. Set data.max_length to {len(best.input_ids)} or more, "
                "or data.on_overflow=drop.",
            )
        num_kept, too_many = 0, len(lines) + 1
        while too_many - num_kept > 1:
            middle = (num_kept + too_many) // 2
            num_first = (middle + 1) // 2
            num_last = middle - num_first
            example = self._encode_one(row, "\n".join([*lines[:num_first], *lines[len(lines) - num_last :], last]))
            if len(example.input_ids) <= self.max_length:
                num_kept, best = middle, example
            else:
                too_many = middle
        return best

    def _encode_one(self, row: Row, completion: str) -> Example:
        prompt_ids, completion_ids = self._tokenize(list(self._render(row.prompt, completion)))
        return self._concatenate(prompt_ids, completion_ids, row.source)

    def _render(self, prompt: str, completion: str) -> tuple[str, str]:
        before = self.render_prompt(prompt)
        if self.template != "chat":
            return before, completion
        turns = [{"role": "user", "content": prompt}, {"role": "assistant", "content": completion}]
        whole = self._render_chat(turns, add_generation_prompt=False)
        if not whole.startswith(before):
            raise UserError(
                "data.template=chat: the tokenizer's chat template renders a conversation that does not begin with "
                "its prompt, so the completion cannot be separated. Set data.template=instruction."
            )
        # Templates append a newline to a turn; EOS must come last, because generation stops there.
        return before, whole[len(before) :].rstrip()

    def _render_chat(self, turns: list[dict[str, str]], *, add_generation_prompt: bool) -> str:
        try:
            text = self.tokenizer.apply_chat_template(
                turns,
                chat_template=self._chat_template,
                tokenize=False,
                add_generation_prompt=add_generation_prompt,
            )
        except Exception as error:  # A chat template is a program, which can raise anything.
            raise UserError(
                f"data.template=chat: the chat template failed ({error}). Set data.template=instruction."
            ) from error
        return cast(str, text)

    def _tokenize(self, texts: list[str]) -> list[list[int]]:
        if self._line_tokenizer is not None:
            return self._line_tokenizer(texts)
        if self._backend is not None:
            return [encoding.ids for encoding in self._backend.encode_batch_fast(texts, add_special_tokens=False)]
        encodings = self.tokenizer(
            texts, add_special_tokens=False, split_special_tokens=self.template != "chat", verbose=False
        )
        return cast("list[list[int]]", encodings["input_ids"])


def check_choice(name: str, value: object, choices: object) -> None:
    """Check that a setting has one of its allowed values.

    Args:
        name: The setting, as the user wrote it.
        value: Its value.
        choices: A ``Literal`` of the allowed values.

    Raises:
        UserError: If the value is not allowed; the message lists the allowed values.
    """
    known = get_args(choices)
    if value not in known:
        raise UserError(f"unknown {name} {value!r}. Choose one of {', '.join(known)}.")


def _prefix_ids(tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """Return the ids that calling the tokenizer puts before a text: BOS for some models, none for others."""
    probe = "Snake"
    bare: list[int] = tokenizer(probe, add_special_tokens=False)["input_ids"]
    whole: list[int] = tokenizer(probe)["input_ids"]
    starts = (i for i in range(len(whole) - len(bare) + 1) if whole[i : i + len(bare)] == bare)
    return whole[: next(starts, 0)]


def _special_pattern(tokenizer: PreTrainedTokenizerBase) -> re.Pattern[str]:
    added = [str(token) for token in tokenizer.added_tokens_decoder.values() if token.special]
    return re.compile("|".join(re.escape(token) for token in {*added, *tokenizer.all_special_tokens} if token))


def _copy_backend(tokenizer: PreTrainedTokenizerBase, *, parse_special: bool) -> Tokenizer | None:
    """Return a copy of a fast tokenizer's backend, a third faster than its wrapper; None for a slow tokenizer.

    Truncation, padding and the handling of special tokens are state of the backend, which other users of the tokenizer
    change as well.
    """
    backend = getattr(tokenizer, "backend_tokenizer", None)
    if backend is None:
        return None
    from tokenizers import Tokenizer

    copy = Tokenizer.from_str(backend.to_str())
    copy.no_truncation()
    copy.no_padding()
    copy.encode_special_tokens = not parse_special
    return copy
