"""N-gram drafter: proposes the next tokens of a completion from earlier completions. Imports no torch.

A model verifies a draft of several tokens in one forward pass for little more than the cost of one token. A player's
completions are nearly the same for every board, so they are easy to predict. A draft token counts only if the model
would have generated it itself, so drafts change the speed and never the output. This is speculative decoding (Leviathan
et al. 2023, https://arxiv.org/abs/2211.17192) with n-grams in place of a draft model, as in prompt lookup decoding
(https://github.com/apoorvumang/prompt-lookup-decoding).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

# Lengths of the n-gram contexts, tried in this order: a long context identifies the line of the completion, a short one
# still matches after a number that was never seen at that position.
_CONTEXT_TOKENS = (12, 6, 3)

# A draft token that is less likely than this does not repay its cost, even in a batch of one row.
_MIN_PROBABILITY = 0.05

_START = -1  # pads contexts at the beginning of a completion


class DraftToken(NamedTuple):
    """A proposed token.

    Attributes:
        token: Token id.
        probability: Estimated probability that it and all draft tokens before it are accepted.
    """

    token: int
    probability: float


class Drafter:
    """Counts which tokens follow which contexts, and drafts the most frequent ones."""

    def __init__(self) -> None:
        self._followers: list[dict[tuple[int, ...], dict[int, int]]] = [{} for _ in _CONTEXT_TOKENS]

    def learn(self, completion: Sequence[int], start: int = 0) -> None:
        """Count the followers of each context.

        Args:
            completion: Token ids from the beginning of the completion.
            start: Index of the first token that has not been counted yet.
        """
        padded = [_START] * _CONTEXT_TOKENS[0] + list(completion)
        for end in range(_CONTEXT_TOKENS[0] + start, len(padded)):
            for length, followers in zip(_CONTEXT_TOKENS, self._followers, strict=True):
                counts = followers.setdefault(tuple(padded[end - length : end]), {})
                counts[padded[end]] = counts.get(padded[end], 0) + 1

    def draft(self, completion: Sequence[int], max_tokens: int) -> list[DraftToken]:
        """Propose the tokens that follow a partial completion, as far as its contexts are known.

        Args:
            completion: Token ids generated so far.
            max_tokens: Maximum number of draft tokens.
        """
        context = ([_START] * _CONTEXT_TOKENS[0] + list(completion))[-_CONTEXT_TOKENS[0] :]
        draft: list[DraftToken] = []
        probability = 1.0
        while len(draft) < max_tokens:
            counts = self._find_counts(context)
            if counts is None:
                break
            token = max(counts, key=counts.__getitem__)
            # Smoothing by half an unseen case: a follower seen once is not certain.
            probability *= counts[token] / (sum(counts.values()) + 0.5)
            if probability < _MIN_PROBABILITY:
                break
            draft.append(DraftToken(token, probability))
            context = [*context[1:], token]
        return draft

    def _find_counts(self, context: list[int]) -> dict[int, int] | None:
        for length, followers in zip(_CONTEXT_TOKENS, self._followers, strict=True):
            counts = followers.get(tuple(context[-length:]))
            if counts is not None:
                return counts
        return None


def best_width(drafts: Sequence[Sequence[DraftToken]], pass_cost_tokens: float) -> int:
    """Return the number of tokens per row that minimizes the cost of a generated token in the next forward pass.

    A pass over ``width`` tokens per row costs ``pass_cost_tokens + rows * width``. It generates one token per row, and
    one more for each accepted draft token.

    Args:
        drafts: The draft of each row.
        pass_cost_tokens: Fixed cost of a pass, as the number of tokens that could be read in that time.

    Returns:
        The width: 1 plus the number of draft tokens to verify.
    """
    expected_tokens = float(len(drafts))
    best_rate, best = expected_tokens / (pass_cost_tokens + len(drafts)), 1
    for width in range(2, 2 + max(map(len, drafts))):
        expected_tokens += sum(draft[width - 2].probability for draft in drafts if len(draft) > width - 2)
        rate = expected_tokens / (pass_cost_tokens + len(drafts) * width)
        if rate > best_rate:
            best_rate, best = rate, width
    return best
