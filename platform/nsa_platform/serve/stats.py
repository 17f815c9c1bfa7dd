"""What an engine tells of itself: to metrics, to the router and to whoever scales replicas."""

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class SelectionSample:
    """What one token was made from, as an example."""

    number: int
    """How many samples there have been with this one."""
    gate_means: tuple[tuple[float, ...], ...]
    """Of each layer the gates of the compressed, selected and sliding branch, means over a step."""
    ages: tuple[int, ...]
    """Of each block that any layer and head selected the tokens from its start to the query."""


@dataclass(frozen=True, slots=True)
class EngineStats:
    """What an engine holds now and has done so far."""

    num_running: int
    num_waiting: int
    queued_prefill_tokens: int
    """Tokens to compute before the next tokens of all that run or wait can come."""
    predicted_ttft_s: float
    """When the first token of a request of average length would come if it came now; 0 as long as
    no step has been measured."""
    next_end_s: float
    """When the next request ends at the latest, as predicted."""
    pages_used: int
    pages_cached: int
    """Pages that nobody uses and whose contents are still known."""
    pages_total: int
    window_pages_used: int
    """0 for full attention, as window_pages_total."""
    window_pages_total: int
    prompt_tokens_total: int
    """Tokens of the prompts of all requests that have generated a token."""
    generation_tokens_total: int
    prefix_cache_queries_total: int
    """Tokens of the prompts of all requests that have begun to run."""
    prefix_cache_hits_total: int
    """How many of them the prefix cache knew."""
    computed_tokens_total: int
    """Tokens that went through the model; again after a preemption."""
    preemptions_total: int
    steps_total: int
    selection: SelectionSample | None
    """The newest; None before the first, and for full attention."""
