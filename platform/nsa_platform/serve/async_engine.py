"""The engine for asyncio: its steps run in a thread, outputs arrive on the caller's event loop."""

import asyncio
import logging
import threading
from collections import deque
from collections.abc import AsyncGenerator, Callable, Sequence
from dataclasses import dataclass

from nsa_platform.serve.admission import NeverInTime, QueueFull
from nsa_platform.serve.engine import Engine
from nsa_platform.serve.request import Output, SamplingParams
from nsa_platform.serve.stats import EngineStats

log = logging.getLogger(__name__)


class EngineDead(RuntimeError):
    """The engine's thread has ended; nothing will be generated any more."""


@dataclass(frozen=True, slots=True)
class _Stream:
    """Where the outputs of one request go."""

    loop: asyncio.AbstractEventLoop
    items: asyncio.Queue[Output | EngineDead | NeverInTime | QueueFull]

    def put(self, item: Output | EngineDead | NeverInTime | QueueFull) -> None:
        """Hand over an item from the engine's thread."""
        try:
            self.loop.call_soon_threadsafe(self.items.put_nowait, item)
        except RuntimeError:
            # The loop was closed and its listeners with it.
            log.debug("an output came after the end of its event loop")


@dataclass(frozen=True, slots=True)
class _Add:
    request_id: str
    prompt_ids: tuple[int, ...]
    params: SamplingParams
    cache_salt: str | None
    priority: int
    deadline_s: float | None


@dataclass(frozen=True, slots=True)
class _Abort:
    request_id: str
    stream: _Stream
    """Whose request it is: another one may have come under the same id since."""


@dataclass(frozen=True, slots=True)
class _Forget:
    """Empty the prefix cache."""


class AsyncEngine:
    """Feeds one engine from any number of coroutines, and loops its steps in a thread."""

    def __init__(
        self, engine: Engine, *, reason_outside: Callable[[], str | None] | None = None
    ) -> None:
        """reason_outside: asked, in the thread, after a step has failed: what outside of the engine
        has made it fail, if anything; None: there is nothing outside."""
        self.engine = engine
        self._reason_outside = reason_outside
        self._changed = threading.Condition()
        # All below is guarded by _changed.
        self._inbox: deque[_Add | _Abort | _Forget] = deque()
        self._streams: dict[str, _Stream] = {}
        self._stats = engine.stats()
        self._failure: Exception | None = None
        self._is_closing = False
        self._thread = threading.Thread(target=self._run, name="nsa-engine", daemon=True)

    def start(self) -> None:
        """Start the thread. Once."""
        self._thread.start()

    def check_health(self) -> None:
        """Raise EngineDead, with its reason, unless the thread is alive."""
        if self._failure is not None:
            raise EngineDead(f"the engine failed: {self._failure!r}") from self._failure
        # A thread that is about to end takes in no more requests.
        if self._is_closing or not self._thread.is_alive():
            state = "is closed" if self._is_closing else "was not started"
            raise EngineDead(f"the engine {state}")

    def stats(self) -> EngineStats:
        """What the engine held after its last step, and what it has done so far."""
        with self._changed:
            return self._stats

    def cache_config(self) -> dict[str, str]:
        """Sizes of the cache, by vLLM's names."""
        return self.engine.cache.description()

    def take_step_tokens(self) -> list[int]:
        """Tokens of each step since this was asked last; of very many the newest."""
        return self.engine.totals.take_step_tokens()

    def generate(
        self,
        prompt_ids: Sequence[int],
        params: SamplingParams,
        request_id: str,
        *,
        cache_salt: str | None = None,
        priority: int = 0,
        deadline_s: float | None = None,
    ) -> AsyncGenerator[Output, None]:
        """Outputs of a new request, the last of which has a finish_reason.

        cache_salt, priority and deadline_s are those of Engine.add.

        The request is checked by this call and begins with the first output that is asked for.
        Closing the iterator, or cancelling the task that waits in it, aborts the request: its
        pages are free before the engine's next step.

        Raises:
            ValueError: the request can never be served, or its id is in use.
            NeverInTime: its deadline is too soon for any engine; raised by the first output.
            QueueFull: max_num_queued requests wait already, or the first token would come too
                late; raised by the first output too.
            EngineDead: the engine has failed or is closed; raised by any output too.
        """
        self.check_health()
        self.engine.check_request(prompt_ids, params)
        with self._changed:
            self._check_place(request_id)
        return self._outputs(
            _Add(request_id, tuple(prompt_ids), params, cache_salt, priority, deadline_s)
        )

    def reset_prefix_cache(self) -> None:
        """Forget all prompts and answers before the next step. Requests that run keep what they
        have.

        Raises:
            EngineDead: the engine has failed or is closed.
        """
        self.check_health()
        with self._changed:
            self._tell(_Forget())

    def fail(self, error: Exception) -> None:
        """Give up because of an error, also of one outside of the thread, which may wait for what
        will not come. All open streams raise EngineDead now."""
        reason = EngineDead(f"the engine failed: {error!r}")
        reason.__cause__ = error
        self._end(reason, error)

    async def close(self) -> None:
        """End the thread after the step at hand; open streams raise EngineDead."""
        with self._changed:
            self._is_closing = True
            self._changed.notify()
        if self._thread.ident is not None:
            await asyncio.to_thread(self._thread.join)

    async def _outputs(self, request: _Add) -> AsyncGenerator[Output, None]:
        stream = _Stream(asyncio.get_running_loop(), asyncio.Queue())
        with self._changed:
            self.check_health()
            self._check_place(request.request_id)
            self._streams[request.request_id] = stream
            self._tell(request)
        try:
            while True:
                item = await stream.items.get()
                if isinstance(item, EngineDead):
                    raise EngineDead(*item.args) from item.__cause__
                if isinstance(item, NeverInTime | QueueFull):
                    raise item
                yield item
                if item.finish_reason is not None:
                    return
        finally:
            with self._changed:
                # Gone already if the request has come to its own end.
                if self._streams.get(request.request_id) is stream:
                    self._tell(_Abort(request.request_id, stream))

    def _check_place(self, request_id: str) -> None:
        if request_id in self._streams:
            raise ValueError(f"request_id={request_id!r} is in use")
        if len(self._streams) >= self.engine.max_num_requests:
            raise QueueFull(
                f"{len(self._streams)} requests run or wait, and no more than max_num_seqs + "
                f"max_num_queued = {self.engine.max_num_requests} may",
                retry_after_s=self._stats.next_end_s,
            )

    def _tell(self, order: _Add | _Abort | _Forget) -> None:
        self._inbox.append(order)
        self._changed.notify()

    def _run(self) -> None:
        """The thread: until it is closed, or a step fails."""
        try:
            while self._obey():
                self._deliver(self.engine.step())
        except Exception as error:
            log.exception("the engine failed; it serves no more requests")
            reason = self._reason_outside() if self._reason_outside else None
            self.fail(RuntimeError(reason) if reason else error)
        else:
            self._end(EngineDead("the engine was closed"), None)

    def _end(self, reason: EngineDead, failure: Exception | None) -> None:
        """Take no more requests, and tell those that are open why."""
        with self._changed:
            self._failure, self._is_closing = self._failure or failure, True
            streams, self._streams = list(self._streams.values()), {}
            self._changed.notify()
        for stream in streams:
            stream.put(reason)

    def _obey(self) -> bool:
        """Wait for work, take in what is new; False when it is time to end."""
        with self._changed:
            self._changed.wait_for(lambda: self._inbox or self._is_closing or self.engine.has_work)
            if self._is_closing:
                return False
            orders, self._inbox = self._inbox, deque()
        for order in orders:
            if isinstance(order, _Add):
                self._add(order)
            elif isinstance(order, _Forget):
                self.engine.reset_prefix_cache()
            else:
                self._abort(order)
        return True

    def _add(self, order: _Add) -> None:
        try:
            self.engine.add(
                order.request_id,
                order.prompt_ids,
                order.params,
                cache_salt=order.cache_salt,
                priority=order.priority,
                deadline_s=order.deadline_s,
            )
        except (NeverInTime, QueueFull) as refusal:
            with self._changed:
                stream = self._streams.pop(order.request_id)
            stream.put(refusal)

    def _abort(self, order: _Abort) -> None:
        with self._changed:
            if self._streams.get(order.request_id) is not order.stream:
                return  # it has come to its own end since
            del self._streams[order.request_id]
        self.engine.abort(order.request_id)

    def _deliver(self, outputs: list[Output]) -> None:
        with self._changed:
            self._stats = self.engine.stats()
            streams = [self._streams.get(output.request_id) for output in outputs]
            for output in outputs:
                if output.finish_reason is not None:
                    self._streams.pop(output.request_id, None)
        for output, stream in zip(outputs, streams, strict=True):
            if stream is not None:
                stream.put(output)
