"""The equal-budget rule: as many keys per query as NSA reads on average at that length."""

from dataclasses import dataclass

from nsa_platform.config.model import NsaChoices
from nsa_platform.model.cost import key_counts

PAPER_TOTAL, PAPER_LEADING, PAPER_LOCAL = 2560, 128, 512
"""arXiv 2502.11089, section 4.2: 2560 tokens for each query, of which 128 lead and 512 are local.
The rest, 1920, is for each method to spend."""


@dataclass(frozen=True, slots=True)
class Budget:
    """Tokens that one query reads, in three parts."""

    leading: int
    local: int
    """The query's own token included."""
    dynamic: int

    @property
    def total(self) -> int:
        return self.leading + self.local + self.dynamic

    def scaled(self, size: int) -> int:
        """A size of the paper's budget in this one's ratio to it, at least 1."""
        return max(1, round(size * self.total / PAPER_TOTAL))


def split_budget(total: int) -> Budget:
    """A budget with the paper's ratio of leading, local and dynamic tokens.

    Raises:
        ValueError: there are fewer than three tokens.
    """
    if total < 3:
        raise ValueError(f"a budget of {total} tokens has no leading, local and dynamic one")
    leading = max(1, round(total * PAPER_LEADING / PAPER_TOTAL))
    local = max(1, round(total * PAPER_LOCAL / PAPER_TOTAL))
    return Budget(leading, local, total - leading - local)


def equal_budget(nsa: NsaChoices, context: int) -> Budget:
    """The smallest budget whose mean over the positions of a context is at least NSA's.

    Early queries have fewer keys than the budget, with NSA as with a baseline: a budget of B tokens
    reads B (1 - (B - 1) / 2T) on average over T positions.
    """
    wanted = key_counts(nsa, context).total * context
    low, high = 3, max(3, context)
    while low < high:
        middle = (low + high) // 2
        if middle * (middle + 1) // 2 + (context - middle) * middle >= wanted:
            high = middle
        else:
            low = middle + 1
    return split_budget(low)
