import json
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from snake_lora_pl.game import (
    STYLES,
    Board,
    BoardReader,
    Claims,
    Move,
    check_claims,
    check_completion,
    get_style,
    read_claims,
    read_move,
)
from snake_lora_pl.game.text.metrics import Danger
from tests.game.board_strategies import boards

REPOSITORY_DIR = Path(__file__).parents[2]
SAMPLE_DIR = REPOSITORY_DIR / "tests" / "data" / "heuristics_v0.04"
SHARED_DIR = REPOSITORY_DIR.parent / "shared" / "data" / "heuristics_v0.04"

BOARD = Board(4, ((1, 1), (1, 2), (2, 2)), (3, 0))
METRICS = {"moving", "head", "valid_moves", "manhattan_distance", "apple_direction", "danger", "free_space"}
CLAIMS_BY_STYLE = {
    "bfs-512": METRICS | {"conclusion"},
    "bfs-1024": {"moving", "head", "path_length", "distance", "free_cells"},
    "bfs-2048": {"moving", "head", "path_length", "distance", "free_cells"},
    "bfs-4096": METRICS | {"conclusion", "path_length", "distance", "free_cells"},
    "bfs-safe-greedy-4096": METRICS | {"conclusion", "path_length", "distance", "free_cells"},
    "compact": set(),
    "features": set(),
    "cycle": set(),
}


@given(boards(), st.sampled_from(list(Move)))
def test_every_claim_that_a_style_writes_is_parsed_and_true(board, move):
    assert set(CLAIMS_BY_STYLE) == set(STYLES)
    for name, expected in CLAIMS_BY_STYLE.items():
        checked = check_claims(board, move, get_style(name).write_completion(board, move))
        assert set(checked) == expected
        checked.pop("conclusion", None)
        assert all(checked.values())


@pytest.mark.parametrize("root", [SAMPLE_DIR, SHARED_DIR], ids=["sample", "shared"])
def test_every_claim_of_every_upstream_row_is_true(root):
    paths = sorted(root.glob("*/*/*.jsonl"))
    if not paths:
        pytest.skip(f"the upstream files are not at {root}")
    for path in paths:
        reader = BoardReader()
        for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), start=1):
            row = json.loads(line)
            checked = check_completion(reader.read(row["prompt"]), row["completion"])
            assert set(checked) == CLAIMS_BY_STYLE[path.parent.name]
            assert all(checked.values()), f"{path}:{number}: {checked}"


def test_claims_are_parsed_into_their_values():
    assert read_claims(get_style("bfs-512").write_completion(BOARD, Move.DOWN)) == Claims(
        moving=Move.DOWN,
        head=(1, 1),
        valid_moves=frozenset([Move.RIGHT, Move.DOWN, Move.LEFT]),
        manhattan_distance=3,
        apple_direction=frozenset([Move.DOWN, Move.RIGHT]),
        danger=Danger(straight=False, left=False, right=False),
        free_space={Move.UP: 0, Move.RIGHT: 2, Move.DOWN: 1, Move.LEFT: 1},
    )
    claims = read_claims(get_style("bfs-1024").write_completion(BOARD, Move.DOWN))
    assert claims == Claims(moving=Move.DOWN, head=(1, 1), path_length=3, distance=3, free_cells=13)


@pytest.mark.parametrize(
    ("old", "new", "false"),
    [
        ("from [1, 1]", "from [1, 2]", {"head"}),
        ("from [1, 1]", "from here", {"moving", "head"}),
        ("Moving DOWN", "Moving LEFT", {"moving"}),
        ("Moving DOWN", "Moving AWAY", {"moving", "head"}),
        ("move is: DOWN", "move is: UP", {"moving", "conclusion"}),
        ("move is: DOWN", "move is:", {"moving", "conclusion"}),
        ("['RIGHT', 'DOWN', 'LEFT']", "['RIGHT', 'LEFT']", {"valid_moves", "conclusion"}),
        ("['RIGHT', 'DOWN', 'LEFT']", "['RIGHT', 'AWAY']", {"valid_moves"}),
        ("['RIGHT', 'DOWN', 'LEFT']", "all", {"valid_moves"}),
        ("to apple: 3", "to apple: 4", {"manhattan_distance"}),
        ("to apple: 3", "to apple: three", {"manhattan_distance"}),
        ("'down': 1, 'left': 0", "'down': 1, 'left': 1", {"apple_direction"}),
        ("{'straight': 0", "{'straight': 1", {"danger"}),
        ("{'straight': 0, ", "{", {"danger"}),
        ("{'up': 0, 'down': 1, 'left': 1", "{'up': 0, 'down': 1, 'left': 9", {"free_space"}),
        ("{'up': 0, 'down': 1, 'left': 1", "{'up': 0, 'down': 1, 'south': 1", {"free_space"}),
    ],
)
def test_false_and_malformed_claims_are_reported_by_name(old, new, false):
    completion = get_style("bfs-512").write_completion(BOARD, Move.DOWN)
    assert old in completion
    broken = completion.replace(old, new)
    checked = check_claims(BOARD, read_move(broken), broken)
    assert {name for name, is_true in checked.items() if not is_true} == false


def test_absent_claims_are_not_checked():
    assert check_completion(BOARD, "Conclusion: UP") == {}
    assert check_completion(BOARD, "") == {}
    truncated = get_style("bfs-512").write_completion(BOARD, Move.DOWN).partition("- Apple")[0]
    assert set(check_completion(BOARD, truncated)) == {
        "moving",
        "head",
        "valid_moves",
        "manhattan_distance",
        "conclusion",
    }


def test_a_move_onto_the_tail_contradicts_the_valid_moves_of_the_format():
    board = Board(3, ((0, 0), (1, 0), (1, 1), (0, 1)), (2, 2))
    checked = check_completion(board, get_style("bfs-512").write_completion(board, Move.UP))
    assert checked["valid_moves"]
    assert not checked["conclusion"]


@given(st.text(alphabet="MovingUP from[1,2]\n- Valid moves:'Danger assessment={}Found(steps)"))
def test_arbitrary_text_is_never_an_error(text):
    assert isinstance(check_completion(BOARD, text), dict)
