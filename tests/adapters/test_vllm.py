"""What vLLM takes; where it is installed, its own check is asked about the same cases."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any, get_args

import pytest

from snake_lora_pl.adapters.vllm import VLLM_RANKS, adapter_rank, vllm_command, vllm_obstacles
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
    ({"lora_bias": True}, "bias on B"),
    ({"bias": "all"}, "trained biases"),
    ({"modules_to_save": ["lm_head"]}, "modules_to_save: lm_head"),
    ({"init_lora_weights": "pissa_niter_4"}, "init_lora_weights=pissa_niter_4 changed the base"),
    ({"layer_replication": [[0, 4]]}, "replicated layers"),
    ({"r": 1024}, "rank 1024 is above"),
    ({"rank_pattern": {"q_proj": 600}}, "rank 600 is above"),
]


@pytest.mark.parametrize("changes", SERVED)
def test_plain_lora_is_served(changes: dict[str, Any]) -> None:
    assert vllm_obstacles({**LORA, **changes}) == []


@pytest.mark.parametrize(("changes", "reason"), NOT_SERVED)
def test_what_is_not_served_is_said_with_its_reason(changes: dict[str, Any], reason: str) -> None:
    (obstacle,) = vllm_obstacles({**LORA, **changes})
    assert reason in obstacle


def test_every_obstacle_is_named() -> None:
    assert len(vllm_obstacles({**LORA, "use_dora": True, "modules_to_save": ["norm"], "r": 600})) == 3


@pytest.mark.parametrize(("rank", "flag"), [(1, 1), (2, 8), (16, 16), (17, 32), (300, 320), (512, 512)])
def test_the_command_names_the_least_rank_that_vllm_takes(rank: int, flag: int) -> None:
    command = vllm_command({**LORA, "r": rank}, "base", "dir")
    assert command == f"vllm serve base --enable-lora --max-lora-rank {flag} --lora-modules snake=dir"


def test_documentation_names_that_command_and_those_ranks() -> None:
    page = (ROOT / "docs" / "how-to" / "serve-and-share.md").read_text(encoding="utf-8")
    assert vllm_command(LORA, "HuggingFaceTB/SmolLM2-135M-Instruct", "path/to/model_artifacts") in page
    assert f"one of {', '.join(map(str, VLLM_RANKS))} and 16 if" in page


def test_the_rank_is_the_largest_that_a_layer_has() -> None:
    assert adapter_rank({**LORA, "rank_pattern": {"q_proj": 64}}) == 64
    assert adapter_rank({"peft_type": "ADALORA", "r": 8, "init_r": 12, "rank_pattern": {"x": [True]}}) == 12
    assert adapter_rank({"peft_type": "IA3"}) is None


@pytest.fixture(scope="session")
def vllm_peft_helper() -> Any:
    """vLLM's own reading of ``adapter_config.json``; importing it sets environment variables, so it comes first."""
    return pytest.importorskip("vllm.lora.peft_helper", reason="vLLM is not installed")


@pytest.mark.parametrize("changes", [*SERVED, *(changes for changes, _ in NOT_SERVED if "peft_type" not in changes)])
def test_vllms_own_check_says_the_same(changes: dict[str, Any], vllm_peft_helper: Any) -> None:
    helper = vllm_peft_helper.PEFTHelper.from_dict({**LORA, **changes})
    limits = SimpleNamespace(max_lora_rank=VLLM_RANKS[-1])
    if vllm_obstacles({**LORA, **changes}):
        with pytest.raises(ValueError, match="."):
            helper.validate_legal(limits)
    else:
        helper.validate_legal(limits)


@pytest.mark.usefixtures("vllm_peft_helper")
def test_vllms_ranks_are_these() -> None:
    from vllm.config.lora import MaxLoRARanks

    assert get_args(MaxLoRARanks) == VLLM_RANKS
