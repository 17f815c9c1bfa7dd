"""Fingerprints of a part's documents in the staging folder: copies are found without the text.

Two files for a part of n documents, without headers, so that one band of all parts is read without
the others:
    FINGERPRINT.keys        uint64 [1 + BANDS, n]: hashes of the texts, then the keys of each band
    FINGERPRINT.signatures  uint8 [n, PLACES]: the low bits of the MinHash signatures
Where only equal texts count, keys is [1, n] and there are no signatures.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from nsa_platform import storage
from nsa_platform.data.fingerprints import PLACES, band_keys

KEYS, SIGNATURES = ".keys", ".signatures"
KEY = np.dtype("<u8")


@dataclass(frozen=True, slots=True)
class Documents:
    """What a part's record keeps of every document, in the corpus's order."""

    held_out: np.ndarray
    """bool [documents]: validation, not train."""
    inputs: np.ndarray
    """uint16 [documents]: the number of the input that it comes from."""
    text_bytes: np.ndarray
    """int64 [documents]."""
    loss_tokens: np.ndarray
    """int64 [documents]."""


def write_prints(
    staging: str, fingerprint: str, hashes: Sequence[int], signatures: Sequence[np.ndarray]
) -> None:
    """Write the files of a part; without signatures only equal texts will be found."""
    keys = np.array([hashes], KEY)
    if signatures:
        stacked = np.stack(signatures)
        keys = np.concatenate([keys, band_keys(stacked)]).astype(KEY)
        content = stacked.astype(np.uint8).tobytes()
        storage.write_bytes(storage.join(staging, fingerprint + SIGNATURES), content)
    storage.write_bytes(storage.join(staging, fingerprint + KEYS), keys.tobytes())


def read_keys(staging: str, fingerprint: str, row: int, count: int) -> np.ndarray:
    """One row of a part's keys, uint64 [count]: 0 for the texts' hashes, 1 + b for band b."""
    with storage.open_input(storage.join(staging, fingerprint + KEYS)) as file:
        file.seek(row * count * KEY.itemsize)
        return np.frombuffer(file.read(count * KEY.itemsize), KEY)


def read_signatures(staging: str, fingerprint: str) -> np.ndarray:
    """Of all documents of a part, uint8 [documents, PLACES]."""
    content = storage.read_bytes(storage.join(staging, fingerprint + SIGNATURES))
    return np.frombuffer(content, np.uint8).reshape(-1, PLACES)
