"""Policies inside a model: they agree with the model where they read everything."""

from dataclasses import replace
from functools import partial
from typing import get_args

import numpy as np
import pytest
import torch

from nsa_platform.config.evaluate import BaselineName, BaselinesConfig, PatternSearchConfig
from nsa_platform.config.model import ModelConfig, NsaAttentionConfig, NsaChoices
from nsa_platform.data.loader import Batch
from nsa_platform.data.packing import IGNORED
from nsa_platform.evaluate.baselines.budget import equal_budget, split_budget
from nsa_platform.evaluate.baselines.comparison import PolicyResult, start_of
from nsa_platform.evaluate.baselines.full import Full
from nsa_platform.evaluate.baselines.h2o import H2o
from nsa_platform.evaluate.baselines.pattern_search import search_patterns
from nsa_platform.evaluate.baselines.policy import Phase, Policy
from nsa_platform.evaluate.baselines.reader import PolicyReader
from nsa_platform.evaluate.baselines.report import baselines_summary
from nsa_platform.evaluate.baselines.sliding import SlidingWindow
from nsa_platform.evaluate.baselines.systems import published, within
from nsa_platform.evaluate.needle import NeedleGrid, Trial
from nsa_platform.evaluate.scores import ModelScorer
from nsa_platform.model.cost import key_counts
from nsa_platform.model.inputs import PolicyInputs
from nsa_platform.model.transformer import Transformer, init_weights
from nsa_platform.serve.generator import Generator
from tests.platform.evaluate.small import make_corpus, make_model

NAMES: tuple[BaselineName, ...] = get_args(BaselineName)
NEAR = {"rtol": 0, "atol": 1e-4}
"""fp32 on both sides, two layers, sums in another order."""
PROMPT = list(range(3, 60))


@pytest.fixture(scope="module")
def model() -> Transformer:
    return make_full(gated=False)


def make_full(*, gated: bool) -> Transformer:
    tree = {
        "vocab_size": 300,
        "layers": 2,
        "width": 32,
        "ffn_width": 64,
        "max_context": 512,
        "yarn": {"factor": 4, "original_context": 128},
        "attention": {
            "kind": "full",
            "gated": gated,
            "query_heads": 4,
            "kv_heads": 2,
            "key_width": 16,
            "value_width": 16,
            "qk_norm": True,
        },
    }
    model = Transformer(ModelConfig.parse(tree))
    init_weights(model, 0)
    return model.eval()


def reader(model: Transformer, make: type[Policy] = Full, *, tail: int = 5) -> PolicyReader:
    return PolicyReader(model, lambda *_: make(model.config), decoded_tail=tail)


@pytest.fixture(scope="module")
def batch(tmp_path_factory: pytest.TempPathFactory) -> Batch:
    """Several pieces of text and some padding in one row."""
    corpus = make_corpus(tmp_path_factory.mktemp("data") / "text")
    return next(iter(corpus.loader("validation", 96).next_step(2)))


@pytest.mark.parametrize("gated", [False, True])
def test_the_full_policy_is_the_model(gated: bool, batch: Batch) -> None:
    model = make_full(gated=gated)
    full, scorer = reader(model), ModelScorer(model)
    np.testing.assert_allclose(full.nats(batch, context=96), scorer.nats(batch), **NEAR)
    mine, theirs = full.answer(PROMPT, [7, 8, 9]), scorer.answer(PROMPT, [7, 8, 9])
    assert mine.nats == pytest.approx(theirs.nats, abs=1e-4)
    assert mine.hits == theirs.hits
    assert full.generate(PROMPT, 6) == list(Generator(model).stream(PROMPT, 6))
    assert full.generate(PROMPT, 3, pick=lambda logits: 11) == [11, 11, 11]
    stopped = PolicyReader(
        model,
        lambda *_: Full(model.config),
        decoded_tail=5,
        stop_ids=full.generate(PROMPT, 1),
    )
    assert stopped.generate(PROMPT, 6) == []


@pytest.mark.parametrize("name", NAMES)
def test_a_budget_beyond_the_text_reads_everything(
    name: BaselineName, model: Transformer, batch: Batch
) -> None:
    wide = PolicyReader(
        model, lambda *_: within(name, model.config, split_budget(4000)), decoded_tail=5
    )
    np.testing.assert_allclose(wide.nats(batch, context=96), ModelScorer(model).nats(batch), **NEAR)


@pytest.mark.parametrize("name", NAMES)
def test_a_small_budget_is_kept_where_the_policy_is_sparse(
    name: BaselineName, model: Transformer
) -> None:
    budget = split_budget(40)
    tight = PolicyReader(model, lambda *_: within(name, model.config, budget), decoded_tail=5)
    ids = [(7 * i * i + i) % 300 for i in range(200)]
    tight.answer(ids, [1, 2, 3])
    sparse_in = within(name, model.config, budget).sparse_in
    fed: dict[Phase, int] = {"prefill": 195, "decode": 7}
    for phase, tokens in fed.items():
        count = tight.reads[phase].summary()
        assert count.queries == tokens
        dense = 98 if phase == "prefill" else 199
        if phase not in sparse_in:
            assert count.keys_per_query == pytest.approx(dense)
        else:
            # Columns and diagonals cross: of MInference's lines fewer keys are left.
            assert count.keys_per_query <= budget.total
            assert count.keys_per_query >= 0.5 * budget.total


@pytest.mark.parametrize(
    ("tokens", "length", "tail"), [(40, 120, 119), (40, 192, 64), (160, 1900, 64), (1280, 1900, 20)]
)
def test_what_infllm_has_left_over_comes_off_the_budget(
    tokens: int, length: int, tail: int
) -> None:
    model = make_model(300, max_context=2000, kind="full")
    ids = [(7 * i * i + i) % 300 for i in range(length)]
    found: dict[BaselineName, PolicyReader] = {}
    for name in ("infllm", "sliding"):
        start = partial(within, name, model.config, split_budget(tokens))
        found[name] = PolicyReader(model, lambda *_, start=start: start(), decoded_tail=tail)
        found[name].answer(ids, [1, 2])
    for phase in ("prefill", "decode"):
        mine, whole = (each.reads[phase].summary().keys_per_query for each in found.values())
        assert 0.8 * whole <= mine <= whole


@pytest.mark.parametrize("published_sizes", [False, True])
def test_searched_patterns_keep_the_budget(published_sizes: bool, model: Transformer) -> None:
    ids = [(7 * i * i + i) % 300 for i in range(200)]
    budget = None if published_sizes else split_budget(40)
    found: list[None] = []
    searched = search_patterns(
        model, ids, PatternSearchConfig(), budget, advance=lambda: found.append(None)
    )
    assert [len(heads) for heads in searched.heads] == [4, 4]
    assert len(found) == 8
    policy = searched.policy(model.config, budget)
    model(torch.tensor(ids), PolicyInputs(policy.prefill))
    read = policy.reads["prefill"].summary().keys_per_query
    shares = [found.share for heads in searched.heads for found in heads]
    assert read == pytest.approx(np.mean(shares) * 201 / 2), "what the search counted"
    if budget is None:
        assert shares == [1.0] * 8, "5,120 keys are more than there are"
        return
    assert all(np.array(shares) * 201 / 2 <= 40)
    wider = searched.policy(model.config, split_budget(80))
    for before, after in zip(policy.patterns, wider.patterns, strict=True):
        assert [each.scaled(2) for each in before] == list(after)
    assert (wider.grain.tile, wider.grain.local) == (policy.grain.tile, 16)


@pytest.mark.parametrize("name", NAMES)
def test_published_sizes_run(name: BaselineName, model: Transformer) -> None:
    one = PolicyReader(
        model,
        lambda prompt, _: published(name, model.config, prompt_tokens=prompt),
        decoded_tail=5,
    )
    assert len(one.generate(PROMPT, 3)) == 3


def test_published_h2o_keeps_a_tenth_and_a_tenth(model: Transformer) -> None:
    one = PolicyReader(
        model, lambda n, _: published("h2o", model.config, prompt_tokens=n), decoded_tail=1
    )
    one.generate([5] * 100, 4)
    # The own token comes on top of 10 heavy and 10 recent ones.
    assert one.reads["decode"].summary().keys_per_query == 21


def test_a_budget_is_that_of_a_prompt_and_its_answer(model: Transformer) -> None:
    asked = []

    def start(prompt_tokens: int, follow: int) -> Policy:
        asked.append((prompt_tokens, follow))
        return Full(model.config)

    one = PolicyReader(model, start, decoded_tail=5)
    one.answer(PROMPT, [7, 8, 9])
    one.generate(PROMPT, 4)
    assert asked == [(len(PROMPT), 3), (len(PROMPT), 4)]
    sliding = start_of("sliding", model.config, BaselinesConfig())(128, 4096 - 128)
    assert isinstance(sliding, SlidingWindow)
    assert sliding.window == equal_budget(NsaChoices(), 4096).total
    published_sizes = BaselinesConfig(budget="published")
    heavy = start_of("h2o", model.config, published_sizes)(120, 900)
    assert isinstance(heavy, H2o) and heavy.heavy == 12, "a tenth of the prompt"


@pytest.mark.parametrize("name", NAMES)
def test_writing_and_scoring_read_a_prompt_once(name: BaselineName, model: Transformer) -> None:
    start = partial(within, name, model.config, split_budget(30))
    both, alone = (PolicyReader(model, lambda *_: start(), decoded_tail=5) for _ in range(2))
    written = both.generate(PROMPT, 4)
    again, scored = both.generate(PROMPT, 4), both.answer(PROMPT, [7, 8, 9])
    assert written == again and scored == alone.answer(PROMPT, [7, 8, 9])
    assert both.reads["prefill"].summary().queries == len(PROMPT) - 5
    # Twice three tokens that were written, two that were given, and the prompt's last five.
    assert both.reads["decode"].summary().queries == 6 + 2 + 5


def test_a_policy_needs_full_attention() -> None:
    nsa = make_model(300)
    with pytest.raises(ValueError, match=r"attention\.kind=full, got nsa"):
        nsa(torch.tensor([1]), PolicyInputs(Full(nsa.config).prefill))


def test_the_papers_budget() -> None:
    paper = split_budget(2560)
    assert (paper.leading, paper.local, paper.dynamic) == (128, 512, 1920)
    assert (paper.scaled(16), paper.scaled(128)) == (16, 128)
    with pytest.raises(ValueError, match="a budget of 2 tokens"):
        split_budget(2)


@pytest.mark.parametrize("context", [100, 4096, 32768])
def test_an_equal_budget_reads_what_nsa_reads(context: int) -> None:
    nsa = NsaChoices()
    total = equal_budget(nsa, context).total

    def mean(budget: int) -> float:
        return sum(min(t + 1, budget) for t in range(context)) / context

    heads = NsaAttentionConfig(**nsa.model_dump(), query_heads=1, kv_heads=1)
    wanted = min(key_counts(heads, context).total, (context + 1) / 2)
    assert mean(total - 1) < wanted <= mean(total)


def test_sequences_of_a_batch_do_not_see_each_other(model: Transformer, batch: Batch) -> None:
    first = int(batch.cu_seqlens[1])
    alone = replace(
        batch,
        ids=batch.ids[:first],
        targets=batch.targets[:first],
        positions=batch.positions[:first],
        cu_seqlens=batch.cu_seqlens[:2],
    )
    nats = reader(model).nats(batch, context=96)
    np.testing.assert_allclose(nats[:first], reader(model).nats(alone, context=96), **NEAR)
    assert (nats[batch.targets.numpy() == IGNORED] == 0).all()


def test_equal_shares_of_needles_have_an_interval_with_a_width():
    trials = [
        Trial(64, 0.0, position=0, number="1 2", written="1", exact=0.5, tokens=0.5, lift=0.0)
        for _ in range(4)
    ]
    found = baselines_summary({"x": PolicyResult(grid=NeedleGrid((64,), (0.0,), trials))})
    low, high = found["x"]["intervals"]["needle_exact"]
    assert low < 0.2 and high > 0.8
