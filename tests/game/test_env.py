from __future__ import annotations

import subprocess
import sys
import warnings

import gymnasium
import numpy as np
import pytest
from gymnasium.utils.env_checker import check_env
from hypothesis import given, settings

from snake_lora_pl.game import STYLES, Board, End, Game, Move, get_style, get_teacher
from snake_lora_pl.game.env import APPLE, EMPTY, FIRST_BODY, HEAD, MOVES, SnakeEnv, encode_board
from tests.game.board_strategies import boards

UP, RIGHT, DOWN, LEFT = range(4)


def decode_board(codes: np.ndarray) -> Board:
    """Follow the codes of the body from its tail to the head."""
    size = len(codes)
    cells = {(x, size - 1 - row): int(code) for row, line in enumerate(codes) for x, code in enumerate(line)}
    (head,) = (cell for cell, code in cells.items() if code == HEAD)
    apple = next((cell for cell, code in cells.items() if code == APPLE), None)

    def toward_head(cell: tuple[int, int]) -> tuple[int, int]:
        move = MOVES[cells[cell] - FIRST_BODY]
        return cell[0] + move.dx, cell[1] + move.dy

    previous = {toward_head(cell): cell for cell, code in cells.items() if code >= FIRST_BODY}
    body = [head]
    while body[-1] in previous:
        body.append(previous[body[-1]])
    return Board(size, tuple(body), apple)


@given(boards())
@settings(max_examples=50)
def test_codes_of_the_grid_determine_the_board(board: Board):
    codes = encode_board(board)
    assert decode_board(codes) == board
    assert np.count_nonzero(codes == EMPTY) == board.size**2 - board.length - (board.apple is not None)


@pytest.mark.parametrize(
    "arguments",
    [
        {},
        {"grid_size": 2},
        {"render_mode": "ansi"},
        {"render_mode": "rgb_array"},
        *({"observation": "text", "style": style} for style in STYLES),
    ],
    ids=str,
)
def test_environment_passes_the_checker_without_warnings(arguments: dict):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        check_env(gymnasium.make("Snake-v0", **arguments).unwrapped)


def test_an_episode_is_the_game_of_its_seed_with_the_same_moves():
    teacher = get_teacher("safe_greedy")
    env = SnakeEnv(grid_size=4, observation="text", style="compact")
    _, info = env.reset(seed=3)
    game = Game(4, info["game_seed"], max_steps_without_apple=64)
    rewards = 0.0
    terminated = truncated = False
    while not terminated and not truncated:
        move = teacher(game.board) or game.board.fallback_move()
        game.play(move)
        observation, reward, terminated, truncated, info = env.step(MOVES.index(move))
        rewards += reward
        if game.board.apple is not None:
            assert observation == get_style("compact").write_prompt(game.board)
        if game.end is None:
            assert [MOVES[i] for i in np.flatnonzero(info["action_mask"])] == game.board.legal_moves()
        assert (info["apples"], info["steps"]) == (game.num_apples, game.num_steps)
    assert info["end"] == game.end.value
    assert rewards == game.num_apples - (game.end in (End.WALL, End.SELF))


def play(board: Board, actions: list[int], **arguments) -> tuple[float, bool, bool, dict]:
    """Return reward, terminated, truncated and info of the last of several moves from a position."""
    env = SnakeEnv(grid_size=board.size, **arguments)
    env.reset(seed=0)
    env.game.board = board
    for action in actions:
        observation, reward, terminated, truncated, info = env.step(action)
        assert env.observation_space.contains(observation)
        assert info["action_mask"].dtype == np.int8
        assert info["action_mask"].shape == (4,)
    assert not info["action_mask"].any()
    with pytest.raises(ValueError, match=info["end"]):
        env.step(UP)
    return reward, terminated, truncated, info


AWAY = Board(4, ((0, 0),), (3, 3))
RING = Board(3, ((1, 0), (0, 0), (0, 1), (1, 1), (2, 1)), (2, 2))
ALMOST_FULL = Board(2, ((0, 0), (0, 1), (1, 1)), (1, 0))


@pytest.mark.parametrize(
    ("board", "actions", "arguments", "expected"),
    [
        (AWAY, [LEFT], {}, (-1.0, True, False, "WALL")),
        (AWAY, [LEFT], {"loss_reward": -5.0}, (-5.0, True, False, "WALL")),
        (RING, [UP], {}, (-1.0, True, False, "SELF")),
        (RING, [LEFT], {}, (-1.0, True, False, "NO_VALID_ANSWER")),
        (ALMOST_FULL, [RIGHT], {}, (1.0, True, False, "WIN")),
        (ALMOST_FULL, [RIGHT], {"observation": "text"}, (1.0, True, False, "WIN")),
        (AWAY, [UP, DOWN], {"max_steps": 2}, (0.0, False, True, "MAX_STEPS")),
        (AWAY, [UP, DOWN, UP], {"max_steps_without_apple": 3}, (0.0, False, True, "STARVED")),
        (AWAY, [UP, DOWN] * 32, {}, (0.0, False, True, "STARVED")),
    ],
)
def test_losses_and_wins_terminate_and_limits_truncate(
    board: Board, actions: list[int], arguments: dict, expected: tuple
):
    reward, terminated, truncated, info = play(board, actions, **arguments)
    assert (reward, terminated, truncated, info["end"]) == expected


def test_seeds_select_the_games():
    env = SnakeEnv()

    def game_seeds(seed: int) -> list[int]:
        return [env.reset(seed=seed)[1]["game_seed"], *(env.reset()[1]["game_seed"] for _ in range(3))]

    assert game_seeds(1) == game_seeds(1) != game_seeds(2)
    assert len(set(game_seeds(1))) == 4
    observation, info = env.reset(options={"game_seed": 12})
    assert info["game_seed"] == 12
    assert decode_board(observation) == Game(10, 12).board


@pytest.mark.parametrize("arguments", [{}, {"observation": "text"}], ids=str)
def test_many_games_run_as_a_vector_with_masks_and_restart(arguments: dict):
    envs = gymnasium.make_vec("snake_lora_pl.game.env:Snake-v0", num_envs=64, grid_size=4, max_steps=3, **arguments)
    observations, info = envs.reset(seed=0)
    assert len(observations) == len(set(info["game_seed"].tolist())) == 64
    for step in (1, 2, 3, 0, 1):  # the step after the end of an episode restarts it
        masks = info["action_mask"]
        actions = np.array([envs.single_action_space.sample(mask) for mask in masks])
        observations, rewards, terminated, truncated, info = envs.step(actions)
        assert len(observations) == len(rewards) == 64
        assert masks.shape == info["action_mask"].shape == (64, 4)
        assert not terminated.any()
        assert truncated.all() == (step == 3)
        assert set(info["end"]) == ({"MAX_STEPS"} if step == 3 else {""})
        assert set(info["steps"]) == {step}


def test_rendering_shows_the_board_in_both_modes():
    env = SnakeEnv(grid_size=6, render_mode="ansi")
    env.reset(seed=0)
    env.game.board = Board(6, ((1, 1), (1, 2), (2, 2)), (3, 0))
    lines = env.render().splitlines()
    assert "●" in lines[5]
    assert "██" in lines[4]
    assert lines[3].count("▓▓") == 2
    env = SnakeEnv(grid_size=6, render_mode="rgb_array")
    env.reset(seed=0)
    before = env.render()
    assert before.dtype == np.uint8
    assert before.shape == (140, 120, 3)
    env.step(UP)
    assert not np.array_equal(before, env.render())


@pytest.mark.parametrize(
    ("arguments", "match"),
    [
        ({"observation": "image"}, "image"),
        ({"observation": "text", "style": "compakt"}, "compact"),
        ({"render_mode": "human"}, "human"),
        ({"grid_size": 1}, "1"),
        ({"max_steps": 0}, "max_steps"),
        ({"max_steps_without_apple": -1}, "max_steps_without_apple"),
    ],
)
def test_invalid_argument_is_reported(arguments: dict, match: str):
    with pytest.raises(ValueError, match=match):
        SnakeEnv(**arguments)


def test_invalid_action_or_option_is_reported():
    env = SnakeEnv()
    with pytest.raises(ValueError, match="seed_of_game"):
        env.reset(options={"seed_of_game": 1})
    env.reset(seed=0)
    for action in (4, -1, Move.UP):
        with pytest.raises(ValueError, match="0, 1, 2 or 3"):
            env.step(action)


def test_the_game_does_not_import_gymnasium_or_numpy():
    code = "import sys, snake_lora_pl.game, snake_lora_pl.game.replay; print({'gymnasium', 'numpy'} & set(sys.modules))"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True).stdout.strip() == "set()"


def test_a_missing_gymnasium_names_the_extra():
    code = "import sys; sys.modules['gymnasium'] = None; import snake_lora_pl.game.env"
    assert "snake_lora_pl[gym]" in subprocess.run([sys.executable, "-c", code], capture_output=True, text=True).stderr
