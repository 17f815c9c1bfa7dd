"""The order in which the rows of an epoch are dealt.

Rows of the packed stream lie end to end: a long document fills many in a row, and a step made of
neighbours would learn from one document alone. So rows are dealt in a shuffled order within windows
of neighbouring rows: wide enough to mix documents, narrow enough that few shards are open at once.
"""

import numpy as np

from nsa_platform.data.packing import permutation

KEY = 0x726F7773
"""Keeps this shuffle apart from those of shards and documents."""


class RowOrder:
    """Row of the stream that is dealt at each place of one epoch."""

    def __init__(self, num_rows: int, *, window: int, seed: int, epoch: int) -> None:
        self._num_rows = num_rows
        self._window = window
        self._key = (seed, epoch, KEY)
        self._known: tuple[int, np.ndarray] | None = None

    def __getitem__(self, place: int) -> int:
        """The row at `place`, both in [0, num_rows)."""
        number, offset = divmod(place, self._window)
        if self._known is None or self._known[0] != number:
            width = min(self._window, self._num_rows - number * self._window)
            self._known = (number, permutation(width, *self._key, number))
        return number * self._window + int(self._known[1][offset])
