"""The curves of a run so far, kept in its checkpoints so that figures survive a resume."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Self

# A curve that has grown to this many points keeps every second one.
MOST_POINTS = 2000
# And a table of so many validations those of every second one.
MOST_TABLES = 200

Sample = tuple[str, str, str]
"""Prompt, answer, reference."""


@dataclass
class History:
    """Points in the order of steps."""

    train: list[tuple[float, float]] = field(default_factory=list)
    """(tokens seen, loss)."""
    valid: list[tuple[float, float]] = field(default_factory=list)
    """(tokens seen, loss)."""
    health: list[tuple[int, dict[int, dict[str, float]]]] = field(default_factory=list)
    """(step, layer -> gate means by branch, entropy)."""
    samples: list[tuple[int, list[Sample]]] = field(default_factory=list)
    """(step, what was answered)."""

    def add_train(self, tokens: int, loss: float) -> None:
        """One more point of the training loss."""
        self.train.append((tokens, loss))
        if len(self.train) > MOST_POINTS:
            self.train = self.train[::2]

    def add_validations(self, other: "History") -> None:
        """Take over what another history has of validations; of the same ones, the other's."""
        self.valid = sorted((dict(self.valid) | dict(other.valid)).items())
        self.health = sorted((dict(self.health) | dict(other.health)).items())
        self.samples = sorted((dict(self.samples) | dict(other.samples)).items())
        if len(self.samples) > MOST_TABLES:
            self.samples = self.samples[::2]

    def to_dict(self) -> dict[str, Any]:
        """Plain values for JSON."""
        return {
            "train": self.train,
            "valid": self.valid,
            "health": self.health,
            "samples": self.samples,
        }

    @classmethod
    def from_dict(cls, tree: Mapping[str, Any]) -> Self:
        """What to_dict gave, also after a round trip through JSON."""
        return cls(
            train=[(x, y) for x, y in tree["train"]],
            valid=[(x, y) for x, y in tree["valid"]],
            health=[
                (step, {int(layer): dict(row) for layer, row in by_layer.items()})
                for step, by_layer in tree["health"]
            ],
            # Checkpoints of older versions know no samples.
            samples=[
                (step, [(prompt, answer, reference) for prompt, answer, reference in rows])
                for step, rows in tree.get("samples", [])
            ],
        )
