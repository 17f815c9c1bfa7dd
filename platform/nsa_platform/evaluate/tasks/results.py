"""Scores of a task in its cells: counts, means and intervals of 95 %.

Where every unit is one sample that is right or wrong, or all units have the same mean, the interval
is Wilson's over units; otherwise it is the percentile bootstrap over units, for samples of a unit
are alike. Of equal means a bootstrap makes an interval without width, which reads as certainty.
"""

import math
from collections import defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import numpy as np
from scipy import stats

RESAMPLES = 2000
CONFIDENCE = 0.95


@dataclass(frozen=True, slots=True)
class Row:
    """One sample and what the model made of it."""

    cells: tuple[str, ...]
    unit: str
    prompt_tokens: int
    references: tuple[str, ...]
    written: str
    new_tokens: int
    score: float


@dataclass(frozen=True, slots=True)
class Score:
    """A mean with its interval."""

    mean: float
    low: float
    high: float
    method: str
    """wilson or bootstrap."""
    samples: int
    units: int
    new_tokens: float
    """Mean tokens of an answer."""


@dataclass(frozen=True, slots=True)
class TaskResult:
    """All rows of a task."""

    name: str
    rows: list[Row]

    @property
    def cells(self) -> dict[str, Score]:
        """Score of each cell, in the order in which cells came."""
        by_cell: dict[str, list[Row]] = defaultdict(list)
        for row in self.rows:
            for cell in row.cells:
                by_cell[cell].append(row)
        return {cell: score_of(rows) for cell, rows in by_cell.items()}

    @property
    def mean(self) -> float:
        """The plain mean of the cells that stand first in a sample: lengths or datasets count
        alike, however many samples they have."""
        first = {row.cells[0] for row in self.rows}
        return float(np.mean([score.mean for cell, score in self.cells.items() if cell in first]))


def score_of(rows: Sequence[Row]) -> Score:
    """Mean and interval of some rows; there must be one."""
    by_unit: dict[str, list[float]] = defaultdict(list)
    for row in rows:
        by_unit[row.unit].append(row.score)
    means = [float(np.mean(scores)) for scores in by_unit.values()]
    binary = len(means) == len(rows) and set(means) <= {0.0, 1.0}
    is_share = binary or len(set(means)) == 1 < len(means)
    low, high = wilson(means) if is_share else bootstrap(means)
    return Score(
        mean=float(np.mean([row.score for row in rows])),
        low=low,
        high=high,
        method="wilson" if is_share else "bootstrap",
        samples=len(rows),
        units=len(means),
        new_tokens=float(np.mean([row.new_tokens for row in rows])),
    )


def wilson(scores: Iterable[float]) -> tuple[float, float]:
    """Wilson's interval of a share, from scores that are 0 or 1. Of fractions it is too wide rather
    than too narrow: no scores in 0 to 1 with the same mean vary more than those that are 0 or 1."""
    values = list(scores)
    share, count = float(np.mean(values)), len(values)
    z = float(stats.norm.ppf((1 + CONFIDENCE) / 2))
    middle = (share + z * z / (2 * count)) / (1 + z * z / count)
    half = z * math.sqrt(share * (1 - share) / count + (z / (2 * count)) ** 2) / (1 + z * z / count)
    return max(0.0, middle - half), min(1.0, middle + half)


def bootstrap(scores: Sequence[float]) -> tuple[float, float]:
    """The percentile interval of a mean; one score alone says nothing: 0 to 1."""
    if len(scores) < 2:
        return 0.0, 1.0
    found = stats.bootstrap(
        (scores,),
        np.mean,
        n_resamples=RESAMPLES,
        confidence_level=CONFIDENCE,
        method="percentile",
        rng=np.random.default_rng(0),
        batch=100,
    ).confidence_interval
    return float(found.low), float(found.high)
