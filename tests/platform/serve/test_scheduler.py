"""Scheduling without a model: who goes when, and that nothing is lost whatever happens."""

from collections.abc import Sequence
from dataclasses import dataclass, field

import pytest
from hypothesis import event, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, rule

from nsa_platform.serve.page_pool import PageLeak
from nsa_platform.serve.pages import ABSENT, PageBook
from nsa_platform.serve.request import Request, RequestState, SamplingParams
from nsa_platform.serve.scheduler import Limits, Scheduler, Step
from nsa_platform.serve.step_cost import CostModel


def next_token(tokens: list[int]) -> int:
    """A model that hangs on every token and its place."""
    value = 7
    for token in tokens:
        value = (31 * value + token) % 1009
    return value


@dataclass
class Machine:
    """A scheduler with a memory that holds, instead of keys and values, what these hang on.

    A row of a page hangs on all tokens up to its own, that of a compressed block on all up to the
    block's last one. Rows of shared pages are not written, as on a device.
    """

    scheduler: Scheduler
    block: int
    stride: int
    memory: dict[tuple[str, int], int] = field(default_factory=dict)
    """(pool, row) -> digest of the tokens that it hangs on."""
    emitted: dict[str, list[int]] = field(default_factory=dict)
    """Every token that was sampled, by request: what its listener has got."""
    num_arrived: int = 0
    num_preempted: int = 0
    num_cached: int = 0

    @classmethod
    def of(
        cls,
        *,
        num_pages: int = 20,
        page_size: int = 4,
        tail: int | None = 6,
        max_num_seqs: int = 4,
        max_step_tokens: int = 8,
        block: int = 2,
        stride: int = 1,
        is_caching: bool = True,
        spare_window_pages: int = 6,
        coefficients: tuple[float, ...] = (0.0,) * 6,
        max_step_s: float | None = None,
        **limits: int,
    ) -> "Machine":
        num_window_pages = None
        if tail is not None:
            tails = max_num_seqs * (-(-tail // page_size) + 3)
            num_window_pages = 1 + tails + max_step_tokens // page_size + spare_window_pages
        book = PageBook(
            page_size=page_size,
            num_pages=num_pages + 1,
            tail_tokens=tail or 0,
            num_window_pages=num_window_pages,
            enable_prefix_caching=is_caching,
            lookahead=0 if tail is None else block - stride,
        )
        bounds = Limits(max_num_seqs, max_step_tokens, max_step_s, **limits)
        return cls(Scheduler(book, bounds, CostModel(coefficients)), block, stride)

    def add(
        self,
        num_prompt: int,
        max_tokens: int,
        *,
        family: int | None = None,
        num_own: int = 0,
        priority: int = 0,
    ) -> Request:
        """Prompts of one family begin alike; the last num_own tokens are the request's own."""
        number = self.num_arrived
        root = 13 * number if family is None else 500 + family
        tokens = [(root + i) % 997 for i in range(num_prompt)]
        tokens[max(0, num_prompt - num_own) :] = [
            (7 * number + i) % 997 for i in range(min(num_own, num_prompt))
        ]
        keys = self.scheduler.book.keys(tokens)
        request = Request(
            str(number),
            tuple(tokens),
            SamplingParams(max_tokens=max_tokens),
            arrival=number,
            seed=0,
            keys=keys,
            num_to_compute=len(tokens) - self.scheduler.book.num_known(keys),
            priority=priority,
        )
        self.scheduler.add(request)
        self.emitted[request.request_id] = []
        self.num_arrived += 1
        return request

    def step(self) -> Step:
        decoding = [r for r in self.scheduler.running if r.is_decoding]
        has_work = self.scheduler.has_work
        step = self.scheduler.schedule()
        self.scheduler.check()
        assert step.num_tokens <= self.scheduler.limits.max_step_tokens
        served = [chunk.request for chunk in step.chunks]
        assert len(served) == len(set(served))
        assert bool(served) == has_work
        if served:  # who ranks highest of those that run is served, or behind in its fair share
            first = min((*self.scheduler.running, *self.scheduler.waiting), key=lambda r: r.rank)
            assert first in served or not first.is_decoding
        stalled = [r for r in decoding if r.state is RequestState.RUNNING and r not in served]
        assert all(self.scheduler.book.room(request.pages) == 0 for request in stalled)
        for chunk in step.chunks:
            self._compute(chunk.request, chunk.num_tokens)
        for chunk in step.chunks:
            self._read_back(chunk.request, chunk.num_tokens)
        self.scheduler.settle(step)
        self.scheduler.check()
        for chunk in step.chunks:
            if chunk.is_last:
                self._sample(chunk.request)
        self.scheduler.check()
        book = self.scheduler.book
        for request in self.scheduler.running:
            held = sum(page != ABSENT for page in request.pages.window_pages)
            assert held <= -(-book.tail_tokens // book.page_size) + 2
        self.num_preempted += step.num_preempted
        self.num_cached += sum(request.num_cached_tokens for request in step.begun)
        return step

    def drain(self) -> None:
        for _ in range(10_000):
            if not self.scheduler.has_work:
                return
            self.step()
        raise AssertionError("it does not end")

    def _row(self, pages: Sequence[int], position: int) -> int:
        size = self.scheduler.book.page_size
        assert pages[position // size] != ABSENT
        return pages[position // size] * size + position % size

    def _blocks(self, num_tokens: int) -> int:
        """Complete compressed blocks of so many tokens."""
        return max(0, (num_tokens - self.block) // self.stride + 1)

    def _compute(self, request: Request, num_tokens: int) -> None:
        pages, end = request.pages, request.pages.num_tokens
        shared = pages.num_shared * self.scheduler.book.page_size
        digests = digests_of(request.tokens(0, end))
        has_window = self.scheduler.book.window_pool is not None
        for position in range(end - num_tokens, end):
            if position >= shared:
                self.memory["all", self._row(pages.pages, position)] = digests[position]
            if has_window:
                self.memory["window", self._row(pages.window_pages, position)] = digests[position]
        for index in range(self._blocks(end - num_tokens), self._blocks(end)):
            start = index * self.stride
            if has_window and start >= shared:
                row = self._row(pages.pages, start)
                self.memory["blocks", row] = digests[start + self.block - 1]

    def _read_back(self, request: Request, num_tokens: int) -> None:
        """All that attention of the new tokens may read hangs on the request's own tokens."""
        book, pages, end = self.scheduler.book, request.pages, request.pages.num_tokens
        digests = digests_of(request.tokens(0, end))
        for position in range(end):
            assert self.memory["all", self._row(pages.pages, position)] == digests[position]
        if book.window_pool is None:
            return
        for position in range(max(0, end - num_tokens - book.tail_tokens), end):
            row = self._row(pages.window_pages, position)
            assert self.memory["window", row] == digests[position]
        for index in range(self._blocks(end)):
            row = self._row(pages.pages, index * self.stride)
            assert self.memory["blocks", row] == digests[index * self.stride + self.block - 1]

    def _sample(self, request: Request) -> None:
        assert request.num_pending == 0
        token = next_token(request.tokens(0, request.num_tokens))
        request.output_ids.append(token)
        self.emitted[request.request_id].append(token)
        if len(request.output_ids) == request.params.max_tokens:
            self.scheduler.finish(request)


def digests_of(tokens: list[int]) -> list[int]:
    """For each token a number that hangs on it and on all before."""
    value, digests = 7, []
    for token in tokens:
        value = (1_000_003 * value + token + 1) % (2**61 - 1)
        digests.append(value)
    return digests


def wanted(request: Request) -> list[int]:
    tokens = list(request.prompt_ids)
    for _ in range(request.params.max_tokens):
        tokens.append(next_token(tokens))
    return tokens[len(request.prompt_ids) :]


class Arrivals(RuleBasedStateMachine):
    """Requests come, run, are aborted and preempted in any order; the books stay straight."""

    @initialize(
        num_pages=st.integers(5, 20),
        sizes=st.sampled_from([(2, 2, 1), (3, 2, 1), (4, 3, 1), (4, 4, 2), (2, 2, 2), (8, 4, 2)]),
        tail=st.one_of(st.none(), st.integers(4, 12)),
        max_num_seqs=st.integers(2, 5),
        extra_tokens=st.integers(0, 20),
        max_step_s=st.sampled_from([None, 4.0, 12.0]),
        max_prompts=st.integers(1, 4),
        long_prompt_tokens=st.integers(5, 40),
        is_caching=st.sampled_from([True, True, False]),
        spare_window_pages=st.integers(0, 12),
    )
    def start(self, num_pages, sizes, max_num_seqs, extra_tokens, max_prompts, **fields) -> None:
        page_size, block, stride = sizes
        self.machine = Machine.of(
            num_pages=num_pages,
            page_size=page_size,
            max_num_seqs=max_num_seqs,
            max_step_tokens=max_num_seqs + extra_tokens,
            block=block,
            stride=stride,
            coefficients=(2.0, 1.0, 1.0, 0.01, 0.5, 0.001),
            max_prompts=max_prompts,
            max_long_prompts=(max_prompts + 1) // 2,
            **fields,
        )
        self.num_places = num_pages * page_size
        self.requests: list[Request] = []
        self.aborted: set[str] = set()
        self._add(min(30, self.num_places), 1, family=0)
        self.machine.drain()

    @rule(num_prompt=st.integers(1, 60), max_tokens=st.integers(1, 40), priority=st.integers(0, 1))
    def add_stranger(self, num_prompt: int, max_tokens: int, priority: int) -> None:
        self._add(num_prompt, max_tokens, priority=priority)

    @rule(
        num_prompt=st.integers(8, 60),
        max_tokens=st.integers(1, 12),
        family=st.integers(0, 1),
        num_own=st.integers(0, 9),
    )
    def add_relative(self, num_prompt: int, max_tokens: int, family: int, num_own: int) -> None:
        self._add(num_prompt, max_tokens, family=family, num_own=num_own)

    @rule(count=st.integers(1, 25))
    def step(self, count: int) -> None:
        for _ in range(count):
            self.machine.step()

    @rule(which=st.integers(0, 30))
    def abort_or_forget(self, which: int) -> None:
        scheduler = self.machine.scheduler
        if which < len(self.requests) and self.requests[which].state is not RequestState.FINISHED:
            scheduler.finish(self.requests[which])
            self.aborted.add(self.requests[which].request_id)
        elif which == 30:
            scheduler.book.forget()
        scheduler.check()

    def _add(self, num_prompt: int, max_tokens: int, **fields: int) -> None:
        # As long as the cache allows, and one token more is refused.
        room = self.num_places + 1 - num_prompt
        if max_tokens > room:
            with pytest.raises(ValueError, match="the whole cache has"):
                self.machine.add(num_prompt, max_tokens, **fields)
        if room > 0:
            request = self.machine.add(num_prompt, min(max_tokens, room), **fields)
            self.requests.append(request)

    def teardown(self) -> None:
        if not hasattr(self, "machine"):
            return
        self.machine.drain()
        event(f"preemptions: {min(self.machine.num_preempted, 3)}")
        event(f"cached tokens: {min(self.machine.num_cached, 1)}")
        book = self.machine.scheduler.book
        assert book.num_free_pages == book.num_pages
        for request in self.requests:
            emitted, whole = self.machine.emitted[request.request_id], wanted(request)
            is_cut = request.request_id in self.aborted
            assert emitted == (whole[: len(emitted)] if is_cut else whole)


class TestArrivals(Arrivals.TestCase):
    """No page and no token is lost, and nobody reads another's contents, whatever happens."""

    settings = settings(deadline=None, max_examples=120, stateful_step_count=30)


def counts(step: Step) -> dict[str, int]:
    return {chunk.request.request_id: chunk.num_tokens for chunk in step.chunks}


def test_decodes_go_on_beside_chunks_of_prompts():
    machine = Machine.of(num_pages=60, max_step_tokens=8)
    machine.add(3, 20)
    assert counts(machine.step()) == {"0": 3}
    machine.add(30, 2)
    machine.add(2, 2)
    # The short prompt is through at once, and the long one goes on beside it.
    assert counts(machine.step()) == {"0": 1, "2": 2, "1": 5}
    assert counts(machine.step()) == {"0": 1, "2": 1, "1": 6}
    for _ in range(2):
        assert counts(machine.step()) == {"0": 1, "1": 7}
    # The end of one prompt and the beginning of the next share a step.
    machine.add(9, 2)
    assert counts(machine.step()) == {"0": 1, "1": 5, "3": 2}


def test_a_step_takes_no_longer_than_it_may():
    # 1 s a step, 1 s a prompt token and 2 s a decode.
    machine = Machine.of(
        num_pages=60,
        max_step_tokens=40,
        coefficients=(1.0, 0.0, 1.0, 0.0, 2.0, 0.0),
        max_step_s=10.0,
    )
    machine.add(30, 9)
    assert counts(machine.step()) == {"0": 9}
    machine.add(2, 40)
    machine.add(3, 40)
    assert counts(machine.step()) == {"1": 2, "2": 3, "0": 4}
    # Two decodes take 5 s without prompts. Three take 7 s, and prompts may take half as much.
    assert counts(machine.step()) == {"1": 1, "2": 1, "0": 5}
    machine.add(1, 40)
    machine.step()
    assert counts(machine.step()) == {"1": 1, "2": 1, "3": 1, "0": 3}


def test_what_having_prompts_costs_is_no_share_of_their_tokens():
    # 1 s a step, 9 s more where it has prompts, 1 s a prompt token and 1 s a decode.
    machine = Machine.of(
        num_pages=60,
        max_step_tokens=40,
        coefficients=(1.0, 9.0, 1.0, 0.0, 1.0, 0.0),
        max_step_s=4.0,
    )
    machine.add(20, 9)
    # 10 s go by without a token, and prompts may take half as long.
    assert counts(machine.step()) == {"0": 5}
    machine.add(2, 40)
    assert counts(machine.step()) == {"1": 2, "0": 3}
    assert counts(machine.step()) == {"1": 1, "0": 5}


def test_a_step_moves_a_page_however_little_time_there_is():
    machine = Machine.of(coefficients=(0.0, 0.0, 1.0, 0.0, 0.0, 0.0), max_step_s=0.1)
    machine.add(10, 2)
    assert counts(machine.step()) == {"0": 4}


def test_a_long_prompt_gets_its_share_while_short_ones_keep_coming():
    machine = Machine.of(num_pages=400, max_num_seqs=3, max_step_tokens=10)
    long = machine.add(300, 1)
    machine.step()
    num_steps = 0
    while long.state is not RequestState.FINISHED:
        machine.add(9, 1)
        machine.step()
        num_steps += 1
        assert long.deficit <= machine.scheduler.shares.max_deficit + 10
    # Three prompts at a time share steps of ten tokens: a third of them is its due.
    assert 300 / 10 < num_steps <= 3 * 300 / 10 + 8


def test_short_prompts_pass_long_ones_that_wait_for_their_turn():
    machine = Machine.of(
        num_pages=200, max_step_tokens=10, max_prompts=3, max_long_prompts=1, long_prompt_tokens=20
    )
    machine.add(60, 1)
    machine.add(50, 1)
    machine.add(5, 1)
    assert counts(machine.step()) == {"2": 5, "0": 5}
    assert [request.request_id for request in machine.scheduler.waiting] == ["1"]
    machine.drain()


def test_lower_priorities_wait_and_give_way():
    machine = Machine.of(num_pages=10, page_size=4, max_num_seqs=3, max_step_tokens=20)
    low = machine.add(10, 12, priority=1)
    machine.step()
    high, lowest = machine.add(10, 12, priority=0), machine.add(10, 2, priority=2)
    assert counts(machine.step())["1"] == 10
    ended: list[Request] = []
    while machine.scheduler.has_work:
        machine.step()
        assert high.state is not RequestState.WAITING
        ended += [
            request
            for request in (low, high, lowest)
            if request.state is RequestState.FINISHED and request not in ended
        ]
    assert machine.num_preempted > 0
    assert ended.index(high) < ended.index(low)


def test_several_prompts_share_a_step():
    machine = Machine.of(num_pages=60, max_step_tokens=16)
    for _ in range(5):
        machine.add(3, 2)
    step = machine.step()
    assert counts(step) == {"0": 3, "1": 3, "2": 3, "3": 3}  # max_num_seqs
    assert all(chunk.is_last for chunk in step.chunks)


def test_even_decodes_that_fill_the_step_leave_a_token_for_a_prompt():
    machine = Machine.of(num_pages=60, max_num_seqs=3, max_step_tokens=3)
    machine.add(1, 30)
    machine.add(1, 30)
    machine.add(5, 2)
    machine.step()
    for _ in range(4):
        assert counts(machine.step()) == {"0": 1, "1": 1, "2": 1}


def test_the_youngest_makes_room_and_comes_back_first():
    machine = Machine.of(num_pages=6, page_size=4, max_step_tokens=20)
    requests = [machine.add(4, 12), machine.add(4, 12), machine.add(3, 2)]
    num_preempted, order = 0, []
    for _ in range(40):
        step = machine.step()
        num_preempted += step.num_preempted
        if step.num_preempted:
            assert machine.scheduler.waiting[0] is requests[1]
            assert not requests[1].pages.pages
        order += [r for r in requests if r.state is RequestState.FINISHED and r not in order]
    assert num_preempted == 1
    assert [request.output_ids for request in requests] == [wanted(r) for r in requests]
    assert order[0] is requests[2] or order[0] is requests[0]


def test_the_youngest_goes_back_before_those_who_have_waited():
    machine = Machine.of(num_pages=8, page_size=2, max_num_seqs=2, max_step_tokens=20)
    requests = [machine.add(2, 12), machine.add(4, 12), machine.add(1, 2)]
    while not machine.num_preempted:
        machine.step()
    assert list(machine.scheduler.waiting) == requests[1:]
    machine.drain()
    assert [request.output_ids for request in requests] == [wanted(r) for r in requests]


def test_nobody_is_let_in_whose_pages_the_running_ones_are_about_to_need():
    machine = Machine.of(num_pages=6, page_size=4, max_num_seqs=4, max_step_tokens=9)
    machine.add(15, 4)  # four pages, and one to grow into: two are free, so one can be given away
    machine.add(5, 4)
    assert counts(machine.step()) == {"0": 9}
    assert counts(machine.step()) == {"0": 6}
    machine.add(1, 2)
    # The head of the line needs two pages; who stands behind it does not overtake it.
    assert counts(machine.step()) == {"0": 1}
    machine.drain()
    assert machine.num_preempted == 0


def test_who_comes_back_with_one_token_to_go_goes_on_at_once():
    machine = Machine.of(num_pages=10, tail=None, max_num_seqs=2, max_step_tokens=8)
    request = machine.add(12, 10)
    while request.num_tokens < 17 or request.num_pending != 1:
        machine.step()
    machine.scheduler.running.remove(request)
    machine.scheduler.book.release(request.pages)
    request.state = RequestState.WAITING
    machine.scheduler.waiting.append(request)
    assert counts(machine.step()) == {"0": 1}
    machine.drain()
    assert request.output_ids == wanted(request)


def test_a_lost_page_is_noticed():
    machine = Machine.of()
    request = machine.add(9, 3)
    machine.step()
    page = request.pages.pages.pop()
    with pytest.raises(PageLeak, match=rf"nobody holds: \[{page}\]"):
        machine.scheduler.check()
    request.pages.pages.extend([page, page])
    with pytest.raises(PageLeak, match=rf"{page}: \(2, 1\)"):
        machine.scheduler.check()


def test_a_step_must_hold_every_decode():
    with pytest.raises(ValueError, match="max_step_tokens=3 must be at least max_num_seqs=4"):
        Limits(max_num_seqs=4, max_step_tokens=3)
