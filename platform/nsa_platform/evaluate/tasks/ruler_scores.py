"""RULER's scores: which of the references stand in what was written.

Source: github.com/NVIDIA/RULER, scripts/eval/synthetic/constants.py (string match, all and part).
"""

import re

from nsa_platform.evaluate.tasks.task import Scorer

CONTROL = re.compile(r"[\x00-\x1f]")


def share_of(references: tuple[str, ...]) -> Scorer:
    """The share of the references that stand in the text, in any case of letters."""

    def score(written: str) -> float:
        return sum(each in _plain(written) for each in map(str.lower, references)) / len(references)

    return score


def any_of(references: tuple[str, ...]) -> Scorer:
    """1 if one of the references stands in the text, in any case of letters, else 0."""

    def score(written: str) -> float:
        return float(any(each in _plain(written) for each in map(str.lower, references)))

    return score


def _plain(written: str) -> str:
    return CONTROL.sub("\n", written.strip()).strip().lower()
