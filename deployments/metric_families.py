"""Every metric of a replica: its name, its kind, its labels, its buckets.

Names are vLLM's, so that dashboards port. `/metrics` shows them as `nsa:NAME`, Ray's exporter as
`ray_nsa_NAME`; counters end in `_total`, histograms in `_bucket`, `_sum` and `_count`.
"""

from dataclasses import dataclass
from typing import Literal

LABELS = ("model_name", "engine")
"""What every metric carries: the served model, the replica."""

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
AGES = (64, 256, 1024, 4096, 16_384, 65_536, 262_144, 1_048_576)
STEP_TOKENS = (1, 8, 16, 32, 64, 128, 256, 512, 1024, 2048, 4096, 8192, 16_384)
GATES = ("branch", "layer")
CACHE = ("block_size", "cache_dtype", "enable_prefix_caching", "num_gpu_blocks")
CHOICES = (1, 2, 5, 10, 20, 50, 128)


@dataclass(frozen=True, slots=True)
class Family:
    """One metric."""

    name: str
    kind: Literal["gauge", "counter", "histogram"]
    about: str
    labels: tuple[str, ...] = ()
    """Beside LABELS."""
    buckets: tuple[float, ...] = ()
    """Upper bounds of a histogram's buckets."""

    @property
    def series(self) -> tuple[str, ...]:
        """The names under which an exporter shows it, without prefix."""
        if self.kind == "counter":
            return (f"{self.name}_total",)
        if self.kind == "histogram":
            return tuple(f"{self.name}_{part}" for part in ("bucket", "sum", "count"))
        return (self.name,)


def _histogram(name: str, about: str, buckets: tuple[float, ...]) -> Family:
    return Family(name, "histogram", about, buckets=buckets)


_ALL = (
    Family("num_requests_running", "gauge", "Requests in the batch."),
    Family("num_requests_waiting", "gauge", "Requests that wait for their first step."),
    Family("queued_prefill_tokens", "gauge", "Prompt tokens in line."),
    Family("predicted_ttft_seconds", "gauge", "First token of an average request, if it came now."),
    Family("kv_cache_usage_perc", "gauge", "Share of the cache in use, 0 to 1."),
    Family("kv_pages_used", "gauge", "Pages of the cache in use."),
    Family("kv_pages_cached", "gauge", "Pages that nobody uses and whose contents are known."),
    Family("kv_pages_total", "gauge", "Pages of the cache."),
    Family("kv_window_pages_used", "gauge", "Pages of the sliding window's pool in use."),
    Family("kv_window_pages_total", "gauge", "Pages of the sliding window's pool."),
    Family("cache_config_info", "gauge", "Sizes of the cache, as labels; always 1.", CACHE),
    Family("prompt_tokens", "counter", "Prompt tokens of requests that have begun to answer."),
    Family("generation_tokens", "counter", "Tokens generated."),
    Family("computed_tokens", "counter", "Tokens that went through the model."),
    Family("num_preemptions", "counter", "Requests put back for lack of pages."),
    Family("engine_steps", "counter", "Steps of the engine."),
    Family("prefix_cache_queries", "counter", "Prompt tokens that were looked up."),
    Family("prefix_cache_hits", "counter", "Prompt tokens that did not have to be computed."),
    Family("request_success", "counter", "Choices that ended.", ("finished_reason",)),
    Family("admission_rejections", "counter", "Requests that were not taken.", ("reason",)),
    Family("gate_mean", "gauge", "Gate of a branch in a layer, in a sampled step.", GATES),
    _histogram(
        "selected_block_age_tokens",
        "From the start of a selected block to the query, of sampled tokens.",
        AGES,
    ),
    _histogram("iteration_tokens_total", "Tokens of a step, of all its requests.", STEP_TOKENS),
    _histogram("time_to_first_token_seconds", "From arrival to the first token.", FIRST_TOKEN_S),
    _histogram("inter_token_latency_seconds", "From a token to the next.", NEXT_TOKEN_S),
    _histogram(
        "request_time_per_output_token_seconds",
        "Time after the first token, spread over those that follow.",
        NEXT_TOKEN_S,
    ),
    _histogram("request_queue_time_seconds", "From arrival to the first step.", WHOLE_S),
    _histogram("request_prefill_time_seconds", "From the first step to the first token.", WHOLE_S),
    _histogram("request_inference_time_seconds", "From the first step to the last token.", WHOLE_S),
    _histogram("request_decode_time_seconds", "From the first token to the last.", WHOLE_S),
    _histogram("e2e_request_latency_seconds", "From arrival to the last token.", WHOLE_S),
    _histogram("request_prompt_tokens", "Tokens of a prompt.", TOKENS),
    _histogram("request_generation_tokens", "Tokens of an output.", TOKENS),
    _histogram("request_params_max_tokens", "Tokens asked for at most.", TOKENS),
    _histogram("request_params_n", "Answers asked for.", CHOICES),
)

FAMILIES = {family.name: family for family in _ALL}
