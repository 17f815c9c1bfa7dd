"""Unigram and bigram models of token ids: what a language model must beat to have learned anything.

Unigram: add-one counts. Bigram: interpolated absolute discounting with the unigram below it.
Source: Ney, Essen, Kneser 1994, "On structuring probabilistic dependences in stochastic language
modelling"; the discount is n1 / (n1 + 2 n2) from the pairs seen once and twice.
"""

from collections.abc import Iterable

import numpy as np

from nsa_platform.data.loader import Batch
from nsa_platform.data.packing import IGNORED


class Ngrams:
    """Counts of targets and of (token, target) pairs, as the training targets give them."""

    def __init__(self, batches: Iterable[Batch], vocab_size: int) -> None:
        """Count. Raises ValueError if there is no target to count."""
        self.vocab_size = vocab_size
        unigrams = np.zeros(vocab_size, dtype=np.int64)
        collected: list[np.ndarray] = []
        for batch in batches:
            previous, target = _pairs(batch)
            unigrams += np.bincount(target, minlength=vocab_size)
            collected.append(previous * vocab_size + target)
        self.tokens = int(unigrams.sum())
        if not self.tokens:
            raise ValueError("the training text has no token to count")
        self._unigram = (unigrams + 1.0) / (self.tokens + vocab_size)
        self._keys, self._counts = np.unique(np.concatenate(collected), return_counts=True)
        once, twice = (int((self._counts == n).sum()) for n in (1, 2))
        self.discount = once / (once + 2 * twice) if once else 0.5
        previous = self._keys // vocab_size
        self._followers = np.bincount(previous, minlength=vocab_size)
        self._occurrences = np.bincount(previous, self._counts, minlength=vocab_size)

    def unigram(self, batch: Batch) -> np.ndarray:
        """-log p of each target by its frequency alone, float64 [T]."""
        return self._spread(batch, -np.log(self._unigram[_pairs(batch)[1]]))

    def bigram(self, batch: Batch) -> np.ndarray:
        """-log p of each target after the token before it, float64 [T]."""
        previous, target = _pairs(batch)
        return self._spread(batch, -np.log(self.bigram_probability(previous, target)))

    def bigram_probability(self, previous: np.ndarray, target: np.ndarray) -> np.ndarray:
        """p(target | previous) of int64 arrays; over all targets it sums to one."""
        keys = previous * self.vocab_size + target
        place = np.minimum(np.searchsorted(self._keys, keys), len(self._keys) - 1)
        count = np.where(self._keys[place] == keys, self._counts[place], 0)
        seen = self._occurrences[previous]
        # A token that never was a predecessor leaves everything to the unigram.
        reserved = np.where(
            seen > 0, self.discount * self._followers[previous] / np.maximum(seen, 1), 1.0
        )
        kept = np.maximum(count - self.discount, 0) / np.maximum(seen, 1)
        return kept + reserved * self._unigram[target]

    @staticmethod
    def _spread(batch: Batch, nats: np.ndarray) -> np.ndarray:
        result = np.zeros(len(batch.targets))
        result[batch.targets.numpy() != IGNORED] = nats
        return result


def _pairs(batch: Batch) -> tuple[np.ndarray, np.ndarray]:
    """Each token that has a target, and the target."""
    targets = batch.targets.numpy()
    counted = targets != IGNORED
    return batch.ids.numpy()[counted], targets[counted]
