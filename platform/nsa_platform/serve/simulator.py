"""Replays a trace of requests through the real scheduler and page book, without a model.

The cost model is the clock: a step takes as long as it predicts. Several replicas may serve, each
with a scheduler of its own; who gets which request and how many replicas there are is decided by
two objects that the caller brings:

    class Router(Protocol):
        def choose(
            self, request: TraceRequest, replicas: Mapping[int, ReplicaLoad], now_s: float
        ) -> int
            Number of one of these replicas; they are ready and not draining.

    class AutoscalingPolicy(Protocol):
        def target(self, replicas: Mapping[int, ReplicaLoad], state: ScalingState) -> int
            How many replicas there should be; asked every state.interval_s.

ReplicaLoad's fields are named and meant as those of EngineStats, which a real replica reports. New
replicas take start_s until they are ready. Replicas that are too many get no more requests and go
when those that they have are through. Requests that come while no replica is ready wait.
"""

import heapq
import itertools
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Protocol

from nsa_platform.serve.admission import Admission, QueueFull, queued_tokens
from nsa_platform.serve.request import Request, RequestState, SamplingParams
from nsa_platform.serve.scheduler import Scheduler, Step

OWN_TOKENS = 1 << 20
"""Ids from here on stand for tokens that no other request has."""


@dataclass(frozen=True, slots=True)
class TraceRequest:
    """One request of a trace."""

    arrival_s: float
    num_prompt_tokens: int
    num_output_tokens: int
    prefix_group: int = 0
    """Requests of one group begin with the same tokens."""
    num_prefix_tokens: int = 0
    """As many as this; 0: none."""
    priority: int = 0


@dataclass(frozen=True, slots=True)
class ReplicaLoad:
    """What a replica tells of itself."""

    num_running: int
    num_waiting: int
    queued_prefill_tokens: int
    pages_used: int
    pages_total: int
    predicted_ttft_s: float


@dataclass(frozen=True, slots=True)
class ScalingState:
    """What a policy is told beside the loads of the replicas that are ready."""

    now_s: float
    interval_s: float
    """Time between two questions."""
    num_target: int
    """The answer to the last one."""
    num_starting: int
    """Replicas that are not ready yet."""
    num_unrouted: int
    """Requests that wait for a replica."""


class Router(Protocol):
    """Decides which replica serves a request."""

    def choose(
        self, request: TraceRequest, replicas: Mapping[int, ReplicaLoad], now_s: float
    ) -> int: ...


class AutoscalingPolicy(Protocol):
    """Decides how many replicas there should be."""

    def target(self, replicas: Mapping[int, ReplicaLoad], state: ScalingState) -> int: ...


class FewestQueuedTokens:
    """The router that takes the replica with the least to compute before a new request."""

    def choose(
        self, request: TraceRequest, replicas: Mapping[int, ReplicaLoad], now_s: float
    ) -> int:
        return min(
            replicas,
            key=lambda number: (
                replicas[number].queued_prefill_tokens,
                replicas[number].num_running + replicas[number].num_waiting,
                number,
            ),
        )


@dataclass(slots=True)
class Record:
    """What became of one request."""

    request: TraceRequest
    replica: int | None = None
    first_token_s: float | None = None
    """When its first token came."""
    end_s: float | None = None
    """When its last one came."""
    retry_after_s: float | None = None
    """It was refused, and told this."""
    num_cached_tokens: int = 0

    @property
    def ttft_s(self) -> float | None:
        """Time to the first token; None: it was refused."""
        return None if self.first_token_s is None else self.first_token_s - self.request.arrival_s


@dataclass(slots=True)
class Replay:
    """What became of a trace."""

    records: list[Record]
    """In the order of the trace."""
    replica_seconds: float = 0.0
    """Time of all replicas from their start, until they went or the last request ended."""
    num_replicas: list[tuple[float, int]] = field(default_factory=list)
    """When the number of replicas, starting ones included, changed, and to what."""


@dataclass(slots=True, eq=False)
class _Replica:
    number: int
    scheduler: Scheduler
    admission: Admission
    started_s: float
    is_ready: bool = False
    is_draining: bool = False
    is_stepping: bool = False
    records: dict[Request, Record] = field(default_factory=dict)

    def load(self) -> ReplicaLoad:
        book = self.scheduler.book
        return ReplicaLoad(
            num_running=len(self.scheduler.running),
            num_waiting=len(self.scheduler.waiting),
            queued_prefill_tokens=queued_tokens(self.scheduler),
            pages_used=book.num_pages - book.num_free_pages,
            pages_total=book.num_pages,
            predicted_ttft_s=self.admission.predicted_ttft_s(),
        )


class Simulator:
    """Plays one trace."""

    def __init__(
        self,
        make_scheduler: Callable[[], Scheduler],
        *,
        router: Router | None = None,
        policy: AutoscalingPolicy | None = None,
        num_replicas: int = 1,
        start_s: float = 60.0,
        interval_s: float = 10.0,
        max_num_queued: int = 1 << 20,
        max_ttft_s: float | None = None,
    ) -> None:
        """num_replicas are ready at the beginning; without a policy they are all there ever are.

        max_num_queued and max_ttft_s are the bounds of each replica's admission.
        """
        self._make_scheduler = make_scheduler
        self._router = router or FewestQueuedTokens()
        self._policy = policy
        self._start_s, self._interval_s = start_s, interval_s
        self._bounds = {"max_num_queued": max_num_queued, "max_ttft_s": max_ttft_s}
        self._events: list[tuple[float, int, Callable[[], None]]] = []
        self._order = itertools.count()
        self._numbers = itertools.count()
        self._arrivals = itertools.count()
        self._replicas: dict[int, _Replica] = {}
        self._unrouted: list[Record] = []
        self._now_s = 0.0
        self._num_target = num_replicas
        self._num_open = 0
        self._replay = Replay([])
        for _ in range(num_replicas):
            self._start_replica(0.0)

    def run(self, trace: Iterable[TraceRequest]) -> Replay:
        """Play the trace to its end. Once.

        Raises:
            ValueError: a request can never be served by a replica.
        """
        self._replay.records = [Record(request) for request in trace]
        self._num_open = len(self._replay.records)
        for record in self._replay.records:
            self._at(record.request.arrival_s, lambda record=record: self._arrive(record))
        if self._policy is not None:
            self._at(0.0, self._scale)
        while self._num_open:
            self._now_s, _, happen = heapq.heappop(self._events)
            happen()
        for replica in self._replicas.values():
            replica.scheduler.check()
            self._replay.replica_seconds += self._now_s - replica.started_s
        return self._replay

    def _at(self, time_s: float, happen: Callable[[], None]) -> None:
        heapq.heappush(self._events, (time_s, next(self._order), happen))

    def _arrive(self, record: Record) -> None:
        loads = {
            number: replica.load()
            for number, replica in self._replicas.items()
            if replica.is_ready and not replica.is_draining
        }
        if not loads:
            self._unrouted.append(record)
            return
        record.replica = self._router.choose(record.request, loads, self._now_s)
        replica = self._replicas[record.replica]
        request = self._request_of(record.request, replica)
        try:
            replica.admission.check(
                request.num_to_compute, priority=request.priority, deadline_s=None
            )
        except QueueFull as refusal:
            record.retry_after_s = refusal.retry_after_s
            self._num_open -= 1
            return
        replica.scheduler.add(request)
        replica.records[request] = record
        self._step(replica)

    def _request_of(self, request: TraceRequest, replica: _Replica) -> Request:
        arrival = next(self._arrivals)
        num_shared = min(request.num_prefix_tokens, request.num_prompt_tokens)
        ids = (request.prefix_group,) * num_shared
        ids += (OWN_TOKENS + arrival,) * (request.num_prompt_tokens - num_shared)
        keys = replica.scheduler.book.keys(ids)
        return Request(
            str(arrival),
            ids,
            SamplingParams(max_tokens=request.num_output_tokens),
            arrival=arrival,
            seed=0,
            keys=keys,
            num_to_compute=len(ids) - replica.scheduler.book.num_known(keys),
            priority=request.priority,
        )

    def _step(self, replica: _Replica) -> None:
        """Let an idle replica begin its next step."""
        if replica.is_stepping or not replica.scheduler.has_work:
            return
        step = replica.scheduler.schedule()
        for request in step.begun:
            replica.records[request].num_cached_tokens = request.num_cached_tokens
        replica.is_stepping = True
        seconds = replica.scheduler.cost.seconds(step.work)
        self._at(self._now_s + seconds, lambda: self._end_step(replica, step))

    def _end_step(self, replica: _Replica, step: Step) -> None:
        replica.is_stepping = False
        replica.scheduler.settle(step)
        for chunk in step.chunks:
            if chunk.is_last and chunk.request.state is RequestState.RUNNING:
                self._take_token(replica, chunk.request)
        self._step(replica)
        self._stop_if_drained(replica)

    def _take_token(self, replica: _Replica, request: Request) -> None:
        record = replica.records[request]
        request.output_ids.append(OWN_TOKENS + request.arrival)
        if record.first_token_s is None:
            record.first_token_s = self._now_s
        if len(request.output_ids) == request.params.max_tokens:
            replica.scheduler.finish(request)
            record.end_s = self._now_s
            del replica.records[request]
            self._num_open -= 1

    def _scale(self) -> None:
        """Ask the policy, and start or drain replicas accordingly."""
        assert self._policy is not None
        staying = [r for r in self._replicas.values() if not r.is_draining]
        state = ScalingState(
            now_s=self._now_s,
            interval_s=self._interval_s,
            num_target=self._num_target,
            num_starting=sum(not replica.is_ready for replica in staying),
            num_unrouted=len(self._unrouted),
        )
        loads = {replica.number: replica.load() for replica in staying if replica.is_ready}
        self._num_target = max(0, self._policy.target(loads, state))
        for _ in range(self._num_target - len(staying)):
            self._start_replica(self._start_s)
        self._drain(staying, len(staying) - self._num_target)
        self._at(self._now_s + self._interval_s, self._scale)

    def _drain(self, staying: Sequence[_Replica], count: int) -> None:
        """Let the replicas with the least to do go: those that are not ready first."""
        by_load = sorted(staying, key=lambda r: (r.is_ready, len(r.records), -r.number))
        for replica in by_load[: max(0, count)]:
            replica.is_draining = True
            self._stop_if_drained(replica)

    def _start_replica(self, start_s: float) -> None:
        scheduler = self._make_scheduler()
        admission = Admission(scheduler, **self._bounds)
        replica = _Replica(next(self._numbers), scheduler, admission, self._now_s)
        self._replicas[replica.number] = replica
        self._note_number()
        if start_s:
            self._at(self._now_s + start_s, lambda: self._become_ready(replica))
        else:
            replica.is_ready = True

    def _become_ready(self, replica: _Replica) -> None:
        if replica.number in self._replicas:
            replica.is_ready = True
            unrouted, self._unrouted = self._unrouted, []
            for record in unrouted:
                self._arrive(record)

    def _stop_if_drained(self, replica: _Replica) -> None:
        if replica.is_draining and not replica.scheduler.has_work:
            replica.scheduler.check()
            self._replay.replica_seconds += self._now_s - replica.started_s
            del self._replicas[replica.number]
            self._note_number()

    def _note_number(self) -> None:
        self._replay.num_replicas.append((self._now_s, len(self._replicas)))
