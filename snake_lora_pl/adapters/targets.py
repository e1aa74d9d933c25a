"""Resolution of the layers that carry an adapter, before PEFT sees them.

PEFT accepts a list of names of which only some exist (https://github.com/huggingface/peft/issues/1959), and then trains
fewer layers without a warning. Here every name must match.
"""

from __future__ import annotations

import logging
import re
from collections.abc import Iterable, Mapping
from typing import TYPE_CHECKING

from snake_lora_pl.adapters.config import ALL_LINEAR, ATTENTION_PROJECTIONS
from snake_lora_pl.adapters.patterns import problem_with_pattern
from snake_lora_pl.adapters.peft_internals import default_target_modules, is_adapter_layer, matches_layer_pattern
from snake_lora_pl.errors import UserError, did_you_mean

if TYPE_CHECKING:
    from peft import PeftModel
    from torch import nn
    from transformers import PreTrainedModel

logger = logging.getLogger(__name__)


def resolve_target_modules(base_model: PreTrainedModel, target_modules: list[str] | str) -> list[str] | str:
    """Return the ``target_modules`` to pass to PEFT, each of which matches a layer.

    Args:
        base_model: The model to adapt.
        target_modules: As in ``LoRAConfig.target_modules``.

    Raises:
        UserError: If a name or the pattern matches no layer; the message lists the layers.
    """
    linear_names = [name for name, module in base_model.named_modules() if _is_adaptable(base_model, module)]
    if target_modules == ALL_LINEAR:
        return ALL_LINEAR
    if isinstance(target_modules, str):
        return _checked_pattern(target_modules, linear_names)
    missing = [target for target in target_modules if not _matches(target, linear_names)]
    if not missing:
        return list(target_modules)
    if tuple(target_modules) == ATTENTION_PROJECTIONS:
        return _default_targets(base_model, linear_names)
    suffixes = _suffixes(linear_names)
    raise UserError(
        f"model.lora.target_modules: {', '.join(repr(m) for m in missing)} "
        f"{'match' if len(missing) > 1 else 'matches'} no layer of {type(base_model).__name__}. "
        f"Layers: {', '.join(suffixes)}; or '{ALL_LINEAR}'.{did_you_mean(missing[0], suffixes)}"
    )


def check_has_no_adapter(base_model: PreTrainedModel) -> None:
    """Check that a base model carries no adapter; PEFT would add the next one to it, or replace it.

    Raises:
        UserError: If it carries one.
    """
    from peft import PeftModel

    if isinstance(base_model, PeftModel) or any(is_adapter_layer(module) for module in base_model.modules()):
        raise UserError(
            "the base model already carries an adapter. Remove it with PeftModel.unload(), or load several adapters on "
            "one base with snake_lora_pl.adapters.shared_base.SharedBase."
        )


def check_layer_patterns(model: PeftModel, setting: str, pattern: Mapping[str, object]) -> None:
    """Check that each key of a per-layer setting matches an adapted layer; PEFT ignores the others.

    Raises:
        UserError: If a key matches none; the message lists the adapted layers.
    """
    prefix = "base_model.model."
    names = [name.removeprefix(prefix) for name, module in model.named_modules() if is_adapter_layer(module)]
    for key in pattern:
        if not any(matches_layer_pattern(key, name) for name in names):
            raise UserError(
                f"model.lora.{setting}: '{key}' matches no adapted layer. Full names are of the form {names[0]}, "
                f"with the suffixes {', '.join(_suffixes(names))}."
            )


def _is_adaptable(base_model: PreTrainedModel, module: nn.Module) -> bool:
    # Conv1D is GPT-2's transposed linear layer; quantized layers subclass nn.Linear.
    from torch import nn
    from transformers.pytorch_utils import Conv1D

    return isinstance(module, nn.Linear | Conv1D) and module is not base_model.get_output_embeddings()


def _matches(target: str, names: Iterable[str]) -> bool:
    # PEFT's rule for lists: the full name, or a suffix after a dot.
    return any(name == target or name.endswith(f".{target}") for name in names)


def _suffixes(names: Iterable[str]) -> list[str]:
    return sorted({name.rsplit(".", 1)[-1] for name in names})


def _checked_pattern(pattern: str, linear_names: list[str]) -> str:
    if problem := problem_with_pattern(pattern):
        raise UserError(f"model.lora.target_modules: '{pattern[:60]}' is {problem}.")
    if not any(re.fullmatch(pattern, name) for name in linear_names):
        raise UserError(
            f"model.lora.target_modules: pattern '{pattern}' matches no layer. It must match a full name such as "
            f"'{linear_names[0] if linear_names else '(none)'}'. Alternatively, pass a list of suffixes: "
            f"{', '.join(_suffixes(linear_names))}."
        )
    return pattern


def _default_targets(base_model: PreTrainedModel, linear_names: list[str]) -> list[str]:
    model_type = base_model.config.model_type
    targets = default_target_modules(model_type)
    if targets is None or not all(_matches(target, linear_names) for target in targets):
        raise UserError(
            f"model.lora.target_modules: there is no default for the architecture '{model_type}'. "
            f"Choose from its layers: {', '.join(_suffixes(linear_names))}; or '{ALL_LINEAR}'."
        )
    logger.info("Target modules of the architecture '%s': %s", model_type, ", ".join(targets))
    return targets
