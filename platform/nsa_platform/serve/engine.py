"""The engine: requests in, increments of text out, one step at a time.

    add(request) ... while has_work: step()

A step schedules, runs the model once, samples, and turns tokens into outputs. While requests only
decode, the device has the next step before the tokens of the last one are taken: it does not wait
for Python. An engine belongs to one thread.
"""

import math
import time
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial

from torch import Tensor

from nsa_platform.config.serve import EngineConfig
from nsa_platform.data.tokenizer import Tokenizer
from nsa_platform.model.transformer import Transformer
from nsa_platform.serve.admission import Admission, next_end_s, queued_tokens
from nsa_platform.serve.batch_sampler import BatchSampler, Choices, Sampled, needs_output
from nsa_platform.serve.calibration import measured_steps
from nsa_platform.serve.capacity import limits_of, make_cache, model_len_of
from nsa_platform.serve.decode_graphs import DecodeGraphs
from nsa_platform.serve.detokenizer import Detokenizer, StopStrings
from nsa_platform.serve.grammar import Grammars
from nsa_platform.serve.ranks import Ranks
from nsa_platform.serve.request import FinishReason, Output, Request, SamplingParams
from nsa_platform.serve.runner import ModelRunner
from nsa_platform.serve.sampler import seed_of
from nsa_platform.serve.scheduler import Scheduler, Step
from nsa_platform.serve.stats import EngineStats
from nsa_platform.serve.step_cost import CostModel, StepWork
from nsa_platform.serve.totals import Totals
from nsa_platform.serve.trial_steps import warm_up


@dataclass(slots=True)
class _Live:
    """A request and its text."""

    request: Request
    characters: Detokenizer
    stops: StopStrings


@dataclass(frozen=True, slots=True)
class _Flight:
    """A step that the device has, and whose answer has not been taken."""

    step: Step
    work: StepWork
    requests: list[Request]
    """Those that get a token."""
    choices: Choices | None
    launched_s: float


class Engine:
    """Continuous batching for one model on one device."""

    def __init__(
        self,
        model: Transformer,
        tokenizer: Tokenizer,
        config: EngineConfig,
        ranks: Ranks | None = None,
    ) -> None:
        """Reserve the cache on the model's device, in its dtype.

        ranks: those that compute the model together, of which this is the first.

        Raises:
            ValueError: a size of the configuration does not fit the model or the memory, or the
                tokenizer has ids that the model does not know.
        """
        if tokenizer.vocab_size > model.config.vocab_size:
            raise ValueError(
                f"{tokenizer.folder}: the tokenizer has {tokenizer.vocab_size} ids and the model "
                f"knows {model.config.vocab_size}: they do not belong together"
            )
        self.config = config
        self.tokenizer = tokenizer
        self.vocab_size = model.config.vocab_size
        self.max_model_len = model_len_of(model.config, config)
        weight = model.embedding.weight
        self.cache = make_cache(
            model.config, config, device=weight.device, dtype=weight.dtype, ranks=ranks
        )
        self.cost = CostModel()
        self.scheduler = Scheduler(self.cache.book, limits_of(config), self.cost)
        self.admission = Admission(
            self.scheduler, max_num_queued=config.max_num_queued, max_ttft_s=config.max_ttft_s
        )
        self.runner = ModelRunner(model, self.cache, ranks)
        self.grammars = Grammars(tokenizer, vocab_size=self.vocab_size)
        self.sampler = BatchSampler(self.grammars)
        self._live: dict[str, _Live] = {}
        self._num_added = 0
        self._is_measuring = False
        self._runs_ahead = config.runs_ahead(is_on_gpu=weight.is_cuda)
        self._flight: _Flight | None = None
        self._landed_s = 0.0
        self.totals = Totals()

    @property
    def max_num_requests(self) -> int:
        """Requests that run or wait at once."""
        return self.admission.max_num_requests

    @property
    def block_size(self) -> int | None:
        """Tokens of a selection block; None for full attention."""
        return self.runner.block_reads.block_size

    @property
    def has_work(self) -> bool:
        return self.scheduler.has_work

    def check_request(self, prompt_ids: Sequence[int], params: SamplingParams) -> None:
        """Tell whether a request could ever be served; nothing is changed. Any thread may ask.

        Raises:
            ValueError: the prompt is empty, an id is outside the vocabulary, the grammar cannot be
                compiled, or prompt and output do not fit into max_model_len or the whole cache.
        """
        if not prompt_ids:
            raise ValueError("the prompt is empty: at least one token is needed")
        for name, ids in (
            ("prompt_ids", prompt_ids),
            ("stop_token_ids", params.stop_token_ids),
            ("logit_bias", params.logit_bias),
            ("allowed_token_ids", params.allowed_token_ids),
            *(("bad_words", word) for word in params.bad_words),
        ):
            if ids and (min(ids) < 0 or max(ids) >= self.vocab_size):
                raise ValueError(
                    f"{name}: ids must lie in [0, {self.vocab_size}), got {min(ids)} to {max(ids)}"
                )
        total = len(prompt_ids) + params.max_tokens
        if total > self.max_model_len:
            raise ValueError(
                f"{len(prompt_ids)} prompt tokens + max_tokens={params.max_tokens} = {total} "
                f"exceed max_model_len={self.max_model_len}"
            )
        self.scheduler.check_size(len(prompt_ids), params.max_tokens)
        if params.selected_blocks and self.block_size is None:
            raise ValueError("selected_blocks: full attention selects none, it reads everything")
        if params.grammar is not None:
            self.grammars.matcher(params.grammar)

    def add(
        self,
        request_id: str,
        prompt_ids: Sequence[int],
        params: SamplingParams,
        *,
        cache_salt: str | None = None,
        priority: int = 0,
        deadline_s: float | None = None,
    ) -> None:
        """Accept a request; its outputs come from step().

        cache_salt: the prefix cache shares nothing between requests of different salts. priority:
        the lower, the sooner. deadline_s: seconds from now until which the first token must come;
        a request that misses it ends with finish_reason "abort" and stop_reason "deadline".

        Raises:
            ValueError: as check_request, a request of this id is there already, or the deadline is
                not positive.
            QueueFull: max_num_queued requests wait already, or the first token is predicted to
                come later than after max_ttft_s or deadline_s.
        """
        self.check_request(prompt_ids, params)
        if request_id in self._live:
            raise ValueError(f"request_id={request_id!r} is in use")
        # Known tokens have no scores: whoever asks for those of its prompt shares with nobody.
        is_private = params.prompt_logprobs is not None
        salt = f"{request_id}\n{cache_salt}" if is_private else cache_salt
        keys = self.cache.book.keys(prompt_ids, salt)
        num_to_compute = len(prompt_ids) - self.cache.book.num_known(keys)
        self.admission.check(num_to_compute, priority=priority, deadline_s=deadline_s)
        now_s = time.monotonic()
        own_stops = () if params.ignore_eos else self.tokenizer.stop_ids()
        request = Request(
            request_id,
            tuple(prompt_ids),
            params,
            arrival=self._num_added,
            seed=seed_of(self.config.seed, request_id) if params.seed is None else params.seed,
            keys=keys,
            num_to_compute=num_to_compute,
            priority=priority,
            deadline_s=math.inf if deadline_s is None else now_s + deadline_s,
            arrived_s=now_s,
            stop_ids=frozenset((*own_stops, *params.stop_token_ids)),
        )
        self.scheduler.add(request)
        self._num_added += 1
        self._live[request_id] = _Live(
            request,
            Detokenizer(
                partial(self.tokenizer.decode, skip_special_tokens=params.skip_special_tokens)
            ),
            StopStrings(params.stop, is_included=params.include_stop_str_in_output),
        )

    def abort(self, request_id: str) -> Output | None:
        """End a request now; its pages are free when this returns.

        Returns its last output, or None if there is no such request any more.
        """
        live = self._live.get(request_id)
        if live is None:
            return None
        self._finish(live.request, "abort", None)
        return live.request.output()

    def step(self) -> list[Output]:
        """Compute one step: at most one token for each running request.

        Raises:
            RuntimeError: there is work, and nothing of it can go on: a bug.
        """
        expired = [self._expire(request) for request in self._overdue()]
        flight, self._flight = self._flight, None
        if flight is None or not any(self._is_live(request) for request in flight.requests):
            step = self.scheduler.schedule()
            if not step.chunks:
                if self.has_work:
                    raise RuntimeError(f"no request can go on: {self.stats()}")
                return expired
            flight = self._launch(step)
        self._flight = self._launch_ahead(flight)
        return expired + self._land(flight)

    def calibrate(self) -> None:
        """Measure some steps, so that later ones can be predicted; from now on each step is learnt
        from. The engine must be idle; nothing of it changes.

        Without it steps are as long as max_num_batched_tokens make them, and the same requests
        share the same steps whenever they are run.
        """
        assert not self.has_work
        for work, seconds in measured_steps(self.runner, self.scheduler.limits):
            self.cost.observe(work, seconds)
        self.cost.fit()
        self._is_measuring = True

    def warm_up(self) -> None:
        """Run steps of all kinds, so that no request waits until a kernel is compiled. The engine
        must be idle; nothing of it changes. A CPU compiles nothing, and is left alone."""
        if self.config.warm_up and self.cache.device.type != "cpu":
            warm_up(self.runner, self.scheduler.limits, self.max_model_len)

    def capture(self, *, context_lens: Sequence[int] | None = None) -> None:
        """Make ready the fixed shapes in which steps of decodes run, CUDA graphs on a GPU: for
        contexts of up to so many tokens each; None: short ones and longer ones to max_model_len."""
        self.runner.graphs = DecodeGraphs.of(
            self.runner.model, self.cache, self.config, context_lens=context_lens
        )

    def reset_prefix_cache(self) -> None:
        """Forget all prompts and answers. Requests that run keep what they have."""
        self.cache.book.forget()

    def check(self) -> None:
        """Prove that no page and no request is lost. Raises PageLeak or AssertionError."""
        self.scheduler.check()
        lines = {request.request_id for request in self.scheduler.running}
        lines |= {request.request_id for request in self.scheduler.waiting}
        assert lines == set(self._live), "a request is in no line, or in a line after its end"
        kept = self.sampler.known_ids | self.runner.prompt_scores.known_ids
        kept |= self.runner.block_reads.known_ids
        assert kept <= lines, "something is kept of a request that has ended"

    def stats(self) -> EngineStats:
        """What the engine holds now and has done so far."""
        book = self.cache.book
        window = book.window_pool
        return EngineStats(
            num_running=len(self.scheduler.running),
            num_waiting=len(self.scheduler.waiting),
            queued_prefill_tokens=queued_tokens(self.scheduler),
            predicted_ttft_s=self.admission.predicted_ttft_s(),
            next_end_s=next_end_s(self.scheduler),
            pages_used=book.num_pages - book.num_free_pages,
            pages_cached=book.pool.num_cached,
            pages_total=book.num_pages,
            window_pages_used=0 if window is None else window.num_used,
            window_pages_total=0 if window is None else window.num_pages - 1,
            prompt_tokens_total=self.totals.prompt_tokens,
            generation_tokens_total=self.totals.generation_tokens,
            prefix_cache_queries_total=self.totals.prefix_queries,
            prefix_cache_hits_total=self.totals.prefix_hits,
            computed_tokens_total=self.totals.computed_tokens,
            preemptions_total=self.totals.preemptions,
            steps_total=self.totals.steps,
            selection=self.runner.selection.last(),
        )

    def _launch(self, step: Step, unknown_ids: Tensor | None = None) -> _Flight:
        """Give a step to the device. Nothing waits for it; what is known without its answer is done
        meanwhile.

        unknown_ids: the step's tokens where they are known to the device alone.
        """
        launched_s = time.perf_counter()
        logits = self.runner.run(step, unknown_ids)
        requests = [chunk.request for chunk in step.chunks if chunk.is_last]
        choices = None
        if logits is not None:
            num_unknown = int(unknown_ids is not None)
            choices = self.sampler.choose(logits, requests, num_unknown=num_unknown)
        self.totals.add_step(step)
        for request in step.begun:
            request.queue_s = time.monotonic() - request.arrived_s
        self.scheduler.settle(step)
        return _Flight(step, step.work, requests, choices, launched_s)

    def _launch_ahead(self, flight: _Flight) -> _Flight | None:
        """The step after one under way, if all of its requests will take part in it for all that
        is known: of one that ends all the same the token is dropped."""
        if not self._runs_ahead or flight.choices is None:
            return None
        for request in flight.requests:
            is_last = len(request.output_ids) + 1 >= request.params.max_tokens
            if is_last or needs_output(request.params):
                return None
        step = self.scheduler.ahead(flight.step)
        return None if step is None else self._launch(step, flight.choices.ids)

    def _land(self, flight: _Flight) -> list[Output]:
        """Take a step's answer: at most one token for each of its requests that still live."""
        sampled = [] if flight.choices is None else flight.choices.collect()
        if flight.choices is None:
            self.runner.wait()  # or steps would queue up before the device, and decodes behind them
        now_s = time.perf_counter()
        if self._is_measuring:
            self.cost.observe(flight.work, now_s - max(flight.launched_s, self._landed_s))
        self._landed_s = now_s
        pairs = zip(flight.requests, sampled, strict=True) if sampled else ()
        living = [(request, token) for request, token in pairs if self._is_live(request)]
        self.totals.add_tokens([request for request, _ in living])
        return [self._advance(self._live[r.request_id], token) for r, token in living]

    def _is_live(self, request: Request) -> bool:
        live = self._live.get(request.request_id)
        return live is not None and live.request is request

    def _overdue(self) -> list[Request]:
        """Requests whose deadline has passed without a token."""
        now = time.monotonic()
        waiting = (*self.scheduler.waiting, *self.scheduler.prompts())
        return [r for r in waiting if r.deadline_s < now and not r.output_ids]

    def _expire(self, request: Request) -> Output:
        self._finish(request, "abort", "deadline")
        return request.output()

    def _advance(self, live: _Live, sampled: Sampled) -> Output:
        """Take a request's next token, and say what came of it."""
        request, params, token = live.request, live.request.params, sampled.token_id
        if token is None:
            self._finish(request, "abort", "grammar" if params.grammar else None)
            return request.output()
        is_first = not request.output_ids
        if is_first and time.monotonic() > request.deadline_s:
            return self._expire(request)
        prompt_logprobs = self.runner.prompt_scores.take(request) if is_first else None
        selected = self.runner.block_reads.take(request)
        request.output_ids.append(token)
        by_id = token in request.stop_ids
        by_length = len(request.output_ids) == params.max_tokens
        is_asked_for = token in params.stop_token_ids
        is_shown = not by_id or (is_asked_for and params.include_stop_str_in_output)
        text, stop = live.characters.push(token) if is_shown else "", None
        if by_id or by_length:
            text += live.characters.flush()
        if len(request.output_ids) > params.min_tokens:
            text, stop = live.stops.push(text)
        if stop is not None:
            self._finish(request, "stop", stop)
        elif by_id or by_length:
            text += live.stops.flush()
            stop_id = token if by_id and is_asked_for else None
            self._finish(request, "stop" if by_id else "length", stop_id)
        return request.output(token, text, sampled.logprob, prompt_logprobs, selected)

    def _finish(
        self, request: Request, reason: FinishReason, stop_reason: str | int | None
    ) -> None:
        """The one place where a request ends, for whatever reason."""
        request.finish_reason, request.stop_reason = reason, stop_reason
        self.scheduler.finish(request)
        self.sampler.forget(request)
        self.runner.prompt_scores.forget(request)
        self.runner.block_reads.forget(request)
        del self._live[request.request_id]
