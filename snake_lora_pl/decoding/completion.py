"""Completion: what decoders return."""

from __future__ import annotations

from dataclasses import dataclass, field


@dataclass
class Completion:
    """Tokens that the model generated after a prompt.

    Attributes:
        tokens: Token ids, without EOS.
        is_complete: Whether the model ended the completion; False if ``max_new_tokens`` cut it off.
    """

    tokens: list[int] = field(default_factory=list)
    is_complete: bool = False
