"""Padded decode steps give what exact ones give, and touch nobody's pages."""

import pytest
import torch

from nsa_platform.config.serve import EngineConfig
from nsa_platform.serve.decode_graphs import DecodeGraphs, capture_lengths, capture_sizes
from nsa_platform.serve.engine import Engine
from nsa_platform.serve.kv_cache import KvCache
from nsa_platform.serve.pages import SequencePages
from nsa_platform.serve.request import SamplingParams


def test_sizes_reach_from_one_to_all():
    assert capture_sizes(1) == (1,)
    assert capture_sizes(16) == (1, 2, 4, 8, 16)
    assert capture_sizes(50) == (1, 2, 4, 8, 16, 32, 48, 50)
    assert capture_lengths(40) == (40,)
    assert capture_lengths(2048) == (64, 256, 1024, 2048)


@pytest.mark.parametrize(
    "attention", [{}, {"branch_kv": "shared"}, {"kind": "full"}], ids=["nsa", "shared", "full"]
)
def test_padding_changes_nothing(make_model, attention):
    model = make_model(attention, dtype=torch.float64)
    caches = [
        KvCache(
            model.config,
            num_tokens=400,
            max_new_tokens=64,
            max_sequences=4,
            dtype=torch.float64,
        )
        for _ in range(2)
    ]
    graphs = DecodeGraphs(model, caches[1], sizes=[1, 4], lengths=[2, 16])
    assert graphs.shape_for(2, 3) == (4, 16)
    assert graphs.shape_for(1, 2) == (1, 2)
    assert graphs.shape_for(5, 1) is graphs.shape_for(1, 17) is None
    generator = torch.Generator().manual_seed(0)
    lengths = [60, 7, 33]
    sequences = [[SequencePages() for _ in lengths] for _ in caches]
    prompt = torch.randint(0, 61, (sum(lengths),), generator=generator)
    with torch.no_grad():
        for cache, each in zip(caches, sequences, strict=True):
            model(prompt, cache.extend(each, lengths))
        # Three, then one, then three again: what a larger step left in the buffers is gone.
        for rows in [(0, 1, 2), (1,), (1,), (0, 2), (2, 0, 1)] * 2:
            ids = torch.randint(0, 61, (len(rows),), generator=generator)
            exact, padded = (
                cache.extend([each[row] for row in rows], [1] * len(rows))
                for cache, each in zip(caches, sequences, strict=True)
            )
            wanted = model.logits(model(ids, exact).hidden)
            found = graphs.run(ids, padded)
            assert found is not None
            torch.testing.assert_close(found, wanted)
    for one, other in zip(caches[0].layers, caches[1].layers, strict=True):
        for tensor, same in zip(
            one.page_tensors() + one.window_tensors(),
            other.page_tensors() + other.window_tensors(),
            strict=True,
        ):
            torch.testing.assert_close(tensor[1:], same[1:])  # page 0 is scratch


def test_an_engine_decodes_alike_with_padded_steps(make_speaker, toy_tokenizer):
    texts = []
    for is_padded in (False, True):
        config = EngineConfig(max_num_seqs=3, max_num_batched_tokens=16, num_kv_tokens=96)
        engine = Engine(make_speaker(), toy_tokenizer, config)
        if is_padded:
            engine.capture()
            assert engine.runner.graphs is not None
        greedy = SamplingParams(max_tokens=20, temperature=0.0, ignore_eos=True)
        for number, length in enumerate((30, 9, 50, 17)):
            engine.add(str(number), [(7 * number + i) % 60 for i in range(length)], greedy)
        found: dict[str, list[int]] = {}
        while engine.has_work:
            for output in engine.step():
                found.setdefault(output.request_id, []).extend(output.token_ids)
            engine.check()
        texts.append(found)
    assert texts[0] == texts[1]
