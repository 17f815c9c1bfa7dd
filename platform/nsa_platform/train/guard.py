"""The guard: an optimizer step whose loss or gradients are broken is skipped, not taken.

What it has seen is part of a checkpoint: a resumed run judges as the straight run would have.
"""

import math
import statistics
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from nsa_platform.config.train import GuardConfig

# Spikes are only told from noise after this many steps.
FEWEST_STEPS = 32
# How many steps back a spike is compared with.
WINDOW = 128


class TrainingDiverged(ArithmeticError):
    """Too many steps in a row had a broken loss or broken gradients."""


@dataclass
class Guard:
    """Judges each step by its loss and the norm of its gradients."""

    config: GuardConfig
    losses: list[float] = field(default_factory=list)
    """Of the last steps that were taken."""
    norms: list[float] = field(default_factory=list)
    """Gradient norms of the same steps."""
    in_a_row: int = 0
    """Steps that were skipped since the last one that was taken."""
    skipped: int = 0
    """Steps that were skipped since the run began."""

    def judge(self, step: int, *, loss: float, grad_norm: float) -> str | None:
        """Why this step must be skipped; None if it is to be taken.

        Raises:
            TrainingDiverged: it would be the last of too many in a row. Every worker judges the
                same numbers, so all of them raise it at the same step.
        """
        problem = _problem("train/loss", loss, self.losses, self.config.spike_sigmas) or _problem(
            "train/grad_norm", grad_norm, self.norms, self.config.spike_sigmas
        )
        if problem is None:
            self.in_a_row = 0
            self.losses = [*self.losses, loss][-WINDOW:]
            self.norms = [*self.norms, grad_norm][-WINDOW:]
            return None
        self.in_a_row += 1
        self.skipped += 1
        if self.in_a_row >= self.config.halt_after:
            raise TrainingDiverged(
                f"{problem} at step {step}, the last of {self.in_a_row} steps in a row that were "
                "skipped; the newest checkpoint lies before them. A lower learning rate or a "
                "longer warm-up may help"
            )
        return problem

    def forget(self) -> None:
        """Compare with nothing that was seen so far: what comes is of another kind."""
        self.losses, self.norms, self.in_a_row = [], [], 0

    def to_dict(self) -> dict[str, Any]:
        """Plain values for a checkpoint."""
        return {
            "losses": self.losses,
            "norms": self.norms,
            "in_a_row": self.in_a_row,
            "skipped": self.skipped,
        }

    @classmethod
    def from_dict(cls, config: GuardConfig, tree: Mapping[str, Any]) -> "Guard":
        """What to_dict gave, under a configuration that may have changed."""
        return cls(config, **tree)


def _problem(name: str, value: float, before: list[float], sigmas: float | None) -> str | None:
    if not math.isfinite(value):
        return f"{name} is {value}"
    if sigmas is None or len(before) < FEWEST_STEPS:
        return None
    limit = statistics.fmean(before) + sigmas * statistics.pstdev(before)
    if value > limit:
        return f"{name} is {value:.4g}, above {limit:.4g} = mean + {sigmas:g} sigmas"
    return None
