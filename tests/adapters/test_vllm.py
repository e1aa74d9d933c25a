"""Adapter settings that vLLM supports; if vLLM is installed, the same cases are compared with its own check."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any, get_args

import pytest

from snake_lora_pl.adapters.vllm import VLLM_RANKS, vllm_command, vllm_obstacles
from tests.documented import ROOT

LORA: dict[str, Any] = {"peft_type": "LORA", "r": 16, "lora_alpha": 32, "bias": "none", "target_modules": ["q_proj"]}


SERVED = [
    {},
    {"use_rslora": True},
    {"init_lora_weights": "gaussian"},
    {"rank_pattern": {"q_proj": 64}, "alpha_pattern": {"q_proj": 8}},
    {"target_modules": ["q_proj", "down_proj"]},
    {"modules_to_save": None, "layer_replication": None},
]

NOT_SERVED = [
    ({"peft_type": "ADALORA"}, "plain LoRA, not ADALORA"),
    ({"use_dora": True}, "DoRA"),
    ({"lora_bias": True}, "bias in B"),
    ({"bias": "all"}, "trained biases"),
    ({"modules_to_save": ["lm_head"]}, "modules_to_save: lm_head"),
    ({"init_lora_weights": "pissa_niter_4"}, "init_lora_weights=pissa_niter_4"),
    ({"layer_replication": [[0, 4]]}, "replicated layers"),
    ({"r": 1024}, "rank 1024"),
    ({"rank_pattern": {"q_proj": 600}}, "rank 600"),
]


@pytest.mark.parametrize("changes", SERVED)
def test_plain_lora_has_no_obstacles(changes: dict[str, Any]) -> None:
    assert vllm_obstacles({**LORA, **changes}) == []


@pytest.mark.parametrize(("changes", "reason"), NOT_SERVED)
def test_unsupported_setting_is_reported(changes: dict[str, Any], reason: str) -> None:
    (obstacle,) = vllm_obstacles({**LORA, **changes})
    assert reason in obstacle


def test_all_obstacles_are_reported() -> None:
    assert len(vllm_obstacles({**LORA, "use_dora": True, "modules_to_save": ["norm"], "r": 600})) == 3


@pytest.mark.parametrize(("rank", "flag"), [(1, 1), (2, 8), (16, 16), (17, 32), (300, 320), (512, 512)])
def test_command_has_the_smallest_sufficient_max_lora_rank(rank: int, flag: int) -> None:
    command = vllm_command({**LORA, "r": rank}, "base", "dir")
    assert command == f"vllm serve base --enable-lora --max-lora-rank {flag} --lora-modules snake=dir"


def test_documentation_has_the_same_command_and_ranks() -> None:
    page = (ROOT / "docs" / "how-to" / "serve-and-share.md").read_text(encoding="utf-8")
    assert vllm_command(LORA, "HuggingFaceTB/SmolLM2-135M-Instruct", "path/to/model_artifacts") in page
    assert f"one of {', '.join(map(str, VLLM_RANKS))} and 16 if" in page


@pytest.fixture(scope="session")
def vllm_peft_helper() -> Any:
    """vLLM's parser of ``adapter_config.json``, imported early because the import sets environment variables."""
    return pytest.importorskip("vllm.lora.peft_helper", reason="vLLM is not installed")


@pytest.mark.parametrize("changes", [*SERVED, *(changes for changes, _ in NOT_SERVED if "peft_type" not in changes)])
def test_obstacles_agree_with_the_check_of_vllm(changes: dict[str, Any], vllm_peft_helper: Any) -> None:
    helper = vllm_peft_helper.PEFTHelper.from_dict({**LORA, **changes})
    limits = SimpleNamespace(max_lora_rank=VLLM_RANKS[-1])
    if vllm_obstacles({**LORA, **changes}):
        with pytest.raises(ValueError, match="."):
            helper.validate_legal(limits)
    else:
        helper.validate_legal(limits)


@pytest.mark.usefixtures("vllm_peft_helper")
def test_ranks_equal_those_of_vllm() -> None:
    from vllm.config.lora import MaxLoRARanks

    assert get_args(MaxLoRARanks) == VLLM_RANKS
