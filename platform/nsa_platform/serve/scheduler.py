"""Which tokens of which requests go into the next step. No tensors.

A request waits, runs or is finished. schedule() gives every running request that decodes its one
token, and fills the rest of the step with chunks of prompts, several at once (prompt_shares.py). A
step takes no longer than max_step_s, as the cost model predicts, or one and a half times what it
would take without prompts: so a decode never waits for more than one such chunk, and a third of a
step is for prompts at least.

Requests have a rank: priority first (lower is more important), then arrival. They begin to run in
this order, but only max_long_prompts long prompts at once, so that short ones pass long ones that
wait for their turn. Nobody passes a request that waits for pages. A running request that finds no
page takes those of the running one of the lowest rank, if that is below its own. The loser waits
again, in its old place; with the prefix cache it computes little twice, and never loses a token.

Invariants, which check() proves:
    - a request is in exactly one place, and those that wait stand in order of rank;
    - every page in use belongs to as many requests as are counted;
and while anything is unfinished, schedule() makes progress: the running request of the highest
rank can take the pages of all others, and a request that does not fit alone is never added.
"""

import math
from bisect import insort
from dataclasses import dataclass

from nsa_platform.serve.page_pool import OutOfPages
from nsa_platform.serve.pages import PageBook
from nsa_platform.serve.prompt_shares import PromptShares
from nsa_platform.serve.request import Request, RequestState
from nsa_platform.serve.step_cost import CostModel, StepWork

MEAN_OVER = 32
"""Requests that an average is taken over, about."""
LEAST_FOR_PROMPTS = 0.5
"""Time for tokens of prompts in a step at least, as a share of what the step takes without them."""


@dataclass(frozen=True, slots=True)
class Limits:
    """How much a scheduler takes on at once."""

    max_num_seqs: int
    """Requests that run."""
    max_step_tokens: int
    """Tokens of one step."""
    max_step_s: float | None = None
    """Time of a step with prompts, as far as it can be predicted; None: any."""
    max_prompts: int = 8
    """Prompts that are being prefilled."""
    max_long_prompts: int = 4
    """Long ones among them."""
    long_prompt_tokens: int = 8192
    """A prompt with more tokens to compute than this is long."""

    def __post_init__(self) -> None:
        if self.max_step_tokens < self.max_num_seqs:
            raise ValueError(
                f"max_step_tokens={self.max_step_tokens} must be at least "
                f"max_num_seqs={self.max_num_seqs}"
            )


@dataclass(frozen=True, slots=True)
class Chunk:
    """The next tokens of one request; they have their places."""

    request: Request
    num_tokens: int
    is_last: bool
    """The request has no pending token after these: its next one is to be sampled."""

    @property
    def is_decode(self) -> bool:
        """Whether it is one generated token."""
        return self.num_tokens == 1 and self.is_last and bool(self.request.output_ids)


@dataclass(frozen=True, slots=True)
class Step:
    """What one forward pass computes."""

    chunks: tuple[Chunk, ...]
    num_preempted: int
    """Requests that gave their pages back."""
    begun: tuple[Request, ...]
    """Requests that run for the first time."""

    @property
    def num_tokens(self) -> int:
        return sum(chunk.num_tokens for chunk in self.chunks)

    @property
    def work(self) -> StepWork:
        sizes = [(c.num_tokens, c.request.pages.num_tokens, c.is_decode) for c in self.chunks]
        return StepWork.of(
            ((count, context) for count, context, is_decode in sizes if not is_decode),
            (context for _, context, is_decode in sizes if is_decode),
        )


class Scheduler:
    """Requests that wait and that run, and the book of their pages."""

    def __init__(self, book: PageBook, limits: Limits, cost: CostModel) -> None:
        self.book = book
        self.limits = limits
        self.cost = cost
        self.shares = PromptShares(cost, max_deficit=2 * limits.max_step_tokens)
        self.waiting: list[Request] = []
        self.running: list[Request] = []
        self.mean_outputs: float | None = None
        """Tokens that requests had generated when they ended, of late; None: none has ended."""
        # Who was last found to lack pages, and how many were free: it is not looked at again before
        # there are more.
        self._lacking: tuple[Request, int] | None = None

    @property
    def has_work(self) -> bool:
        return bool(self.waiting or self.running)

    def prompts(self) -> list[Request]:
        """Running requests that are being prefilled."""
        return [r for r in self.running if r.num_pending and not r.is_decoding]

    def is_long(self, num_pending: int) -> bool:
        """Whether a prompt with so many tokens to compute counts as long."""
        return num_pending > self.limits.long_prompt_tokens

    def check_size(self, num_prompt_tokens: int, max_tokens: int) -> None:
        """Raise ValueError if such a request does not fit into the cache even alone."""
        # The last token is never put through the model.
        num_pages = -(-(num_prompt_tokens + max_tokens - 1) // self.book.page_size)
        if num_pages > self.book.num_pages:
            raise ValueError(
                f"{num_prompt_tokens} prompt tokens + max_tokens={max_tokens} need {num_pages} "
                f"pages of {self.book.page_size} tokens, and the whole cache has "
                f"{self.book.num_pages} (num_kv_tokens)"
            )

    def add(self, request: Request) -> None:
        """Let a new request wait for its turn.

        Raises:
            ValueError: it could never run, for its tokens do not fit into the cache.
        """
        self.check_size(len(request.prompt_ids), request.params.max_tokens)
        insort(self.waiting, request, key=_rank)

    def schedule(self) -> Step:
        """Choose the next step, and give its tokens their places."""
        chunks: dict[Request, Chunk] = {}
        num_preempted = self._decode(chunks)
        begun = [] if num_preempted else self._admit()
        # Who comes back from a preemption may find all but its last token in the prefix cache.
        num_preempted += self._decode(chunks)
        num_preempted += self._prefill(chunks)
        return Step(tuple(chunks.values()), num_preempted, tuple(begun))

    def ahead(self, step: Step) -> Step | None:
        """The step after one of decodes alone, before it is known what that one says: one token
        more for each of its requests, with its place. None where another step may be due."""
        requests = [chunk.request for chunk in step.chunks]
        if not all(chunk.is_decode for chunk in step.chunks) or self._may_admit():
            return None
        if len(requests) != len(self.running) or set(requests) != set(self.running):
            return None
        try:
            self.book.extend_all([request.pages for request in requests], [1] * len(requests))
        except OutOfPages:
            return None
        return Step(tuple(Chunk(request, 1, is_last=True) for request in requests), 0, ())

    def settle(self, step: Step) -> None:
        """After the step has run: make known what it has computed, and give back window pages that
        no later token reaches."""
        for chunk in step.chunks:
            chunk.request.update_keys()
            self.book.publish(chunk.request.pages, chunk.request.keys)
            self.book.trim(chunk.request.pages)

    def finish(self, request: Request) -> None:
        """End a request, for whatever reason, wherever it is; its pages are free afterwards."""
        if request.state is RequestState.WAITING:
            self.waiting.remove(request)
        elif request.state is RequestState.RUNNING:
            self.running.remove(request)
        request.state = RequestState.FINISHED
        self.book.release(request.pages)
        if num_outputs := len(request.output_ids):
            mean = num_outputs if self.mean_outputs is None else self.mean_outputs
            self.mean_outputs = mean + (num_outputs - mean) / MEAN_OVER

    def check(self) -> None:
        """Prove the invariants.

        Raises:
            PageLeak: a page is lost, or held by more than are counted.
            AssertionError: a request is in the wrong place.
        """
        self.book.check(request.pages for request in self.running)
        ranks = [request.rank for request in self.waiting]
        assert ranks == sorted(ranks), "those that wait are not in order of rank"
        everybody = [*self.running, *self.waiting]
        assert len({request.arrival for request in everybody}) == len(everybody)
        assert all(request.state is RequestState.RUNNING for request in self.running)
        assert all(request.state is RequestState.WAITING for request in self.waiting)
        assert not any(request.pages.pages for request in self.waiting)
        assert len(self.running) <= self.limits.max_num_seqs

    def _decode(self, chunks: dict[Request, Chunk]) -> int:
        """One token for each request that decodes; how many had to give their pages to others."""
        num_preempted = 0
        decoding = [r for r in self.running if r.is_decoding and r not in chunks]
        for request in sorted(decoding, key=_rank):
            if request.state is RequestState.RUNNING:  # its pages may have gone to a higher rank
                num_preempted += self._make_room(request, chunks)
                if self.book.room(request.pages):
                    chunks[request] = self._take(request, 1)
        return num_preempted

    def _admit(self) -> list[Request]:
        """Let waiting requests begin, as long as nobody who runs is short of pages for it; which
        of them have never run before."""
        begun: list[Request] = []
        prompts = self.prompts()
        num_prompts, num_long = len(prompts), sum(self.is_long(r.num_pending) for r in prompts)
        # What the running ones still need: the rest of their prompts, and a page now and then.
        reserved = sum(self.book.missing(r.pages, r.num_pending) for r in prompts)
        for request in list(self.waiting):
            if num_prompts >= self.limits.max_prompts:
                break
            if len(self.running) >= self.limits.max_num_seqs:
                break
            is_long = self.is_long(request.num_to_compute)
            if is_long and num_long >= self.limits.max_long_prompts:
                continue
            if not self._begin(request, reserved):
                break
            reserved += self.book.missing(request.pages, request.num_pending)
            num_prompts += 1
            num_long += is_long
            if not request.has_begun:
                request.has_begun = True
                request.num_cached_tokens = request.pages.num_tokens
                begun.append(request)
        return begun

    def seconds_for_prompts(self, rest: float) -> float:
        """Time for tokens of prompts in a step whose rest takes so many seconds."""
        limit = self.limits.max_step_s
        return math.inf if limit is None else max(limit - rest, rest * LEAST_FOR_PROMPTS)

    def _may_admit(self) -> bool:
        """Whether somebody who waits may have a place, as long as nobody ends."""
        if not self.waiting or len(self.running) >= self.limits.max_num_seqs:
            return False
        request, num_free = self._lacking or (None, 0)
        return request is not self.waiting[0] or self.book.num_free_pages > num_free

    def _begin(self, request: Request, num_reserved: int) -> bool:
        """Let a request run if there are pages for all its tokens; whether there are."""
        num_free = self.book.num_free_pages - num_reserved
        if self.running and self._lacking == (request, num_free):
            return False
        request.update_keys()
        hit = self.book.match(request.keys)
        if self.book.missing_after(hit, request.keys) + len(self.running) > num_free:
            self._lacking = (request, num_free)
            return False
        self.waiting.remove(request)
        self.book.attach(request.pages, request.keys, hit)
        request.state = RequestState.RUNNING
        request.deficit = 0.0
        self.running.append(request)
        return True

    def _prefill(self, chunks: dict[Request, Chunk]) -> int:
        """Chunks of prompts beside the decodes; how many had to give their pages to others."""
        prompts = self.prompts()
        if not prompts:
            return 0
        num_tokens = self.limits.max_step_tokens - len(chunks)
        rest = self.cost.seconds_beside_prompts(Step((*chunks.values(),), 0, ()).work)
        counts = self.shares.split(prompts, num_tokens, self.seconds_for_prompts(rest))
        if not counts:
            counts = self.shares.split(prompts, min(num_tokens, self.book.page_size), math.inf)
        num_preempted, taken = 0, {}
        for request, count in sorted(counts.items(), key=lambda item: item[0].rank):
            if request.state is RequestState.RUNNING:
                num_preempted += self._make_room(request, chunks)
                taken[request] = min(count, self.book.room(request.pages))
                if taken[request]:
                    chunks[request] = self._take(request, taken[request])
        self.shares.book(prompts, taken)
        return num_preempted

    def _make_room(self, request: Request, chunks: dict[Request, Chunk]) -> int:
        """Preempt requests of lower ranks that are not in the step yet, until there is a place for
        one token; how many it took."""
        num_preempted = 0
        while not self.book.room(request.pages):
            below = [r for r in self.running if r.rank > request.rank and r not in chunks]
            if not below:
                break
            victim = max(below, key=_rank)
            self.running.remove(victim)
            self.book.release(victim.pages)
            victim.state = RequestState.WAITING
            insort(self.waiting, victim, key=_rank)
            num_preempted += 1
        return num_preempted

    def _take(self, request: Request, num_tokens: int) -> Chunk:
        self.book.extend(request.pages, num_tokens, request.keys)
        return Chunk(request, num_tokens, is_last=not request.num_pending)


def _rank(request: Request) -> tuple[int, int]:
    return request.rank
