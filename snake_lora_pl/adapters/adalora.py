"""AdaLoRA (https://arxiv.org/abs/2303.10512): allocates ranks to layers by importance during training.

The update of a layer is ``B diag(E) A``. Every layer starts with ``initial_rank`` triplets of a row of A, an entry of E
and a column of B. After an initial phase, the least important triplets over all layers are pruned step by step, down to
an average of ``rank`` per layer; in the final phase, ranks are fixed. PEFT implements the algorithm. This module
implements what PEFT leaves to the training loop: the schedule, the allocation, the regularizer, the state for a resume.
"""

from __future__ import annotations

import copy
import logging
import math
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, ClassVar, Literal

from typing_extensions import override

from snake_lora_pl.adapters.adapter_type import AdapterType
from snake_lora_pl.adapters.config import LoRAConfig
from snake_lora_pl.adapters.targets import add_adapter, resolve_target_modules
from snake_lora_pl.errors import UserError

if TYPE_CHECKING:
    from peft import AdaLoraConfig, PeftConfig, PeftModel
    from torch import Tensor
    from transformers import PreTrainedModel

logger = logging.getLogger(__name__)

_SCHEDULE = ("total_step", "tinit", "tfinal")
_SCORES = ("ipt", "exp_avg_ipt", "exp_avg_unc")


def build_adalora(base_model: PreTrainedModel, config: LoRAConfig) -> PeftModel:
    """Add AdaLoRA to a base model at its initial rank; E is zero, so logits are unchanged at first."""
    from peft import AdaLoraConfig

    adalora = config.adalora
    targets = resolve_target_modules(base_model, config.target_modules, config.layers)
    peft_config = AdaLoraConfig(
        target_r=config.rank,
        init_r=adalora.initial_rank or math.ceil(1.5 * config.rank),
        lora_alpha=config.alpha,
        lora_dropout=config.dropout,
        target_modules=targets,
        deltaT=adalora.allocate_every_n_steps,
        beta1=adalora.beta1,
        beta2=adalora.beta2,
        orth_reg_weight=adalora.orthogonal_weight,
        task_type="CAUSAL_LM",
        # PEFT requires a value; `start` sets the length of the run.
        total_step=1,
    )
    return add_adapter(base_model, peft_config)


class AdaLoRA(AdapterType):
    """LoRA with a rank budget that is allocated by importance.

    An adapter that is loaded to train further keeps its ranks.
    """

    ignored_settings = ("quantization", "use_rslora", "use_dora", "init_lora_weights", "rank_pattern", "alpha_pattern")
    # In a saved rank_pattern, each layer has one boolean per initial triplet.
    peft_setting_types: ClassVar[Mapping[str, Any]] = {
        **AdapterType.peft_setting_types,
        "peft_type": Literal["ADALORA"],
        "rank_pattern": dict[str, list[bool]] | None,
    }
    card_settings: ClassVar[Mapping[str, str]] = {
        "init_r": "initial rank",
        "target_r": "target rank",
        "lora_alpha": "alpha",
        "lora_dropout": "dropout",
    }

    def __init__(self) -> None:
        super().__init__(build_adalora)

    @override
    def start(self, model: PeftModel, config: LoRAConfig, total_steps: int | None) -> None:
        """Divide the steps of the run into the three phases.

        Raises:
            UserError: If the number of steps is unknown, or leaves no step for pruning.
        """
        peft_config = _peft_config(model)
        if peft_config.rank_pattern is not None:
            logger.info("AdaLoRA: the adapter's ranks are final; training continues without rank allocation.")
            model.base_model.rankallocator = None
            return
        if total_steps is None:
            raise UserError(
                "model.adapter_type=adalora prunes ranks over a known number of steps, but trainer.max_time ends this "
                "run. Set trainer.max_steps, in addition or instead."
            )
        adalora = config.adalora
        initial = total_steps // 10 if adalora.initial_steps is None else adalora.initial_steps
        final = (total_steps - 1) // 2 if adalora.final_steps is None else adalora.final_steps
        # Pruning is by importance, which takes one step to estimate.
        needed = max(initial, 1) + final + 1
        if total_steps < needed:
            given = [name for name in ("initial_steps", "final_steps") if getattr(adalora, name)]
            lower = ", or lower " + " and ".join(f"model.lora.adalora.{name}" for name in given) if given else ""
            raise UserError(
                f"model.adapter_type=adalora: {initial} initial and {final} final steps do not fit into a run of "
                f"{total_steps} steps. Train for at least {needed} steps (trainer.max_steps, trainer.max_epochs)"
                f"{lower}."
            )
        peft_config.total_step, peft_config.tinit, peft_config.tfinal = total_steps, initial, final

    @override
    def regularizer(self, model: PeftModel) -> Tensor | None:
        """Return ``orthogonal_weight`` times the mean Frobenius norm of ``P P^T - I`` over all factors P."""
        import torch

        weight: float = _peft_config(model).orth_reg_weight
        if weight == 0:
            return None
        norms = []
        for name, parameter in model.named_parameters():
            if parameter.requires_grad and (".lora_A." in name or ".lora_B." in name):
                factor = parameter if ".lora_A." in name else parameter.T  # (rank, features)
                identity = torch.eye(len(factor), device=factor.device, dtype=factor.dtype)
                norms.append(torch.linalg.matrix_norm(factor @ factor.T - identity))
        return torch.stack(norms).mean() * weight

    @override
    def after_step(self, model: PeftModel, step: int) -> dict[str, float]:
        """Update the importance of each triplet and prune those beyond the step's budget."""
        allocator = model.base_model.rankallocator
        if allocator is None:
            return {}
        model.base_model.update_and_allocate(step)
        return {"train/rank_budget": float(allocator.budget_schedule(step)[0]), "train/rank": _rank(model)}

    @override
    def end(self, model: PeftModel, step: int) -> None:
        """Log a warning if the run ended before its ranks reached the target."""
        peft_config = _peft_config(model)
        if model.base_model.rankallocator is None or step >= peft_config.total_step - peft_config.tfinal:
            return
        logger.warning(
            "AdaLoRA: the run ended at step %d, before its ranks reached the target at step %d; %d of %d remain to be "
            "pruned. Continue with --ckpt_path last, or plan for fewer steps with trainer.max_steps.",
            step,
            peft_config.total_step - peft_config.tfinal,
            int(_rank(model)) - model.base_model.rankallocator.target_bgt,
            model.base_model.rankallocator.init_bgt,
        )

    @override
    def state(self, model: PeftModel) -> dict[str, Any]:
        """Return the schedule, the allocated ranks, and the running scores that the next allocation depends on."""
        allocator = model.base_model.rankallocator
        if allocator is None:
            return {}
        peft_config = _peft_config(model)
        return {
            "schedule": {key: getattr(peft_config, key) for key in _SCHEDULE},
            "rank_pattern": peft_config.rank_pattern,
            "scores": {key: dict(getattr(allocator, key)) for key in _SCORES},
        }

    @override
    def load_state(self, model: PeftModel, state: dict[str, Any]) -> None:
        """Restore the state, including the original schedule if the resumed run is longer."""
        if not state:  # a run with final ranks
            return
        allocator = model.base_model.rankallocator
        peft_config = _peft_config(model)
        for key, value in state["schedule"].items():
            setattr(peft_config, key, value)
        peft_config.rank_pattern = state["rank_pattern"]
        devices = {name: parameter.device for name, parameter in model.base_model.model.named_parameters()}
        for key, scores in state["scores"].items():
            setattr(allocator, key, {name: score.to(devices[name]) for name, score in scores.items()})

    @override
    def saved_form(self, model: PeftModel, weights: dict[str, Tensor]) -> tuple[PeftConfig, dict[str, Tensor]]:
        """Return the adapter without pruned triplets: PEFT truncates the factors to the config's ``rank_pattern``."""
        config = _peft_config(model)
        singular_values = {name: weights[name] for name in weights if ".lora_E." in name}
        is_resized = any(len(values) != config.init_r for values in singular_values.values())
        if is_resized or not any(values.any() for values in singular_values.values()):
            return config, weights
        # Not the allocator's pattern: between two allocations, the optimizer changes what was set to zero.
        config = copy.deepcopy(config)
        config.rank_pattern = {
            name.removeprefix("base_model.model."): (values != 0).flatten().tolist()
            for name, values in singular_values.items()
        }
        return config, weights

    @override
    def saved_rank(self, peft_config: Mapping[str, Any]) -> int | None:
        """Return the initial rank, which bounds the rank of every layer; AdaLoRA does not use ``r``."""
        return peft_config.get("init_r")


def _peft_config(model: PeftModel) -> AdaLoraConfig:
    return model.peft_config["default"]


def _rank(model: PeftModel) -> float:
    """Return the number of triplets over all layers after the last allocation."""
    pattern = _peft_config(model).rank_pattern
    return float(model.base_model.rankallocator.init_bgt if pattern is None else sum(map(sum, pattern.values())))
