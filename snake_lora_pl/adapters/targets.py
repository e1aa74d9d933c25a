"""Resolution of the layers that carry an adapter, before PEFT sees them.

PEFT accepts a list of names of which only some exist (https://github.com/huggingface/peft/issues/1959), and then trains
fewer layers without a warning. Here every name must match.
"""

from __future__ import annotations

import logging
import re
from collections.abc import Iterable, Mapping
from typing import TYPE_CHECKING, Any

from snake_lora_pl.adapters.config import ALL_LINEAR, ATTENTION_PROJECTIONS, UPPER_HALF
from snake_lora_pl.adapters.patterns import problem_with_pattern
from snake_lora_pl.adapters.peft_internals import default_target_modules, is_adapter_layer, matches_layer_pattern
from snake_lora_pl.errors import UserError, did_you_mean, one_line
from snake_lora_pl.models.text_decoder import text_config, text_decoder

if TYPE_CHECKING:
    from peft import PeftConfig, PeftModel
    from torch import nn
    from transformers import PreTrainedModel

logger = logging.getLogger(__name__)

# Names of the modules that mix tokens, in the architectures of transformers 5.
_MIXERS = {
    "attention", "attn", "conv", "linear_attn", "mamba", "mixer", "multi_head_attention", "self_attention", "self_attn",
    "temporal_block",
}  # fmt: skip
# Projections to one or two scalars per attention head: smaller than any useful rank.
_HEAD_GATES = {"a_proj", "b_proj", "in_proj_a", "in_proj_b", "in_proj_ba"}


def resolve_target_modules(
    base_model: PreTrainedModel, target_modules: list[str] | str, layers: list[int] | str | None = None
) -> list[str] | str:
    """Return the ``target_modules`` to pass to PEFT: each matches a layer that can be trained, and no other layer.

    Args:
        base_model: The model to adapt.
        target_modules: As in ``LoRAConfig.target_modules``.
        layers: As in ``LoRAConfig.layers``.

    Raises:
        UserError: If a name or the pattern matches no layer that can be trained, or a layer does not exist; the message
            lists those that do.
    """
    targets = _resolve_in_all_layers(base_model, target_modules)
    if layers is None:
        return targets
    # Full names, because PEFT's `layers_to_transform` does not work with patterns, nor in all adapter types.
    names = list(selected_layers(base_model, targets))
    wanted = _layer_indices(base_model, layers, names)
    selected = [name for name in names if _layer_index(name) in wanted]
    # A name can match in other layers only, in models that alternate two kinds of layers.
    is_default = tuple(target_modules) == ATTENTION_PROJECTIONS
    named = [] if is_default or isinstance(target_modules, str) else target_modules
    missing = [target for target in named if not _matches(target, selected)]
    if missing or not selected:
        unmatched = ", ".join(missing) or "model.lora.target_modules"
        raise UserError(
            f"model.lora.layers: {unmatched} matches nothing in layers {layers}. Select other layers, or other modules "
            "with model.lora.target_modules."
        )
    return selected


def _layer_index(name: str) -> int | None:
    """Return the index in the name of a module: the first part that is a number, as in PEFT."""
    return next((int(part) for part in name.split(".") if part.isdecimal()), None)


def _layer_indices(base_model: PreTrainedModel, layers: list[int] | str, names: list[str]) -> set[int]:
    known = [index for name in names if (index := _layer_index(name)) is not None]
    num_layers = getattr(text_config(base_model), "num_hidden_layers", None) or max(known, default=-1) + 1
    if layers == UPPER_HALF:
        return set(range(num_layers // 2, num_layers))
    if isinstance(layers, str):
        first, last = (int(part) for part in layers.split("-"))
        wanted = set(range(first, last + 1))
    else:
        first, last = min(layers), max(layers)
        wanted = set(layers)
    if not wanted or last >= num_layers:
        raise UserError(
            f"model.lora.layers: {layers} is not within the layers of {type(base_model).__name__}, 0-{num_layers - 1}."
        )
    return wanted


def _resolve_in_all_layers(base_model: PreTrainedModel, target_modules: list[str] | str) -> list[str] | str:
    decoder = text_decoder(base_model)
    linear_names = [name for name, module in base_model.named_modules() if _is_linear(base_model, module)]
    names = [name for name in linear_names if _is_trainable(base_model, decoder, name)]
    if target_modules == ALL_LINEAR:
        return ALL_LINEAR if names == linear_names else names
    # PEFT matches modules of any class.
    others = {name for name, _ in base_model.named_modules()} - set(names)
    if isinstance(target_modules, str):
        pattern = _checked_pattern(target_modules, names)
        if not any(re.fullmatch(pattern, name) for name in others):
            return pattern
        return [name for name in names if re.fullmatch(pattern, name)]
    missing = [target for target in target_modules if not _matches(target, names)]
    targets = list(target_modules)
    if tuple(target_modules) == ATTENTION_PROJECTIONS:
        targets = _default_targets(base_model, names)
    elif missing:
        suffixes = _suffixes(names)
        raise UserError(
            f"model.lora.target_modules: {', '.join(repr(m) for m in missing)} "
            f"{'match' if len(missing) > 1 else 'matches'} no trainable layer of {type(base_model).__name__}. "
            f"Layers: {', '.join(suffixes)}; or '{ALL_LINEAR}'.{did_you_mean(missing[0], suffixes)}"
        )
    if any(_matches(target, others) for target in targets):
        return [name for name in names if any(_matches(target, [name]) for target in targets)]
    return targets


def add_adapter(base_model: PreTrainedModel, peft_config: PeftConfig) -> PeftModel:
    """Add a fresh adapter to a base model, and log a warning if PEFT adapts other layers than those selected.

    For some mixtures of experts, PEFT reads the name of a linear layer as the name of stacked expert weights
    (https://github.com/huggingface/peft/blob/v0.21.2/src/peft/utils/transformers_weight_conversion.py).

    Args:
        base_model: The model to adapt.
        peft_config: Settings with the result of ``resolve_target_modules``.

    Raises:
        UserError: If PEFT does not support the settings for the selected layers.
    """
    from peft import get_peft_model

    targets = peft_config.target_modules
    targets = targets if isinstance(targets, str) else list(targets)  # a copy: PEFT may replace names in it
    try:
        model = get_peft_model(base_model, peft_config)
    except (TypeError, ValueError) as error:  # for expert weights, PEFT supports few types and options
        raise UserError(
            f"model.lora: PEFT cannot adapt the selected layers of {type(base_model).__name__} with these settings "
            f"({one_line(error, 160)}). Set model.lora.dropout=0 and model.lora.use_dora=false, or select layers "
            "without experts, such as the attention projections, with model.lora.target_modules."
        ) from error
    _warn_of_skipped_layers(model, targets)
    return model


def _warn_of_skipped_layers(model: PeftModel, target_modules: list[str] | str) -> None:
    base = model.get_base_model()
    adapted = {name for name, module in base.named_modules() if is_adapter_layer(module)}
    skipped = []
    for name, module in base.named_modules():
        in_adapter = any(name.startswith(f"{layer}.") for layer in adapted)
        if _is_selected(name, target_modules) and not in_adapter and name not in adapted and _is_linear(base, module):
            skipped.append(name)
    if skipped:
        logger.warning(
            "%d selected layers of %s have no adapter, such as %s: PEFT adapts the expert weights instead.",
            len(skipped),
            type(base).__name__,
            skipped[0],
        )


def selected_layers(base_model: PreTrainedModel, target_modules: list[str] | str) -> dict[str, Any]:
    """Return the layers that PEFT will adapt, by name.

    Args:
        base_model: The model to adapt.
        target_modules: The result of ``resolve_target_modules``.
    """
    modules = base_model.named_modules()
    return {name: m for name, m in modules if _is_linear(base_model, m) and _is_selected(name, target_modules)}


def check_are_linear(adapter_type: str, layers: Mapping[str, object]) -> None:
    """Check that no layer is a ``Conv1D``, which not every adapter type supports.

    Raises:
        UserError: If one is.
    """
    from torch import nn

    for name, layer in layers.items():
        if not isinstance(layer, nn.Linear):
            raise UserError(
                f"model.adapter_type: '{adapter_type}' adapts linear layers only, but {name} is a "
                f"{type(layer).__name__}. Use lora, or select other layers with model.lora.target_modules."
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


def _is_selected(name: str, target_modules: list[str] | str) -> bool:
    if isinstance(target_modules, list):
        return any(_matches(target, [name]) for target in target_modules)
    return target_modules == ALL_LINEAR or re.fullmatch(target_modules, name) is not None


def _is_linear(base_model: PreTrainedModel, module: nn.Module) -> bool:
    # Conv1D is GPT-2's transposed linear layer; quantized layers subclass nn.Linear.
    from torch import nn
    from transformers.pytorch_utils import Conv1D

    return isinstance(module, nn.Linear | Conv1D) and module is not base_model.get_output_embeddings()


def _is_trainable(base_model: PreTrainedModel, decoder: nn.Module, name: str) -> bool:
    """Return whether an adapter on a linear layer gets a gradient from text."""
    path = name.split(".")
    ancestors = [base_model.get_submodule(".".join(path[:depth])) for depth in range(len(path))]
    return not (
        all(module is not decoder for module in ancestors)
        # Cross-attention layers run only with an image or an encoder.
        or any("CrossAttentionDecoderLayer" in type(module).__name__ for module in ancestors)
        or "encoder_attn" in path
        # Routers return a tuple, on which PEFT's layers fail.
        or "Router" in type(base_model.get_submodule(name)).__name__
        # Mamba multiplies by these weights without calling the layers: `dt_proj` always, `out_proj` in GPU kernels.
        or (path[-1] in ("dt_proj", "out_proj") and all(hasattr(ancestors[-1], part) for part in ("A_log", "D")))
    )


def _matches(target: str, names: Iterable[str]) -> bool:
    # PEFT's rule for lists: the full name, or a suffix after a dot.
    return any(name == target or name.endswith(f".{target}") for name in names)


def _suffixes(names: Iterable[str]) -> list[str]:
    return sorted({name.rsplit(".", 1)[-1] for name in names})


def _checked_pattern(pattern: str, names: list[str]) -> str:
    if problem := problem_with_pattern(pattern):
        raise UserError(f"model.lora.target_modules: '{pattern[:60]}' is {problem}.")
    if not any(re.fullmatch(pattern, name) for name in names):
        raise UserError(
            f"model.lora.target_modules: pattern '{pattern}' matches no trainable layer. It must match a full name "
            f"such as '{names[0] if names else '(none)'}'. Alternatively, pass a list of suffixes: "
            f"{', '.join(_suffixes(names))}."
        )
    return pattern


def _default_targets(base_model: PreTrainedModel, names: list[str]) -> list[str]:
    """Return the attention projections, or their equivalent in the architecture.

    These are PEFT's default targets. Token mixers without any of them, such as linear attention between layers of
    attention, are adapted in all of their projections.
    """
    model_type = text_config(base_model).model_type
    targets = list(ATTENTION_PROJECTIONS)
    if not all(_matches(target, names) for target in targets):
        targets = default_target_modules(model_type) or []
        if not all(_matches(target, names) for target in targets):
            targets = []
    mixers: dict[str, list[str]] = {}
    for name in names:
        parent, _, layer = name.rpartition(".")
        if parent.rpartition(".")[2] in _MIXERS and layer not in _HEAD_GATES:
            mixers.setdefault(parent, []).append(name)
    in_mixers = {name for layers in mixers.values() for name in layers}
    skipped = [layers for layers in mixers.values() if not any(_matches(target, layers) for target in targets)]
    for name in (name for layers in skipped for name in layers):
        if not any(_matches(target, [name]) for target in targets):
            targets.append(_short_name(name, set(names) - in_mixers))
    if not targets:
        raise UserError(
            f"model.lora.target_modules: there is no default for the architecture '{model_type}'. "
            f"Choose from its layers: {', '.join(_suffixes(names))}; or '{ALL_LINEAR}'."
        )
    if tuple(targets) != ATTENTION_PROJECTIONS:
        logger.info("Target modules of the architecture '%s': %s", model_type, ", ".join(targets))
    return targets


def _short_name(name: str, other_names: Iterable[str]) -> str:
    """Return the last part of a layer's name, with the name of its parent if other layers have the same last part."""
    parts = name.split(".")
    return ".".join(parts[-2:]) if _matches(parts[-1], other_names) else parts[-1]
