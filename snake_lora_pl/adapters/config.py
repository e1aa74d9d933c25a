"""Settings of adapters: rank, scale, dropout, target layers, initialization."""

from __future__ import annotations

import math
import re
from dataclasses import dataclass, field

from snake_lora_pl.adapters.patterns import problem_with_pattern
from snake_lora_pl.errors import UserError, did_you_mean
from snake_lora_pl.models.quantization import QuantizationConfig

ALL_LINEAR = "all-linear"
ATTENTION_PROJECTIONS = ("q_proj", "k_proj", "v_proj", "o_proj")
UPPER_HALF = "upper_half"
_LAYERS_PATTERN = re.compile(rf"\d{{1,4}}-\d{{1,4}}|{UPPER_HALF}")

# PEFT names its default initialization `true`.
_INITS = "true, gaussian, orthogonal, olora, pissa, pissa_niter_N (N iterations)"
_INIT_PATTERN = re.compile(r"gaussian|orthogonal|olora|pissa(_niter_[1-9]\d*)?")
# The smaller dimension of the largest layers of open models (Llama 3.1 405B), which bounds any useful rank.
_MAX_RANK = 16_384

PRESETS: dict[str, tuple[int, float, float]] = {
    "lightweight": (8, 16, 0.1),
    "balanced": (16, 32, 0.05),
    "high_capacity": (32, 64, 0.02),
}
"""Rank, alpha and dropout of each preset."""


@dataclass
class AdaLoRAConfig:
    """Additional settings of AdaLoRA (https://arxiv.org/abs/2303.10512).

    Args:
        initial_rank: Initial rank of every layer, above the final average ``model.lora.rank``; 1.5 times that if None.
        initial_steps: Optimizer steps before ranks are pruned; a tenth of the run if None.
        final_steps: Optimizer steps at the end with fixed ranks; half of the run if None.
        allocate_every_n_steps: Optimizer steps between two rank allocations.
        beta1: Decay rate of the running importance, in (0, 1).
        beta2: Decay rate of the running uncertainty, in (0, 1).
        orthogonal_weight: Weight of the orthogonality regularizer, relative to the mean loss per token.

    Raises:
        UserError: If a value is out of range.
    """

    initial_rank: int | None = None
    initial_steps: int | None = None
    final_steps: int | None = None
    allocate_every_n_steps: int = 1
    beta1: float = 0.85
    beta2: float = 0.85
    orthogonal_weight: float = 0.5

    def __post_init__(self) -> None:
        """Check all values and report every problem at once."""
        problems = [
            f"{name} must be at least 0, not {value}"
            for name in ("initial_steps", "final_steps", "orthogonal_weight")
            if (value := getattr(self, name)) is not None and not value >= 0
        ]
        if self.allocate_every_n_steps < 1:
            problems.append(f"allocate_every_n_steps must be at least 1, not {self.allocate_every_n_steps}")
        problems += [
            f"{name} must be between 0 and 1, not {value}"
            for name in ("beta1", "beta2")
            if not 0 < (value := getattr(self, name)) < 1
        ]
        if problems:
            raise UserError("model.lora.adalora: " + "; ".join(problems) + ".")


@dataclass
class LoRAConfig:
    """Settings of a low-rank adapter, ``W' = W + alpha / rank * B A`` (https://arxiv.org/abs/2106.09685).

    Args:
        rank: Inner dimension of the factors A and B.
        alpha: Scale of the update, which is multiplied by ``alpha / rank``.
        dropout: Dropout probability on the input of A, in [0, 1).
        target_modules: Names of the layers to adapt; each must exist. ``all-linear`` selects every linear layer except
            the LM head; any other string is a regular expression over full module names. The default, the attention
            projections, is replaced by the equivalent of other architectures (GPT-2: ``c_attn``).
        layers: Transformer layers to adapt, from 0 at the embeddings: a list of indices, a range ``FIRST-LAST``, or
            ``upper_half``; all if None. Layers below the first adapted one need no backward pass.
        use_rslora: Scale by ``alpha / sqrt(rank)``, for high ranks (https://arxiv.org/abs/2312.03732).
        use_dora: Train magnitude and direction of each weight separately; slower (https://arxiv.org/abs/2402.09353).
        init_lora_weights: Initialization of A and B: ``true`` (A uniform, B zero), ``gaussian`` (A normal, B zero),
            ``orthogonal``, or from the base weights: ``pissa``, ``pissa_niter_N``, ``olora``. The latter are saved at
            twice the rank, as plain LoRA for the unchanged base.
        rank_pattern: Ranks of individual layers, by suffix of the layer's name or regular expression. Each key must
            match an adapted layer.
        alpha_pattern: Alphas of individual layers, with keys as in ``rank_pattern``.
        loraplus_lr_ratio: Learning rate of B relative to A, at least 1 (LoRA+, https://arxiv.org/abs/2402.12354).
        quantization: Quantization of the base, for ``qlora``.
        adalora: Rank allocation, for ``adalora``.

    Raises:
        UserError: If a value is out of range.
    """

    rank: int = 16
    alpha: float = 32
    dropout: float = 0.05
    target_modules: list[str] | str = field(default_factory=lambda: list(ATTENTION_PROJECTIONS))
    layers: list[int] | str | None = None
    use_rslora: bool = False
    use_dora: bool = False
    init_lora_weights: bool | str = True
    rank_pattern: dict[str, int] = field(default_factory=dict)
    alpha_pattern: dict[str, float] = field(default_factory=dict)
    loraplus_lr_ratio: float = 1.0
    quantization: QuantizationConfig = field(default_factory=QuantizationConfig)
    adalora: AdaLoRAConfig = field(default_factory=AdaLoRAConfig)

    def __post_init__(self) -> None:
        """Check all values and report every problem at once."""
        problems = []
        if not 1 <= self.rank <= _MAX_RANK:
            problems.append(f"rank must be between 1 and {_MAX_RANK:,}, not {self.rank}")
        if not 0 < self.alpha < math.inf:
            problems.append(f"alpha must be a number above 0, not {self.alpha}")
        if not 0 <= self.dropout < 1:
            problems.append(f"dropout must be at least 0 and below 1, not {self.dropout}")
        if not self.target_modules:
            problems.append(f"target_modules is empty: name layers, or '{ALL_LINEAR}'")
        if self.layers is not None and not (
            _LAYERS_PATTERN.fullmatch(self.layers)
            if isinstance(self.layers, str)
            else self.layers and all(index >= 0 for index in self.layers)
        ):
            problems.append(
                f"layers must be a list of indices from 0, a range such as 15-29, or {UPPER_HALF}, not {self.layers!r}"
            )
        if self.init_lora_weights is not True and not _INIT_PATTERN.fullmatch(str(self.init_lora_weights)):
            problems.append(f"init_lora_weights must be one of {_INITS}, not '{self.init_lora_weights}'")
        elif self.use_dora and self.starts_from_base:
            problems.append(f"init_lora_weights={self.init_lora_weights} cannot be combined with use_dora: choose one")
        if self.init_lora_weights == "orthogonal" and any(r % 2 for r in (self.rank, *self.rank_pattern.values())):
            problems.append("init_lora_weights=orthogonal requires even ranks")
        if not all(1 <= rank <= _MAX_RANK for rank in self.rank_pattern.values()):
            problems.append(f"rank_pattern must hold ranks between 1 and {_MAX_RANK:,}, not {self.rank_pattern}")
        if not all(0 < alpha < math.inf for alpha in self.alpha_pattern.values()):
            problems.append(f"alpha_pattern must hold alphas above 0, not {self.alpha_pattern}")
        for key in (*self.rank_pattern, *self.alpha_pattern):
            if problem := problem_with_pattern(key):
                problems.append(f"'{key[:60]}' in rank_pattern or alpha_pattern is {problem}")
        if not 1 <= self.loraplus_lr_ratio < math.inf:
            problems.append(f"loraplus_lr_ratio must be at least 1, not {self.loraplus_lr_ratio}")
        if self.adalora.initial_rank is not None and self.adalora.initial_rank <= self.rank:
            problems.append(
                f"adalora.initial_rank must be above rank ({self.rank}), the final average, "
                f"not {self.adalora.initial_rank}"
            )
        if problems:
            raise UserError("model.lora: " + "; ".join(problems) + ".")

    @property
    def starts_from_base(self) -> bool:
        """True if the factors are initialized from the base weights."""
        return str(self.init_lora_weights).startswith(("pissa", "olora"))

    @classmethod
    def preset(cls, name: str) -> LoRAConfig:
        """Return the settings of a named preset.

        Raises:
            UserError: If there is no such preset; the message lists the known ones.
        """
        if name not in PRESETS:
            raise UserError(f"Unknown preset '{name}'. Presets: {', '.join(PRESETS)}.{did_you_mean(name, PRESETS)}")
        rank, alpha, dropout = PRESETS[name]
        return cls(rank=rank, alpha=alpha, dropout=dropout)
