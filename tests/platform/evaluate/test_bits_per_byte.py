"""Bits per byte equals what one computes by hand, on the same tokens for every scorer."""

import math
from collections import Counter

import numpy as np
import pytest
import torch

from nsa_platform.data.loader import Batch
from nsa_platform.evaluate.bits_per_byte import bits_per_byte, first_batches
from nsa_platform.evaluate.ngram import Ngrams
from nsa_platform.evaluate.scores import ModelScorer
from nsa_platform.model.inputs import PackedInputs

CONTEXT = 64


def measure(corpus, model, **changes):
    loader = corpus.loader("validation", CONTEXT)
    ngrams = Ngrams(
        first_batches(corpus.loader("train", CONTEXT), tokens=10**6, batch_rows=1),
        corpus.tokenizer.vocab_size,
    )
    settings = {"tokens": 10**6, "batch_rows": 3, "buckets": 4} | changes
    return bits_per_byte(
        {"model": ModelScorer(model).nats, "bigram": ngrams.bigram, "unigram": ngrams.unigram},
        first_batches(loader, tokens=settings["tokens"], batch_rows=settings["batch_rows"]),
        corpus.tokenizer.token_bytes(),
        context_length=CONTEXT,
        buckets=settings["buckets"],
    )


def test_the_model_is_judged_on_exactly_the_bytes_that_it_predicts(corpus, model) -> None:
    result = measure(corpus, model)["model"]
    loader = corpus.loader("validation", CONTEXT)
    nats, size, tokens = 0.0, 0, 0
    by_part = np.zeros((4, 3))
    for _ in range(loader.rows_per_epoch):
        (batch,) = loader.next_step(1)
        for start, end in zip(batch.cu_seqlens[:-1], batch.cu_seqlens[1:], strict=True):
            piece = slice(int(start), int(end))
            with torch.no_grad():
                inputs = PackedInputs.from_lengths([piece.stop - piece.start])
                logits = model.logits(model(batch.ids[piece], inputs).hidden)
            log_p = logits.double().log_softmax(-1)
            for i, target in enumerate(batch.targets[piece].tolist()):
                if target == -100:
                    continue
                text = corpus.tokenizer.transformers.convert_ids_to_tokens(target)
                loss = -float(log_p[i, target])
                length = 0 if target == corpus.tokenizer.eos_id else len(text)
                nats, size, tokens = nats + loss, size + length, tokens + 1
                by_part[i // 16] += (loss, 1, length)
    assert (result.total.tokens, result.total.bytes) == (tokens, size)
    assert result.total.nats == pytest.approx(nats, rel=1e-5)
    assert result.total.bits_per_byte == pytest.approx(nats / math.log(2) / size, rel=1e-5)
    assert result.edges == (0, 16, 32, 48, 64)
    for part, expected in zip(result.parts, by_part, strict=True):
        assert (part.nats, part.tokens, part.bytes) == pytest.approx(tuple(expected), rel=1e-5)


def test_every_scorer_sees_the_same_tokens_and_the_order_is_as_it_must_be(corpus, model) -> None:
    results = measure(corpus, model)
    totals = {name: (r.total.tokens, r.total.bytes) for name, r in results.items()}
    assert len(set(totals.values())) == 1
    text = sum(len(text.encode()) for text in corpus.documents["validation"])
    counted = results["model"].total.bytes
    assert 0.9 * text < counted < text, "all but the first tokens of pieces"
    assert results["bigram"].total.nats < results["unigram"].total.nats
    assert results["unigram"].total.nats < results["model"].total.nats, "an untrained model"


def test_the_grouping_of_rows_changes_nothing(corpus, model) -> None:
    one = measure(corpus, model, batch_rows=1)
    for rows in (2, 5):
        many = measure(corpus, model, batch_rows=rows)
        for name, result in one.items():
            assert many[name].total.tokens == result.total.tokens
            assert many[name].total.nats == pytest.approx(result.total.nats, rel=1e-6)


@pytest.mark.parametrize(("tokens", "rows"), [(1, 1), (CONTEXT, 1), (5 * CONTEXT + 1, 5)])
def test_as_many_tokens_are_read_as_were_asked_for(corpus, tokens: int, rows: int) -> None:
    loader = corpus.loader("validation", CONTEXT)
    batches = first_batches(loader, tokens=tokens, batch_rows=2)
    assert sum(len(batch.ids) for batch in batches) == rows * CONTEXT


def test_what_cannot_be_measured_is_an_error(corpus, model) -> None:
    with pytest.raises(ValueError, match="position_buckets=65 must not exceed"):
        measure(corpus, model, buckets=65)
    with pytest.raises(ValueError, match="no token to predict"):
        bits_per_byte({}, iter(()), np.ones(3), context_length=8, buckets=1)
    with pytest.raises(ValueError, match="no token to count"):
        Ngrams([], 10)


def batch_of(*documents: list[int]) -> Batch:
    lengths = [len(document) for document in documents]
    targets = [target for document in documents for target in [*document[1:], -100]]
    return Batch(
        ids=torch.tensor([token for document in documents for token in document]),
        targets=torch.tensor(targets),
        positions=torch.cat([torch.arange(n, dtype=torch.int32) for n in lengths]),
        cu_seqlens=torch.tensor(np.cumsum([0, *lengths]), dtype=torch.int32),
        num_targets=sum(n - 1 for n in lengths),
    )


def test_ngrams_equal_counting_by_hand() -> None:
    train = [batch_of([1, 2, 3, 1, 2], [1, 2, 4]), batch_of([3, 1, 3])]
    ngrams = Ngrams(train, 6)
    pairs = Counter([(1, 2), (2, 3), (3, 1), (1, 2), (1, 2), (2, 4), (3, 1), (1, 3)])
    targets = Counter(target for _, target in pairs.elements())
    once = sum(count == 1 for count in pairs.values())
    twice = sum(count == 2 for count in pairs.values())
    assert ngrams.tokens == 8
    assert ngrams.discount == once / (once + 2 * twice)

    def unigram(target: int) -> float:
        return (targets[target] + 1) / (8 + 6)

    def bigram(previous: int, target: int) -> float:
        seen = sum(count for (first, _), count in pairs.items() if first == previous)
        if not seen:
            return unigram(target)
        followers = sum(first == previous for first, _ in pairs)
        kept = max(pairs[previous, target] - ngrams.discount, 0) / seen
        return kept + ngrams.discount * followers / seen * unigram(target)

    test = batch_of([1, 2, 5, 0], [4, 4], [2, 3])
    expected = [(1, 2), (2, 5), (5, 0), None, (4, 4), None, (2, 3), None]
    assert ngrams.unigram(test) == pytest.approx(
        [-math.log(unigram(pair[1])) if pair else 0.0 for pair in expected]
    )
    assert ngrams.bigram(test) == pytest.approx(
        [-math.log(bigram(*pair)) if pair else 0.0 for pair in expected]
    )
    for previous in range(6):
        each = ngrams.bigram_probability(np.full(6, previous), np.arange(6))
        assert each.sum() == pytest.approx(1.0)
        assert (each > 0).all()
