"""Whether a request is accepted: when would its first token come? No tensors.

Prompts are served in shares, the shortest first: what is shorter goes before, what is longer only
fills the steps up, but for what it is owed. Where a request has to wait for a place among the
prompts, or among the long ones, those that come to their end first make it. Where it has to wait
for pages, or for a place among those that run, they come back when requests have generated as many
tokens as others did of late, or all that they may: the latest time, as long as none has ended.
"""

import math
from collections.abc import Iterable
from heapq import heapify, heapreplace

from nsa_platform.serve.request import Request
from nsa_platform.serve.scheduler import MEAN_OVER, Scheduler
from nsa_platform.serve.step_cost import StepWork

MEAN_PROMPT_TOKENS = 1024.0
"""Length of an average prompt before any has come."""


class QueueFull(RuntimeError):
    """The engine does not take a request now; the same one may be accepted later."""

    def __init__(self, message: str, *, retry_after_s: float) -> None:
        """retry_after_s: when it is likely to be accepted if nobody else comes."""
        super().__init__(message)
        self.retry_after_s = retry_after_s


class NeverInTime(ValueError):
    """No engine of these sizes has the first token of such a request by then."""


def predicted_ttft_s(scheduler: Scheduler, num_tokens: int, priority: int = 0) -> float:
    """Seconds until the first token of a request with num_tokens tokens to compute; 0 as long as
    the cost model knows nothing."""
    cost, limits = scheduler.cost, scheduler.limits
    own = cost.prompt_seconds(num_tokens, 0)
    ahead = [r for r in (*scheduler.prompts(), *scheduler.waiting) if r.priority <= priority]
    theirs = {r: cost.prompt_seconds(_num_to_go(r), r.pages.num_tokens) for r in ahead}
    by_work = sorted(ahead, key=lambda request: theirs[request])
    before = set(by_work[: max(0, len(ahead) - limits.max_prompts + 1)])
    if scheduler.is_long(num_tokens):
        long_ones = [request for request in by_work if scheduler.is_long(_num_to_go(request))]
        before |= set(long_ones[: max(0, len(long_ones) - limits.max_long_prompts + 1)])
    work = own
    for request in ahead:
        if request in before or request.priority < priority or theirs[request] <= own:
            work += theirs[request]
        elif request.deficit > scheduler.shares.max_deficit:
            work += min(theirs[request], cost.prompt_seconds(int(request.deficit), 0))
    fixed = cost.seconds_beside_prompts(_decodes(scheduler))
    in_a_step = _prompts_in_a_step_s(scheduler, fixed)
    num_steps = math.ceil(work / in_a_step) if in_a_step > 0.0 else 1
    filled = min(num_steps * in_a_step, own + sum(theirs.values()))
    waits = (r for r in scheduler.waiting if r.priority <= priority)
    begins = max(_pages_s(scheduler, num_tokens), _place_s(scheduler, waits))
    return max(filled, begins + own) + num_steps * fixed


def _alone_s(scheduler: Scheduler, num_tokens: int) -> float:
    """Seconds until the first token of such a request if nobody else were there."""
    own = scheduler.cost.prompt_seconds(num_tokens, 0)
    fixed = scheduler.cost.seconds_beside_prompts(StepWork())
    in_a_step = _prompts_in_a_step_s(scheduler, fixed)
    return own + fixed * (math.ceil(own / in_a_step) if in_a_step > 0.0 else 1)


def _prompts_in_a_step_s(scheduler: Scheduler, fixed: float) -> float:
    """Time of a step for tokens of prompts, as far as they fit in."""
    most = scheduler.cost.prompt_seconds(scheduler.limits.max_step_tokens, 0)
    return min(most, scheduler.seconds_for_prompts(fixed))


def next_end_s(scheduler: Scheduler) -> float:
    """Seconds until a request ends, as predicted."""
    return next(iter(_endings(scheduler)), (0.0, 0))[0]


def queued_tokens(scheduler: Scheduler) -> int:
    """Tokens to compute before all that are prefilled or wait have their next token."""
    return sum(_num_to_go(request) for request in (*scheduler.prompts(), *scheduler.waiting))


def _shown(seconds: float) -> str:
    """For a message: to a tenth, or what is below a second to two digits."""
    return f"{seconds:.1f}" if seconds >= 1 else f"{seconds:.2g}"


def _num_to_go(request: Request) -> int:
    """Tokens to compute before the request's next token comes."""
    return min(request.num_pending, request.num_to_compute)


def _decodes(scheduler: Scheduler) -> StepWork:
    """Work of a step of all requests that decode."""
    return StepWork.of((), (r.num_tokens for r in scheduler.running if r.is_decoding))


def _endings(scheduler: Scheduler) -> list[tuple[float, int]]:
    """Of each running request the seconds until it ends, and its pages; the first to end first."""
    cost, decodes, prompts = scheduler.cost, _decodes(scheduler), scheduler.prompts()
    step_s, for_prompts = cost.seconds(decodes), math.inf
    if scheduler.limits.max_step_s is not None and prompts:
        rest = cost.seconds_beside_prompts(decodes)
        for_prompts = scheduler.seconds_for_prompts(rest)
        step_s = rest + for_prompts
    prompts_s = sum(cost.prompt_seconds(r.num_pending, r.pages.num_tokens) for r in prompts)
    # Steps of step_s bring for_prompts of it; without a limit all of it at once.
    prompts_s = max(prompts_s, prompts_s / for_prompts * step_s)
    endings = []
    for request in scheduler.running:
        num_left = _num_to_generate(scheduler, request)
        begins_s = 0.0 if request.is_decoding else prompts_s
        endings.append((begins_s + num_left * step_s, len(request.pages.pages)))
    return sorted(endings)


def _num_to_generate(scheduler: Scheduler, request: Request) -> int:
    """Tokens that a request will still generate: as many as others did, whatever it has already, or
    all that it may."""
    most = request.params.max_tokens - len(request.output_ids)
    mean = scheduler.mean_outputs
    return most if mean is None else min(most, math.ceil(mean))


def _place_s(scheduler: Scheduler, ahead: Iterable[Request]) -> float:
    """Seconds until there is a place among those that run, behind those ahead that wait for one."""
    num_free = scheduler.limits.max_num_seqs - len(scheduler.running)
    if num_free > len(scheduler.waiting):
        return 0.0
    step_s = scheduler.cost.seconds(_decodes(scheduler))
    ends = [0.0] * num_free + [seconds for seconds, _ in _endings(scheduler)]
    heapify(ends)
    for request in ahead:
        prompt_s = scheduler.cost.prompt_seconds(_num_to_go(request), request.pages.num_tokens)
        heapreplace(ends, ends[0] + prompt_s + _num_to_generate(scheduler, request) * step_s)
    return ends[0]


def _pages_s(scheduler: Scheduler, num_tokens: int) -> float:
    """Seconds until there are pages for a prompt of so many tokens behind all that wait."""
    book = scheduler.book
    wanted = [num_tokens, *(request.num_to_compute for request in scheduler.waiting)]
    needed = sum(-(-count // book.page_size) for count in wanted)
    needed += sum(book.missing(r.pages, r.num_pending) for r in scheduler.prompts())
    needed += len(scheduler.running) - book.num_free_pages
    seconds = 0.0
    for ends_s, num_pages in _endings(scheduler):
        if needed <= 0:
            break
        seconds = ends_s
        needed -= num_pages
    return seconds


class Admission:
    """Accepts what the engine has a place for and can answer in time."""

    def __init__(
        self, scheduler: Scheduler, *, max_num_queued: int, max_ttft_s: float | None
    ) -> None:
        """max_num_queued: requests that may wait. max_ttft_s: the latest first token; None: any."""
        self.scheduler = scheduler
        self.max_num_queued = max_num_queued
        self.max_ttft_s = max_ttft_s
        self._mean_tokens = MEAN_PROMPT_TOKENS

    @property
    def max_num_requests(self) -> int:
        """Requests that run or wait at once."""
        return self.scheduler.limits.max_num_seqs + self.max_num_queued

    def check(self, num_tokens: int, *, priority: int, deadline_s: float | None) -> None:
        """Tell whether a request with num_tokens tokens to compute is accepted.

        Raises:
            ValueError: the deadline, in seconds from now, is not positive.
            NeverInTime: it is not, and would not be by an idle engine.
            QueueFull: it is not now.
        """
        if deadline_s is not None and not deadline_s > 0:
            raise ValueError(f"deadline_s={deadline_s} must be positive")
        num_here = len(self.scheduler.running) + len(self.scheduler.waiting)
        if num_here >= self.max_num_requests:
            raise QueueFull(
                f"{num_here} requests run or wait, and no more than max_num_seqs="
                f"{self.scheduler.limits.max_num_seqs} + max_num_queued={self.max_num_queued} may",
                retry_after_s=next_end_s(self.scheduler),
            )
        alone = _alone_s(self.scheduler, num_tokens)
        for name, bound in (("deadline_s", deadline_s), ("max_ttft_s", self.max_ttft_s)):
            if bound is None:
                continue
            if alone > bound:
                raise NeverInTime(
                    f"{name}={bound:g} is less than the {_shown(alone)} s that {num_tokens} "
                    "tokens of a prompt take alone"
                )
            predicted = predicted_ttft_s(self.scheduler, num_tokens, priority)
            if predicted > bound:
                raise QueueFull(
                    f"the first token is predicted to come after {_shown(predicted)} s, and "
                    f"{name} is {bound:g}",
                    # What is ahead of it is worked off at the rate of time.
                    retry_after_s=predicted - bound,
                )
        self._mean_tokens += (num_tokens - self._mean_tokens) / MEAN_OVER

    def predicted_ttft_s(self) -> float:
        """When the first token of a request of average length would come if it came now."""
        return predicted_ttft_s(self.scheduler, round(self._mean_tokens))
