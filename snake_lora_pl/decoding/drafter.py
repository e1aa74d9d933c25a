"""Guesses of what comes next in a text, from the texts before it. Imports no torch.

A model that reads several tokens in one pass can check a guess of several tokens for little more than the price of one.
What a player writes is nearly the same for every board, so guessing is easy; and because a guess counts only where the
model itself would have written the same, guessing changes the speed and never the words. The scheme is speculative
decoding (Leviathan et al. 2023, https://arxiv.org/abs/2211.17192) with n-grams in place of a small model, as in prompt
lookup decoding.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

# Contexts to look in, the longest first: a long one knows which line it stands in, a short one survives a number that
# was never seen in that place.
_CONTEXT_TOKENS = (12, 6, 3)

# Less likely than this, and a guess is not worth the token it costs, however few the rows.
_LEAST_PROBABILITY = 0.05

_START = -1


class Guess(NamedTuple):
    """A token guessed.

    Attributes:
        token: The token.
        probability: That it and all guessed before it are right, as far as can be told from how often it was.
    """

    token: int
    probability: float


class Drafter:
    """Counts which token followed which, and guesses the most frequent."""

    def __init__(self) -> None:
        self._followers: list[dict[tuple[int, ...], dict[int, int]]] = [{} for _ in _CONTEXT_TOKENS]

    def learn(self, text: Sequence[int], start: int = 0) -> None:
        """Count what follows what.

        Args:
            text: Tokens of a completion, from its beginning.
            start: Where the tokens begin that were not counted before.
        """
        padded = [_START] * _CONTEXT_TOKENS[0] + list(text)
        for end in range(_CONTEXT_TOKENS[0] + start, len(padded)):
            for length, followers in zip(_CONTEXT_TOKENS, self._followers, strict=True):
                counts = followers.setdefault(tuple(padded[end - length : end]), {})
                counts[padded[end]] = counts.get(padded[end], 0) + 1

    def guess(self, text: Sequence[int], max_tokens: int) -> list[Guess]:
        """What may follow a text, as far as there is anything to go by."""
        context = ([_START] * _CONTEXT_TOKENS[0] + list(text))[-_CONTEXT_TOKENS[0] :]
        guesses: list[Guess] = []
        probability = 1.0
        while len(guesses) < max_tokens:
            counts = self._counts(context)
            if counts is None:
                break
            token = max(counts, key=counts.__getitem__)
            # Half an unseen case more: what was seen once is not certain.
            probability *= counts[token] / (sum(counts.values()) + 0.5)
            if probability < _LEAST_PROBABILITY:
                break
            guesses.append(Guess(token, probability))
            context = [*context[1:], token]
        return guesses

    def _counts(self, context: list[int]) -> dict[int, int] | None:
        for length, followers in zip(_CONTEXT_TOKENS, self._followers, strict=True):
            counts = followers.get(tuple(context[-length:]))
            if counts is not None:
                return counts
        return None


def best_width(drafts: Sequence[Sequence[Guess]], pass_cost_tokens: float) -> int:
    """Tokens of each row to read in the next pass, so that a written token costs least.

    A pass over ``width`` tokens of each row costs ``pass_cost_tokens + rows * width``. A row gets from it one token for
    certain, and one more for each guess that turns out right.

    Args:
        drafts: The guesses of each row.
        pass_cost_tokens: What a pass costs whatever it reads, in tokens that it could read in that time.

    Returns:
        The width: 1 where guessing does not pay.
    """
    expected_tokens = float(len(drafts))
    best_rate, best = expected_tokens / (pass_cost_tokens + len(drafts)), 1
    for width in range(2, 2 + max(map(len, drafts))):
        expected_tokens += sum(draft[width - 2].probability for draft in drafts if len(draft) > width - 2)
        rate = expected_tokens / (pass_cost_tokens + len(drafts) * width)
        if rate > best_rate:
            best_rate, best = rate, width
    return best
