"""Which layers of a base model an adapter goes on, checked before PEFT sees them.

PEFT accepts a list of which only a part exists (https://github.com/huggingface/peft/issues/1959): the adapter then
trains fewer layers than asked for, without a word. Here every name must match.
"""

from __future__ import annotations

import difflib
import logging
import re
from collections.abc import Iterable, Mapping
from typing import TYPE_CHECKING

from snake_lora_pl.adapters.config import ALL_LINEAR, ATTENTION_PROJECTIONS
from snake_lora_pl.adapters.patterns import problem_with_pattern
from snake_lora_pl.errors import UserError

if TYPE_CHECKING:
    from peft import PeftModel
    from torch import nn
    from transformers import PreTrainedModel

logger = logging.getLogger(__name__)


def resolve_target_modules(base_model: PreTrainedModel, target_modules: list[str] | str) -> list[str] | str:
    """Turn a user's ``target_modules`` into what PEFT takes, every part of it known to match.

    Args:
        base_model: The model that will carry the adapter.
        target_modules: As in ``LoRAConfig.target_modules``.

    Returns:
        The names or the pattern to hand to PEFT.

    Raises:
        UserError: If a name or the pattern matches no layer; the message names the layers that exist.
    """
    linear_names = [name for name, module in base_model.named_modules() if _can_carry_adapter(base_model, name, module)]
    if target_modules == ALL_LINEAR:
        return ALL_LINEAR
    if isinstance(target_modules, str):
        return _checked_pattern(target_modules, linear_names)
    missing = [target for target in target_modules if not _matches(target, linear_names)]
    if not missing:
        return list(target_modules)
    if tuple(target_modules) == ATTENTION_PROJECTIONS:
        return _targets_of_architecture(base_model, linear_names)
    leaf_names = _leaf_names(linear_names)
    near = difflib.get_close_matches(missing[0], leaf_names, n=1)
    hint = f" Did you mean '{near[0]}'?" if near else ""
    raise UserError(
        f"model.lora.target_modules: {', '.join(repr(m) for m in missing)} "
        f"{'match' if len(missing) > 1 else 'matches'} no layer of {type(base_model).__name__}. "
        f"Layers that exist: {', '.join(leaf_names)}; or '{ALL_LINEAR}'.{hint}"
    )


def check_carries_none(base_model: PreTrainedModel) -> None:
    """Refuse a base model that carries an adapter: PEFT would put the next one on it, or in its place.

    Raises:
        UserError: If it does.
    """
    from peft import PeftModel
    from peft.tuners.tuners_utils import BaseTunerLayer

    if isinstance(base_model, PeftModel) or any(isinstance(module, BaseTunerLayer) for module in base_model.modules()):
        raise UserError(
            "the base model carries an adapter already. Take it off with PeftModel.unload(), or load several on one "
            "base with snake_lora_pl.adapters.shared_base.SharedBase."
        )


def check_layer_patterns(model: PeftModel, setting: str, pattern: Mapping[str, object]) -> None:
    """Check that each key of a per-layer setting is about a layer that carries the adapter; PEFT ignores others.

    Raises:
        UserError: If a key matches none; the message names those that carry it.
    """
    from peft.tuners.tuners_utils import BaseTunerLayer
    from peft.utils.other import get_pattern_key

    prefix = "base_model.model."
    names = [n.removeprefix(prefix) for n, module in model.named_modules() if isinstance(module, BaseTunerLayer)]
    for key in pattern:
        if not any(get_pattern_key([key], name) != name or key == name for name in names):
            raise UserError(
                f"model.lora.{setting}: '{key}' matches no layer that carries the adapter. Layers are called like "
                f"{names[0]}; their last parts are {', '.join(_leaf_names(names))}."
            )


def _can_carry_adapter(base_model: PreTrainedModel, name: str, module: nn.Module) -> bool:
    # Conv1D is GPT-2's transposed linear layer; quantized layers subclass nn.Linear.
    from torch import nn
    from transformers.pytorch_utils import Conv1D

    return isinstance(module, nn.Linear | Conv1D) and module is not base_model.get_output_embeddings()


def _matches(target: str, names: Iterable[str]) -> bool:
    # PEFT's own rule for lists: the whole name, or its end after a dot.
    return any(name == target or name.endswith(f".{target}") for name in names)


def _leaf_names(names: Iterable[str]) -> list[str]:
    return sorted({name.rsplit(".", 1)[-1] for name in names})


def _checked_pattern(pattern: str, linear_names: list[str]) -> str:
    if problem := problem_with_pattern(pattern):
        raise UserError(f"model.lora.target_modules: '{pattern[:60]}' is {problem}.")
    if not any(re.fullmatch(pattern, name) for name in linear_names):
        raise UserError(
            f"model.lora.target_modules: the pattern '{pattern}' matches no layer. It must match a full name such as "
            f"'{linear_names[0] if linear_names else '(none)'}'; a list of last parts works too: "
            f"{', '.join(_leaf_names(linear_names))}."
        )
    return pattern


def _targets_of_architecture(base_model: PreTrainedModel, linear_names: list[str]) -> list[str]:
    from peft.utils.constants import TRANSFORMERS_MODELS_TO_LORA_TARGET_MODULES_MAPPING

    model_type = base_model.config.model_type
    known = TRANSFORMERS_MODELS_TO_LORA_TARGET_MODULES_MAPPING.get(model_type)
    if known is None or not all(_matches(target, linear_names) for target in known):
        raise UserError(
            f"model.lora.target_modules: no default is known for the architecture '{model_type}'. "
            f"Choose from its layers: {', '.join(_leaf_names(linear_names))}; or '{ALL_LINEAR}'."
        )
    logger.info("Adapter layers for the architecture '%s': %s", model_type, ", ".join(known))
    return list(known)
