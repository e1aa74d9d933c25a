from __future__ import annotations

import pytest

from snake_lora_pl.decoding.drafter import Drafter, DraftToken, best_width


def tokens(draft: list[DraftToken]) -> list[int]:
    return [draft_token.token for draft_token in draft]


def test_earlier_completion_is_drafted_from_its_beginning_and_its_middle() -> None:
    drafter, completion = Drafter(), list(range(40))
    drafter.learn(completion)
    assert tokens(drafter.draft([], 100)) == completion[: len(drafter.draft([], 100))]
    assert tokens(drafter.draft(completion[:20], 5)) == completion[20:25]
    assert tokens(drafter.draft([99, 98, 20, 21, 22], 5)) == completion[23:28]


def test_draft_is_empty_without_a_known_context() -> None:
    drafter = Drafter()
    assert drafter.draft([], 10) == []
    drafter.learn([1, 2, 3, 4])
    assert drafter.draft([7, 8, 9], 10) == []
    assert drafter.draft([1, 2, 3], 0) == []


def test_longer_context_takes_precedence() -> None:
    drafter = Drafter()
    long = list(range(12))
    drafter.learn([*long, 50])
    for _ in range(5):
        drafter.learn([*range(100, 109), *long[-3:], 60])
    assert tokens(drafter.draft(long, 1)) == [50]
    assert tokens(drafter.draft([200, 201, *long[-3:]], 1)) == [60]


def test_probability_falls_along_a_draft_and_rises_with_counts() -> None:
    drafter = Drafter()
    drafter.learn([1, 2, 3])
    once = [draft_token.probability for draft_token in drafter.draft([], 3)]
    assert once == sorted(once, reverse=True)
    assert once[0] < 1
    for _ in range(20):
        drafter.learn([1, 2, 3])
    many = [draft_token.probability for draft_token in drafter.draft([], 3)]
    assert all(after > before for after, before in zip(many, once, strict=True))
    for follower in range(100, 140):
        drafter.learn([follower])
    assert drafter.draft([], 3)[0].probability < 0.5


def test_tokens_are_counted_once_when_a_completion_is_learned_in_parts() -> None:
    piecewise, whole = Drafter(), Drafter()
    completion = [3, 1, 4, 1, 5, 9, 2, 6]
    piecewise.learn(completion[:3])
    piecewise.learn(completion, start=3)
    whole.learn(completion)
    assert piecewise.draft([], 8) == whole.draft([], 8)


@pytest.mark.parametrize("num_rows", [1, 64])
def test_width_is_one_without_drafts_and_maximal_for_certain_drafts(num_rows: int) -> None:
    assert best_width([[]] * num_rows, 48) == 1
    certain = [DraftToken(0, 1.0)] * 20
    assert best_width([certain] * num_rows, 48) == 21


def test_uncertain_drafts_are_verified_for_one_row_but_not_for_many() -> None:
    uncertain = [DraftToken(0, 0.4)] * 4
    assert best_width([uncertain], 48) == 5
    assert best_width([uncertain] * 64, 48) == 1


def test_drafts_of_few_rows_do_not_repay_the_padding_of_the_others() -> None:
    certain = [DraftToken(0, 1.0)] * 20
    assert best_width([certain] * 3 + [[]] * 61, 48) == 1
