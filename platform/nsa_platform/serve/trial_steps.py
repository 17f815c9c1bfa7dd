"""Steps that are run for their own sake, before there are requests: to be measured, or to have been
run once."""

import logging
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager

import torch

from nsa_platform.serve.pages import SequencePages
from nsa_platform.serve.runner import ModelRunner
from nsa_platform.serve.scheduler import Limits
from nsa_platform.serve.transfer import on_device

log = logging.getLogger(__name__)

LEAST_CHUNK = 16
LEAST_CONTEXT = 512
"""Kernels for shorter contexts are the same."""

TOKENS_THAT_SHARE = 4
"""New tokens of a step for each of its sequences, from which on kernels for many are taken."""


@contextmanager
def trial_step(
    runner: ModelRunner, chunks: Sequence[tuple[int, int]]
) -> Iterator[Callable[[], None]]:
    """What runs a step of chunks (new tokens, context with them) and waits for its end. The cache
    must have room for them; its pages are given back, with nothing of use in them."""
    cache, book = runner.cache, runner.cache.book
    sequences = [SequencePages() for _ in chunks]
    counts = [count for count, _ in chunks]
    try:
        for sequence, (count, context) in zip(sequences, chunks, strict=True):
            while sequence.num_tokens < context - count:
                rest = context - count - sequence.num_tokens
                book.extend(sequence, min(book.page_size, rest))
        inputs = cache.extend(sequences, counts)
        last_rows = [sum(counts[: index + 1]) - 1 for index in range(len(counts))]

        def run() -> None:
            ids = on_device([0] * sum(counts), torch.int64, cache.device)
            if max(counts) == 1:
                scores = runner.decode(ids, inputs)
            else:
                scores = runner.scores(runner.forward(ids, inputs), last_rows)
            scores.argmax(-1).tolist()  # waits for the device

        yield run
    finally:
        for sequence in sequences:
            book.release(sequence)


def room_for_trials(runner: ModelRunner) -> int:
    """Tokens of trial sequences at most: in half of the cache there are pages enough for sequences
    that end somewhere in a page."""
    return runner.cache.book.num_pages * runner.cache.page_size // 2


def warm_up(runner: ModelRunner, limits: Limits, max_model_len: int) -> int:
    """Run a step of every kind that kernels are compiled for: chunks of doubling sizes on contexts
    of doubling lengths, alone and, on every other length, beside decodes of doubling numbers.
    Returns how many."""
    started, room, count = time.monotonic(), room_for_trials(runner), 0
    for index, context in enumerate(_doublings(LEAST_CONTEXT, min(max_model_len, room))):
        most = min(context, limits.max_step_tokens)
        steps = [[(size, context)] for size in _doublings(LEAST_CHUNK, most)]
        if index % 2 == 0:
            steps += _mixed_steps(context, limits, room)
        for chunks in steps:
            with trial_step(runner, chunks) as run:
                run()
        count += len(steps)
    log.info("%d steps of all kinds were run in %.1f s", count, time.monotonic() - started)
    return count


def _mixed_steps(context: int, limits: Limits, room: int) -> Iterator[list[tuple[int, int]]]:
    """A short chunk beside decodes, and one with which tokens of a sequence share their keys."""
    for number in _doublings(2, limits.max_num_seqs):
        each = min(context, room // number)
        most = min(each, limits.max_step_tokens - (number - 1))
        for size in sorted({LEAST_CHUNK, max(LEAST_CHUNK, TOKENS_THAT_SHARE * number)}):
            if size <= most:
                yield [(size, each), *[(1, each)] * (number - 1)]


def _doublings(first: int, last: int) -> Iterator[int]:
    """first, twice as many, and so on, and last."""
    while first < last:
        yield first
        first *= 2
    yield last
