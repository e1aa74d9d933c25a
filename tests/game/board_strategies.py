"""Hypothesis strategies for positions."""

import random

from hypothesis import strategies as st

from snake_lora_pl.game import Board


@st.composite
def boards(draw: st.DrawFn, max_size: int = 8) -> Board:
    """Any snake that fits on a grid: a random self-avoiding walk, with an apple on a random free cell."""
    size = draw(st.integers(2, max_size))
    rng = random.Random(draw(st.integers(0, 2**32)))
    max_length = draw(st.integers(1, size**2 - 1))
    body = [(rng.randrange(size), rng.randrange(size))]
    while len(body) < max_length:
        x, y = body[-1]
        ways = [(x + 1, y), (x - 1, y), (x, y + 1), (x, y - 1)]
        ways = [(x, y) for x, y in ways if 0 <= x < size and 0 <= y < size and (x, y) not in body]
        if not ways:
            break
        body.append(rng.choice(ways))
    return Board(
        size, tuple(body), rng.choice([c for x in range(size) for y in range(size) if (c := (x, y)) not in body])
    )
