"""Selected attention in Triton: any choice of blocks, forward and backward."""

from dataclasses import dataclass
from itertools import pairwise

import pytest
import torch
from torch import Tensor

import nsa_kernels
from nsa_kernels import NsaConfig, reference, triton_backend
from nsa_kernels.triton_backend.selected_backward import selected_gradients
from nsa_kernels.triton_backend.selected_lists import list_choices
from nsa_kernels.triton_backend.tiles import row_delta
from tests.kernels.cases import (
    DENSE_STRIDE,
    EQUAL_BLOCKS,
    PAPER,
    SMALL,
    Inputs,
    assert_close,
    make_inputs,
    offsets,
)
from tests.kernels.triton.precision import assert_precise_dq, relative_error

ODD = NsaConfig(
    compression_block_size=12,
    compression_stride=6,
    selection_block_size=24,
    num_selected_blocks=3,
    num_initial_blocks=1,
    num_local_blocks=1,
    window_size=1,
)
WIDE_BLOCKS = NsaConfig(selection_block_size=96, num_selected_blocks=3)
FEW_BLOCKS = NsaConfig(selection_block_size=32, num_selected_blocks=2, num_local_blocks=1)
DTYPES = [torch.float32, torch.bfloat16, torch.float16]


@dataclass(frozen=True)
class Case:
    """One shape to try."""

    lengths: tuple[int, ...]
    config: NsaConfig = SMALL
    groups: int = 1
    heads_per_group: int = 1
    key_width: int = 16
    value_width: int = 16

    def __str__(self) -> str:
        lengths = "+".join(map(str, self.lengths))
        heads = f"G{self.groups}R{self.heads_per_group}K{self.key_width}V{self.value_width}"
        return f"T{lengths}-b{self.config.selection_block_size}-{heads}"

    def inputs(self, dtype: torch.dtype, device: str) -> Inputs:
        return make_inputs(
            list(self.lengths),
            config=self.config,
            groups=self.groups,
            heads_per_group=self.heads_per_group,
            key_width=self.key_width,
            value_width=self.value_width,
            dtype=dtype,
            device=device,
        )


# l'-1, l', l'+1 of SMALL, an empty sequence and single tokens, in one packed batch.
INTERPRETED = [
    Case((1,)),
    Case((15, 0, 16, 1, 17, 31)),
    Case((333,), FEW_BLOCKS),
    Case((25, 18), EQUAL_BLOCKS, groups=2, heads_per_group=4, value_width=32),
    Case((47,), DENSE_STRIDE, heads_per_group=16, key_width=32),
    Case((13, 26), ODD, groups=2, heads_per_group=3, key_width=48, value_width=48),
    Case((100,), WIDE_BLOCKS, heads_per_group=2),
    Case((230,), WIDE_BLOCKS, heads_per_group=1),
]
COMPILED = [
    *INTERPRETED,
    Case((333,), SMALL, groups=2, heads_per_group=4),
    Case((333,), PAPER, groups=2, heads_per_group=16, key_width=192, value_width=128),
    Case((1500, 31, 0, 530), PAPER, heads_per_group=16, key_width=128, value_width=128),
    Case((1023,), PAPER, groups=2, heads_per_group=4, key_width=64, value_width=64),
    Case((700, 300), PAPER, heads_per_group=6, key_width=256, value_width=256),
    Case((257,), PAPER, heads_per_group=64, key_width=128, value_width=128),
    Case((1025,), WIDE_BLOCKS, heads_per_group=1, key_width=128, value_width=192),
]


def random_blocks(
    cu_seqlens: Tensor, groups: int, config: NsaConfig, *, seed: int = 0, fewest: int = 0
) -> Tensor:
    """Any choice that the contract allows: random order, -1 anywhere, some rows without a block.

    Each row draws n places among all blocks so far plus as many empty ones, at least `fewest`.
    """
    generator = torch.Generator().manual_seed(seed)
    chosen = config.num_selected_blocks
    rows = []
    for length in cu_seqlens.diff().tolist():
        most = -(-length // config.selection_block_size)
        position = torch.arange(length)[:, None, None]
        block = torch.arange(max(most, chosen))
        noise = torch.rand(length, groups, block.numel(), generator=generator)
        noise = noise.masked_fill(block > position // config.selection_block_size, 2.0)
        keys, order = noise.sort(-1)
        order = order[..., :chosen].masked_fill(keys[..., :chosen] > 1.0, -1)
        dropped = torch.rand(length, groups, chosen, generator=generator) < 0.3
        dropped[..., :fewest] = False
        order = order.masked_fill(dropped, -1)
        mixed = torch.rand(length, groups, chosen, generator=generator).argsort(-1)
        rows.append(order.gather(-1, mixed))
    return torch.cat(rows).to(cu_seqlens.device, torch.int32)


def check(case: Case, dtype: torch.dtype, device: str) -> None:
    """Outputs and gradients, of out and lse, against the float64 reference."""
    inputs = case.inputs(dtype, device)
    blocks = random_blocks(inputs.cu_seqlens, case.groups, case.config)
    tensors = (inputs.q, inputs.k_slc, inputs.v_slc)
    for tensor in tensors:
        tensor.requires_grad_(True)
    out, lse = nsa_kernels.selected_attention(
        *tensors, blocks, config=case.config, cu_seqlens=inputs.cu_seqlens, backend="triton"
    )
    exact = inputs.double()
    exact_tensors = (exact.q, exact.k_slc, exact.v_slc)
    for tensor in exact_tensors:
        tensor.requires_grad_(True)
    exact_out, exact_lse = reference.selected_attention(
        *exact_tensors, blocks.cpu(), config=case.config, cu_seqlens=exact.cu_seqlens
    )
    assert_close(out, exact_out, "out")
    assert_close(lse, exact_lse, "lse")
    dout, dlse = torch.randn_like(exact_out).to(dtype), torch.randn_like(exact_lse).float()
    gradients = torch.autograd.grad((out, lse), tensors, (dout.to(device), dlse.to(device)))
    exact_gradients = torch.autograd.grad(
        (exact_out, exact_lse), exact_tensors, (dout.double(), dlse.double())
    )
    for name, actual, wanted in zip("qkv", gradients, exact_gradients, strict=True):
        assert_close(actual, wanted, f"d{name}")


@pytest.fixture
def interpreted() -> None:
    if torch.cuda.is_available():
        pytest.skip("kernels imported for the GPU do not run in the interpreter")


@pytest.mark.usefixtures("interpreted")
@pytest.mark.parametrize("case", INTERPRETED, ids=str)
def test_interpreted(case: Case) -> None:
    check(case, torch.float32, "cpu")


@pytest.mark.usefixtures("interpreted")
def test_interpreted_in_16_bits() -> None:
    """16-bit inputs take the wide tiles of the tensor cores."""
    config = NsaConfig(num_selected_blocks=3)
    check(Case((70,), config, heads_per_group=4), torch.float16, "cpu")


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("case", COMPILED, ids=str)
def test_compiled(case: Case, dtype: torch.dtype, device: str) -> None:
    check(case, dtype, device)


def check_chunks(lengths: list[int], groups: int, heads: int, chunk: int, device: str) -> None:
    """Gradients in one range and one chunk a list, and in short ranges cut into short chunks.

    Every token chooses block 0, so its list is long.
    """
    inputs = make_inputs(lengths, groups=groups, heads_per_group=heads, device=device)
    config = inputs.config
    blocks = random_blocks(inputs.cu_seqlens, groups, config, fewest=1)
    blocks[..., 1] = torch.where((blocks == 0).any(-1), blocks[..., 1], 0)
    tensors = (inputs.q, inputs.k_slc, inputs.v_slc)
    rest = (blocks, inputs.cu_seqlens, config, 0.25)
    out, lse = triton_backend.selected_forward(*tensors, *rest)
    dout = torch.randn(out.shape, generator=torch.Generator().manual_seed(3)).to(device)
    delta = row_delta(out, dout, lse, torch.zeros_like(lse))
    whole, several = (
        selected_gradients(dout, *tensors, lse, delta, *rest, span=span, chunk_tokens=count)
        for span, count in ((2**20, 2**20), (2 * chunk, chunk))
    )
    for name, one, many in zip("qkv", whole, several, strict=True):
        assert_close(many, one.cpu().double(), f"d{name}")


@pytest.mark.usefixtures("interpreted")
def test_cutting_long_lists_changes_no_gradient() -> None:
    check_chunks([37, 3], groups=1, heads=2, chunk=17, device="cpu")


@pytest.mark.gpu
def test_cutting_long_lists_changes_no_gradient_compiled(device: str) -> None:
    check_chunks([5000, 300], groups=2, heads=4, chunk=64, device=device)


def check_weight(device: str) -> None:
    """A weight on out's gradient may be given inside lse and delta instead."""
    inputs = make_inputs([37, 3], groups=1, heads_per_group=2, device=device)
    blocks = random_blocks(inputs.cu_seqlens, 1, inputs.config, fewest=1)
    tensors = (inputs.q, inputs.k_slc, inputs.v_slc)
    rest = (blocks, inputs.cu_seqlens, inputs.config, 0.25)
    out, lse = triton_backend.selected_forward(*tensors, *rest)
    generator = torch.Generator().manual_seed(3)
    dout = torch.randn(out.shape, generator=generator).to(device)
    weights = torch.rand(lse.shape, generator=generator).to(device)
    delta = row_delta(out, dout, lse, torch.zeros_like(lse))
    weighed = dout * weights[..., None]
    wanted = selected_gradients(weighed, *tensors, lse, delta * weights, *rest)
    actual = selected_gradients(dout, *tensors, lse - weights.log(), delta, *rest)
    for name, one, other in zip("qkv", wanted, actual, strict=True):
        assert_close(other, one.cpu().double(), f"d{name}")


@pytest.mark.usefixtures("interpreted")
def test_lse_may_hold_a_weight() -> None:
    check_weight("cpu")


@pytest.mark.gpu
def test_lse_may_hold_a_weight_compiled(device: str) -> None:
    check_weight(device)


def check_lists(cu_seqlens: Tensor, blocks: Tensor, block: int, span: int, chunk: int) -> None:
    """The lists against a plain loop over the choice; the chunks against the lists."""
    lists = list_choices(blocks, cu_seqlens, block, span, chunk)
    offsets_of = cu_seqlens.tolist()
    wanted: dict[tuple[int, int], list[tuple[int, int, int]]] = {}
    for b in range(len(offsets_of) - 1):
        for t in range(offsets_of[b], offsets_of[b + 1]):
            for g in range(blocks.shape[1]):
                for c, j in enumerate(blocks[t, g].tolist()):
                    if 0 <= j <= (t - offsets_of[b]) // block:
                        number = g * lists.num_blocks + offsets_of[b] // block + b + j
                        wanted.setdefault((t // span, number), []).append((t, g, c))
                    else:
                        assert lists.places[t, g, c] == -1
    tokens = lists.tokens.tolist()
    slots = []
    for r in range(lists.num_ranges):
        starts, chunks = lists.starts[r].tolist(), lists.chunk_lists[r].tolist()
        slots_of_range = []
        for i, (low, high) in enumerate(pairwise(starts)):
            entries = wanted.get((r, i), [])
            assert tokens[low:high] == [t for t, _, _ in entries]
            places = [int(lists.places[entry]) for entry in entries]
            assert places == list(range(low - starts[0], high - starts[0]))
            count = -(-(high - low) // chunk)
            first, slot = int(lists.chunk_starts[r, i]), int(lists.slots[r, i])
            assert chunks[first : first + count] == [i] * count
            assert (slot >= 0) == (count > 1)
            slots_of_range += range(slot, slot + count) if slot >= 0 else []
        used = int(lists.chunk_starts[r, -1])
        assert chunks[used:] == [lists.num_lists] * (len(chunks) - used)
        assert slots_of_range == list(range(len(slots_of_range)))
        slots.append(len(slots_of_range))
    assert max(slots) <= lists.max_slots


@pytest.mark.parametrize("chunk", [1, 3, 7, 1000])
@pytest.mark.parametrize("span", [10, 1000])
@pytest.mark.parametrize("lengths", [[40], [17, 0, 1, 33, 16], [0, 0, 5]])
def test_lists_hold_every_choice_once(lengths: list[int], span: int, chunk: int) -> None:
    cu_seqlens = offsets(lengths)
    check_lists(cu_seqlens, random_blocks(cu_seqlens, 2, SMALL), 16, span, chunk)


def test_lists_leave_out_blocks_that_nobody_sees() -> None:
    """A block after the token's own would be another sequence's in the packed numbering."""
    cu_seqlens = offsets([20, 20])
    blocks = torch.full((40, 1, 2), -1, dtype=torch.int32)
    blocks[3, 0] = torch.tensor([0, 2], dtype=torch.int32)
    check_lists(cu_seqlens, blocks, 16, 64, 4)


@pytest.mark.gpu
def test_backward_repeats_bit_by_bit(device: str) -> None:
    case = Case((3000, 17, 1500), PAPER, 2, 16, 128, 128)
    inputs = case.inputs(torch.bfloat16, device)
    blocks = random_blocks(inputs.cu_seqlens, 2, PAPER)
    arguments = (inputs.q, inputs.k_slc, inputs.v_slc)
    rest = (blocks, inputs.cu_seqlens, PAPER, 128**-0.5)
    out, lse = triton_backend.selected_forward(*arguments, *rest)
    dout, dlse = torch.randn_like(out), torch.randn_like(lse)
    runs = [
        triton_backend.selected_backward(dout, dlse, *arguments, out, lse, *rest) for _ in range(3)
    ]
    for again in runs[1:]:
        assert all(torch.equal(a, b) for a, b in zip(runs[0], again, strict=True))


@pytest.mark.gpu
@pytest.mark.parametrize("deviation", [8.0, 24.0, 60.0])
def test_dq_is_precise_at_large_logits(deviation: float, device: str) -> None:
    inputs = Case((2000,), PAPER, 1, 4, 128, 128).inputs(torch.bfloat16, device)
    blocks = random_blocks(inputs.cu_seqlens, 1, PAPER, fewest=1)
    q = (inputs.q.float() * deviation).bfloat16()
    rest = (blocks, inputs.cu_seqlens, PAPER, 128**-0.5)
    out, lse = triton_backend.selected_forward(q, inputs.k_slc, inputs.v_slc, *rest)
    torch.manual_seed(0)
    dout = torch.randn_like(out)
    dq, _, _ = triton_backend.selected_backward(
        dout, torch.zeros_like(lse), q, inputs.k_slc, inputs.v_slc, out, lse, *rest
    )
    t = torch.arange(2000, device=device)
    chosen = torch.zeros(2000, 2000 // 64 + 1, dtype=torch.bool, device=device)
    chosen.scatter_(1, blocks[:, 0].clamp(min=0).long(), True)
    chosen[:, 0] &= (blocks[:, 0] == 0).any(1)
    visible = chosen[:, t // 64] & (t <= t[:, None])
    given = (q, inputs.k_slc[:, 0], inputs.v_slc[:, 0], dout)
    assert_precise_dq(dq, given, visible, deviation)


LONG = 270_336
"""Tokens at which q of 64 heads of 128 has more than 2^31 elements."""


@pytest.mark.gpu
def test_addresses_pass_32_bits(device: str) -> None:
    torch.manual_seed(0)
    cu_seqlens = offsets([LONG - 4100, 4100], device)
    make = {"dtype": torch.bfloat16, "device": device}
    q, dout = torch.randn(LONG, 64, 128, **make), torch.randn(LONG, 64, 128, **make)
    k, v = torch.randn(LONG, 4, 128, **make), torch.randn(LONG, 4, 128, **make)
    tokens = torch.arange(LONG, device=device, dtype=torch.int32)
    positions = torch.where(tokens < LONG - 4100, tokens, tokens - (LONG - 4100))
    own = (positions // 64)[:, None, None].expand(-1, 4, 1)
    earlier = (torch.rand(LONG, 4, 15, device=device) * own).to(torch.int32)
    blocks = torch.cat([earlier, own], -1)
    # The contract wants each block once: a repeated one is dropped.
    blocks, _ = blocks.sort(-1)
    repeated = torch.nn.functional.pad(blocks[..., 1:] == blocks[..., :-1], (1, 0))
    blocks = blocks.masked_fill(repeated, -1).to(torch.int32).contiguous()
    rest = (blocks, cu_seqlens, PAPER, 128**-0.5)
    out, lse = triton_backend.selected_forward(q, k, v, *rest)
    dq, dk, dv = triton_backend.selected_backward(
        dout, torch.zeros_like(lse), q, k, v, out, lse, *rest
    )
    assert dk.isfinite().all() and dv.isfinite().all()
    for t in (LONG - 4101, LONG - 4100 + 64, LONG - 1):
        start = 0 if t < LONG - 4100 else LONG - 4100
        for group in range(4):
            chosen = blocks[t, group][blocks[t, group] >= 0].long()
            seen = (chosen[:, None] * 64 + torch.arange(64, device=device)).flatten()
            seen = seen[seen <= t - start] + start
            heads = slice(16 * group, 16 * group + 16)
            row = q[t, heads].double().requires_grad_(True)
            logits = row @ k[seen, group].double().T * 128**-0.5
            exact = logits.softmax(-1) @ v[seen, group].double()
            assert relative_error(out[t, heads], exact.detach()) < 0.01
            (exact_dq,) = torch.autograd.grad(exact, row, dout[t, heads].double())
            assert relative_error(dq[t, heads], exact_dq) < 0.01
