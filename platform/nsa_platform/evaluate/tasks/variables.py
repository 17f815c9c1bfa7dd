"""RULER's variable tracking: chains of assignments in noise, and who holds the first one's value.

A solved example of at most 500 tokens, the same for all samples, stands before the text, as in
RULER. Sentences are ours.

Source: arXiv 2404.06654, section 3; github.com/NVIDIA/RULER,
scripts/data/synthetic/variable_tracking.py.
"""

import itertools
import random
from collections.abc import Iterator
from dataclasses import dataclass

from nsa_platform.config.tasks import VariableTrackingTask
from nsa_platform.data.haystack import SYNTHETIC
from nsa_platform.data.tokenizer import Tokenizer
from nsa_platform.evaluate.tasks.fitting import padded, too_short
from nsa_platform.evaluate.tasks.frame import Frame, open_frame
from nsa_platform.evaluate.tasks.ruler_scores import share_of
from nsa_platform.evaluate.tasks.task import Task, WrittenSample
from nsa_platform.evaluate.tasks.words import UPPER, codes

ANSWER_TOKENS = 30
INTRODUCTION = "Variables are assigned in the text below. Follow the chains of assignments.\n\n"
QUESTION = "\nQuestion: which variables hold the value {value} according to the text above?"
BEGUN = " Answer: by the assignments in the text, {count} variables hold the value {value}:"
EXAMPLE_LETTERS, LETTERS = 3, 5
EXAMPLE_TOKENS, EXAMPLE_NOISES, EXAMPLE_HOPS = 500, 5, 10
"""The example has as many times so many noises as it has room for, once at least."""


@dataclass(frozen=True, slots=True)
class Chains:
    """Lines that assign, chain by chain; the first chain is the one that is asked for."""

    lines: list[list[str]]
    value: str
    variables: tuple[str, ...]


def variable_tracking(config: VariableTrackingTask, tokenizer: Tokenizer) -> Task:
    """The samples; prompt and room for the answer are `length` tokens.

    Raises:
        ValueError: a length is too short.
    """
    frame = open_frame(tokenizer, chat=config.chat)
    shown = _example(config, tokenizer)

    def samples() -> Iterator[WrittenSample]:
        for length in sorted(config.lengths):
            for number in range(config.samples):
                dice = random.Random(f"{config.seed}/vt/{length}/{number}")
                yield _sample(config, tokenizer, frame, shown, length, number, dice)

    return Task(config.kind, len(config.lengths) * config.samples, samples)


def _sample(
    config: VariableTrackingTask,
    tokenizer: Tokenizer,
    frame: Frame,
    shown: list[int],
    length: int,
    number: int,
    dice: random.Random,
) -> WrittenSample:
    chains = _chains(dice, config.chains, config.hops, LETTERS)
    noise = tokenizer.encode(SYNTHETIC)
    question, begun = tokenizer.encode(_asked(chains)), tokenizer.encode(_begun(chains))
    lines = sum(len(tokenizer.encode(f"{line}\n")) for chain in chains.lines for line in chain)
    fixed = len(shown) + len(question) + len(begun) + frame.size + ANSWER_TOKENS
    room = length - fixed
    if room < lines:
        raise too_short(config.kind, length, fixed + lines)
    text = _mixed(tokenizer, chains, noise, (room - lines) // len(noise), dice)
    text = padded(tokenizer, text, room)
    return WrittenSample(
        cells=(str(length),),
        unit=f"{length}/{number}",
        prompt=frame.around([*shown, *text, *question], begun),
        references=chains.variables,
        max_new_tokens=ANSWER_TOKENS,
        score=share_of(chains.variables),
    )


def _example(config: VariableTrackingTask, tokenizer: Tokenizer) -> list[int]:
    """A solved example, and the introduction of what follows it."""
    dice = random.Random(f"{config.seed}/vt/example")
    chains = _chains(dice, 1, min(EXAMPLE_HOPS, config.hops), EXAMPLE_LETTERS)
    noise = tokenizer.encode(SYNTHETIC)
    text = _mixed(tokenizer, chains, [], 0, dice)
    asked = tokenizer.encode(_question(chains) + " " + " ".join(chains.variables) + "\n\n")
    introduction = tokenizer.encode(INTRODUCTION)
    room = EXAMPLE_TOKENS - ANSWER_TOKENS - len(introduction) - len(text) - len(asked)
    noises = max(1, room // (EXAMPLE_NOISES * len(noise))) * EXAMPLE_NOISES
    mixed = _mixed(tokenizer, chains, noise, noises, dice)
    return [*introduction, *mixed, *asked, *introduction]


def _chains(dice: random.Random, count: int, hops: int, letters: int) -> Chains:
    names = codes(dice, UPPER, letters)
    chains = [list(itertools.islice(names, hops + 1)) for _ in range(count)]
    values = dice.sample(range(10_000, 100_000), count)
    lines = [
        [f"VAR {chain[0]} = {value}"]
        + [f"VAR {later} = VAR {earlier}" for earlier, later in itertools.pairwise(chain)]
        for chain, value in zip(chains, values, strict=True)
    ]
    return Chains(lines, str(values[0]), tuple(chains[0]))


def _mixed(
    tokenizer: Tokenizer, chains: Chains, noise: list[int], noises: int, dice: random.Random
) -> list[int]:
    """Assignments in their order, at random places between lines of noise."""
    pieces = [noise] * noises
    for chain in chains.lines:
        places = sorted(dice.randint(0, len(pieces)) for _ in chain)
        for done, (place, line) in enumerate(zip(places, chain, strict=True)):
            pieces.insert(place + done, tokenizer.encode(f"{line}\n"))
    return [token for piece in pieces for token in piece]


def _asked(chains: Chains) -> str:
    return QUESTION.format(value=chains.value)


def _begun(chains: Chains) -> str:
    return BEGUN.format(value=chains.value, count=len(chains.variables))


def _question(chains: Chains) -> str:
    return _asked(chains) + _begun(chains)
