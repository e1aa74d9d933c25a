"""Hypothesis strategy for boards."""

import random

from hypothesis import strategies as st

from snake_lora_pl.game import Board


@st.composite
def boards(draw: st.DrawFn, max_size: int = 8) -> Board:
    """Generate boards: the snake is a random self-avoiding path, the apple is on a random free cell."""
    size = draw(st.integers(2, max_size))
    rng = random.Random(draw(st.integers(0, 2**32)))
    max_length = draw(st.integers(1, size**2 - 1))
    body = [(rng.randrange(size), rng.randrange(size))]
    while len(body) < max_length:
        x, y = body[-1]
        neighbors = [(x + 1, y), (x - 1, y), (x, y + 1), (x, y - 1)]
        neighbors = [(x, y) for x, y in neighbors if 0 <= x < size and 0 <= y < size and (x, y) not in body]
        if not neighbors:
            break
        body.append(rng.choice(neighbors))
    return Board(
        size, tuple(body), rng.choice([c for x in range(size) for y in range(size) if (c := (x, y)) not in body])
    )
