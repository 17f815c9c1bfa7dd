"""Paged attention on the torch backend and in the reference: the rows of the one-shot op."""

from typing import Any

import pytest
import torch
from torch import Tensor

import nsa_kernels
from nsa_kernels import NsaConfig, reference
from tests.kernels.cases import DENSE_STRIDE, EQUAL_BLOCKS, SMALL, assert_close
from tests.kernels.triton.pages import PagedBatch, make_paged

# Lengths around every boundary of d, l, l' and w of SMALL (4, 8, 16, 24), and beyond n*l' = 64.
BOUNDARIES = [1, 7, 8, 9, 11, 12, 15, 16, 17, 23, 24, 25, 63, 64, 65, 81]


def _caches(paged: PagedBatch) -> dict[str, Any]:
    return {**paged.caches}


def attend(paged: PagedBatch) -> Tensor:
    """nsa_paged_attention on the torch backend."""
    return nsa_kernels.nsa_paged_attention(
        paged.whole.q[paged.rows],
        **_caches(paged),
        gates=paged.whole.gates[paged.rows],
        page_table=paged.page_table,
        window_page_table=paged.window_page_table,
        cu_seqlens=paged.cu_seqlens,
        context_lens=paged.context_lens,
        config=paged.whole.config,
        backend="torch",
    )


def one_shot(paged: PagedBatch) -> Tensor:
    """The same rows of nsa_attention over the whole sequences."""
    whole = paged.whole
    out = nsa_kernels.nsa_attention(
        *whole.tensors, config=whole.config, cu_seqlens=whole.cu_seqlens, backend="torch"
    )
    return out[paged.rows]


@pytest.mark.parametrize("pages_of", [1, 2], ids=["page=l'", "page=2l'"])
@pytest.mark.parametrize("new_tokens", [1, 3])
def test_decode_at_every_boundary(pages_of: int, new_tokens: int) -> None:
    contexts = [max(context, new_tokens) for context in BOUNDARIES]
    paged = make_paged(
        contexts,
        [new_tokens] * len(contexts),
        config=SMALL,
        page=pages_of * SMALL.selection_block_size,
    )
    assert (paged.window_page_table[-1] == -1).sum() > (paged.page_table[-1] == -1).sum()
    assert_close(attend(paged), one_shot(paged), "paged")


@pytest.mark.parametrize("config", [SMALL, EQUAL_BLOCKS, DENSE_STRIDE], ids=["s", "e", "d"])
def test_prompt_in_chunks(config: NsaConfig) -> None:
    """Chunks of a prompt, each against what the cache holds by then, give the prompt's rows."""
    length, chunk = 101, 37
    whole = one_shot(make_paged([length], [length], config=config))
    for start in range(0, length, chunk):
        stop = min(start + chunk, length)
        paged = make_paged([length], [length - start], config=config)
        paged.rows = paged.rows[: stop - start]
        paged.context_lens.fill_(stop)
        paged.cu_seqlens[1] = stop - start
        assert_close(attend(paged), whole[start:stop], f"rows {start} to {stop}")


def test_fp8_caches() -> None:
    paged = make_paged([101, 40], [37, 1], config=SMALL, is_fp8=True)
    assert paged.caches["k_win"].dtype == torch.float8_e4m3fn
    assert_close(attend(paged), one_shot(paged), "paged")
    for name, dtype, message in (
        ("v_slc", torch.float32, "caches must have one dtype, got .*'v_slc': torch.float32"),
        ("k_cmp", torch.float8_e4m3fn, "k_cmp has dtype torch.float8_e4m3fn, q has"),
    ):
        paged.caches[name] = paged.caches[name].to(dtype)
        with pytest.raises(ValueError, match=message):
            attend(paged)


def test_the_blocks_are_told() -> None:
    batch = make_paged([5, 30, 65, 200], [1, 3, 2, 40], config=SMALL, groups=2)
    told, wanted = batch.selected(backend="torch")
    assert torch.equal(told, wanted)
    assert (wanted[:1] == -1).any() and not (wanted[-1:] == -1).any()


def test_mixed_batch() -> None:
    """Decoding, verifying, a chunk, a whole prompt, and a sequence without new tokens."""
    paged = make_paged([90, 33, 70, 47, 20], [1, 4, 30, 47, 0], config=SMALL)
    assert_close(attend(paged), one_shot(paged), "paged")


def test_wide_and_uneven() -> None:
    paged = make_paged(
        [70, 9], [5, 2], config=SMALL, groups=1, heads_per_group=5, key_width=24, value_width=8
    )
    assert_close(attend(paged), one_shot(paged), "paged")


@pytest.mark.parametrize("new_tokens", [[1, 2], [40, 9]], ids=str)
def test_reference_is_its_own_one_shot(new_tokens: list[int]) -> None:
    paged = make_paged([70, 9], new_tokens, config=SMALL, dtype=torch.float64)
    options: dict[str, Any] = {
        "page_table": paged.page_table,
        "cu_seqlens": paged.cu_seqlens,
        "context_lens": paged.context_lens,
    }
    q, whole = paged.whole.q[paged.rows], paged.whole
    out = reference.nsa_paged_attention(
        q,
        **_caches(paged),
        gates=whole.gates[paged.rows],
        window_page_table=paged.window_page_table,
        config=SMALL,
        **options,
    )
    assert_close(out, one_shot(paged), "nsa")
    assert_close(attend(paged), out, "nsa")
    keys, values = paged.caches["k_slc"], paged.caches["v_slc"]
    full = reference.full_paged_attention(q, keys, values, **options)
    wanted = reference.full_attention(
        whole.q, whole.k_slc, whole.v_slc, cu_seqlens=whole.cu_seqlens
    )
    assert_close(full, wanted[paged.rows], "full")
    out = nsa_kernels.full_paged_attention(q, keys, values, **options, backend="torch")
    assert_close(out, full, "full")


def test_none_is_one_sequence() -> None:
    paged = make_paged([70], [6], config=SMALL)
    wanted = attend(paged)
    paged.cu_seqlens = None  # type: ignore[assignment]
    assert torch.equal(attend(paged), wanted)


def test_pages_that_are_missing_are_named() -> None:
    paged = make_paged([70, 40], [1, 1], config=SMALL)
    paged.page_table[1, 1] = -1
    with pytest.raises(ValueError, match=r"page_table\[1, 0:3\].*positions 0 to 39"):
        attend(paged)
    paged = make_paged([70, 40], [1, 1], config=SMALL)
    paged.window_page_table[0, 3] = 10_000
    with pytest.raises(ValueError, match=r"window_page_table\[0, 2:5\].*positions 46 to 69"):
        attend(paged)
    paged = make_paged([70, 40], [1, 3], config=SMALL)
    paged.context_lens[1] = 2
    with pytest.raises(ValueError, match=r"context_lens\[1\]=2 must count the 3 new tokens"):
        attend(paged)
