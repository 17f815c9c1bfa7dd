"""Paged attention in Triton equals the one-shot op at every position, whatever the pages."""

from itertools import pairwise

import pytest
import torch

from nsa_kernels import (
    NsaConfig,
    compressed_cu_seqlens,
    full_attention,
    nsa_attention,
    reference,
)
from nsa_kernels.triton_backend import paged as paged_module
from nsa_kernels.triton_backend import paged_decode as decode_module
from tests.kernels.cases import DENSE_STRIDE, EQUAL_BLOCKS, PAPER, SMALL, assert_close
from tests.kernels.triton.pages import PagedBatch, lay_out, make_paged

ODD = NsaConfig(
    compression_block_size=12,
    compression_stride=6,
    selection_block_size=24,
    num_selected_blocks=5,
    num_initial_blocks=2,
    num_local_blocks=1,
    window_size=10,
)
# Three strides to a selection block: tiles of keys have columns without a key.
UNEVEN = NsaConfig(
    compression_block_size=16,
    compression_stride=8,
    selection_block_size=24,
    num_selected_blocks=4,
    num_initial_blocks=0,
    num_local_blocks=1,
    window_size=30,
)


@pytest.fixture(params=["few", "many"])
def way(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """As for few new tokens (splits, three launches) or as for many (chunks), whatever they are."""
    monkeypatch.setattr(paged_module, "is_decode", lambda *sizes: request.param == "few")
    return request.param


def assert_equals_reference(batch: PagedBatch) -> None:
    """Both paged ops against the reference's one-shot rows in float64."""
    exact, rows = batch.whole.double(), batch.rows.cpu()
    expected = reference.nsa_attention(
        *exact.tensors, config=exact.config, cu_seqlens=exact.cu_seqlens
    )
    assert_close(batch.attend(), expected[rows], "nsa")
    expected = reference.full_attention(
        exact.q, exact.k_slc, exact.v_slc, cu_seqlens=exact.cu_seqlens
    )
    assert_close(batch.attend_full(), expected[rows], "full")


# l = 8, l' = 16, w = 24 of SMALL, one less, one more.
BOUNDARIES = [1, 7, 8, 9, 15, 16, 17, 23, 24, 25]


@pytest.mark.parametrize("pages_of", [1, 2])
def test_decode_at_every_boundary(pages_of: int) -> None:
    page = pages_of * SMALL.selection_block_size
    ones = [1] * len(BOUNDARIES)
    assert_equals_reference(make_paged(BOUNDARIES, ones, config=SMALL, page=page, groups=1))


@pytest.mark.usefixtures("way")
def test_chunks_verify_and_decode_in_one_batch() -> None:
    batch = make_paged(
        [333, 40, 1, 66, 9],
        [3, 17, 1, 1, 9],
        config=SMALL,
        groups=1,
        page=32,
    )
    assert_equals_reference(batch)


@pytest.mark.parametrize("new_tokens", [[2, 2], [5, 5], [16, 16], [1, 16], [16, 3]], ids=str)
def test_few_new_tokens(new_tokens: list[int]) -> None:
    batch = make_paged([301, 95], new_tokens, config=SMALL, groups=1, heads_per_group=16)
    assert_equals_reference(batch)


@pytest.mark.usefixtures("way")
def test_whole_prompt() -> None:
    assert_equals_reference(make_paged([50], [50], config=SMALL, groups=1, heads_per_group=1))


@pytest.mark.usefixtures("way")
@pytest.mark.parametrize(
    ("config", "groups", "heads_per_group", "key_width", "value_width"),
    [
        (EQUAL_BLOCKS, 3, 1, 48, 16),
        (DENSE_STRIDE, 1, 16, 16, 32),
        (ODD, 2, 3, 32, 16),
        (UNEVEN, 1, 4, 16, 16),
        (NsaConfig(num_selected_blocks=4), 1, 4, 192, 128),
    ],
    ids=["equal", "dense", "odd", "uneven", "wide"],
)
def test_sizes(
    config: NsaConfig, groups: int, heads_per_group: int, key_width: int, value_width: int
) -> None:
    batch = make_paged(
        [433, 64],
        [1, 2],
        config=config,
        page=2 * config.selection_block_size,
        groups=groups,
        heads_per_group=heads_per_group,
        key_width=key_width,
        value_width=value_width,
    )
    assert_equals_reference(batch)


def test_half_precision() -> None:
    assert_equals_reference(make_paged([100, 31], [2, 1], config=SMALL, dtype=torch.float16))


@pytest.mark.usefixtures("way")
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_fp8_caches(dtype: torch.dtype) -> None:
    assert_equals_reference(make_paged([100, 31], [2, 1], config=SMALL, dtype=dtype, is_fp8=True))


def test_empty_sequences_and_no_tokens() -> None:
    batch = make_paged([50, 20, 33], [0, 3, 0], config=SMALL, groups=1)
    assert_equals_reference(batch)
    batch = make_paged([50], [0], config=SMALL)
    assert batch.attend().shape == (0, 4, 16)


def test_tokens_in_chunks_give_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    batch = make_paged([90, 30], [40, 30], config=SMALL, groups=1)
    whole = batch.attend()
    monkeypatch.setattr(paged_module, "_BUFFER_BYTES", 4 * 5000)
    assert torch.equal(batch.attend(), whole)


class Launches:
    """Stands where a kernel does and notes the constants of each launch, which make it a kernel of
    its own."""

    def __init__(self) -> None:
        self.met: set[tuple[tuple[str, object], ...]] = set()

    def __getitem__(self, grid: tuple[int, ...]) -> "Launches":
        return self

    def __call__(self, *tensors: object, **constants: object) -> None:
        self.met.add(tuple(sorted(constants.items())))


def test_a_server_meets_few_kernels(monkeypatch: pytest.MonkeyPatch) -> None:
    """Whatever comes together in a step: each kernel that it has not met is seconds of waiting."""
    kernels: dict[str, Launches] = {}
    for module in (paged_module, decode_module):
        for name in vars(module):
            if name.endswith("_kernel"):
                monkeypatch.setattr(module, name, kernels.setdefault(name, Launches()))
    monkeypatch.setattr(paged_module, "top_blocks", lambda *whatever: None)
    monkeypatch.setattr(paged_module, "merge_parts", lambda *whatever, **more: None)
    monkeypatch.setattr(decode_module, "merge_parts", lambda *whatever, **more: None)
    for sequences in (1, 2, 3, 5, 8, 12, 17, 32):
        for rest in (0, 1, 15, 40, 300):
            counts = [rest] + [1] * (sequences - 1)
            batch = make_paged(
                [300] * sequences, counts, config=PAPER, groups=1, heads_per_group=16
            )
            # Plans go by what the page table has room for.
            room = (0, 1000 - batch.page_table.shape[1])
            batch.page_table = torch.nn.functional.pad(batch.page_table, room)
            paged_module.paged_attention(**indexed(batch), config=PAPER, scale=0.25)
    assert {name: len(launches.met) for name, launches in kernels.items()} == {
        "paged_compressed_kernel": 2,
        "paged_chosen_kernel": 2,
        "paged_span_forward_kernel": 1,
        "paged_importance_kernel": 1,
        "paged_selected_sliding_forward_kernel": 1,
    }


@pytest.mark.usefixtures("way")
def test_splits_of_the_keys_give_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    batch = make_paged([1200, 30], [1, 1], config=PAPER, groups=1, heads_per_group=2)
    split = batch.attend()
    for module in (paged_module, decode_module):
        monkeypatch.setattr(module, "_MOST_SPLITS", 1)
    torch.testing.assert_close(batch.attend(), split, rtol=1e-5, atol=1e-6)


@pytest.mark.usefixtures("way")
@pytest.mark.parametrize("period", [1, 8])
def test_ties_go_to_the_lower_block(period: int) -> None:
    """Integer keys repeat every `period` blocks, over many tiles and splits: exact ties."""
    batch = make_paged([1601, 1030], [1, 2], config=SMALL, groups=1, heads_per_group=3)
    strides = SMALL.selection_block_size // SMALL.compression_stride
    generator = torch.Generator().manual_seed(period)
    key = torch.randint(-1, 2, (period * strides, 1, 16), generator=generator).float()
    batch.whole.q = (batch.whole.q * 2).round()
    repeats = -(-batch.whole.k_cmp.shape[0] // key.shape[0])
    starts = compressed_cu_seqlens(batch.whole.cu_seqlens, SMALL).tolist()
    for start, stop in pairwise(starts):
        batch.whole.k_cmp[start:stop] = key.repeat(repeats, 1, 1)[: stop - start]
    pages = batch.caches["k_cmp"].shape
    batch.caches["k_cmp"] = lay_out(batch.whole.k_cmp, starts, batch.page_table, pages[1], pages[0])
    assert_equals_reference(batch)


def indexed(batch: PagedBatch) -> dict[str, torch.Tensor]:
    """Every tensor of a batch that a captured step holds on to, by its argument's name."""
    return {
        "q": batch.whole.q[batch.rows],
        "gates": batch.whole.gates[batch.rows],
        **batch.caches,
        "page_table": batch.page_table,
        "window_page_table": batch.window_page_table,
        "cu_seqlens": batch.cu_seqlens,
        "context_lens": batch.context_lens,
    }


@pytest.mark.usefixtures("way")
@pytest.mark.parametrize("new_tokens", [1, 3])
def test_the_blocks_are_told(new_tokens: int) -> None:
    batch = make_paged([5, 30, 64, 65, 200], [new_tokens] * 5, config=SMALL, groups=2)
    told, wanted = batch.selected()
    assert torch.equal(told, wanted)
    assert (wanted[:1] == -1).any() and not (wanted[-1:] == -1).any()


@pytest.mark.usefixtures("way")
def test_a_token_of_no_sequence_gets_zero() -> None:
    batch = make_paged([40, 20], [2, 1], config=SMALL, groups=1)
    expected = batch.attend()
    # The end of a captured batch that has room for more tokens than came.
    batch.cu_seqlens[2] = batch.cu_seqlens[1]
    out = paged_module.paged_attention(**indexed(batch), config=SMALL, scale=0.25)
    assert torch.equal(out[:2], expected[:2])
    assert not out[2].any()


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize(
    ("heads_per_group", "key_width", "value_width"),
    [(16, 192, 128), (4, 64, 64), (1, 128, 128), (64, 256, 256), (5, 96, 48)],
)
def test_compiled_equals_the_reference(
    dtype: torch.dtype, heads_per_group: int, key_width: int, value_width: int, device: str
) -> None:
    batch = make_paged(
        [333, 1, 130, 31, 64, 65],
        [1, 1, 17, 3, 1, 65],
        config=NsaConfig(num_selected_blocks=4, window_size=100),
        groups=1,
        page=128,
        heads_per_group=heads_per_group,
        key_width=key_width,
        value_width=value_width,
        dtype=dtype,
        device=device,
    )
    assert_equals_reference(batch)


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("widths", [(192, 128), (64, 64), (96, 48)])
@pytest.mark.parametrize("new_tokens", [1, 40])
def test_compiled_fp8_caches(
    dtype: torch.dtype, widths: tuple[int, int], new_tokens: int, fp8_device: str
) -> None:
    config, sizes = NsaConfig(num_selected_blocks=4), {"groups": 1, "heads_per_group": 16}
    batch = make_paged([833, 65], [new_tokens, 1], config=config, **sizes, is_fp8=True,
                       key_width=widths[0], value_width=widths[1], dtype=dtype,
                       device=fp8_device)  # fmt: skip
    assert_equals_reference(batch)


@pytest.mark.gpu
@pytest.mark.parametrize("config", [SMALL, EQUAL_BLOCKS, DENSE_STRIDE, ODD])
def test_compiled_sizes(config: NsaConfig, device: str) -> None:
    batch = make_paged([333, 64, 9], [40, 1, 9], config=config, device=device)
    assert_equals_reference(batch)


@pytest.mark.gpu
@pytest.mark.parametrize(("context", "new_tokens"), [(65536, 1), (65536, 5), (8192, 3000)])
def test_long_context_equals_the_one_shot_op(context: int, new_tokens: int, device: str) -> None:
    batch = make_paged([context, 700], [new_tokens, 2], config=PAPER, heads_per_group=16,
                       key_width=128, value_width=128, dtype=torch.bfloat16,
                       device=device)  # fmt: skip
    whole, cu_seqlens = batch.whole, batch.whole.cu_seqlens
    expected = nsa_attention(*whole.tensors, config=PAPER, cu_seqlens=cu_seqlens, backend="triton")
    # Where two blocks tie within rounding at the cut, the two ways may choose differently.
    error = (batch.attend().float() - expected[batch.rows].float()).abs().amax((1, 2))
    assert (error < 2e-2).float().mean() > 0.998
    expected = full_attention(
        whole.q, whole.k_slc, whole.v_slc, cu_seqlens=cu_seqlens, backend="triton"
    )
    torch.testing.assert_close(batch.attend_full(), expected[batch.rows], rtol=2e-2, atol=2e-2)


@pytest.mark.gpu
def test_a_captured_decode_step_replays_with_other_contents(device: str) -> None:
    first, second = (
        make_paged(
            contexts,
            [1, 1, 1, 1],
            config=PAPER,
            heads_per_group=4,
            key_width=64,
            value_width=64,
            dtype=torch.bfloat16,
            device=device,
            seed=contexts[1],
        )
        for contexts in ([3000, 900, 64, 1500], [3000, 40, 1200, 1224])
    )
    held = indexed(first)
    paged_module.paged_attention(**held, config=PAPER, scale=0.125)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out = paged_module.paged_attention(**held, config=PAPER, scale=0.125)
    graph.replay()
    assert torch.equal(out, first.attend())
    for name, tensor in indexed(second).items():
        held[name].copy_(tensor)
    graph.replay()
    assert torch.equal(out, second.attend())
