"""RULER's aggregation: the ten common words of a list (cwe), the three frequent codes (fwe).

cwe: a numbered list in which ten words stand 30 times and all others 3 times, after a solved short
one; below 4,096 tokens 6 times and once. fwe: random words whose counts fall as rank to the power
of minus alpha (2); the first rank is dots and does not count. Sentences are ours.

Source: arXiv 2404.06654, section 3; github.com/NVIDIA/RULER, scripts/data/synthetic/
{common,freq}_words_extraction.py.
"""

import functools
import itertools
import random
from collections.abc import Callable, Iterator

from scipy.special import zeta

from nsa_platform.config.tasks import WordsTask
from nsa_platform.data.tokenizer import Tokenizer
from nsa_platform.evaluate.tasks.fitting import largest, padded, too_short
from nsa_platform.evaluate.tasks.frame import Frame, open_frame
from nsa_platform.evaluate.tasks.ruler_scores import share_of
from nsa_platform.evaluate.tasks.task import Task, WrittenSample
from nsa_platform.evaluate.tasks.words import LOWER, codes, english

SMALL = 4096
"""Below so many tokens cwe repeats its words less often."""
COMMON_WORDS, FREQUENT_WORDS = 10, 3
CWE_TOKENS, FWE_TOKENS = 120, 50
CWE_INTRODUCTION = "A numbered list of words follows. Some of them come more often than others.\n"
CWE_QUESTION = "\nQuestion: which 10 words come most often in the list above?"
CWE_BEGUN = " Answer: the 10 words that come most often are:"
FWE_INTRODUCTION = "A text of coded words follows. Keep count of each of them.\n"
FWE_QUESTION = (
    "\nQuestion: which three coded words come most often in the text above? Dots do not count, "
    "and no explanation is wanted."
)
FWE_BEGUN = " Answer: the three coded words that come most often are:"
ALPHA, CODE_LETTERS, TOKENS_PER_CODE = 2.0, 6, 50

Content = Callable[[random.Random], tuple[str, tuple[str, ...]]]
"""Dice to a text and the words that are asked for; equal dice, equal text."""


def counted_words(config: WordsTask, tokenizer: Tokenizer) -> Task:
    """The samples of cwe or fwe; prompt and room for the answer are `length` tokens.

    Raises:
        ValueError: a length is too short.
    """
    frame = open_frame(tokenizer, chat=config.chat)
    make = _common if config.kind == "cwe" else _frequent

    def samples() -> Iterator[WrittenSample]:
        for length in sorted(config.lengths):
            for number in range(config.samples):
                seed = f"{config.seed}/{config.kind}/{length}/{number}"
                yield make(tokenizer, frame, length, number, seed)

    return Task(config.kind, len(config.lengths) * config.samples, samples)


def _common(
    tokenizer: Tokenizer, frame: Frame, length: int, number: int, seed: str
) -> WrittenSample:
    often, seldom, example_words = (30, 3, 40) if length >= SMALL else (6, 1, 20)
    example_counts = (10, 3) if length >= SMALL else (3, 1)
    listed, top = _word_list(random.Random(f"{seed}/example"), example_words, *example_counts)
    solved = " " + " ".join(f"{i}. {word}" for i, word in enumerate(top, 1))
    shown = CWE_INTRODUCTION + listed + CWE_QUESTION + CWE_BEGUN + solved + "\n\n"
    introduction = tokenizer.encode(shown + CWE_INTRODUCTION)

    def content(words: int) -> tuple[str, tuple[str, ...]]:
        return _word_list(random.Random(seed), words, often, seldom)

    most = min(len(english("noun", "adjective", "verb")), length)
    return _fitted(
        ("cwe", length, number), tokenizer, frame, introduction,
        (CWE_QUESTION, CWE_BEGUN, CWE_TOKENS), content, COMMON_WORDS + 1, most,
    )  # fmt: skip


def _frequent(
    tokenizer: Tokenizer, frame: Frame, length: int, number: int, seed: str
) -> WrittenSample:
    vocabulary = max(FREQUENT_WORDS + 1, length // TOKENS_PER_CODE)
    names = list(itertools.islice(codes(random.Random(seed), LOWER, CODE_LETTERS), vocabulary))
    names[0] = "..."

    def content(words: int) -> tuple[str, tuple[str, ...]]:
        counts = [int(words * rank**-ALPHA / zeta(ALPHA)) for rank in range(1, vocabulary + 1)]
        text = [name for name, count in zip(names, counts, strict=True) for _ in range(count)]
        random.Random(f"{seed}/order").shuffle(text)
        return " ".join(text), tuple(names[1 : FREQUENT_WORDS + 1])

    # With fewer than 30 words the fourth rank would not come at all; a code is two tokens or more.
    return _fitted(
        ("fwe", length, number), tokenizer, frame, tokenizer.encode(FWE_INTRODUCTION),
        (FWE_QUESTION, FWE_BEGUN, FWE_TOKENS), content, 30, length // 2,
    )  # fmt: skip


def _word_list(
    dice: random.Random, words: int, often: int, seldom: int
) -> tuple[str, tuple[str, ...]]:
    # All words in one order, so that a longer list holds what a shorter one does.
    every = english("noun", "adjective", "verb")
    chosen = dice.sample(every, len(every))[:words]
    common, others = chosen[:COMMON_WORDS], chosen[COMMON_WORDS:]
    listed = common * often + others * seldom
    dice.shuffle(listed)
    return " ".join(f"{i}. {word}" for i, word in enumerate(listed, 1)), tuple(common)


def _fitted(
    name: tuple[str, int, int],
    tokenizer: Tokenizer,
    frame: Frame,
    introduction: list[int],
    ending: tuple[str, str, int],
    content: Callable[[int], tuple[str, tuple[str, ...]]],
    fewest: int,
    most: int,
) -> WrittenSample:
    """The sample with the largest number of words that fits; what is left of the room is padded."""
    kind, length, number = name
    asked, started, answer_tokens = ending
    question, begun = tokenizer.encode(asked), tokenizer.encode(started)
    fixed = len(introduction) + len(question) + len(begun) + frame.size + answer_tokens
    room = length - fixed
    encoded = functools.cache(lambda words: tokenizer.encode(content(words)[0]))
    if len(encoded(fewest)) > room:
        raise too_short(kind, length, fixed + len(encoded(fewest)))
    words = largest(lambda count: len(encoded(count)), room, fewest, most)
    references = content(words)[1]
    text = padded(tokenizer, encoded(words), room)
    return WrittenSample(
        cells=(str(length),),
        unit=f"{length}/{number}",
        prompt=frame.around([*introduction, *text, *question], begun),
        references=references,
        max_new_tokens=answer_tokens,
        score=share_of(references),
    )
