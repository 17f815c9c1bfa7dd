"""Which of several shard sets gives each row: in proportion to their weights, at every point.

After any number of rows each source has given its share to within one row. Nothing is drawn at
random, and the counts are all the state there is.

Source:
    R. Tijdeman, The chairman assignment problem, Discrete Mathematics 32 (1980): among those
    that are due, whoever would first fall a row behind comes next.
"""

from collections.abc import Sequence


class Mixture:
    """The order of sources.

    Args:
        weights: positive, of any scale; two or more sources.
        dealt: rows that each source has given already; None: none.
    """

    def __init__(self, weights: Sequence[float], dealt: Sequence[int] | None = None) -> None:
        self._shares = [weight / sum(weights) for weight in weights]
        self.dealt = [0] * len(weights) if dealt is None else list(dealt)
        """Rows that each source has given."""

    def next(self) -> int:
        """The source of the next row."""
        slack = 1 / (2 * len(self._shares) - 2)
        number = sum(self.dealt) + 1
        behind = [
            number * share - dealt for share, dealt in zip(self._shares, self.dealt, strict=True)
        ]
        due = [i for i, rows in enumerate(behind) if rows >= slack]
        # In exact arithmetic one is always due.
        due = due or [behind.index(max(behind))]
        source = min(due, key=lambda i: (1 - slack - behind[i]) / self._shares[i])
        self.dealt[source] += 1
        return source
