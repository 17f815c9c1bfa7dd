"""Needles lie where they should, and a model that reads them is told from one that does not."""

import random
import re
from collections.abc import Iterator, Sequence

import pytest

from nsa_platform.config.evaluate import NeedleConfig
from nsa_platform.data.haystack import Counts, haystack, synthetic_filler
from nsa_platform.evaluate import scores
from nsa_platform.evaluate.needle import needle_grid
from nsa_platform.evaluate.prompt import Prompt, one_by_one
from nsa_platform.evaluate.scores import AnswerScore, ModelScorer

CONFIG = NeedleConfig(lengths=(96, 160), depths=(0.0, 0.5, 1.0), samples=2)


@pytest.fixture
def filler(corpus) -> list[int]:
    return corpus.tokenizer.encode(corpus.documents["validation"][0])


@pytest.mark.parametrize("length", [96, 161, 500])
@pytest.mark.parametrize("depth", [0.0, 0.3, 1.0])
def test_a_haystack_has_its_length_and_its_needle_at_a_line_start(
    corpus, filler: list[int], length: int, depth: float
) -> None:
    hay = haystack(corpus.tokenizer, filler, length=length, depth=depth, dice=random.Random(1))
    assert len(hay.prompt) == len(hay.control) == length
    text = corpus.tokenizer.decode(hay.prompt)
    needle = re.search(r"\nThe secret number of (\w+) is (\d+)\.\n", text)
    assert needle is not None
    assert needle.group(2) == hay.number
    assert text.endswith(f"\nThe secret number of {needle.group(1)} is")
    assert corpus.tokenizer.decode(hay.answer) == f" {hay.number}"
    control = corpus.tokenizer.decode(hay.control)
    assert hay.number not in control
    assert len(re.findall(r"number of \w+ is \d+", control)) == 1
    before = corpus.tokenizer.decode(hay.prompt[: hay.position])
    assert text.startswith(before + needle.group(0))
    assert hay.position == 0 or before.endswith("\n") or "\n" not in before[-100:]
    room = length - 40
    assert depth * room - 70 <= hay.position <= depth * length


def test_the_needle_moves_with_its_depth(corpus, filler: list[int]) -> None:
    places = [
        haystack(corpus.tokenizer, filler, length=400, depth=d, dice=random.Random(1)).position
        for d in (0.0, 0.25, 0.5, 0.75, 1.0)
    ]
    assert places == sorted(places)
    assert len(set(places)) == 5


def test_reading_the_needle_is_told_from_guessing(corpus, filler: list[int]) -> None:
    tokenizer = corpus.tokenizer

    def read(prompt: Prompt) -> list[int]:
        text = tokenizer.decode(prompt.ids)
        word, number = re.findall(r"number of (\w+) is (\d+)", text)[0]
        assert text.endswith(f"number of {word} is")
        return tokenizer.encode(f" {number}.")[: prompt.max_new_tokens]

    def read_backwards(prompts: Sequence[Prompt]) -> Iterator[tuple[int, list[int]]]:
        yield from reversed([(place, read(prompt)) for place, prompt in enumerate(prompts)])

    def know(prompt: list[int], answer: list[int]) -> AnswerScore:
        right = tokenizer.decode(answer).strip() in tokenizer.decode(prompt)
        return AnswerScore((0.1 if right else 2.0,) * len(answer), (right,) * len(answer))

    def guess(prompt: Prompt) -> list[int]:
        return tokenizer.encode(" 12345.")[: prompt.max_new_tokens]

    def shrug(prompt: list[int], answer: list[int]) -> AnswerScore:
        # That a number comes after a blank is no knowledge of it.
        blanks = [not tokenizer.decode([token]).strip() for token in answer]
        assert any(blanks)
        return AnswerScore((3.0,) * len(answer), tuple(blanks))

    done: list[None] = []
    found = needle_grid(
        read_backwards, know, tokenizer, CONFIG, filler=filler, advance=lambda: done.append(None)
    )
    assert len(done) == len(found.trials) == 12
    assert found.cells("exact") == [[1.0, 1.0]] * 3
    assert found.mean("tokens") == 1.0
    assert found.mean("lift") > 1.9
    lost = needle_grid(one_by_one(guess), shrug, tokenizer, CONFIG, filler=filler)
    assert lost.cells("exact") == [[0.0, 0.0]] * 3
    assert (lost.mean("tokens"), lost.mean("lift")) == (0.0, 0.0)
    assert [t.number for t in lost.trials] == [t.number for t in found.trials], "the same needles"


def test_a_longer_number_that_begins_with_the_right_one_is_wrong(corpus, filler) -> None:
    def almost(prompt: Prompt) -> list[int]:
        number = re.findall(r"is (\d+)", corpus.tokenizer.decode(prompt.ids))[0]
        return corpus.tokenizer.encode(f" {number}0")

    def shrug(prompt: list[int], answer: list[int]) -> AnswerScore:
        return AnswerScore((1.0,) * len(answer), (False,) * len(answer))

    grid = needle_grid(one_by_one(almost), shrug, corpus.tokenizer, CONFIG, filler=filler)
    assert grid.mean("exact") == 0.0


@pytest.mark.parametrize(
    ("counts", "asked"),
    [
        (Counts(keys=4), 1),
        (Counts(values=3), 3),
        (Counts(keys=4, queries=2), 2),
        (Counts(keys=3, values=2, queries=2), 4),
    ],
)
def test_several_needles(corpus, filler: list[int], counts: Counts, asked: int) -> None:
    hay = haystack(
        corpus.tokenizer, filler, length=700, depth=0.2, dice=random.Random(3), counts=counts
    )
    assert len(hay.prompt) == len(hay.control) == 700
    text, control = corpus.tokenizer.decode(hay.prompt), corpus.tokenizer.decode(hay.control)
    pairs = re.findall(r"\nThe secret number of (\w+) is (\d+)\.\n", text)
    assert len(pairs) == counts.keys * counts.values
    question = text.rsplit("\nThe secret number", 1)[1]
    numbers = hay.number.split(", ")
    assert len(numbers) == asked
    assert [number for word, number in pairs if re.search(rf"\b{word}\b", question)] == numbers
    others = {number for _, number in pairs} - set(numbers)
    assert not any(number in control for number in numbers)
    assert all(number in control for number in others)
    first = corpus.tokenizer.decode(hay.prompt[hay.position :])
    assert re.match(rf"\nThe secret number of \w+ is {numbers[0]}\.", first)
    places = [text.index(f"is {number}.") / len(text) for number in numbers]
    assert places == sorted(places) and places[0] > 0.05
    assert asked == 1 or places[-1] - places[0] > 0.3, "spread from the depth to the end"


def test_of_several_numbers_the_share_counts(corpus, filler: list[int]) -> None:
    def half(prompt: Prompt) -> list[int]:
        found = re.findall(r"number of \w+ is (\d+)", corpus.tokenizer.decode(prompt.ids))
        return corpus.tokenizer.encode(f" {found[0]} and 1{found[1]}")[: prompt.max_new_tokens]

    def shrug(prompt: list[int], answer: list[int]) -> AnswerScore:
        return AnswerScore((1.0,) * len(answer), (False,) * len(answer))

    config = NeedleConfig(lengths=(200,), depths=(0.5,), samples=1, values=2)
    grid = needle_grid(one_by_one(half), shrug, corpus.tokenizer, config, filler=filler)
    assert grid.mean("exact") == 0.5
    with pytest.raises(ValueError, match="queries=2 must not exceed keys=1"):
        NeedleConfig(queries=2)


def test_an_answer_is_scored_as_the_batch_scores_it(
    corpus, model, filler: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    scorer = ModelScorer(model)
    prompt, answer = filler[:50], filler[50:57]
    whole = scorer.answer(prompt, answer)
    # As many rows of logits at once as one call has memory for: here two.
    monkeypatch.setattr(scores, "LOGITS_PER_CHUNK", 2 * model.config.vocab_size)
    assert scorer.answer(prompt, answer).nats == pytest.approx(whole.nats, rel=1e-5)
    one_by_one = [scorer.answer(prompt + answer[:i], answer[i : i + 1]) for i in range(len(answer))]
    assert whole.nats == pytest.approx([each.nats[0] for each in one_by_one], rel=1e-4)
    assert whole.hits == tuple(each.hits[0] for each in one_by_one)


def test_bad_haystacks_are_errors(corpus) -> None:
    with pytest.raises(ValueError, match="needs filler"):
        haystack(corpus.tokenizer, [], length=100, depth=0.5, dice=random.Random(0))
    with pytest.raises(ValueError, match=r"needle\.lengths=30 must be more than"):
        haystack(corpus.tokenizer, [1], length=30, depth=0.5, dice=random.Random(0))
    assert len(synthetic_filler(corpus.tokenizer)) > 10
