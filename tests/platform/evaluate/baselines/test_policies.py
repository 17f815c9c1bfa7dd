"""Every policy against a brute-force statement of its rule: out, keys read, union, bytes."""

from collections.abc import Callable
from dataclasses import asdict

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from nsa_platform.config.model import ModelConfig
from nsa_platform.evaluate.baselines import policy as frame
from nsa_platform.evaluate.baselines.exact_top import ExactTop
from nsa_platform.evaluate.baselines.full import Full
from nsa_platform.evaluate.baselines.h2o import H2o
from nsa_platform.evaluate.baselines.infllm import InfLlm
from nsa_platform.evaluate.baselines.minference import MInference, everywhere
from nsa_platform.evaluate.baselines.pattern_search import (
    PatternSearch,
    Space,
)
from nsa_platform.evaluate.baselines.patterns import (
    AShape,
    BlockSparse,
    Grain,
    Pattern,
    VerticalSlash,
)
from nsa_platform.evaluate.baselines.policy import Policy, largest
from nsa_platform.evaluate.baselines.quest import Quest
from nsa_platform.evaluate.baselines.sliding import SlidingWindow
from nsa_platform.evaluate.baselines.streaming import StreamingLlm
from tests.platform.evaluate.baselines import brute


def config_of(kv_heads: int) -> ModelConfig:
    heads = {"query_heads": 4, "kv_heads": kv_heads, "key_width": 4, "value_width": 3}
    tree = {"vocab_size": 64, "layers": 1, "width": 16, "ffn_width": 16, "max_context": 256}
    return ModelConfig.parse({**tree, "attention": {"kind": "full", **heads}})


CONFIG = config_of(2)
EXACT = {"rtol": 0, "atol": 1e-12}
"""fp64 on both sides."""
ELEMENT = 8
INFLLM = {
    "initial": 3,
    "local": 8,
    "block": 4,
    "top": 2,
    "representatives": 2,
    "chunk": 5,
}
CASES: dict[str, tuple[Callable[[ModelConfig], Policy], Callable[[brute.Text], brute.Rule]]] = {
    "full": (Full, brute.full),
    "sliding": (lambda c: SlidingWindow(c, window=7), lambda x: brute.sliding(x, 7)),
    "streaming": (
        lambda c: StreamingLlm(c, sinks=3, recent=6),
        lambda x: brute.streaming(x, 3, 6),
    ),
    "h2o": (lambda c: H2o(c, heavy=4, recent=3), lambda x: brute.h2o(x, 4, 3, 0)),
    "h2o, leading": (
        lambda c: H2o(c, heavy=2, recent=5, leading=2),
        lambda x: brute.h2o(x, 2, 5, 2),
    ),
    "h2o, nothing recent": (
        lambda c: H2o(c, heavy=4, recent=0),
        lambda x: brute.h2o(x, 4, 0, 0),
    ),
    "quest": (
        lambda c: Quest(c, page=4, pages=3, dense_layers=0),
        lambda x: brute.quest(x, 4, 3, 0, 0),
    ),
    "quest, forced": (
        lambda c: Quest(c, page=3, pages=2, dense_layers=0, leading=4, local=5),
        lambda x: brute.quest(x, 3, 2, 4, 5),
    ),
    "quest, dense layer": (lambda c: Quest(c, page=4, pages=3, dense_layers=1), brute.full),
    "exact_top": (lambda c: ExactTop(c, top=5), lambda x: brute.exact_top(x, 5, 0, 0)),
    "exact_top, forced": (
        lambda c: ExactTop(c, top=4, leading=2, local=3),
        lambda x: brute.exact_top(x, 4, 2, 3),
    ),
    "minference": (
        lambda c: MInference(c, everywhere(c, VerticalSlash(5, 6)), Grain(leading=2, local=3)),
        lambda x: brute.minference(x, [("lines", 5, 6)] * 4, tile=1, leading=2, local=3),
    ),
    "minference, a pattern each": (
        lambda c: MInference(
            c,
            [[AShape(3, 5), VerticalSlash(4, 5), BlockSparse(2), VerticalSlash(0, 2)]],
            Grain(tile=4, leading=2, local=3),
        ),
        lambda x: brute.minference(
            x,
            [("a-shape", 3, 5), ("lines", 4, 5), ("blocks", 2, 0), ("lines", 0, 2)],
            tile=4,
            leading=2,
            local=3,
        ),
    ),
    "infllm": (lambda c: InfLlm(c, **INFLLM), lambda x: brute.infllm(x, **INFLLM)),
    "infllm, within a room": (
        lambda c: InfLlm(c, **INFLLM, room=11),
        lambda x: brute.infllm(x, **INFLLM, room=11),
    ),
    "infllm, no room for a block": (
        lambda c: InfLlm(c, **INFLLM, room=4),
        lambda x: brute.infllm(x, **INFLLM, room=4),
    ),
}


def make_text(tokens: int, prompt: int, *, seed: int = 0, groups: int = 2) -> brute.Text:
    """Random, with some zero queries and repeated keys, so that scores tie."""
    dice = np.random.default_rng(seed)
    q = dice.normal(size=(tokens, 4, 4)) * 2
    k = dice.normal(size=(tokens, groups, 4))
    q[dice.random((tokens, 4)) < 0.2] = 0
    k[dice.random((tokens, groups)) < 0.2] = 0
    return brute.Text(q, k, dice.normal(size=(tokens, groups, 3)), prompt)


def run(policy: Policy, text: brute.Text, *, together: bool = True) -> np.ndarray:
    q, k, v = (torch.from_numpy(x) for x in (text.q, text.k, text.v))
    outs, p = [], text.prompt
    if p:
        outs.append(policy.prefill(0, q[:p], k[:p], v[:p]))
    ends = [(p, text.tokens)] if together else [(t, t + 1) for t in range(p, text.tokens)]
    outs += [policy.decode(0, q[a:b], k[a:b], v[a:b]) for a, b in ends if a < b]
    return torch.cat(outs).numpy()


@pytest.mark.parametrize("name", CASES)
@pytest.mark.parametrize(("tokens", "prompt"), [(1, 0), (1, 1), (23, 0), (37, 26), (83, 83)])
def test_out_and_reads_are_those_of_the_rule(
    name: str, tokens: int, prompt: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    make, rule = CASES[name]
    text = make_text(tokens, prompt, seed=tokens)
    wanted, read = brute.attend(text, rule(text))
    # Pieces of a few queries only: where they end must not show.
    monkeypatch.setattr(frame, "SCORES_PER_PIECE", 4 * tokens * 7)
    policy = make(CONFIG)
    np.testing.assert_allclose(run(policy, text), wanted, **EXACT)
    parts: dict[frame.Phase, list[list[brute.Scores]]]
    parts = {"prefill": read[:prompt], "decode": read[prompt:]}
    for phase, part in parts.items():
        count = policy.reads[phase].summary()
        assert count.queries == len(part)
        if not part:
            continue
        keys = np.mean([len(scores) for heads in part for scores in heads])
        unions = [len({*heads[g], *heads[g + 1]}) for heads in part for g in (0, 2)]
        assert count.keys_per_query == pytest.approx(keys)
        assert count.union_per_group == pytest.approx(np.mean(unions))
        loaded = 2 * np.mean(unions) * (4 + 3) * ELEMENT
        assert count.bytes_per_step >= loaded - 1e-9
        if name in ("full", "sliding", "streaming"):
            assert count.bytes_per_step == pytest.approx(loaded)


@pytest.mark.parametrize("name", CASES)
@pytest.mark.parametrize("groups", [1, 4], ids=["MQA", "MHA"])
def test_groups_of_all_heads_and_of_one(name: str, groups: int) -> None:
    make, rule = CASES[name]
    text = make_text(29, 21, groups=groups)
    wanted, read = brute.attend(text, rule(text))
    policy = make(config_of(groups))
    np.testing.assert_allclose(run(policy, text), wanted, **EXACT)
    share = 4 // groups
    unions = [
        len(set().union(*heads[first : first + share]))
        for heads in read[21:]
        for first in range(0, 4, share)
    ]
    assert policy.reads["decode"].summary().union_per_group == pytest.approx(np.mean(unions))


@pytest.mark.parametrize("name", CASES)
def test_bfloat16_stays_bfloat16(name: str) -> None:
    make, _ = CASES[name]
    text = make_text(40, 30)
    q, k, v = (torch.from_numpy(x).bfloat16() for x in (text.q, text.k, text.v))
    policy = make(CONFIG)
    out = torch.cat(
        [policy.prefill(0, q[:30], k[:30], v[:30]), policy.decode(0, q[30:], k[30:], v[30:])]
    )
    assert out.dtype == torch.bfloat16 and out.isfinite().all()
    count = policy.reads["decode"].summary()
    assert count.bytes_per_step >= 2 * count.union_per_group * 7 * 2 - 1e-9


@pytest.mark.parametrize("name", CASES)
def test_decoding_one_by_one_is_decoding_together(name: str) -> None:
    make, _ = CASES[name]
    text = make_text(31, 17)
    together, single = make(CONFIG), make(CONFIG)
    np.testing.assert_allclose(run(together, text), run(single, text, together=False), **EXACT)
    counts = [asdict(policy.reads["decode"].summary()) for policy in (together, single)]
    assert counts[0] == pytest.approx(counts[1])


def test_what_the_choice_looks_at_counts() -> None:
    text = make_text(20, 19)
    keys = 2 * 4 * ELEMENT

    def beside(policy: Policy, phase: frame.Phase) -> float:
        run(policy, text)
        count = policy.reads[phase].summary()
        return count.bytes_per_step - 2 * count.union_per_group * 7 * ELEMENT

    quest = Quest(CONFIG, page=4, pages=2, dense_layers=0)
    assert beside(quest, "decode") == pytest.approx(2 * 5 * keys)
    assert beside(ExactTop(CONFIG, top=3), "decode") == pytest.approx(20 * keys)
    assert beside(H2o(CONFIG, heavy=3, recent=2), "decode") == pytest.approx(4 * 5 * 2)
    lines, blocks, shape = VerticalSlash(3, 3), BlockSparse(1), AShape(2, 2)
    minference = MInference(CONFIG, everywhere(CONFIG, lines), Grain())
    assert beside(minference, "prefill") == pytest.approx(19 * keys / 19)
    # The second group looks for nothing; the first one reads 19 keys and the means of 5 blocks.
    minference = MInference(CONFIG, [[lines, blocks, shape, shape]], Grain(tile=4))
    assert beside(minference, "prefill") == pytest.approx((19 + 5) * keys / 2 / 19)
    # Two blocks of four left the window of the 20th token: (19 - 8 - 3) // 4.
    assert beside(InfLlm(CONFIG, **INFLLM), "decode") == pytest.approx(2 * 4 * 4 * ELEMENT)


def as_brute(pattern: Pattern) -> brute.Pattern:
    match pattern:
        case AShape(leading, local):
            return "a-shape", leading, local
        case VerticalSlash(columns, diagonals):
            return "lines", columns, diagonals
        case BlockSparse(blocks):
            return "blocks", blocks, 0


@pytest.mark.parametrize(("tokens", "tile", "groups"), [(34, 3, 1), (25, 4, 2), (9, 2, 4)])
def test_the_search_finds_what_trying_everything_finds(tokens: int, tile: int, groups: int) -> None:
    text = make_text(tokens, tokens, seed=tokens, groups=groups)
    ratios, target = [(1, 4), (3, 1)], (2, 6)
    grain = Grain(tile, leading=1, local=2)
    space = Space(AShape(*target), [VerticalSlash(*each) for each in ratios], grain)
    search = PatternSearch(config_of(groups), space)
    q, k, v = (torch.from_numpy(x) for x in (text.q, text.k, text.v))
    wanted, _ = brute.attend(text, brute.full(text))
    np.testing.assert_allclose(search.prefill(0, q, k, v).numpy(), wanted, **EXACT)
    sizes = {"tile": tile, "leading": 1, "local": 2}
    for head, found in enumerate(search.heads[0]):
        best = brute.best_pattern(text, head, target, ratios, **sizes)
        assert as_brute(found.pattern) == best
        cells = brute.pattern_cells(text, head, best, **sizes)
        assert found.share == pytest.approx(len(cells) / (tokens * (tokens + 1) / 2))
        first = brute.pattern_cells(text, head, ("a-shape", *target), **sizes)
        assert len(cells) <= len(first)
    if tokens == 34:
        assert len({type(found.pattern) for found in search.heads[0]}) > 1, "not one for all"


@given(
    st.lists(st.integers(0, 3), min_size=1, max_size=12),
    st.sets(st.integers(0, 11)),
    st.integers(0, 14),
)
def test_the_largest_are_the_first_of_equals(
    values: list[int], barred: set[int], count: int
) -> None:
    row = torch.tensor(values, dtype=torch.float64)
    for index in barred & set(range(len(values))):
        row[index] = -torch.inf
    open_ones = {i: float(x) for i, x in enumerate(row.tolist()) if x > -np.inf}
    mask = largest(row[None], count)[0]
    assert set(mask.nonzero().flatten().tolist()) == brute.best(open_ones, count)
