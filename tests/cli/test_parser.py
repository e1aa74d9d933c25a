from __future__ import annotations

from pathlib import Path

import pytest
from jsonargparse import Namespace

from snake_lora_pl.cli.parser import OneLineParser, append_repeated, config_names
from snake_lora_pl.errors import UserError
from snake_lora_pl.paths import shipped_configs


@pytest.fixture
def parser() -> OneLineParser:
    parser = OneLineParser(prog="program")
    parser.add_argument("--model.rank", type=int, default=4)
    parser.add_argument("--adapter", type=str | list[str] | None, default=None)
    return parser


def test_repeated_option_is_collected_into_a_list(parser: OneLineParser) -> None:
    arguments = append_repeated(["--adapter=a", "--model.rank=3", "--adapter", "b"], "--adapter")
    assert arguments == ["--adapter=a", "--model.rank=3", "--adapter+", "b"]
    assert parser.parse_args(arguments).adapter == ["a", "b"]


@pytest.mark.parametrize(
    ("argument", "parts"),
    [
        ("--model.rnk=3", ["'model.rank'"]),
        ("--model.rank=many", ["model.rank", "many"]),
        ("--model.ran=3", ["'model.rank'"]),
    ],
)
def test_error_is_one_line_that_names_the_key(parser: OneLineParser, argument: str, parts: list[str]) -> None:
    with pytest.raises(UserError) as caught:
        parser.parse_args([argument])
    assert "\n" not in str(caught.value)
    assert all(part in str(caught.value) for part in parts)


def test_shipped_configs_have_their_short_name(tmp_path: Path) -> None:
    mine = tmp_path / "balanced.yaml"
    assert config_names(Namespace(config=[shipped_configs()["qlora.yaml"], mine])) == ["qlora.yaml", str(mine)]
    assert config_names(Namespace()) == []
