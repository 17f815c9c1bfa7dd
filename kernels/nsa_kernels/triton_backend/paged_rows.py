"""Rows of a paged batch: the sequence and the position of each new token, found on the device."""

import torch
import triton
import triton.language as tl
from torch import Tensor

_TILE_T = 64
_MAX_TILE_B = 256


@triton.jit
def locate_rows_kernel(
    cu_seqlens,
    context_lens,
    row_sequences,
    row_positions,
    T,
    B,
    TILE_T: tl.constexpr,
    TILE_B: tl.constexpr,
):
    """Write row_sequences [T] and row_positions [T]; a token of no sequence gets position -1."""
    o_token = tl.program_id(0) * TILE_T + tl.arange(0, TILE_T)
    m_token = o_token < T
    # A token's sequence is the number of sequences that end at or before it.
    sequence = tl.zeros([TILE_T], tl.int32)
    for first in range(0, B, TILE_B):
        o_sequence = first + tl.arange(0, TILE_B)
        end = tl.load(cu_seqlens + 1 + o_sequence, o_sequence < B, 0x7FFFFFFF)
        sequence += tl.sum((end[None, :] <= o_token[:, None]).to(tl.int32), 1)
    m_known = m_token & (sequence < B)
    end = tl.load(cu_seqlens + 1 + sequence, m_known, 0)
    context = tl.load(context_lens + sequence, m_known, 0)
    position = tl.where(m_known, context - (end - o_token), -1)
    tl.store(row_sequences + o_token, sequence, m_token)
    tl.store(row_positions + o_token, tl.maximum(position, -1), m_token)


def locate_rows(cu_seqlens: Tensor, context_lens: Tensor, num_tokens: int) -> tuple[Tensor, Tensor]:
    """Return int32 [T] sequence and position of each new token.

    A token past the last sequence (the padding of a captured batch) has position -1.
    """
    num_sequences = context_lens.shape[0]
    row_sequences = torch.empty(num_tokens, dtype=torch.int32, device=cu_seqlens.device)
    row_positions = torch.empty_like(row_sequences)
    locate_rows_kernel[(triton.cdiv(num_tokens, _TILE_T),)](
        cu_seqlens,
        context_lens,
        row_sequences,
        row_positions,
        num_tokens,
        num_sequences,
        TILE_T=_TILE_T,
        TILE_B=min(_MAX_TILE_B, triton.next_power_of_2(max(1, num_sequences))),
        num_warps=4,
    )
    return row_sequences, row_positions
