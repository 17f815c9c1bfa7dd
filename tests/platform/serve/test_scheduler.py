"""Scheduling without a model: who goes when, and that nothing is lost whatever happens."""

from dataclasses import dataclass, field

import pytest
from hypothesis import HealthCheck, event, given, settings
from hypothesis import strategies as st

from nsa_platform.serve.pages import ABSENT, PageBook, PageLeak
from nsa_platform.serve.request import Request, RequestState, SamplingParams
from nsa_platform.serve.scheduler import Scheduler, Step


def next_token(tokens: list[int]) -> int:
    """A model that hangs on every token and its place."""
    value = 7
    for token in tokens:
        value = (31 * value + token) % 1009
    return value


@dataclass
class Machine:
    """A scheduler with a memory that holds tokens instead of keys and values."""

    scheduler: Scheduler
    memory: dict[tuple[str, int], tuple[str, int, int]] = field(default_factory=dict)
    """(pool, slot) -> request, position, token."""
    emitted: dict[str, list[int]] = field(default_factory=dict)
    """Every token that was sampled, by request: what its listener has got."""
    num_arrived: int = 0
    num_preempted: int = 0

    @classmethod
    def of(
        cls,
        *,
        num_pages: int = 20,
        page_size: int = 4,
        tail: int | None = 6,
        max_num_seqs: int = 4,
        max_step_tokens: int = 8,
    ) -> "Machine":
        num_window_pages = None
        if tail is not None:
            tails = max_num_seqs * (-(-tail // page_size) + 2)
            num_window_pages = 1 + tails + max_step_tokens // page_size
        book = PageBook(
            page_size=page_size,
            num_pages=num_pages + 1,
            tail_tokens=tail or 0,
            num_window_pages=num_window_pages,
        )
        return cls(Scheduler(book, max_num_seqs=max_num_seqs, max_step_tokens=max_step_tokens))

    def add(self, num_prompt: int, max_tokens: int) -> Request:
        number = self.num_arrived
        request = Request(
            str(number),
            tuple((13 * number + i) % 997 for i in range(num_prompt)),
            SamplingParams(max_tokens=max_tokens),
            arrival=number,
            seed=0,
        )
        self.scheduler.add(request)
        self.emitted[request.request_id] = []
        self.num_arrived += 1
        return request

    def step(self) -> Step:
        decoding = [r for r in self.scheduler.running if r.is_decoding]
        oldest = (*self.scheduler.running, *self.scheduler.waiting)[:1]
        step = self.scheduler.schedule()
        self.scheduler.check()
        assert step.num_tokens <= self.scheduler.max_step_tokens
        served = [chunk.request for chunk in step.chunks]
        assert len(served) == len(set(served))
        assert oldest == () or oldest[0] in served
        stalled = [r for r in decoding if r.state is RequestState.RUNNING and r not in served]
        assert all(self.scheduler.book.room(request.pages) == 0 for request in stalled)
        for chunk in step.chunks:
            self._compute(chunk.request, chunk.num_tokens)
        for chunk in step.chunks:
            self._read_back(chunk.request)
            if chunk.is_last:
                self._sample(chunk.request)
        self.scheduler.settle(step)
        self.scheduler.check()
        book = self.scheduler.book
        for request in self.scheduler.running:
            held = sum(page != ABSENT for page in request.pages.window_pages)
            assert held <= -(-book.tail_tokens // book.page_size) + 1
        self.num_preempted += step.num_preempted
        return step

    def drain(self) -> None:
        for _ in range(10_000):
            if not self.scheduler.has_work:
                return
            self.step()
        raise AssertionError("it does not end")

    def _slots(self, request: Request, position: int) -> list[tuple[str, int]]:
        size, pages = self.scheduler.book.page_size, request.pages
        slots = [("all", pages.pages[position // size] * size + position % size)]
        if self.scheduler.book.window_allocator is not None:
            page = pages.window_pages[position // size]
            slots += [("window", page * size + position % size)] if page != ABSENT else []
        return slots

    def _compute(self, request: Request, num_tokens: int) -> None:
        end = request.pages.num_tokens
        for position in range(end - num_tokens, end):
            token = request.tokens(position, position + 1)[0]
            for slot in self._slots(request, position):
                self.memory[slot] = (request.request_id, position, token)

    def _read_back(self, request: Request) -> None:
        end, tail = request.pages.num_tokens, self.scheduler.book.tail_tokens
        for position in range(end):
            slots = self._slots(request, position)
            token = request.tokens(position, position + 1)[0]
            assert all(self.memory[s] == (request.request_id, position, token) for s in slots)
            if self.scheduler.book.window_allocator is not None:
                assert len(slots) == 2 or position < end - tail

    def _sample(self, request: Request) -> None:
        assert request.num_pending == 0
        token = next_token(request.tokens(0, request.num_tokens))
        request.output_ids.append(token)
        self.emitted[request.request_id].append(token)
        if len(request.output_ids) == request.params.max_tokens:
            self.scheduler.finish(request)


def wanted(request: Request) -> list[int]:
    tokens = list(request.prompt_ids)
    for _ in range(request.params.max_tokens):
        tokens.append(next_token(tokens))
    return tokens[len(request.prompt_ids) :]


OPERATIONS = st.lists(
    st.one_of(
        st.tuples(st.just("add"), st.integers(1, 12), st.integers(1, 40)),
        st.tuples(st.just("add"), st.integers(1, 60), st.integers(1, 3)),
        st.tuples(st.just("abort"), st.integers(0, 15), st.just(0)),
        st.tuples(st.just("step"), st.integers(1, 9), st.just(0)),
    ),
    min_size=12,
    max_size=40,
)


@settings(deadline=None, max_examples=120, suppress_health_check=[HealthCheck.too_slow])
@given(
    operations=OPERATIONS,
    num_pages=st.integers(5, 20),
    page_size=st.sampled_from([2, 3, 4]),
    tail=st.one_of(st.none(), st.integers(1, 12)),
    max_num_seqs=st.integers(2, 5),
    extra_tokens=st.integers(0, 20),
)
def test_no_page_and_no_token_is_lost_whatever_happens(
    operations, num_pages, page_size, tail, max_num_seqs, extra_tokens
):
    machine = Machine.of(
        num_pages=num_pages,
        page_size=page_size,
        tail=tail,
        max_num_seqs=max_num_seqs,
        max_step_tokens=max_num_seqs + extra_tokens,
    )
    requests: list[Request] = []
    aborted: set[str] = set()
    for what, first, second in operations:
        if what == "add":
            # As long as the cache allows, and one token more is refused.
            room = num_pages * page_size + 1 - first
            if second > room:
                with pytest.raises(ValueError, match=f"the whole cache has {num_pages}"):
                    machine.add(first, second)
            if room > 0:
                requests.append(machine.add(first, min(second, room)))
        elif what == "abort" and first < len(requests):
            request = requests[first]
            if request.state is not RequestState.FINISHED:
                machine.scheduler.finish(request)
                aborted.add(request.request_id)
                machine.scheduler.check()
        elif what == "step":
            for _ in range(first):
                machine.step()
    machine.drain()
    event(f"preemptions: {min(machine.num_preempted, 5)}")
    assert machine.scheduler.book.num_free_pages == num_pages
    for request in requests:
        emitted, whole = machine.emitted[request.request_id], wanted(request)
        assert emitted == (whole[: len(emitted)] if request.request_id in aborted else whole)


def counts(step: Step) -> dict[str, int]:
    return {chunk.request.request_id: chunk.num_tokens for chunk in step.chunks}


def test_decodes_go_on_beside_chunks_of_prompts():
    machine = Machine.of(num_pages=60, max_step_tokens=8)
    machine.add(3, 20)
    assert counts(machine.step()) == {"0": 3}
    machine.add(30, 2)
    machine.add(2, 2)
    assert counts(machine.step()) == {"0": 1, "1": 7}
    assert counts(machine.step()) == {"0": 1, "1": 7}
    assert counts(machine.step()) == {"0": 1, "1": 7}
    assert counts(machine.step()) == {"0": 1, "1": 7}
    # The end of one prompt and the whole next share a step.
    assert counts(machine.step()) == {"0": 1, "1": 2, "2": 2}
    assert counts(machine.step()) == {"0": 1, "1": 1, "2": 1}


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


def test_a_lost_page_is_noticed():
    machine = Machine.of()
    request = machine.add(9, 3)
    machine.step()
    page = request.pages.pages.pop()
    with pytest.raises(PageLeak, match=rf"nobody holds: \[{page}\]"):
        machine.scheduler.check()
    request.pages.pages += [page, page]
    with pytest.raises(PageLeak, match="1 pages are held twice"):
        machine.scheduler.check()


def test_a_step_must_hold_every_decode():
    with pytest.raises(ValueError, match="max_step_tokens=3 must be at least max_num_seqs=4"):
        Machine.of(max_num_seqs=4, max_step_tokens=3)
