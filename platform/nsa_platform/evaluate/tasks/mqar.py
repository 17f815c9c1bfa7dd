"""Multi-query associative recall: pairs of ids, then every key again, whose value is asked for.

The first 2 x pairs ids are keys and values in turn. In what follows each key comes once more, its
value after it, at gaps of a power law: most soon, some late; between them stand random ids. The
model is given the right ids and asked for the likeliest one after each key (teacher forcing).

Source: Arora et al., arXiv 2312.04927, appendix; github.com/HazyResearch/zoology.
"""

import random
from collections.abc import Iterator

import numpy as np

from nsa_platform.config.tasks import MqarTask
from nsa_platform.data.tokenizer import Tokenizer
from nsa_platform.evaluate.tasks.task import ForcedSample, Task

POWER = 0.01
"""Gaps of g pairs come as often as g to the power of POWER - 1."""


def mqar(config: MqarTask, tokenizer: Tokenizer) -> Task:
    """The samples, of exactly `length` ids.

    Raises:
        ValueError: the vocabulary has no room for the pairs.
    """
    vocabulary = config.vocabulary or tokenizer.vocab_size
    ids = [index for index in range(vocabulary) if index not in tokenizer.control_tokens]
    keys, values = ids[: len(ids) // 2], ids[len(ids) // 2 :]
    if vocabulary > tokenizer.vocab_size or config.pairs > len(keys):
        raise ValueError(
            f"tasks: mqar: vocabulary={vocabulary} must lie in [2 x pairs = {2 * config.pairs} and "
            f"control tokens, the tokenizer's {tokenizer.vocab_size}]"
        )

    def samples() -> Iterator[ForcedSample]:
        for length in sorted(config.lengths):
            for number in range(config.samples):
                dice = random.Random(f"{config.seed}/mqar/{length}/{number}")
                yield _sample(config.pairs, keys, values, length, number, dice)

    return Task(config.kind, len(config.lengths) * config.samples, samples)


def _sample(
    pairs: int,
    keys: list[int],
    values: list[int],
    length: int,
    number: int,
    dice: random.Random,
) -> ForcedSample:
    chosen = list(zip(dice.sample(keys, pairs), dice.choices(values, k=pairs), strict=True))
    rest = dice.choices([*keys, *values], k=length - 2 * pairs)
    slots = (length - 2 * pairs) // 2
    weights = np.arange(1, slots + 1, dtype=float) ** (POWER - 1)
    numbers = np.random.default_rng(dice.getrandbits(64))
    places = numbers.choice(slots, pairs, replace=False, p=weights / weights.sum())
    for place, (key, value) in zip(places.tolist(), chosen, strict=True):
        rest[2 * place : 2 * place + 2] = [key, value]
    return ForcedSample(
        cells=(str(length),),
        unit=f"{length}/{number}",
        prompt=[token for pair in chosen for token in pair],
        answer=rest,
        counted=tuple(2 * place + 1 for place in sorted(places.tolist())),
    )
