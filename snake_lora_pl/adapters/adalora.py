"""AdaLoRA (https://arxiv.org/abs/2303.10512): ranks move, while training, to the layers that need them.

The update of a layer is ``B diag(E) A``. Every layer begins with ``initial_rank`` triplets of a row of A, an entry of E
and a column of B. After the first phase the least important ones over all layers are set to zero, step by step down to
``rank`` a layer on average; in the last phase the ranks stand and train on. The algorithm is PEFT's. What PEFT leaves
to the training loop is here: the phases' lengths, when to allocate, the orthogonal term, what a resumed run needs.
"""

from __future__ import annotations

import copy
import logging
import math
from typing import TYPE_CHECKING, Any

from snake_lora_pl.adapters.adapter_type import AdapterType
from snake_lora_pl.adapters.config import LoRAConfig
from snake_lora_pl.adapters.targets import resolve_target_modules
from snake_lora_pl.errors import UserError

if TYPE_CHECKING:
    from peft import AdaLoraConfig, PeftConfig, PeftModel
    from torch import Tensor
    from transformers import PreTrainedModel

logger = logging.getLogger(__name__)

_SCHEDULE = ("total_step", "tinit", "tfinal")
_SCORES = ("ipt", "exp_avg_ipt", "exp_avg_unc")


def build_adalora(base_model: PreTrainedModel, config: LoRAConfig) -> PeftModel:
    """AdaLoRA on a base model, at its initial rank everywhere; E is zero, so training starts at the base model."""
    from peft import AdaLoraConfig, get_peft_model

    adalora = config.adalora
    peft_config = AdaLoraConfig(
        target_r=config.rank,
        init_r=adalora.initial_rank or math.ceil(1.5 * config.rank),
        lora_alpha=config.alpha,
        lora_dropout=config.dropout,
        target_modules=resolve_target_modules(base_model, config.target_modules),
        deltaT=adalora.allocate_every_n_steps,
        beta1=adalora.beta1,
        beta2=adalora.beta2,
        orth_reg_weight=adalora.orthogonal_weight,
        task_type="CAUSAL_LM",
        # PEFT wants a number here; how long the run is, `start` learns from the trainer.
        total_step=1,
    )
    return get_peft_model(base_model, peft_config)


class AdaLoRA(AdapterType):
    """LoRA with a budget of ranks that is shared out by importance.

    An adapter that was trained before and is trained on keeps the ranks it has.
    """

    ignored_settings = ("quantization", "use_rslora", "use_dora", "init_lora_weights", "rank_pattern", "alpha_pattern")

    def __init__(self) -> None:
        super().__init__(build_adalora)

    def start(self, model: PeftModel, config: LoRAConfig, total_steps: int | None) -> None:
        """Lay the three phases over the steps of the run.

        Raises:
            UserError: If the number of steps is not known or leaves no step to lower the ranks in.
        """
        peft_config = _peft_config(model)
        if peft_config.rank_pattern is not None:
            logger.info("AdaLoRA: the adapter's ranks are settled; training goes on with them.")
            model.base_model.rankallocator = None
            return
        if total_steps is None:
            raise UserError(
                "model.adapter_type=adalora lowers ranks over a known number of steps, and the clock would end this "
                "run: set trainer.max_steps, beside trainer.max_time or in its place."
            )
        adalora = config.adalora
        initial = total_steps // 10 if adalora.initial_steps is None else adalora.initial_steps
        final = (total_steps - 1) // 2 if adalora.final_steps is None else adalora.final_steps
        # Ranks are dropped by importance, which takes a step to be measured.
        needed = max(initial, 1) + final + 1
        if total_steps < needed:
            given = [name for name in ("initial_steps", "final_steps") if getattr(adalora, name)]
            lower = ", or lower " + " and ".join(f"model.lora.adalora.{name}" for name in given) if given else ""
            raise UserError(
                f"model.adapter_type=adalora: {initial} steps before ranks are lowered and {final} after do not fit "
                f"into a run of {total_steps}. Train for at least {needed} steps (trainer.max_steps, "
                f"trainer.max_epochs){lower}."
            )
        peft_config.total_step, peft_config.tinit, peft_config.tfinal = total_steps, initial, final

    def regularizer(self, model: PeftModel) -> Tensor | None:
        """``orthogonal_weight`` times the mean over all factors of the Frobenius norm of ``P P^T - I``."""
        import torch

        weight = _peft_config(model).orth_reg_weight
        if weight == 0:
            return None
        norms = []
        for name, parameter in model.named_parameters():
            if parameter.requires_grad and (".lora_A." in name or ".lora_B." in name):
                factor = parameter if ".lora_A." in name else parameter.T  # (rank, features)
                identity = torch.eye(len(factor), device=factor.device, dtype=factor.dtype)
                norms.append(torch.linalg.matrix_norm(factor @ factor.T - identity))
        return weight * torch.stack(norms).mean()

    def after_step(self, model: PeftModel, step: int) -> dict[str, float]:
        """Update each triplet's importance and set those beyond the step's budget to zero."""
        allocator = model.base_model.rankallocator
        if allocator is None:
            return {}
        model.base_model.update_and_allocate(step)
        return {"train/rank_budget": float(allocator.budget_schedule(step)[0]), "train/rank": _rank(model)}

    def end(self, model: PeftModel, step: int) -> None:
        """Say so where a run was cut before its ranks reached the target."""
        peft_config = _peft_config(model)
        if model.base_model.rankallocator is None or step >= peft_config.total_step - peft_config.tfinal:
            return
        logger.warning(
            "AdaLoRA: the run ended at step %d, before its ranks reached their target at step %d; %d of %d are left to "
            "drop. Train on with --ckpt_path last, or plan for fewer steps with trainer.max_steps.",
            step,
            peft_config.total_step - peft_config.tfinal,
            int(_rank(model)) - model.base_model.rankallocator.target_bgt,
            model.base_model.rankallocator.init_bgt,
        )

    def state(self, model: PeftModel) -> dict[str, Any]:
        """The schedule, the ranks as allocated, and the running scores that the next allocation is made by."""
        allocator = model.base_model.rankallocator
        if allocator is None:
            return {}
        peft_config = _peft_config(model)
        return {
            "schedule": {key: getattr(peft_config, key) for key in _SCHEDULE},
            "rank_pattern": peft_config.rank_pattern,
            "scores": {key: dict(getattr(allocator, key)) for key in _SCORES},
        }

    def load_state(self, model: PeftModel, state: dict[str, Any]) -> None:
        """Go on with the schedule that the run began with, also where the resumed run is longer."""
        if not state:  # a run with settled ranks
            return
        allocator = model.base_model.rankallocator
        peft_config = _peft_config(model)
        for key, value in state["schedule"].items():
            setattr(peft_config, key, value)
        peft_config.rank_pattern = state["rank_pattern"]
        devices = {name: parameter.device for name, parameter in model.base_model.model.named_parameters()}
        for key, scores in state["scores"].items():
            setattr(allocator, key, {name: score.to(devices[name]) for name, score in scores.items()})

    def saved_form(self, model: PeftModel, weights: dict[str, Tensor]) -> tuple[PeftConfig, dict[str, Tensor]]:
        """Only triplets that are not zero: PEFT cuts the factors down to the config's ``rank_pattern``."""
        config = _peft_config(model)
        singular_values = {name: weights[name] for name in weights if ".lora_E." in name}
        is_resized = any(len(values) != config.init_r for values in singular_values.values())
        if is_resized or not any(values.any() for values in singular_values.values()):
            return config, weights
        # Not the allocator's own pattern: between two allocations the optimizer moves what it had set to zero.
        config = copy.deepcopy(config)
        config.rank_pattern = {
            name.removeprefix("base_model.model."): (values != 0).flatten().tolist()
            for name, values in singular_values.items()
        }
        return config, weights


def _peft_config(model: PeftModel) -> AdaLoraConfig:
    return model.peft_config["default"]


def _rank(model: PeftModel) -> float:
    """Number of triplets, over all layers, that the last allocation kept."""
    pattern = _peft_config(model).rank_pattern
    return float(model.base_model.rankallocator.init_bgt if pattern is None else sum(map(sum, pattern.values())))
