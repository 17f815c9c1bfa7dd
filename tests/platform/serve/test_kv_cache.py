"""Paged forward passes give what one pass over the whole sequence gives."""

import pytest
import torch

from nsa_platform.model.cost import cache_bytes
from nsa_platform.model.inputs import PackedInputs
from nsa_platform.serve.kv_cache import KvCache, compiled_width, page_size_of
from nsa_platform.serve.page_pool import OutOfPages, PagePool
from nsa_platform.serve.pages import ABSENT, SequencePages

VARIANTS = {
    "nsa": {},
    "shared": {"branch_kv": "shared"},
    "rotated-before": {"compressed_rotary": "before"},
    "unrotated-blocks": {"compressed_rotary": "none"},
    "mean": {"compression": "mean"},
    "linear": {"compression": "linear"},
    "window-below-l": {"window_size": 3},
    "wide-selection": {"selection_block_size": 16, "window_size": 40},
    "odd-sizes": {
        "compression_block_size": 6,
        "compression_stride": 3,
        "selection_block_size": 12,
        "window_size": 7,
    },
    "every-token-a-block": {"compression_stride": 1},
    "full": {"kind": "full"},
    "full-gated": {"kind": "full", "gated": True},
}
CHUNKS = {
    "one-shot": [60],
    "token-by-token": [1] * 40,
    "chunks": [7, 8, 1, 1, 16, 9, 1, 17],
}


def ids_of(length: int, seed: int = 0) -> torch.Tensor:
    return torch.randint(0, 61, (length,), generator=torch.Generator().manual_seed(seed))


def poison_free_pages(cache: KvCache) -> None:
    """Large numbers where no sequence has a page: a step that reads them goes wrong visibly."""
    for layer in cache.layers:
        for tensors, allocator in (
            (layer.page_tensors(), cache.book.pool),
            (layer.window_tensors(), cache.book.window_pool),
        ):
            for tensor in tensors:
                assert allocator is not None
                free = set(range(1, len(tensor))) - allocator.in_use()
                tensor[sorted(free)] = 1e6


@pytest.mark.parametrize("chunks", CHUNKS.values(), ids=CHUNKS)
@pytest.mark.parametrize("blocks_per_page", [1, 2])
@pytest.mark.parametrize("attention", VARIANTS.values(), ids=VARIANTS)
def test_paged_equals_one_pass(make_model, attention, blocks_per_page, chunks):
    model = make_model(attention, dtype=torch.float64)
    cache = KvCache(
        model.config,
        num_tokens=sum(chunks) + 64,
        max_new_tokens=max(chunks),
        blocks_per_page=blocks_per_page,
        dtype=torch.float64,
    )
    ids, sequence, hidden = ids_of(sum(chunks)), SequencePages(), []
    with torch.no_grad():
        for chunk in ids.split(chunks):
            cache.book.trim(sequence)
            poison_free_pages(cache)
            hidden.append(model(chunk, cache.extend([sequence], [len(chunk)])).hidden)
        wanted = model(ids, PackedInputs.from_lengths([len(ids)])).hidden
    torch.testing.assert_close(torch.cat(hidden), wanted)


@pytest.mark.parametrize("attention", [{}, {"kind": "full"}], ids=["nsa", "full"])
def test_tables_of_compiled_widths_give_the_same(make_model, attention, monkeypatch):
    assert [compiled_width(pages) for pages in (1, 16, 17, 64, 1025)] == [16, 16, 32, 64, 2048]
    model, ids, sequence = make_model(attention, dtype=torch.float64), ids_of(60), SequencePages()
    cache = KvCache(model.config, num_tokens=124, max_new_tokens=24, dtype=torch.float64)
    monkeypatch.setattr(cache, "table_width", compiled_width)
    hidden = []
    with torch.no_grad():
        for chunk in ids.split([24, 7, 1, 1, 20, 7]):
            inputs = cache.extend([sequence], [len(chunk)])
            assert inputs.page_table.shape == (1, 16)
            hidden.append(model(chunk, inputs).hidden)
        wanted = model(ids, PackedInputs.from_lengths([len(ids)])).hidden
    torch.testing.assert_close(torch.cat(hidden), wanted)


@pytest.mark.parametrize("attention", [{}, {"kind": "full"}], ids=["nsa", "full"])
def test_sequences_of_a_batch_do_not_touch_each_other(make_model, attention):
    model = make_model(attention, dtype=torch.float64)
    cache = KvCache(
        model.config,
        num_tokens=140,
        max_new_tokens=40,
        max_sequences=3,
        dtype=torch.float64,
    )
    ids = [ids_of(60, 1), ids_of(40, 2), ids_of(40, 3)]
    sequences = [SequencePages() for _ in ids]
    hidden: list[list[torch.Tensor]] = [[] for _ in ids]
    with torch.no_grad():
        for counts in [(5, 33, 0), (0, 1, 8), (30, 1, 1), (1, 1, 1), (24, 0, 30), (0, 4, 0)]:
            active = [b for b, count in enumerate(counts) if count]
            new = [
                ids[b][sequences[b].num_tokens : sequences[b].num_tokens + counts[b]]
                for b in active
            ]
            inputs = cache.extend([sequences[b] for b in active], [len(part) for part in new])
            parts = model(torch.cat(new), inputs).hidden.split([len(part) for part in new])
            for b, part in zip(active, parts, strict=True):
                hidden[b].append(part)
        for b, parts in enumerate(hidden):
            wanted = model(ids[b], PackedInputs.from_lengths([len(ids[b])])).hidden
            torch.testing.assert_close(torch.cat(parts), wanted)


def test_pages_of_an_ended_sequence_serve_the_next(make_model):
    model = make_model(dtype=torch.float64)
    cache = KvCache(model.config, num_tokens=50, max_new_tokens=50, dtype=torch.float64)
    for seed in range(3):
        sequence, ids = SequencePages(), ids_of(50, seed)
        with torch.no_grad():
            hidden = model(ids, cache.extend([sequence], [50])).hidden
            wanted = model(ids, PackedInputs.from_lengths([50])).hidden
        torch.testing.assert_close(hidden, wanted)
        cache.release(sequence)
    assert not cache.book.pool.in_use()


def test_window_pages_are_given_back(make_model):
    model = make_model()
    cache = KvCache(model.config, num_tokens=120, max_new_tokens=1)
    sequence = SequencePages()
    assert cache.book.window_pool is not None
    for count in range(1, 121):
        inputs = cache.extend([sequence], [1])
        # 12 tokens of the window before the new one, pages of 8.
        assert len(cache.book.window_pool.in_use()) <= 3
        assert len(cache.book.pool.in_use()) == -(-count // 8)
    assert list(sequence.window_pages[:13]) == [ABSENT] * 13
    assert inputs.window_page_table is not None
    assert inputs.window_page_table.shape == inputs.page_table.shape == (1, 15)


@pytest.mark.parametrize("attention", [{}, {"branch_kv": "shared"}, {"kind": "full"}])
@pytest.mark.parametrize("context", [1, 8, 13, 21, 64, 100])
@pytest.mark.parametrize(
    ("dtype", "kv_dtype"),
    [(torch.float32, None), (torch.bfloat16, None), (torch.bfloat16, torch.float8_e4m3fn)],
)
def test_pages_in_use_take_the_bytes_that_cost_says(
    make_model, attention, context, dtype, kv_dtype
):
    config = make_model(attention).config
    cache = KvCache(config, num_tokens=120, max_new_tokens=120, dtype=dtype, kv_dtype=kv_dtype)
    sequence = SequencePages()
    cache.book.extend(sequence, context)
    cache.book.trim(sequence)
    cost = cache_bytes(
        config,
        context,
        element_bytes=dtype.itemsize,
        kv_bytes=None if kv_dtype is None else kv_dtype.itemsize,
        page_size=page_size_of(config),
    )

    def bytes_in_use(tensors: list[torch.Tensor], allocator: PagePool | None) -> int:
        return sum(tensor[0].nbytes * len(allocator.in_use()) for tensor in tensors if allocator)

    pages = [tensor for layer in cache.layers for tensor in layer.page_tensors()]
    window = [tensor for layer in cache.layers for tensor in layer.window_tensors()]
    assert bytes_in_use(pages, cache.book.pool) == cost.selected + cost.compressed
    assert bytes_in_use(window, cache.book.window_pool) == cost.sliding + cost.tail
    assert cache.num_bytes() == sum(tensor.nbytes for tensor in pages + window)


@pytest.mark.parametrize("attention", [{}, {"branch_kv": "shared"}, {"kind": "full"}])
def test_an_fp8_cache_rounds_what_is_read_as_it_is(make_model, attention):
    """In the first layer it holds the same numbers, rounded; however a text comes, the same."""
    model, ids, fp8 = make_model(attention, dtype=torch.float64), ids_of(90), torch.float8_e4m3fn

    def read(kv_dtype: torch.dtype | None, chunks: list[int]) -> tuple[torch.Tensor, KvCache]:
        sizes = {"num_tokens": 90, "max_new_tokens": 90, "dtype": torch.float64}
        cache, sequence = KvCache(model.config, **sizes, kv_dtype=kv_dtype), SequencePages()
        with torch.no_grad():
            hidden = [
                model(chunk, cache.extend([sequence], [len(chunk)])).hidden
                for chunk in ids.split(chunks)
            ]
        return torch.cat(hidden), cache

    exact, kept = read(None, [90])
    rounded, cache = read(fp8, [90])
    torch.testing.assert_close(read(fp8, [41, 8, 1, 40])[0], rounded)
    assert not torch.allclose(rounded, exact, rtol=1e-4)
    tensors = [layer.page_tensors() + layer.window_tensors() for layer in (kept.layers[0],
               cache.layers[0])]  # fmt: skip
    assert {tensor.dtype for tensor in tensors[1]} <= {fp8, torch.float64}
    for wanted, found in zip(*tensors, strict=True):
        assert torch.equal(found.double(), wanted.to(found.dtype).double())


def test_a_latent_that_kernels_cannot_read_is_refused(make_model):
    attention = {"kind": "mla", "kv_lora_rank": 256, "key_width": 64, "rotary_width": 32}
    config = make_model(attention).config
    KvCache(config, num_tokens=16, max_new_tokens=16)
    with pytest.raises(ValueError, match=r"kv_cache_dtype=fp8 takes a model .*kind=nsa or full"):
        KvCache(config, num_tokens=16, max_new_tokens=16, kv_dtype=torch.float8_e4m3fn)
    with pytest.raises(ValueError, match=r"up to 256, a multiple of 16, got 256 \+ 32"):
        KvCache(config, num_tokens=16, max_new_tokens=16, device="cuda")


def test_models_that_caches_cannot_serve_are_refused(make_model):
    for attention, said in (
        ({"kind": "moba"}, "kind=moba has no cache"),
        ({"selection_top_p": 0.8}, "selection_top_p=0.8 is trained and scored here"),
    ):
        with pytest.raises(ValueError, match=said):
            KvCache(make_model(attention).config, num_tokens=16, max_new_tokens=16)


def test_an_exhausted_cache_says_so(make_model):
    cache = KvCache(make_model().config, num_tokens=16, max_new_tokens=16)
    with pytest.raises(OutOfPages, match="3 pages are needed"):
        cache.extend([SequencePages()], [17])
    with pytest.raises(ValueError, match="blocks_per_page=0"):
        page_size_of(make_model().config, 0)
