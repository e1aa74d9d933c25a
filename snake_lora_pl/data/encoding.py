"""A row becomes token ids: templates, the boundary between prompt and completion, and rows that are too long.

Prompt and completion are tokenized apart, so the boundary is exact, and a prompt has the same ids here as when the
model plays. Nothing cuts the end of a completion: what teaches the model its move and its EOS stays, or the row is
refused.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, Literal, NamedTuple, TypeAlias, get_args

import numpy as np
import numpy.typing as npt

from snake_lora_pl.data.jsonl import Row
from snake_lora_pl.data.line_tokenizer import LineTokenizer, cuts_at_lines
from snake_lora_pl.errors import UserError

if TYPE_CHECKING:
    from tokenizers import Tokenizer
    from transformers import PreTrainedTokenizerBase

TemplateName: TypeAlias = Literal["instruction", "chat", "raw"]
OnOverflow: TypeAlias = Literal["error", "drop", "shorten"]

TOO_LONG = "too long"
SPECIAL_TOKEN = "special token in the text"

_INSTRUCTION_PROMPT = "### Instruction:\n{prompt}\n\n### Response:\n"


class Example(NamedTuple):
    """A row encoded.

    Attributes:
        input_ids: Prompt, completion and EOS.
        num_prompt: How many of the ids are the prompt's; the others are to be learned.
        source: Where the row stands, as ``path:line``.
    """

    input_ids: Sequence[int] | npt.NDArray[np.unsignedinteger[Any]]
    num_prompt: int
    source: str


class Refusal(NamedTuple):
    """A row that was not encoded.

    Attributes:
        source: Where the row stands, as ``path:line``.
        reason: ``TOO_LONG`` or ``SPECIAL_TOKEN``.
        message: What was found, and what to do.
    """

    source: str
    reason: str
    message: str


class Encoder:
    r"""Encodes prompts and rows with one tokenizer and one template.

    Templates:
        - ``instruction``: ``### Instruction:\n{prompt}\n\n### Response:\n`` and the completion.
        - ``chat``: the tokenizer's own chat template, the prompt as the user's turn, the completion as the assistant's.
        - ``raw``: the prompt and the completion as they are.

    All end in EOS. ``instruction`` and ``raw`` begin with BOS if the tokenizer's own call puts it there; a chat
    template writes its own.

    A special token that is spelt out in a row is text, not a token: nobody can end a turn by writing ``<|im_end|>``
    into a file. Under ``chat``, where the rendered text has to be parsed for special tokens, such a row is refused.

    Args:
        tokenizer: A Hugging Face tokenizer with an EOS token.
        template: Name of the template.
        max_length: Most tokens in an example, EOS included.
        on_overflow: What becomes of longer rows. ``shorten`` takes whole lines out of the completion's middle and keeps
            its last line and, where there is room for two, its first; ``error`` and ``drop`` refuse them.

    Raises:
        UserError: If a setting is unknown or out of range, or the tokenizer lacks EOS or a chat template.
    """

    def __init__(
        self,
        tokenizer: PreTrainedTokenizerBase,
        template: TemplateName = "instruction",
        max_length: int = 512,
        on_overflow: OnOverflow = "shorten",
    ) -> None:
        check_choice("data.template", template, TemplateName)
        check_choice("data.on_overflow", on_overflow, OnOverflow)
        if max_length < 2:
            raise UserError(f"data.max_length must be at least 2, a token and EOS (found: {max_length})")
        if tokenizer.eos_token_id is None:
            raise UserError("the tokenizer has no EOS token, so no completion could end. Set one, or use another base.")
        if template == "chat" and not tokenizer.chat_template:
            raise UserError(
                "data.template=chat, but the tokenizer has no chat template. Set data.template=instruction."
            )
        self.tokenizer = tokenizer
        self.template = template
        self.max_length = max_length
        self.on_overflow = on_overflow
        self._eos_id: int = tokenizer.eos_token_id
        self._prefix_ids = [] if template == "chat" else _prefix_ids(tokenizer)
        self._special = _special_pattern(tokenizer) if template == "chat" else None
        self._backend = _private_backend(tokenizer, parse_special=template == "chat")
        self._lines: LineTokenizer | None = None
        if self._backend is not None and cuts_at_lines(self._backend):
            self._lines = LineTokenizer(self._backend)

    def encode_prompt(self, prompt: str) -> list[int]:
        """The ids that come before a completion: what the model is given when it plays.

        Raises:
            UserError: If the template is ``chat`` and the prompt spells out a special token.
        """
        if refusal := self.refuse(prompt):
            raise UserError(f"the prompt {refusal.message}")
        return self.encode_prompts([prompt])[0]

    def encode_prompts(self, prompts: Sequence[str]) -> list[list[int]]:
        """The ids of many prompts, none of which ``refuse`` objects to."""
        return [[*self._prefix_ids, *ids] for ids in self._tokenize([self.render_prompt(prompt) for prompt in prompts])]

    def refuse(self, *texts: str, source: str = "") -> Refusal | None:
        """Why no text of these can be encoded, whatever its length; None where they can."""
        if self._special is None:
            return None
        for text in texts:
            if match := self._special.search(text):
                return Refusal(
                    source,
                    SPECIAL_TOKEN,
                    f"holds {match[0]!r}, which template 'chat' would take for the end or start of a turn. "
                    "Reword it, or set data.template=instruction.",
                )
        return None

    def encode(self, rows: Sequence[Row]) -> list[Example | Refusal]:
        """Encode rows; a thousand at a time keep the tokenizer's threads busy.

        Returns:
            An example or a refusal for each row, in order.
        """
        refusals = [self.refuse(row.prompt, row.completion, source=row.source) for row in rows]
        texts = [
            ("", "") if refusal else self._render(row.prompt, row.completion)
            for row, refusal in zip(rows, refusals, strict=True)
        ]
        ids = self._tokenize([text for pair in texts for text in pair])
        return [
            refusal or self._finish(row, prompt_ids, completion_ids)
            for row, refusal, prompt_ids, completion_ids in zip(rows, refusals, ids[::2], ids[1::2], strict=True)
        ]

    def fingerprint(self) -> str:
        """A hash of all that decides which ids a row becomes."""
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
            "instruction": _INSTRUCTION_PROMPT,
            "max_length": self.max_length,
            "on_overflow": self.on_overflow,
            "tokenizers": tokenizers.__version__,
        }
        return hashlib.blake2b((vocabulary + json.dumps(settings, sort_keys=True)).encode(), digest_size=16).hexdigest()

    def _finish(self, row: Row, prompt_ids: list[int], completion_ids: list[int]) -> Example | Refusal:
        example = self._join(prompt_ids, completion_ids, row.source)
        num_tokens = len(example.input_ids)
        if num_tokens <= self.max_length:
            return example
        if self.on_overflow == "shorten":
            return self._shorten(row, num_tokens)
        return Refusal(
            row.source,
            TOO_LONG,
            f"{num_tokens:,} tokens, over data.max_length={self.max_length}. "
            f"Set data.max_length to {num_tokens} or more, or data.on_overflow to shorten or drop.",
        )

    def _join(self, prompt_ids: list[int], completion_ids: list[int], source: str) -> Example:
        eos = [] if completion_ids[-1:] == [self._eos_id] else [self._eos_id]
        input_ids = [*self._prefix_ids, *prompt_ids, *completion_ids, *eos]
        return Example(input_ids, len(self._prefix_ids) + len(prompt_ids), source)

    def _shorten(self, row: Row, num_tokens: int) -> Example | Refusal:
        """The row with as few lines taken out of its completion's middle as will make it fit."""
        *lines, last = row.completion.rstrip().split("\n")
        best = self._encode_one(row, last)
        if len(best.input_ids) > self.max_length:
            return Refusal(
                row.source,
                TOO_LONG,
                f"{num_tokens:,} tokens, {len(best.input_ids):,} with only the completion's last line kept, over "
                f"data.max_length={self.max_length}. Set data.max_length to {len(best.input_ids)} or more, "
                "or data.on_overflow=drop.",
            )
        kept, too_many = 0, len(lines) + 1
        while too_many - kept > 1:
            middle = (kept + too_many) // 2
            num_head = (middle + 1) // 2
            num_tail = middle - num_head
            example = self._encode_one(row, "\n".join([*lines[:num_head], *lines[len(lines) - num_tail :], last]))
            if len(example.input_ids) <= self.max_length:
                kept, best = middle, example
            else:
                too_many = middle
        return best

    def _encode_one(self, row: Row, completion: str) -> Example:
        prompt_ids, completion_ids = self._tokenize(list(self._render(row.prompt, completion)))
        return self._join(prompt_ids, completion_ids, row.source)

    def render_prompt(self, prompt: str) -> str:
        """The text that comes before a completion, special tokens of a chat template spelt out."""
        if self.template == "chat":
            return self._render_chat([{"role": "user", "content": prompt}], add_generation_prompt=True)
        return _INSTRUCTION_PROMPT.format(prompt=prompt) if self.template == "instruction" else prompt

    def _render(self, prompt: str, completion: str) -> tuple[str, str]:
        before = self.render_prompt(prompt)
        if self.template != "chat":
            return before, completion
        turns = [{"role": "user", "content": prompt}, {"role": "assistant", "content": completion}]
        whole = self._render_chat(turns, add_generation_prompt=False)
        if not whole.startswith(before):
            raise UserError(
                "data.template=chat, but with this tokenizer's chat template a conversation does not begin with its "
                "own prompt, so the completion cannot be told apart. Set data.template=instruction."
            )
        # Templates put a newline behind the end of a turn; EOS must come last, for generation stops there.
        return before, whole[len(before) :].rstrip()

    def _render_chat(self, turns: list[dict[str, str]], *, add_generation_prompt: bool) -> str:
        try:
            return self.tokenizer.apply_chat_template(
                turns, tokenize=False, add_generation_prompt=add_generation_prompt
            )
        except Exception as error:  # A template is a program of the model's maker's: it may raise anything.
            raise UserError(
                f"data.template=chat, but the chat template failed ({error}). Set data.template=instruction."
            ) from error

    def _tokenize(self, texts: list[str]) -> list[list[int]]:
        if self._backend is None:
            return self.tokenizer(
                texts, add_special_tokens=False, split_special_tokens=self.template != "chat", verbose=False
            )["input_ids"]
        if self._lines is not None:
            return self._lines(texts)
        return [encoding.ids for encoding in self._backend.encode_batch_fast(texts, add_special_tokens=False)]


def check_choice(name: str, value: object, choices: object) -> None:
    """Check a setting that has few values.

    Args:
        name: The setting, as the user wrote it.
        value: What it was set to.
        choices: A ``Literal`` of the values it can have.

    Raises:
        UserError: If it is none of them; the message lists them.
    """
    known = get_args(choices)
    if value not in known:
        raise UserError(f"unknown {name} {value!r}. Choose one of {', '.join(known)}.")


def _prefix_ids(tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """What the tokenizer's own call puts in front of a text: BOS for some models, nothing for others."""
    probe = "Snake"
    bare: list[int] = tokenizer(probe, add_special_tokens=False)["input_ids"]
    whole: list[int] = tokenizer(probe)["input_ids"]
    starts = (i for i in range(len(whole) - len(bare) + 1) if whole[i : i + len(bare)] == bare)
    return whole[: next(starts, 0)]


def _special_pattern(tokenizer: PreTrainedTokenizerBase) -> re.Pattern[str]:
    added = [str(token) for token in tokenizer.added_tokens_decoder.values() if token.special]
    return re.compile("|".join(re.escape(token) for token in {*added, *tokenizer.all_special_tokens} if token))


def _private_backend(tokenizer: PreTrainedTokenizerBase, *, parse_special: bool) -> Tokenizer | None:
    """A copy of a fast tokenizer's engine, a third faster than its wrapper; None where it is no fast tokenizer.

    A copy, since truncation, padding and the treatment of special tokens are state of the engine, which the tokenizer's
    other users set as well.
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
