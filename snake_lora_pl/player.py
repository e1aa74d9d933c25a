"""A trained adapter as a player: it takes boards and returns moves and completions, prompted as in its training."""

from __future__ import annotations

import contextlib
import os
import weakref
from typing import get_args

import torch

from snake_lora_pl.adapters import store
from snake_lora_pl.adapters.metadata import AdapterMetadata
from snake_lora_pl.console import suppress_library_output
from snake_lora_pl.data.encoding import Encoder, TemplateName, check_choice
from snake_lora_pl.errors import UserError
from snake_lora_pl.evaluation.language_model import LanguageModelPolicy
from snake_lora_pl.evaluation.policy import Answer, Reading
from snake_lora_pl.game import STYLES, Board, Move, Style, get_style
from snake_lora_pl.training.module import LoRALightningModule


class Player:
    """An adapter on its base model that chooses moves; ``load_player`` creates it.

    Args:
        policy: Policy that answers many boards at a time; ``evaluation.game_loop.play_games`` plays whole games with
            it.
        metadata: Metadata of the adapter and its training.
    """

    def __init__(self, policy: LanguageModelPolicy, metadata: AdapterMetadata) -> None:
        self.policy = policy
        self.metadata = metadata
        self._last: tuple[Board, Answer] | None = None
        # The adapter stays merged for the lifetime of the player, instead of once per board.
        stack = contextlib.ExitStack()
        stack.enter_context(policy.playing())
        weakref.finalize(self, stack.close)

    def move(self, board: Board) -> Move | None:
        """Return the adapter's move, or None if its completion names none.

        Raises:
            UserError: If the board has no apple: the game is over.
        """
        return self._answer(board).move

    def explain(self, board: Board) -> str:
        """Return the completion behind the move; that of the last board is reused.

        Raises:
            UserError: If the board has no apple: the game is over.
        """
        return self._answer(board).completion

    def _answer(self, board: Board) -> Answer:
        if self._last is None or self._last[0] != board:
            if board.apple is None:
                raise UserError("the board has no apple, so the game is over. Give a board with one.")
            # Decoding is greedy, so the seed has no effect.
            self._last = board, self.policy.answer([board], [0])[0]
        return self._last[1]


def load_player(
    adapter_dir: str | os.PathLike[str],
    *,
    base_model: str | None = None,
    style: str | None = None,
    template: TemplateName | None = None,
    reading: Reading = "generate",
    legal_mask: bool = False,
    max_new_tokens: int = 192,
    full_precision_base: bool = False,
    dtype: str = "auto",
    device: str | None = None,
    trust_remote_code: bool = False,
) -> Player:
    """Verify an adapter and load it onto its base model.

    Args:
        adapter_dir: The ``model_artifacts`` directory of a run.
        base_model: The base it was trained on, under another name; None takes the name in its metadata.
        style: Format of the prompts; None takes that of its training rows.
        template: Template of prompt and completion; None takes that of its training.
        reading: ``generate`` lets the model write and parses its conclusion, ``score`` compares the four moves.
        legal_mask: Compare legal moves only; requires ``score``.
        max_new_tokens: Maximum length of a completion; a longer one names no move.
        full_precision_base: Use the unquantized base even if the adapter was trained on a quantized one.
        dtype: Data type of the base, as in ``model.dtype``.
        device: Device by its torch name; None takes CUDA if available, else the CPU.
        trust_remote_code: Whether code that comes with a Hub model may run.

    Raises:
        UserError: If the adapter is damaged or belongs to another base, a setting is unknown, or neither the metadata
            nor the arguments name the style and the template.

    Example:
        >>> player = load_player("path/to/model_artifacts")  # doctest: +SKIP
        >>> player.move(Board(10, ((5, 5), (5, 4)), apple=(2, 7)))  # doctest: +SKIP
        <Move.LEFT: (-1, 0)>
    """
    metadata = store.read_metadata(adapter_dir)
    chosen_style = _style(metadata, style)
    chosen_template = _template(metadata, template)
    module = LoRALightningModule(
        base_model=base_model or metadata.base_model_name,
        adapter_path=os.fspath(adapter_dir),
        revision=metadata.base_revision if base_model is None else None,
        dtype=dtype,
        max_new_tokens=max_new_tokens,
        full_precision_base=full_precision_base,
        trust_remote_code=trust_remote_code,
    )
    with suppress_library_output():
        module.configure_model()
    _place(module, device or ("cuda" if torch.cuda.is_available() else "cpu"))
    encoder = Encoder(module.tokenizer, chosen_template, template_date=metadata.data.get("template_date"))
    policy = LanguageModelPolicy(
        module.peft_model,
        module.tokenizer,
        encoder.encode_prompts,
        chosen_style,
        name="adapter",
        reading=reading,
        legal_mask=legal_mask,
        max_new_tokens=max_new_tokens,
        compute_context=module.compute_context,
    )
    return Player(policy, metadata)


def _place(module: LoRALightningModule, device: str) -> None:
    try:
        module.to(device)
    except (RuntimeError, AssertionError) as error:  # torch built without CUDA asserts
        reason = str(error).strip().splitlines()[0]
        raise UserError(
            f"device={device!r}: cannot be used ({reason}). Omit it to use the available device."
        ) from error
    module.eval()


def _style(metadata: AdapterMetadata, style: str | None) -> Style:
    if style is not None:
        try:
            return get_style(style)
        except ValueError as error:
            raise UserError(f"style: {error}") from error
    trained_on = metadata.data.get("prompt_format")
    if trained_on not in STYLES:
        raise UserError(
            "the adapter's metadata names no prompt style. Pass one, such as "
            f'style="{next(iter(STYLES))}" (known: {", ".join(STYLES)}).'
        )
    return STYLES[trained_on]


def _template(metadata: AdapterMetadata, template: TemplateName | None) -> TemplateName:
    chosen = template or metadata.data.get("template")
    if chosen is None:
        raise UserError(
            f"the adapter's metadata names no template. Pass template= as one of {', '.join(get_args(TemplateName))}."
        )
    check_choice("template", chosen, TemplateName)
    return chosen
