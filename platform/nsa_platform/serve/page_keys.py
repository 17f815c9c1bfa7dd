"""Names for the contents of pages: digests of all tokens that they hang on. No tensors.

What a page of the window pool holds hangs on its tokens and on all before. So does a page of the
selection pool, but for its last compressed blocks: they reach l - d tokens into the next page. Its
key therefore covers those tokens too (`lookahead`).

Keys form a chain: that of a page takes in the digest of the page before, which begins with the
salt. So equal keys mean equal tokens from the first one on, and the same salt.
"""

import hashlib
from array import array
from collections.abc import Iterable

DIGEST_BYTES = 16


class PageKeys:
    """Keys of the pages of one sequence, each worked out once, when it is first asked for."""

    def __init__(
        self, token_ids: Iterable[int], *, page_size: int, lookahead: int, salt: str | None = None
    ) -> None:
        """salt: sequences share nothing with those of another salt."""
        self.page_size = page_size
        self.lookahead = lookahead
        self._tokens = array("I", token_ids)
        self._chain = [_digest(b"" if salt is None else b"salt:" + salt.encode())]

    @property
    def num_tokens(self) -> int:
        return len(self._tokens)

    def append(self, token_ids: Iterable[int]) -> None:
        """Take in the next tokens of the sequence."""
        self._tokens.extend(token_ids)

    def window_key(self, page: int) -> bytes:
        """Name of what logical page `page` holds in the window pool; its tokens must be known."""
        while len(self._chain) <= page + 1:
            start = (len(self._chain) - 1) * self.page_size
            own = self._tokens[start : start + self.page_size]
            assert len(own) == self.page_size
            self._chain.append(_digest(self._chain[-1], own.tobytes()))
        return self._chain[page + 1]

    def key(self, page: int) -> bytes:
        """Name of what logical page `page` holds in the selection pool; its tokens and the
        lookahead behind them must be known."""
        own = self.window_key(page)
        if not self.lookahead:
            return own
        end = (page + 1) * self.page_size
        following = self._tokens[end : end + self.lookahead]
        assert len(following) == self.lookahead
        return _digest(own, following.tobytes())


def _digest(*parts: bytes) -> bytes:
    digest = hashlib.blake2b(digest_size=DIGEST_BYTES)
    for part in parts:
        digest.update(part)
    return digest.digest()
