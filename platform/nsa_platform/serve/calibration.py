"""Steps that are run to be measured: what a step costs with few and many tokens, short and long
contexts."""

import time
from collections.abc import Iterator, Sequence

from nsa_platform.serve.runner import ModelRunner
from nsa_platform.serve.scheduler import Limits
from nsa_platform.serve.step_cost import StepWork
from nsa_platform.serve.trial_steps import room_for_trials, trial_step

CHUNKS = (16, 128, 512, 2048, 8192)
"""Tokens of a chunk of a prompt."""
LONG_CONTEXT = 32768
NUM_DECODES = 8
LONG_ENOUGH_S = 0.25
"""No larger step is measured after one that took as long."""
REPEATS = 2


def measured_steps(runner: ModelRunner, limits: Limits) -> Iterator[tuple[StepWork, float]]:
    """Works of steps and the seconds that they took. The cache must be unused."""
    room = room_for_trials(runner)
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
    """A step of chunks (new tokens, context with them), measured some times. Chunks of a token are
    decodes, as they are to trial steps."""
    prompts = [chunk for chunk in chunks if chunk[0] > 1]
    work = StepWork.of(prompts, (context for count, context in chunks if count == 1))
    with trial_step(runner, chunks) as run:
        for repeat in range(REPEATS + 1):
            started = time.perf_counter()
            run()
            if repeat:  # the first one may compile kernels
                yield work, time.perf_counter() - started
