from __future__ import annotations

import pytest

from snake_lora_pl.decoding.drafter import Drafter, Guess, best_width


def tokens(guesses: list[Guess]) -> list[int]:
    return [guess.token for guess in guesses]


def test_what_was_written_before_is_guessed_from_the_beginning_and_from_anywhere() -> None:
    drafter, text = Drafter(), list(range(40))
    drafter.learn(text)
    assert tokens(drafter.guess([], 100)) == text[: len(drafter.guess([], 100))]
    assert tokens(drafter.guess(text[:20], 5)) == text[20:25]
    assert tokens(drafter.guess([99, 98, 20, 21, 22], 5)) == text[23:28]


def test_nothing_is_guessed_where_nothing_is_known() -> None:
    drafter = Drafter()
    assert drafter.guess([], 10) == []
    drafter.learn([1, 2, 3, 4])
    assert drafter.guess([7, 8, 9], 10) == []
    assert drafter.guess([1, 2, 3], 0) == []


def test_a_longer_context_counts_more_than_a_shorter_one() -> None:
    drafter = Drafter()
    long = list(range(12))
    drafter.learn([*long, 50])
    for _ in range(5):
        drafter.learn([*range(100, 109), *long[-3:], 60])
    assert tokens(drafter.guess(long, 1)) == [50]
    assert tokens(drafter.guess([200, 201, *long[-3:]], 1)) == [60]


def test_probability_falls_with_every_guess_and_rises_with_experience() -> None:
    drafter = Drafter()
    drafter.learn([1, 2, 3])
    once = [guess.probability for guess in drafter.guess([], 3)]
    assert once == sorted(once, reverse=True)
    assert once[0] < 1
    for _ in range(20):
        drafter.learn([1, 2, 3])
    assert all(guess.probability > before for guess, before in zip(drafter.guess([], 3), once, strict=True))
    for follower in range(100, 140):
        drafter.learn([follower])
    assert drafter.guess([], 3)[0].probability < 0.5


def test_only_what_is_new_is_learnt() -> None:
    piecewise, whole = Drafter(), Drafter()
    text = [3, 1, 4, 1, 5, 9, 2, 6]
    piecewise.learn(text[:3])
    piecewise.learn(text, start=3)
    whole.learn(text)
    assert piecewise.guess([], 8) == whole.guess([], 8)


@pytest.mark.parametrize("num_rows", [1, 64])
def test_a_pass_reads_no_guesses_where_there_are_none_and_all_where_they_are_certain(num_rows: int) -> None:
    assert best_width([[]] * num_rows, 48) == 1
    certain = [Guess(0, 1.0)] * 20
    assert best_width([certain] * num_rows, 48) == 21


def test_doubtful_guesses_are_read_for_one_row_and_not_for_many() -> None:
    doubtful = [Guess(0, 0.4)] * 4
    assert best_width([doubtful], 48) == 5
    assert best_width([doubtful] * 64, 48) == 1


def test_a_guess_that_few_rows_have_is_not_worth_its_padding() -> None:
    certain = [Guess(0, 1.0)] * 20
    assert best_width([certain] * 3 + [[]] * 61, 48) == 1
