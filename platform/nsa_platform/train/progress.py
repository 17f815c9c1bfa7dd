"""How far a run is: what moves with every step and stands in every checkpoint."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Self

from nsa_platform.config.train import GuardConfig
from nsa_platform.train.guard import Guard
from nsa_platform.train.history import History


@dataclass
class Progress:
    """A run between two steps."""

    guard: Guard
    step: int = 0
    """Optimizer steps that are done, or were skipped."""
    tokens: int = 0
    """Tokens that went through the model in them, over all workers."""
    history: History = field(default_factory=History)

    def advance(self, tokens: int) -> None:
        """One more step of `tokens` is done."""
        self.step += 1
        self.tokens += tokens

    def to_dict(self) -> dict[str, Any]:
        """Plain values for a checkpoint."""
        return {
            "step": self.step,
            "tokens": self.tokens,
            "history": self.history.to_dict(),
            "guard": self.guard.to_dict(),
        }

    @classmethod
    def from_facts(cls, facts: Mapping[str, Any] | None, guard: GuardConfig) -> Self:
        """What to_dict gave among the facts of a checkpoint; None: a new run."""
        if facts is None:
            return cls(Guard(guard))
        return cls(
            # Checkpoints of older versions know no guard.
            Guard.from_dict(guard, facts.get("guard", {})),
            facts["step"],
            facts["tokens"],
            History.from_dict(facts["history"]),
        )
