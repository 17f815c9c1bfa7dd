"""The prefix cache: what is found gives what computing gives, and is counted."""

import pytest
import torch

from nsa_platform.config.serve import EngineConfig
from nsa_platform.model.inputs import PackedInputs
from nsa_platform.serve.engine import Engine
from nsa_platform.serve.kv_cache import KvCache
from nsa_platform.serve.pages import PageBook, SequencePages
from nsa_platform.serve.request import Output, SamplingParams

VARIANTS = {
    "nsa": {},
    "shared": {"branch_kv": "shared"},
    "rotated-before": {"compressed_rotary": "before"},
    "window-of-whole-pages": {"window_size": 16},
    "wide-selection": {"selection_block_size": 16, "window_size": 40},
    "no-overlap": {"compression_stride": 8},
    "every-token-a-block": {"compression_stride": 1},
    "full": {"kind": "full"},
}


def ids_of(length: int, seed: int = 0) -> list[int]:
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(0, 61, (length,), generator=generator).tolist()


@torch.no_grad()
def compute(model, cache: KvCache, sequence: SequencePages, ids: list[int], chunks) -> torch.Tensor:
    """Hidden states of the tokens that the cache does not know, in chunks; names what is final."""
    keys = cache.book.keys(ids)
    cache.book.attach(sequence, keys, cache.book.match(keys))
    hidden = []
    while sequence.num_tokens < len(ids):
        start = sequence.num_tokens
        count = min(next(chunks), len(ids) - start)
        cache.book.extend(sequence, count, keys)
        new = torch.tensor(ids[start : start + count])
        hidden.append(model(new, cache.inputs([sequence], [count])).hidden)
        cache.book.publish(sequence, keys)
        cache.book.trim(sequence)
    return torch.cat(hidden)


def repeated(*values: int):
    while True:
        yield from values


@pytest.mark.parametrize("attention", VARIANTS.values(), ids=VARIANTS)
@pytest.mark.parametrize("chunks", [(64,), (7, 1, 20)], ids=["whole", "chunks"])
def test_a_hit_gives_what_computing_gives(make_model, attention, chunks):
    model = make_model(attention, max_context=512, dtype=torch.float64)
    cache = KvCache(
        model.config,
        num_tokens=1000,
        max_new_tokens=64,
        max_sequences=4,
        enable_prefix_caching=True,
        dtype=torch.float64,
    )
    page = cache.page_size
    first, tail = ids_of(3 * page + 50, 1), ids_of(70, 2)
    middle = first[: 2 * page + 10]
    asked = [
        (first, False),
        (first, True),  # the same again
        (first + tail, True),  # a second turn
        (middle + tail, False),  # parts in the middle, where no window is known any more
        (middle + ids_of(40, 3), True),  # but now there is one
        (ids_of(90, 4), False),
    ]
    running = []
    for ids, is_hit in asked:
        if ids == middle + tail and cache.book.window_pool is not None:
            cache.book.window_pool.forget()
        sequence = SequencePages()
        hidden = compute(model, cache, sequence, ids, repeated(*chunks))
        num_known = len(ids) - len(hidden)
        assert num_known % page == 0
        if attention.get("kind") != "full":
            assert (num_known > 0) == is_hit
        with torch.no_grad():
            wanted = model(torch.tensor(ids), PackedInputs.from_lengths([len(ids)])).hidden
        torch.testing.assert_close(hidden, wanted[num_known:])
        running.append(sequence)
        cache.book.check(running)
        if len(running) == 2:
            cache.book.release(running.pop(0))
    for sequence in running:
        cache.book.release(sequence)
    cache.book.check([])


def test_shared_pages_are_not_written(make_model):
    model = make_model(max_context=512)
    cache = KvCache(
        model.config,
        num_tokens=1000,
        max_new_tokens=64,
        max_sequences=4,
        enable_prefix_caching=True,
    )
    ids, sequences = ids_of(100), [SequencePages() for _ in range(3)]
    compute(model, cache, sequences[0], ids, repeated(64))
    held = [list(sequences[0].pages), [p for p in sequences[0].window_pages if p >= 0]]
    before = [
        [tensor[pages].clone() for tensor in tensors]
        for layer in cache.layers
        for tensors, pages in zip((layer.page_tensors(), layer.window_tensors()), held, strict=True)
    ]
    # The second goes on behind the prompt, the third from the middle, where no window is known.
    compute(model, cache, sequences[1], ids + ids_of(30, 1), repeated(5))
    assert sequences[1].num_shared == 12
    assert cache.book.window_pool is not None
    cache.book.window_pool.forget()
    compute(model, cache, sequences[2], ids[:53] + ids_of(30, 2), repeated(64))
    assert sequences[2].num_shared == 6
    after = [
        [tensor[pages] for tensor in tensors]
        for layer in cache.layers
        for tensors, pages in zip((layer.page_tensors(), layer.window_tensors()), held, strict=True)
    ]
    for one, other in zip(before, after, strict=True):
        for tensor, again in zip(one, other, strict=True):
            # The last page is the first one's own, and was not final.
            assert torch.equal(tensor[:12], again[:12])
    cache.book.check(sequences)


@pytest.fixture
def make_engine(toy_tokenizer, make_speaker):
    def make(attention=None, **sizes) -> Engine:
        sizes = {"max_num_seqs": 4, "max_num_batched_tokens": 64, **sizes}
        return Engine(make_speaker(attention or {}), toy_tokenizer, EngineConfig(**sizes))

    return make


def answer(engine: Engine, name: str, prompt: list[int], count: int = 6, **fields) -> list[Output]:
    params = SamplingParams(max_tokens=count, temperature=0.0, ignore_eos=True, logprobs=0)
    engine.add(name, prompt, params, **fields)
    outputs = []
    while engine.has_work:
        outputs += engine.step()
        engine.check()
    return outputs


def tokens(outputs: list[Output]) -> list[int]:
    return [token for output in outputs for token in output.token_ids]


@pytest.mark.parametrize("attention", [{}, {"kind": "full"}], ids=["nsa", "full"])
def test_later_turns_compute_only_what_is_new(make_engine, attention):
    engine, plain = make_engine(attention), make_engine(attention, enable_prefix_caching=False)
    page = engine.cache.page_size
    prompt, num_known = ids_of(page + 21), 0
    for turn in range(3):
        outputs = answer(engine, f"turn-{turn}", prompt)
        wanted = answer(plain, f"turn-{turn}", prompt)
        assert tokens(outputs) == tokens(wanted)
        for one, other in zip(outputs, wanted, strict=True):
            assert one.logprobs and other.logprobs
            assert abs(one.logprobs[0].logprob - other.logprobs[0].logprob) < 1e-4
        assert {output.num_cached_tokens for output in outputs} == {num_known}
        assert {output.num_cached_tokens for output in wanted} == {0}
        # The last token is never computed; what phi folds behind a page must be known too.
        ahead = 4 if attention == {} else 0
        num_known = (len(prompt) + 5 - ahead) // page * page
        prompt = prompt + tokens(outputs) + ids_of(9, turn)
    stats = engine.stats()
    assert stats.pages_used == 0 and stats.pages_cached > 0
    assert 0 < stats.prefix_cache_hits_total < stats.prefix_cache_queries_total
    assert plain.stats().pages_cached == plain.stats().prefix_cache_hits_total == 0
    computed = stats.computed_tokens_total
    assert computed == plain.stats().computed_tokens_total - stats.prefix_cache_hits_total


def test_the_last_prompt_token_is_always_computed(make_engine):
    engine = make_engine({"kind": "full"})
    prompt = ids_of(64)  # one page to the brim
    assert answer(engine, "a", prompt)[0].num_cached_tokens == 0
    assert answer(engine, "b", prompt)[0].num_cached_tokens == 0
    assert answer(engine, "c", [*prompt, 1])[0].num_cached_tokens == 64


def test_requests_of_other_salts_share_nothing(make_engine):
    engine, prompt = make_engine(), ids_of(50)
    cached = [
        answer(engine, str(number), prompt, cache_salt=salt)[0].num_cached_tokens
        for number, salt in enumerate([None, None, "a", "b", "a", None])
    ]
    assert cached == [0, 40, 0, 0, 40, 40]


def test_reset_forgets_everything(make_engine):
    engine, prompt = make_engine(), ids_of(50)
    answer(engine, "a", prompt)
    engine.reset_prefix_cache()
    engine.check()
    assert engine.stats().pages_cached == 0
    assert answer(engine, "b", prompt)[0].num_cached_tokens == 0
    assert answer(engine, "c", prompt)[0].num_cached_tokens == 40


def test_a_preempted_request_comes_back_cheaply(make_engine):
    sizes = {"max_num_batched_tokens": 24, "num_kv_tokens": 48}
    engine, plain = make_engine(**sizes), make_engine(**sizes, enable_prefix_caching=False)
    prompts = {str(n): ids_of(n, n) for n in (30, 25, 41)}
    for each in (engine, plain):
        for name, prompt in prompts.items():
            params = SamplingParams(max_tokens=20, temperature=0.0, ignore_eos=True)
            each.add(name, prompt, params)
    texts = []
    for each in (engine, plain):
        found: dict[str, list[int]] = {}
        while each.has_work:
            for output in each.step():
                found.setdefault(output.request_id, []).extend(output.token_ids)
                assert output.num_cached_tokens == 0
            each.check()
        texts.append(found)
    assert texts[0] == texts[1]
    assert engine.stats().preemptions_total > 0
    computed = [each.stats().computed_tokens_total for each in (engine, plain)]
    assert computed[0] < computed[1]


def test_a_crowd_evicts_the_oldest_and_stays_right(make_engine):
    engine = make_engine(num_kv_tokens=160)
    system = ids_of(40, 1)
    answer(engine, "first", system + ids_of(20, 2))
    for number in range(5):
        answer(engine, f"stranger-{number}", ids_of(70, 100 + number))
        outputs = answer(engine, f"again-{number}", system + ids_of(20, 3 + number))
        # Asked for again and again, the beginning outlives every stranger.
        assert outputs[0].num_cached_tokens > 0
        stranger = answer(engine, f"back-{number}", ids_of(70, 100 + number - 2))
        assert stranger[0].num_cached_tokens == 0
    fresh = make_engine()
    wanted = answer(fresh, "x", system + ids_of(20, 7))
    assert tokens(outputs) == tokens(wanted)


def test_a_tail_outlives_pages_that_pass_through_a_window():
    book = PageBook(
        page_size=4,
        num_pages=200,
        tail_tokens=8,
        num_window_pages=10,
        enable_prefix_caching=True,
        lookahead=2,
    )

    def run(ids: list[int]) -> int:
        sequence, keys = SequencePages(), book.keys(ids)
        hit = book.match(keys)
        book.attach(sequence, keys, hit)
        while sequence.num_tokens < len(ids):
            book.extend(sequence, min(4, len(ids) - sequence.num_tokens), keys)
            book.publish(sequence, keys)
            book.trim(sequence)
            book.check([sequence])
        book.release(sequence)
        book.check([])
        return hit.num_pages

    assert run(ids_of(40, 1)) == 0
    assert run(ids_of(400, 2)) == 0
    assert run([*ids_of(40, 1), 1]) == 9
