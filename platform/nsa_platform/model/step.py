"""What all layers share in one forward pass, worked out once: rotations and row numbers.

A PackedStep stands for whole sequences, a PagedStep for new tokens on top of paged caches. Both
are made without a word from the device to the host, for NSA and for full attention. A PolicyStep
stands for new tokens whose attention is computed elsewhere.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from nsa_kernels import NewBlocks, new_tallies, place_new_tokens
from nsa_platform.config.model import ModelConfig, NsaAttentionConfig
from nsa_platform.model.compression import CompressionBlocks, compression_blocks, kernel_config
from nsa_platform.model.exchange import joined
from nsa_platform.model.inputs import Attend, Observed, PackedInputs, PagedInputs
from nsa_platform.model.partition import Partition
from nsa_platform.model.probe import Probe
from nsa_platform.model.rotary import Rotation, inverse_frequencies, rotation_of


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
    tallies: Tensor
    """Of the linear layers, which take their turns."""


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
    attention = config.attention
    is_sparse = isinstance(attention, NsaAttentionConfig)
    places = place_new_tokens(
        inputs,
        inverse_frequencies(config, device=inputs.positions.device),
        page_size=inputs.caches[0].page_size,
        config=kernel_config(attention) if is_sparse else None,
        is_rotated=is_sparse and attention.compressed_rotary == "block_start",
        dtype=torch.promote_types(dtype, torch.float32),
    )
    return PagedStep(
        cu_seqlens=inputs.cu_seqlens,
        context_lens=inputs.context_lens,
        page_table=inputs.page_table,
        window_page_table=inputs.window_page_table,
        rotation=Rotation(places.cos, places.sin),
        token_rows=places.token_rows,
        window_rows=places.window_rows,
        new_blocks=places.blocks,
        observed=inputs.observed,
        tallies=new_tallies(inputs.positions.device),
    )
