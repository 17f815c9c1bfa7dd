"""How many tokens a cache is given."""

import random
from types import SimpleNamespace

import psutil
import pytest
import torch

from nsa_platform.config.serve import EngineConfig
from nsa_platform.serve.capacity import CPU_MEMORY_SHARE, make_cache
from nsa_platform.serve.kv_cache import CACHED_TAILS, KvCache
from nsa_platform.serve.pages import SequencePages

CPU = torch.device("cpu")


@pytest.fixture(params=[{}, {"kind": "full"}], ids=["nsa", "full"])
def config(request, make_model):
    return make_model(request.param).config


def cache_of(config, **sizes) -> KvCache:
    sizes = {"max_num_seqs": 4, "max_num_batched_tokens": 32, **sizes}
    return make_cache(config, EngineConfig(**sizes), device=CPU, dtype=torch.float32)


def limit_memory(monkeypatch: pytest.MonkeyPatch, num_bytes: int) -> None:
    found = SimpleNamespace(available=num_bytes / CPU_MEMORY_SHARE)
    monkeypatch.setattr(psutil, "virtual_memory", lambda: found)


def test_there_is_room_for_every_request_at_its_longest(config):
    cache = cache_of(config)
    assert cache.book.num_pages * cache.page_size >= 4 * 128
    assert cache_of(config, max_model_len=64).book.num_pages < cache.book.num_pages


def test_num_kv_tokens_is_what_the_cache_holds(config):
    cache = cache_of(config, num_kv_tokens=200)
    assert 200 <= cache.book.num_pages * cache.page_size < 200 + 5 * cache.page_size


@pytest.mark.parametrize("share", [0.6, 0.7, 0.99])
def test_memory_is_used_and_not_exceeded(config, share, monkeypatch):
    sizes = {"max_num_seqs": 4, "max_num_batched_tokens": 4, "max_model_len": 128}
    whole = cache_of(config, **sizes)
    page_bytes = sum(t[0].nbytes for layer in whole.layers for t in layer.page_tensors())
    budget = int(share * whole.num_bytes())
    limit_memory(monkeypatch, budget)
    cache = cache_of(config, **sizes)
    assert cache.num_bytes() <= budget
    assert cache.book.num_pages < whole.book.num_pages
    assert budget - cache.num_bytes() < 2 * page_bytes + sum(
        t.nbytes for layer in whole.layers for t in layer.window_tensors()
    )


def test_too_little_memory_is_refused(config, monkeypatch):
    limit_memory(monkeypatch, 1000)
    with pytest.raises(ValueError, match="max_num_seqs=4 requests"):
        cache_of(config)


@pytest.mark.parametrize("is_caching", [False, True])
def test_the_window_pool_suffices_for_any_step(make_model, is_caching):
    chance = random.Random(0)
    cache = cache_of(
        make_model(max_context=4096).config,
        max_num_batched_tokens=64,
        enable_prefix_caching=is_caching,
    )
    book = cache.book
    window = book.window_pool
    assert window is not None and window.num_pages < book.num_pages // 4
    sequences = [SequencePages() for _ in range(4)]
    fewest_free = window.num_free
    for _ in range(400):
        budget = 64
        order = chance.sample(sequences, 4)
        for sequence in order:
            count = min(chance.choice([1, 7, 13, 64]), budget)
            if count and sequence.num_tokens + count <= 4096:
                book.extend(sequence, count)
                budget -= count
        fewest_free = min(fewest_free, window.num_free)
        for sequence in sequences:
            book.trim(sequence)
        book.check(sequences)
    # And it is not much too large: beyond what is meant for tails that nobody uses now.
    spare = book.num_pages // CACHED_TAILS + 5 if is_caching else 0
    assert fewest_free < 8 + spare
