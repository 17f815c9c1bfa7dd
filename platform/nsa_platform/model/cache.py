"""Pages of one layer: what attention keeps of the tokens that it has seen.

NSA keeps every token's key and value for the selected branch, one compressed pair for each d
tokens, and of the last max(w, l) tokens alone the sliding branch's pair and the pair that phi
folds (the tail). Two pools hold them: a logical page of the first pool lives as long as its
sequence, a logical page of the window pool is given back once its tokens have left the window.

Physical page 0 of each pool is scratch: rows without a destination are written there and it
belongs to no sequence.
"""

from dataclasses import dataclass

from torch import Tensor


@dataclass(frozen=True, slots=True)
class NsaLayerCache:
    """Caches of one NSA layer. P pages of the selection pool, W pages of the window pool."""

    k_slc: Tensor
    """[P, page, G, K], rotated."""
    v_slc: Tensor
    """[P, page, G, V]"""
    k_cmp: Tensor
    """[P, page / d, G, K]; the block that starts at token s is in row s % page / d of s's page."""
    v_cmp: Tensor
    """[P, page / d, G, V]"""
    k_win: Tensor
    """[W, page, G, K], rotated; with branch_kv=shared the very tensor k_slc."""
    v_win: Tensor
    """[W, page, G, V]; with branch_kv=shared the very tensor v_slc."""
    k_tail: Tensor
    """[W, page, G, K], keys as phi takes them."""
    v_tail: Tensor
    """[W, page, G, V], values as phi takes them."""

    @property
    def page_size(self) -> int:
        return self.k_slc.shape[1]

    def page_tensors(self) -> list[Tensor]:
        """The tensors of the selection pool: axis 0 is its physical page."""
        return [self.k_slc, self.v_slc, self.k_cmp, self.v_cmp]

    def window_tensors(self) -> list[Tensor]:
        """The tensors of the window pool: axis 0 is its physical page."""
        tail = [self.k_tail, self.v_tail]
        return tail if self.k_win is self.k_slc else [self.k_win, self.v_win, *tail]


@dataclass(frozen=True, slots=True)
class FullLayerCache:
    """Cache of one layer of full attention."""

    k: Tensor
    """[P, page, G, K], rotated."""
    v: Tensor
    """[P, page, G, V]"""

    @property
    def page_size(self) -> int:
        return self.k.shape[1]

    def page_tensors(self) -> list[Tensor]:
        """The tensors of the only pool: axis 0 is the physical page."""
        return [self.k, self.v]

    def window_tensors(self) -> list[Tensor]:
        """None: full attention keeps everything."""
        return []


@dataclass(frozen=True, slots=True)
class LatentLayerCache:
    """Cache of one layer of Multi-head Latent Attention."""

    latent: Tensor
    """[P, page, 1, rank + rotary width], the normed latent and the rotated key of all heads."""

    @property
    def page_size(self) -> int:
        return self.latent.shape[1]

    def page_tensors(self) -> list[Tensor]:
        """The tensor of the only pool: axis 0 is the physical page."""
        return [self.latent]

    def window_tensors(self) -> list[Tensor]:
        """None: every token is kept."""
        return []


LayerCache = NsaLayerCache | FullLayerCache | LatentLayerCache
