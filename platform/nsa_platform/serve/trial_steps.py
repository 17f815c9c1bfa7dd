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

Chunks = Sequence[tuple[int, int]]
"""A step: the new tokens of each sequence, and the context with them."""

FEWEST_TOKENS = 2
"""Of a chunk alone; one token is a decode."""
LEAST_CHUNK = 16
"""Beside decodes."""
SHORT_CHUNK = 64
LEAST_CONTEXT = 1024
"""Kernels for shorter contexts are the same."""

TOKENS_THAT_SHARE = 4
"""New tokens of a step for each of its sequences, from which on kernels for many are taken."""


@contextmanager
def trial_step(runner: ModelRunner, chunks: Chunks) -> Iterator[Callable[[], None]]:
    """What runs a step and waits for its end. The cache must have room for it; its pages are given
    back, with nothing of use in them."""
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
    """Run a step of every kind that kernels are compiled for; returns how many."""
    started, count = time.monotonic(), 0
    for chunks in warm_up_steps(limits, max_model_len, room_for_trials(runner)):
        with trial_step(runner, chunks) as run:
            run()
        count += 1
    log.info("%d steps of all kinds were run in %.1f s", count, time.monotonic() - started)
    return count


def warm_up_steps(limits: Limits, max_model_len: int, room: int) -> Iterator[Chunks]:
    """Chunks on contexts of doubling lengths, alone and, on every other length, beside decodes of
    doubling numbers; long chunks, which take long, on the first and the last length alone. room:
    tokens of a step's contexts together at most."""
    longest = min(max_model_len, room)
    for index, context in enumerate(_doublings(LEAST_CONTEXT, longest)):
        most = min(context, limits.max_step_tokens)
        if 0 < index and context < longest:
            most = min(most, SHORT_CHUNK)
        for size in _doublings(FEWEST_TOKENS, most):
            yield [(size, context)]
        if index % 2 == 0:
            yield from _mixed_steps(context, limits, room)


def _mixed_steps(context: int, limits: Limits, room: int) -> Iterator[Chunks]:
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
