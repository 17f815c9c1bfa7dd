"""Steps that are run to be measured: what a step costs with few and many tokens, short and long
contexts."""

import time
from collections.abc import Iterator, Sequence

import torch

from nsa_platform.serve.pages import SequencePages
from nsa_platform.serve.runner import ModelRunner
from nsa_platform.serve.scheduler import Limits
from nsa_platform.serve.step_cost import StepWork
from nsa_platform.serve.transfer import on_device

CHUNKS = (16, 128, 512, 2048)
"""Tokens of a chunk of a prompt."""
LONG_CONTEXT = 32768
NUM_DECODES = 8
LONG_ENOUGH_S = 0.25
"""No larger step is measured after one that took as long."""
REPEATS = 2


def measured_steps(runner: ModelRunner, limits: Limits) -> Iterator[tuple[StepWork, float]]:
    """Works of steps and the seconds that they took. The cache must be unused; its pages are given
    back, with nothing of use in them."""
    # In half of the cache there are pages enough for sequences that end somewhere in a page.
    room = runner.cache.book.num_pages * runner.cache.page_size // 2
    for context in (0, min(LONG_CONTEXT, room)):
        seconds = 0.0
        most = min(limits.max_step_tokens, room)
        for count in sorted({min(count, most) for count in CHUNKS}):
            if seconds < LONG_ENOUGH_S:
                for work, seconds in _measured(runner, [(count, max(context, count))]):
                    yield work, seconds
        for number in (1, min(NUM_DECODES, limits.max_num_seqs)):
            each = max(1, min(context, room // number))
            yield from _measured(runner, [(1, each)] * number)


def _measured(
    runner: ModelRunner, chunks: Sequence[tuple[int, int]]
) -> Iterator[tuple[StepWork, float]]:
    """A step of chunks (new tokens, context with them), measured some times."""
    cache, book = runner.cache, runner.cache.book
    sequences = [SequencePages() for _ in chunks]
    try:
        for sequence, (count, context) in zip(sequences, chunks, strict=True):
            while sequence.num_tokens < context - count:
                rest = context - count - sequence.num_tokens
                book.extend(sequence, min(book.page_size, rest))
        counts = [count for count, _ in chunks]
        inputs = cache.extend(sequences, counts)
        last_rows = [sum(counts[: index + 1]) - 1 for index in range(len(counts))]
        for repeat in range(REPEATS + 1):
            started = time.perf_counter()
            ids = on_device([0] * sum(counts), torch.int64, cache.device)
            if max(counts) == 1:
                scores = runner.decode(ids, inputs)
            else:
                scores = runner.scores(runner.forward(ids, inputs), last_rows)
            scores.argmax(-1).tolist()  # waits for the device
            if repeat:  # the first one may compile kernels
                yield StepWork.of(chunks), time.perf_counter() - started
    finally:
        for sequence in sequences:
            book.release(sequence)
