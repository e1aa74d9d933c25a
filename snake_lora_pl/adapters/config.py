"""What is trained on top of the base model: rank, scale, dropout and the layers that carry it."""

from __future__ import annotations

import difflib
from dataclasses import dataclass, field

from snake_lora_pl.errors import UserError

ALL_LINEAR = "all-linear"
ATTENTION_PROJECTIONS = ("q_proj", "k_proj", "v_proj", "o_proj")


@dataclass
class LoRAConfig:
    """Settings of a low-rank adapter, ``W' = W + alpha / rank * B A`` (https://arxiv.org/abs/2106.09685).

    Args:
        rank: Inner dimension of the two factors A and B.
        alpha: Scale of the update; the product is multiplied by ``alpha / rank``.
        dropout: Probability with which an input of A is zeroed in training, in [0, 1).
        target_modules: Names of the layers that get an adapter; each must exist. ``all-linear`` takes every linear
            layer but the output head, any other string is a regular expression over full module names. The default,
            the four attention projections, follows the architecture where it has other names (GPT-2: ``c_attn``).

    Raises:
        UserError: If a value lies outside its range.
    """

    rank: int = 16
    alpha: float = 32
    dropout: float = 0.05
    target_modules: list[str] | str = field(default_factory=lambda: list(ATTENTION_PROJECTIONS))

    def __post_init__(self) -> None:
        """Check every value and report all that are wrong at once."""
        problems = []
        if self.rank < 1:
            problems.append(f"rank must be at least 1, not {self.rank}")
        if not self.alpha > 0:
            problems.append(f"alpha must be above 0, not {self.alpha}")
        if not 0 <= self.dropout < 1:
            problems.append(f"dropout must be at least 0 and below 1, not {self.dropout}")
        if not self.target_modules:
            problems.append(f"target_modules is empty: name layers, or '{ALL_LINEAR}'")
        if problems:
            raise UserError("model.lora: " + "; ".join(problems) + ".")

    @classmethod
    def preset(cls, name: str) -> LoRAConfig:
        """The settings of a named preset.

        Raises:
            UserError: If there is no such preset; the message lists those there are.
        """
        if name not in PRESETS:
            near = difflib.get_close_matches(name, PRESETS, n=1)
            hint = f" Did you mean '{near[0]}'?" if near else ""
            raise UserError(f"Unknown preset '{name}'. Presets: {', '.join(PRESETS)}.{hint}")
        rank, alpha, dropout = PRESETS[name]
        return cls(rank=rank, alpha=alpha, dropout=dropout)


# name: (rank, alpha, dropout)
PRESETS: dict[str, tuple[int, float, float]] = {
    "lightweight": (8, 16, 0.1),
    "balanced": (16, 32, 0.05),
    "high_capacity": (32, 64, 0.02),
}
