"""Prometheus metrics of one replica.

Names are vLLM's with the prefix `nsa:`, so that dashboards port.
"""

from collections.abc import Callable, Iterable, Iterator, Sequence

from prometheus_client import CollectorRegistry, Counter, Histogram, generate_latest
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric
from prometheus_client.registry import Collector

from nsa_platform.serve.engine import EngineStats

LABELS = ("model_name", "engine")

FIRST_TOKEN_S = (
    *(0.001, 0.005, 0.01, 0.02, 0.04, 0.06, 0.08, 0.1, 0.25, 0.5, 0.75, 1, 2.5, 5, 7.5, 10),
    *(20, 40, 80, 160, 640, 2560),
)
NEXT_TOKEN_S = (
    *(0.001, 0.0025, 0.005, 0.0075, 0.01, 0.025, 0.05, 0.075, 0.1, 0.15, 0.2, 0.3, 0.4, 0.5),
    *(0.75, 1, 2.5, 5, 7.5, 10, 20, 40, 80),
)
WHOLE_S = (
    *(0.3, 0.5, 0.8, 1, 1.5, 2, 2.5, 5, 10, 15, 20, 30, 40, 50, 60, 120, 240, 480, 960, 1920),
    7680,
)
TOKENS = (1, 10, 50, 100, 500, 1000, 5000, 10_000, 50_000, 100_000, 500_000, 1_000_000)

GAUGES = {
    "nsa:num_requests_running": ("Requests in the batch.", "num_running"),
    "nsa:num_requests_waiting": ("Requests that wait for their first step.", "num_waiting"),
    "nsa:kv_pages_used": ("Pages of the cache in use.", "pages_used"),
    "nsa:kv_pages_total": ("Pages of the cache.", "pages_total"),
}
COUNTERS = {
    "nsa:prompt_tokens": ("Prompt tokens computed.", "prompt_tokens_total"),
    "nsa:generation_tokens": ("Tokens generated.", "generation_tokens_total"),
    "nsa:num_preemptions": ("Requests put back for lack of pages.", "preemptions_total"),
    "nsa:engine_steps": ("Steps of the engine.", "steps_total"),
}


class EngineCollector(Collector):
    """The engine's own numbers, read when they are asked for."""

    def __init__(self, stats: Callable[[], EngineStats], labels: Sequence[str]) -> None:
        self._stats = stats
        self._labels = labels

    def describe(self) -> Iterable[Metric]:
        return ()

    def collect(self) -> Iterator[Metric]:
        stats = self._stats()
        for name, (about, field) in GAUGES.items():
            gauge = GaugeMetricFamily(name, about, labels=LABELS)
            gauge.add_metric(self._labels, getattr(stats, field))
            yield gauge
        used = GaugeMetricFamily(
            "nsa:kv_cache_usage_perc", "Share of the cache in use, 0 to 1.", labels=LABELS
        )
        used.add_metric(self._labels, stats.pages_used / max(1, stats.pages_total))
        yield used
        for name, (about, field) in COUNTERS.items():
            counter = CounterMetricFamily(name, about, labels=LABELS)
            counter.add_metric(self._labels, getattr(stats, field))
            yield counter


class Meter:
    """What one replica counts about its requests."""

    def __init__(self, stats: Callable[[], EngineStats], *, model: str, replica: str) -> None:
        self._registry = CollectorRegistry()
        self._labels = (model, replica)
        self._registry.register(EngineCollector(stats, self._labels))
        self._first = self._histogram("time_to_first_token_seconds", FIRST_TOKEN_S)
        self._next = self._histogram("inter_token_latency_seconds", NEXT_TOKEN_S)
        self._whole = self._histogram("e2e_request_latency_seconds", WHOLE_S)
        self._prompt = self._histogram("request_prompt_tokens", TOKENS)
        self._generated = self._histogram("request_generation_tokens", TOKENS)
        self._success = self._counter("request_success", "finished_reason")
        self._refused = self._counter("admission_rejections", "reason")

    def first_token(self, seconds: float) -> None:
        self._first.observe(seconds)

    def next_token(self, seconds: float) -> None:
        self._next.observe(seconds)

    def finished(self, reason: str, *, prompt: int, generated: int, seconds: float) -> None:
        """One choice came to its end."""
        self._success.labels(*self._labels, reason).inc()
        self._whole.observe(seconds)
        self._prompt.observe(prompt)
        self._generated.observe(generated)

    def refused(self, reason: str) -> None:
        """A request was not taken."""
        self._refused.labels(*self._labels, reason).inc()

    def exposition(self) -> str:
        """All metrics in Prometheus' text format."""
        return generate_latest(self._registry).decode()

    def _histogram(self, name: str, buckets: Sequence[float]) -> Histogram:
        about = f"{name.replace('_', ' ')}, one observation a choice or token."
        family = Histogram(f"nsa:{name}", about, LABELS, buckets=buckets, registry=self._registry)
        return family.labels(*self._labels)

    def _counter(self, name: str, label: str) -> Counter:
        about = f"{name.replace('_', ' ')} by {label.replace('_', ' ')}."
        return Counter(f"nsa:{name}", about, (*LABELS, label), registry=self._registry)
