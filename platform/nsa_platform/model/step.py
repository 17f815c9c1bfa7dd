"""What all layers share in one forward pass, worked out once: rotations and row numbers.

A PackedStep stands for whole sequences, a PagedStep for new tokens on top of paged caches. Both
are made without a word from the device to the host, for NSA and for full attention. A PolicyStep
stands for new tokens whose attention is computed elsewhere.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from nsa_kernels import NewBlocks
from nsa_platform.config.model import ModelConfig, NsaAttentionConfig
from nsa_platform.model.compression import CompressionBlocks, compression_blocks, kernel_config
from nsa_platform.model.exchange import joined
from nsa_platform.model.inputs import Attend, Observed, PackedInputs, PagedInputs
from nsa_platform.model.partition import Partition
from nsa_platform.model.probe import Probe
from nsa_platform.model.rotary import Rotation, rotation_of


@dataclass(frozen=True, slots=True)
class PackedStep:
    """Whole sequences."""

    positions: Tensor
    """int32 [T], of all tokens, also of those that lie on other workers."""
    cu_seqlens: Tensor
    rotation: Rotation
    """Of this worker's tokens."""
    blocks: CompressionBlocks | None
    """None for full attention, as block_rotation."""
    block_rotation: Rotation | None
    """Rotation of the starts of the compression blocks."""
    probe: Probe | None
    partition: Partition


@dataclass(frozen=True, slots=True)
class PagedStep:
    """New tokens on top of paged caches."""

    cu_seqlens: Tensor
    context_lens: Tensor
    page_table: Tensor
    window_page_table: Tensor | None
    rotation: Rotation
    token_rows: Tensor
    """int64 [T], row of the selection pool (of the only pool, for full attention); a scratch row
    for a token whose page is shared."""
    window_rows: Tensor | None
    """int64 [T], row of the window pool."""
    new_blocks: NewBlocks | None
    """Compression blocks that the new tokens complete; a block that starts in a shared page is
    none."""
    observed: Observed | None
    """As PagedInputs has it."""


@dataclass(frozen=True, slots=True)
class PolicyStep:
    """New tokens of one sequence, for a policy that keeps, rotates and reads by its own rule."""

    attend: Attend


Step = PackedStep | PagedStep | PolicyStep


def packed_step(inputs: PackedInputs, config: ModelConfig, *, dtype: torch.dtype) -> PackedStep:
    """Prepare a forward pass over whole sequences."""
    blocks, block_rotation = None, None
    positions = joined(inputs.positions, inputs.partition.context)
    if isinstance(config.attention, NsaAttentionConfig):
        blocks = compression_blocks(
            inputs.cu_seqlens,
            num_tokens=positions.numel(),
            config=kernel_config(config.attention),
        )
        block_rotation = rotation_of(blocks.starts, config, dtype=dtype)
    return PackedStep(
        positions=positions,
        cu_seqlens=inputs.cu_seqlens,
        rotation=rotation_of(inputs.positions, config, dtype=dtype),
        blocks=blocks,
        block_rotation=block_rotation,
        probe=inputs.probe,
        partition=inputs.partition,
    )


def paged_step(inputs: PagedInputs, config: ModelConfig, *, dtype: torch.dtype) -> PagedStep:
    """Prepare a forward pass over new tokens."""
    page_size = inputs.caches[0].page_size
    num_tokens = inputs.positions.numel()
    packed = torch.arange(num_tokens, device=inputs.positions.device)
    sequence = _owner(inputs.cu_seqlens, packed)
    positions = inputs.positions.long()

    window_rows, new_blocks = None, None
    if isinstance(config.attention, NsaAttentionConfig):
        assert inputs.window_page_table is not None
        window_rows = _rows(inputs.window_page_table, sequence, positions, page_size)
        new_blocks = _new_blocks(inputs, config, config.attention, dtype)
    token_rows = _rows(inputs.page_table, sequence, positions, page_size)
    is_own = positions >= inputs.shared_lens[sequence]
    return PagedStep(
        cu_seqlens=inputs.cu_seqlens,
        context_lens=inputs.context_lens,
        page_table=inputs.page_table,
        window_page_table=inputs.window_page_table,
        rotation=rotation_of(inputs.positions, config, dtype=dtype),
        token_rows=torch.where(is_own, token_rows, 0),
        window_rows=window_rows,
        new_blocks=new_blocks,
        observed=inputs.observed,
    )


def _new_blocks(
    inputs: PagedInputs, config: ModelConfig, attention: NsaAttentionConfig, dtype: torch.dtype
) -> NewBlocks:
    """A block is new when its last token is; q new tokens complete ceil(q / d) blocks at most."""
    size, stride = attention.compression_block_size, attention.compression_stride
    page_size = inputs.caches[0].page_size
    assert inputs.window_page_table is not None

    contexts = inputs.context_lens.long()
    before = _num_blocks(contexts - inputs.cu_seqlens.long().diff(), size, stride)
    added = _num_blocks(contexts, size, stride) - before
    offsets = torch.cat([added.new_zeros(1), added.cumsum(0)])
    bound = (inputs.positions.numel() + contexts.numel() * (stride - 1)) // stride

    entry = torch.arange(bound, device=contexts.device)
    sequence = _owner(offsets, entry)
    is_block = entry < offsets[-1]
    index = before[sequence] + entry - offsets[sequence]
    starts = torch.where(is_block, index * stride, 0)
    tokens = starts[:, None] + torch.arange(size, device=contexts.device)
    tail_rows = _rows(inputs.window_page_table, sequence[:, None], tokens, page_size)
    rows = _rows(inputs.page_table, sequence, starts, page_size) // stride
    rotation = rotation_of(starts, config, dtype=dtype)
    return NewBlocks(
        tail_rows=torch.where(is_block[:, None], tail_rows, 0),
        rows=torch.where(is_block & (starts >= inputs.shared_lens[sequence]), rows, 0),
        cos=rotation.cos,
        sin=rotation.sin,
        is_rotated=attention.compressed_rotary == "block_start",
    )


def _num_blocks(lengths: Tensor, size: int, stride: int) -> Tensor:
    """Complete compression blocks of sequences with these lengths (none below l tokens)."""
    whole = torch.div(lengths - size, stride, rounding_mode="floor") + 1
    return whole.clamp(min=0)


def _owner(offsets: Tensor, items: Tensor) -> Tensor:
    """Which of the ranges [offsets[b], offsets[b + 1]) holds each item; the last for the rest."""
    owner = torch.searchsorted(offsets.long(), items, right=True) - 1
    return owner.clamp(0, offsets.numel() - 2)


def _rows(page_table: Tensor, sequence: Tensor, positions: Tensor, page_size: int) -> Tensor:
    """Pool row of each position; positions without a page share the scratch page 0."""
    logical = (positions // page_size).clamp(max=page_table.shape[1] - 1)
    page = page_table.long()[sequence, logical].clamp(min=0)
    return page * page_size + positions % page_size
