"""What one replica counts about its engine and its requests."""

from collections.abc import Mapping, Sequence
from typing import Protocol

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest

from deployments.metric_families import FAMILIES, LABELS, Family
from nsa_platform.config.model import BRANCHES
from nsa_platform.serve.stats import EngineStats, SelectionSample

GAUGES = {
    "num_requests_running": "num_running",
    "num_requests_waiting": "num_waiting",
    "queued_prefill_tokens": "queued_prefill_tokens",
    "predicted_ttft_seconds": "predicted_ttft_s",
    "kv_pages_used": "pages_used",
    "kv_pages_cached": "pages_cached",
    "kv_pages_total": "pages_total",
    "kv_window_pages_used": "window_pages_used",
    "kv_window_pages_total": "window_pages_total",
}
COUNTERS = {
    "prompt_tokens": "prompt_tokens_total",
    "generation_tokens": "generation_tokens_total",
    "computed_tokens": "computed_tokens_total",
    "prefix_cache_queries": "prefix_cache_queries_total",
    "prefix_cache_hits": "prefix_cache_hits_total",
    "num_preemptions": "preemptions_total",
    "engine_steps": "steps_total",
}
"""Of metrics that the engine itself keeps, the fields of its stats."""


class Source(Protocol):
    """What counts for itself: AsyncEngine, but for tests."""

    def stats(self) -> EngineStats:
        """What it holds and has done so far."""
        ...

    def cache_config(self) -> Mapping[str, str]:
        """Sizes of its cache, by the labels of cache_config_info."""
        ...

    def take_step_tokens(self) -> Sequence[int]:
        """Tokens of each step since this was asked last."""
        ...


class Sink(Protocol):
    """Where metrics go. Labels are all of a family's."""

    def record(self, family: Family, value: float, labels: Mapping[str, str]) -> None:
        """Set a gauge, add to a counter, or observe a value of a histogram."""
        ...


class PrometheusSink:
    """Metrics of this process in Prometheus' text format, under names that begin with `nsa:`."""

    def __init__(self) -> None:
        self._registry = CollectorRegistry()
        self._metrics = {name: self._metric(family) for name, family in FAMILIES.items()}

    def record(self, family: Family, value: float, labels: Mapping[str, str]) -> None:
        metric = self._metrics[family.name].labels(**labels)
        if isinstance(metric, Gauge):
            metric.set(value)
        elif isinstance(metric, Counter):
            metric.inc(value)
        else:
            metric.observe(value)

    def exposition(self) -> str:
        """All metrics that have been recorded."""
        return generate_latest(self._registry).decode()

    def _metric(self, family: Family) -> Gauge | Counter | Histogram:
        name, names = f"nsa:{family.name}", (*LABELS, *family.labels)
        if family.kind == "gauge":
            return Gauge(name, family.about, names, registry=self._registry)
        if family.kind == "counter":
            return Counter(name, family.about, names, registry=self._registry)
        return Histogram(name, family.about, names, buckets=family.buckets, registry=self._registry)


class Meter:
    """Takes down what happens, for Prometheus and for any other sinks."""

    def __init__(
        self,
        source: Source,
        *,
        model: str,
        replica: str,
        sinks: Sequence[Sink] = (),
    ) -> None:
        self._source = source
        self._labels = dict(zip(LABELS, (model, replica), strict=True))
        self._prometheus = PrometheusSink()
        self._sinks: tuple[Sink, ...] = (self._prometheus, *sinks)
        self._told = dict.fromkeys(COUNTERS, 0)
        self._num_samples = 0

    def asked(self, *, max_tokens: int, n: int) -> None:
        """A request was taken."""
        self._record("request_params_max_tokens", max_tokens)
        self._record("request_params_n", n)

    def first_token(self, seconds: float, *, queue_s: float) -> None:
        """A choice has begun, `seconds` after it came and queue_s of them before its first step."""
        self._record("time_to_first_token_seconds", seconds)
        self._record("request_queue_time_seconds", queue_s)
        self._record("request_prefill_time_seconds", max(0.0, seconds - queue_s))

    def next_token(self, seconds: float) -> None:
        """A token came that long after the one before."""
        self._record("inter_token_latency_seconds", seconds)

    def finished(
        self,
        reason: str,
        *,
        prompt: int,
        generated: int,
        seconds: float,
        queue_s: float | None,
        decode_s: float,
    ) -> None:
        """One choice came to its end; queue_s of its seconds passed before its first step (None: it
        had none), decode_s after its first token."""
        self._record("request_success", 1, finished_reason=reason)
        self._record("e2e_request_latency_seconds", seconds)
        if queue_s is not None:
            self._record("request_inference_time_seconds", max(0.0, seconds - queue_s))
        self._record("request_decode_time_seconds", decode_s)
        self._record("request_prompt_tokens", prompt)
        self._record("request_generation_tokens", generated)
        if generated > 1:
            self._record("request_time_per_output_token_seconds", decode_s / (generated - 1))

    def refused(self, reason: str) -> None:
        """A request was not taken."""
        self._record("admission_rejections", 1, reason=reason)

    def publish(self) -> None:
        """Take down what the engine holds and has done since the last time."""
        stats = self._source.stats()
        for name, field in GAUGES.items():
            self._record(name, getattr(stats, field))
        self._record("cache_config_info", 1, **self._source.cache_config())
        for num_tokens in self._source.take_step_tokens():
            self._record("iteration_tokens_total", num_tokens)
        self._record("kv_cache_usage_perc", stats.pages_used / max(1, stats.pages_total))
        for name, field in COUNTERS.items():
            total = getattr(stats, field)
            self._record(name, total - self._told[name])
            self._told[name] = total
        if stats.selection is not None and stats.selection.number != self._num_samples:
            self._publish_selection(stats.selection)

    def _publish_selection(self, sample: SelectionSample) -> None:
        self._num_samples = sample.number
        for layer, means in enumerate(sample.gate_means):
            for branch, mean in zip(BRANCHES, means, strict=True):
                self._record("gate_mean", mean, branch=branch, layer=str(layer))
        for age in sample.ages:
            self._record("selected_block_age_tokens", age)

    def exposition(self) -> str:
        """All metrics in Prometheus' text format."""
        self.publish()
        return self._prometheus.exposition()

    def _record(self, name: str, value: float, **labels: str) -> None:
        for sink in self._sinks:
            sink.record(FAMILIES[name], value, {**self._labels, **labels})
