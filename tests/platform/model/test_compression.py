"""phi and the table of its blocks, against loops."""

import pytest
import torch

from nsa_kernels import NsaConfig, compressed_cu_seqlens
from nsa_platform.model.compression import Compression, compression_blocks, gather_rows

SIZES = [(8, 4, 8), (32, 16, 64), (8, 8, 8), (12, 3, 12), (6, 1, 6)]
LENGTHS = [[1], [3], [8], [50], [7, 0, 8, 9, 100], [31, 32, 33, 47, 48, 1]]


def config_of(size: int, stride: int, block: int) -> NsaConfig:
    return NsaConfig(
        compression_block_size=size, compression_stride=stride, selection_block_size=block
    )


def offsets_of(lengths: list[int]) -> torch.Tensor:
    return torch.tensor([0, *lengths]).cumsum(0).int()


def expected_blocks(lengths: list[int], size: int, stride: int) -> list[tuple[int, int]]:
    """(position in the sequence, packed token) of the first token of each complete block."""
    starts, begin = [], 0
    for length in lengths:
        starts += [(s, begin + s) for s in range(0, length - size + 1, stride)]
        begin += length
    return starts


@pytest.mark.parametrize("sizes", SIZES)
@pytest.mark.parametrize("lengths", LENGTHS)
def test_table_holds_the_complete_blocks_in_order(sizes, lengths):
    config, total = config_of(*sizes), sum(lengths)
    blocks = compression_blocks(offsets_of(lengths), num_tokens=total, config=config)
    wanted = expected_blocks(lengths, *sizes[:2])
    assert len(blocks.starts) == max(total // sizes[1], 1) >= len(wanted)
    assert len(wanted) == int(compressed_cu_seqlens(offsets_of(lengths), config)[-1])
    assert blocks.starts[: len(wanted)].tolist() == [start for start, _ in wanted]
    assert blocks.tokens.rows[blocks.strides.rows].flatten(1)[: len(wanted)].tolist() == [
        list(range(token, token + sizes[0])) for _, token in wanted
    ]


@pytest.mark.parametrize("sizes", SIZES)
@pytest.mark.parametrize("lengths", LENGTHS)
def test_gradient_of_the_gather_equals_that_of_plain_indexing(sizes, lengths):
    total = sum(lengths)
    blocks = compression_blocks(offsets_of(lengths), num_tokens=total, config=config_of(*sizes))
    x = torch.randn(total, 2, 3, dtype=torch.float64, requires_grad=True)
    count = len(expected_blocks(lengths, *sizes[:2]))
    weight = torch.randn(2, len(blocks.starts), sizes[0], 3, dtype=torch.float64)
    weight[:, count:] = 0

    strides = gather_rows(x.transpose(0, 1), blocks.tokens)
    gathered = gather_rows(strides.flatten(2), blocks.strides)
    plain = x[blocks.tokens.rows[blocks.strides.rows].flatten(1)].permute(2, 0, 1, 3)
    assert torch.equal(gathered.unflatten(3, (-1, 3)).flatten(2, 3), plain)
    (grad,) = torch.autograd.grad((gathered * weight.view_as(gathered)).sum(), x)
    (wanted,) = torch.autograd.grad((plain * weight).sum(), x)
    torch.testing.assert_close(grad, wanted)


@pytest.mark.parametrize("sizes", SIZES)
@pytest.mark.parametrize("lengths", LENGTHS)
@pytest.mark.parametrize("kind", ["mean", "linear", "mlp"])
def test_projecting_each_stride_once_equals_folding_each_block(make_config, kind, sizes, lengths):
    fields = ("compression_block_size", "compression_stride", "selection_block_size")
    chosen = dict(zip(fields, sizes, strict=True))
    phi = Compression(make_config({"compression": kind, **chosen}).attention, width=5).double()
    for parameter in phi.parameters():
        torch.nn.init.normal_(parameter)
    total = sum(lengths)
    blocks = compression_blocks(offsets_of(lengths), num_tokens=total, config=config_of(*sizes))
    x = torch.randn(total, 2, 5, dtype=torch.float64, requires_grad=True)
    count = len(expected_blocks(lengths, *sizes[:2]))
    weight = torch.randn(count, 2, 5, dtype=torch.float64)
    inputs = [x, *phi.parameters()]

    folded = phi.fold_packed(x, blocks)
    wanted = phi(x[blocks.tokens.rows[blocks.strides.rows].flatten(1)].permute(2, 0, 1, 3))
    assert folded.isfinite().all()
    torch.testing.assert_close(folded, wanted)
    for ours, theirs in zip(
        torch.autograd.grad((folded[:count] * weight).sum(), inputs),
        torch.autograd.grad((wanted[:count] * weight).sum(), inputs),
        strict=True,
    ):
        torch.testing.assert_close(ours, theirs)


@pytest.mark.parametrize("kind", ["mean", "linear", "mlp"])
def test_phi_against_its_formula(make_config, kind):
    attention = make_config({"compression": kind}).attention
    phi = Compression(attention, width=5).double()
    for parameter in phi.parameters():
        torch.nn.init.normal_(parameter)
    blocks = torch.randn(2, 7, 8, 5, dtype=torch.float64)
    folded = phi(blocks)
    assert folded.shape == (7, 2, 5)
    for group in range(2):
        for index in range(7):
            block = blocks[group, index]
            wanted = block.mean(0)
            if kind != "mean":
                flat = (block + phi.position[group]).flatten()
                wanted = phi.fold[group].T @ flat
            if kind == "mlp":
                wanted = block.mean(0) + phi.correct[group].T @ torch.nn.functional.silu(wanted)
            torch.testing.assert_close(folded[index, group], wanted)
