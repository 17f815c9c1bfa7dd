"""Which tokens of which requests go into the next step. No tensors.

A request waits, runs or is finished. schedule() gives every running request that decodes its one
token, and fills the rest of the step with chunks of prompts: first of those that have begun, then
of those that wait. So a decode never waits for more than one step's chunks of prompts.

Order is first come, first served: whoever waits came after everybody who runs. A request that
finds no page takes those of the youngest running one, if that is younger than itself. The loser
goes back to the head of the line and is computed again from its prompt and what it had generated;
it loses time, never tokens.

Invariants, which check() proves:
    - a request is in exactly one place, and both lines are in order of arrival;
    - every page in use belongs to one request;
and while anything is unfinished, schedule() makes progress: the oldest running request can take
the pages of all others, and a request that does not fit alone is never added.
"""

from collections import deque
from dataclasses import dataclass

from nsa_platform.serve.pages import PageBook
from nsa_platform.serve.request import Request, RequestState


@dataclass(frozen=True, slots=True)
class Chunk:
    """The next tokens of one request; they have their places."""

    request: Request
    num_tokens: int
    is_last: bool
    """The request has no pending token after these: its next one is to be sampled."""


@dataclass(frozen=True, slots=True)
class Step:
    """What one forward pass computes."""

    chunks: tuple[Chunk, ...]
    num_preempted: int
    """Requests that gave their pages back."""

    @property
    def num_tokens(self) -> int:
        return sum(chunk.num_tokens for chunk in self.chunks)


class Scheduler:
    """The two lines of an engine, and the book of its pages."""

    def __init__(self, book: PageBook, *, max_num_seqs: int, max_step_tokens: int) -> None:
        """max_num_seqs: requests that run at once. max_step_tokens: tokens of one step."""
        if max_step_tokens < max_num_seqs:
            raise ValueError(
                f"max_step_tokens={max_step_tokens} must be at least max_num_seqs={max_num_seqs}"
            )
        self.book = book
        self.max_num_seqs = max_num_seqs
        self.max_step_tokens = max_step_tokens
        self.waiting: deque[Request] = deque()
        self.running: list[Request] = []

    @property
    def has_work(self) -> bool:
        return bool(self.waiting or self.running)

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
        """Put a new request, younger than all others, at the end of the line.

        Raises:
            ValueError: it could never run, for its tokens do not fit into the cache.
        """
        self.check_size(len(request.prompt_ids), request.params.max_tokens)
        self.waiting.append(request)

    def schedule(self) -> Step:
        """Choose the next step, and give its tokens their places."""
        chunks: list[Chunk] = []
        num_preempted = 0
        budget = self.max_step_tokens - sum(request.is_decoding for request in self.running)
        for request in list(self.running):
            if request.state is not RequestState.RUNNING:
                continue  # its pages went to an older one
            is_decoding = request.is_decoding
            wanted = 1 if is_decoding else min(request.num_pending, budget)
            if wanted:
                num_preempted += self._make_room(request)
                wanted = min(wanted, self.book.room(request.pages))
            if wanted:
                chunks.append(self._take(request, wanted))
                budget -= 0 if is_decoding else wanted
        chunks += self._admit(budget)
        return Step(tuple(chunks), num_preempted)

    def settle(self, step: Step) -> None:
        """After the step has run: give back window pages that no later token reaches."""
        for chunk in step.chunks:
            self.book.trim(chunk.request.pages)

    def finish(self, request: Request) -> None:
        """End a request, for whatever reason, wherever it is; its pages are free afterwards."""
        if request.state is RequestState.WAITING:
            self.waiting.remove(request)
        elif request.state is RequestState.RUNNING:
            self.running.remove(request)
        request.state = RequestState.FINISHED
        self.book.release(request.pages)

    def check(self) -> None:
        """Prove the invariants.

        Raises:
            PageLeak: a page is lost, or held twice.
            AssertionError: a request is in the wrong place.
        """
        self.book.check(request.pages for request in self.running)
        arrivals = [request.arrival for request in (*self.running, *self.waiting)]
        assert arrivals == sorted(set(arrivals)), "the lines are not in order of arrival"
        assert all(request.state is RequestState.RUNNING for request in self.running)
        assert all(request.state is RequestState.WAITING for request in self.waiting)
        assert not any(request.pages.pages for request in self.waiting)
        assert len(self.running) <= self.max_num_seqs

    def _make_room(self, request: Request) -> int:
        """Preempt younger requests until there is a place for one token; how many it took."""
        num_preempted = 0
        while not self.book.room(request.pages) and self.running[-1] is not request:
            victim = self.running.pop()
            self.book.release(victim.pages)
            victim.state = RequestState.WAITING
            self.waiting.appendleft(victim)
            num_preempted += 1
        return num_preempted

    def _admit(self, budget: int) -> list[Chunk]:
        """First chunks of waiting requests, as long as nobody who runs is short of pages for it.

        There is budget left only when every prompt that has begun is through: what the running
        ones still need is a page each, now and then.
        """
        chunks: list[Chunk] = []
        while self.waiting and len(self.running) < self.max_num_seqs and budget:
            request = self.waiting[0]
            needed = self.book.missing(request.pages, request.num_pending)
            if needed + len(self.running) > self.book.num_free_pages:
                break
            count = min(request.num_pending, budget, self.book.room(request.pages))
            if not count:
                break
            self.waiting.popleft()
            request.state = RequestState.RUNNING
            self.running.append(request)
            chunks.append(self._take(request, count))
            budget -= count
        return chunks

    def _take(self, request: Request, num_tokens: int) -> Chunk:
        self.book.extend(request.pages, num_tokens)
        return Chunk(request, num_tokens, is_last=not request.num_pending)
