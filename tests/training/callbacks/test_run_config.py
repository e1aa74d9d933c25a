from __future__ import annotations

from typing import Any

import yaml
from jsonargparse import ArgumentParser

from snake_lora_pl.training.callbacks.run_config import config_text


def test_config_has_no_checkpoint_path() -> None:
    parser: Any = ArgumentParser()
    parser.add_argument("--ckpt_path")
    parser.add_argument("--rank", type=int)
    config = parser.parse_args(["--ckpt_path=last", "--rank=8"])
    assert yaml.safe_load(config_text(parser, config)) == {"rank": 8}
    assert config.ckpt_path == "last"
