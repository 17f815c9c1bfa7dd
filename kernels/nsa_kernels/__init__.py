"""Native Sparse Attention as differentiable torch ops, in Triton and in plain torch."""

from nsa_kernels.compressed import compressed_attention
from nsa_kernels.few_rows import new_tallies, project
from nsa_kernels.full import full_attention
from nsa_kernels.new_rows import NewBlocks, NewRows, Phi, fold_blocks
from nsa_kernels.new_tokens import NewPlaces, NewTokens
from nsa_kernels.paged import full_paged_attention, nsa_paged_attention
from nsa_kernels.paged_places import place_new_tokens
from nsa_kernels.paged_writes import fold_and_write, rotate_and_write
from nsa_kernels.projections import Projection, RmsNorm
from nsa_kernels.selected import selected_attention
from nsa_kernels.selection import select_blocks
from nsa_kernels.shapes import NsaConfig, compressed_cu_seqlens, num_compressed_blocks
from nsa_kernels.sliding import sliding_attention
from nsa_kernels.whole import nsa_attention

__all__ = [
    "NewBlocks",
    "NewPlaces",
    "NewRows",
    "NewTokens",
    "NsaConfig",
    "Phi",
    "Projection",
    "RmsNorm",
    "compressed_attention",
    "compressed_cu_seqlens",
    "fold_and_write",
    "fold_blocks",
    "full_attention",
    "full_paged_attention",
    "new_tallies",
    "nsa_attention",
    "nsa_paged_attention",
    "num_compressed_blocks",
    "place_new_tokens",
    "project",
    "rotate_and_write",
    "select_blocks",
    "selected_attention",
    "sliding_attention",
]
