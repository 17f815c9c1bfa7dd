"""Rows and angles of new tokens and blocks, against a statement token by token."""

import math
from dataclasses import replace

import pytest
import torch
from torch import Tensor

from nsa_kernels import NewPlaces, NewTokens, NsaConfig, place_new_tokens
from nsa_kernels.dispatch import Backend

CONFIG = NsaConfig(
    compression_block_size=8, compression_stride=4, selection_block_size=8, window_size=16
)
PAGE = 16
FREQUENCIES = torch.tensor([1.0, 0.37, 1e-3, 2.5e-5, 3e-6], dtype=torch.float64)
# New tokens and context of each sequence.
CASES = {
    "decodes": [(1, 9), (1, 8), (1, 7), (1, 500_003)],
    "one": [(1, 1)],
    "chunks": [(40, 40), (3, 70), (1, 16), (21, 100), (16, 16)],
    "many": [(1 + i % 3, 5 + 7 * i) for i in range(300)],
}


def draw_tokens(lengths: list[tuple[int, int]], *, has_window: bool = True) -> NewTokens:
    """Tokens over pages in no order; some first pages are shared, some window pages gone."""
    generator = torch.Generator().manual_seed(len(lengths))
    counts, contexts = zip(*lengths, strict=True)
    pages = -(-max(contexts) // PAGE) + 1
    order = torch.randperm(len(lengths) * pages, generator=generator).int() + 1
    table = order.view(len(lengths), pages).clone()
    window = table.flip(1).contiguous()
    for row, context in enumerate(contexts):
        table[row, -(-context // PAGE) :] = -1
        window[row, -(-context // PAGE) :] = -1
        window[row, : max(0, context // PAGE - 4)] = -1
    positions = [t for count, context in lengths for t in range(context - count, context)]
    shared = [PAGE * (row % 3) for row in range(len(lengths))]
    return NewTokens(
        positions=torch.tensor(positions, dtype=torch.int32),
        cu_seqlens=torch.tensor([0, *counts]).cumsum(0).int(),
        context_lens=torch.tensor(contexts, dtype=torch.int32),
        page_table=table,
        window_page_table=window if has_window else None,
        shared_lens=torch.tensor(shared, dtype=torch.int32),
    )


def pool_row(table: Tensor, row: int, position: int) -> int:
    page = int(table[row, min(position // PAGE, table.shape[1] - 1)])
    return max(page, 0) * PAGE + position % PAGE


def check_angles(cos: Tensor, sin: Tensor, positions: list[int]) -> None:
    wanted = [[f * p for f in FREQUENCIES.tolist()] for p in positions]
    for found, function in ((cos, math.cos), (sin, math.sin)):
        exact = torch.tensor([[function(a) for a in row] for row in wanted], dtype=torch.float64)
        assert found.dtype == torch.float32
        torch.testing.assert_close(found.cpu().double(), exact, rtol=1e-6, atol=1e-7)


def check_places(
    lengths: list[tuple[int, int]], *, has_window: bool, backend: Backend, device: str = "cpu"
) -> None:
    tokens = draw_tokens(lengths, has_window=has_window)
    found = place(tokens, backend=backend, device=device)
    owner = [row for row, (count, _) in enumerate(lengths) for _ in range(count)]
    positions = tokens.positions.tolist()
    shared = tokens.shared_lens.tolist()
    pairs = list(zip(owner, positions, strict=True))
    rows = [0 if p < shared[b] else pool_row(tokens.page_table, b, p) for b, p in pairs]
    assert found.token_rows.tolist() == rows
    check_angles(found.cos, found.sin, positions)
    if tokens.window_page_table is None:
        assert found.window_rows is None
        assert found.blocks is None
        return
    window = tokens.window_page_table
    assert found.window_rows is not None
    assert found.blocks is not None
    assert found.window_rows.tolist() == [pool_row(window, b, p) for b, p in pairs]
    size, stride = CONFIG.compression_block_size, CONFIG.compression_stride
    # A block is new when its last token is.
    starts = [(b, p + 1 - size) for b, p in pairs if p + 1 >= size and (p + 1 - size) % stride == 0]
    most, blocks = len(found.blocks.rows), found.blocks
    assert len(starts) <= most
    missing = most - len(starts)
    wanted = [
        0 if p < shared[b] else pool_row(tokens.page_table, b, p) // stride for b, p in starts
    ]
    assert blocks.rows.tolist() == wanted + [0] * missing
    tails = [[pool_row(window, b, p + i) for i in range(size)] for b, p in starts]
    assert blocks.tail_rows.tolist() == tails + [[0] * size] * missing
    check_angles(blocks.cos, blocks.sin, [p for _, p in starts] + [0] * missing)


def place(tokens: NewTokens, *, backend: Backend, device: str = "cpu") -> NewPlaces:
    moved = replace(
        tokens,
        **{
            name: tensor.to(device)
            for name in NewTokens.__slots__
            if (tensor := getattr(tokens, name)) is not None
        },
    )
    config = None if tokens.window_page_table is None else CONFIG
    return place_new_tokens(
        moved, FREQUENCIES.to(device), page_size=PAGE, config=config, backend=backend
    )


@pytest.mark.parametrize("backend", ["torch", "triton"])
@pytest.mark.parametrize("has_window", [True, False], ids=["nsa", "full"])
@pytest.mark.parametrize("name", CASES)
def test_places_are_those_of_each_token(name: str, has_window: bool, backend: Backend) -> None:
    check_places(CASES[name], has_window=has_window, backend=backend)


@pytest.mark.gpu
@pytest.mark.parametrize("has_window", [True, False], ids=["nsa", "full"])
@pytest.mark.parametrize("name", CASES)
def test_compiled(name: str, has_window: bool, device: str) -> None:
    check_places(CASES[name], has_window=has_window, backend="triton", device=device)


@pytest.mark.parametrize("backend", ["torch", "triton"])
def test_no_tokens(backend: Backend) -> None:
    empty = torch.zeros(0, dtype=torch.int32)
    table = torch.zeros(0, 4, dtype=torch.int32)
    tokens = NewTokens(empty, torch.zeros(1, dtype=torch.int32), empty, table, table, empty)
    found = place(tokens, backend=backend)
    assert found.token_rows.shape == (0,)
    assert found.cos.shape == (0, 5)


def test_bad_input() -> None:
    tokens = draw_tokens(CASES["decodes"])
    options = {"page_size": PAGE, "config": CONFIG}
    for changes, frequencies, message in (
        ({"config": None}, FREQUENCIES, "window_page_table is needed with a config of NSA"),
        ({"page_size": 0}, FREQUENCIES, "page_size=0 must be a positive whole number"),
        ({"page_size": PAGE + 1}, FREQUENCIES, "multiple of selection_block_size"),
        ({"config": {}}, FREQUENCIES, "config must be an NsaConfig, got dict"),
        ({"dtype": torch.float16}, FREQUENCIES, r"must be float32 or float64, got torch\.float16"),
        ({}, FREQUENCIES.float(), "frequencies must be float64"),
        ({"dtype": torch.float64, "backend": "triton"}, FREQUENCIES, "gives angles in float32"),
    ):
        with pytest.raises(ValueError, match=message):
            place_new_tokens(tokens, frequencies, **{**options, **changes})
    long = replace(tokens, positions=tokens.positions.long())
    with pytest.raises(ValueError, match="positions must be int32"):
        place_new_tokens(long, FREQUENCIES, **options)
    elsewhere = replace(tokens, shared_lens=tokens.shared_lens.to("meta"))
    with pytest.raises(ValueError, match="shared_lens is on meta, positions are on cpu"):
        place_new_tokens(elsewhere, FREQUENCIES, **options)
