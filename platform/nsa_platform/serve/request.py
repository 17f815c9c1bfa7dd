"""A request from admission to its end: what was asked for, what has been generated. No tensors."""

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from enum import Enum
from typing import Literal

from nsa_platform.serve.page_keys import PageKeys
from nsa_platform.serve.pages import SequencePages

MAX_LOGPROBS = 20
MAX_LOGIT_BIAS = 100.0

FinishReason = Literal["stop", "length", "abort"]
GrammarKind = Literal["json_schema", "regex", "lark"]


# Scores are divided by it: beyond these they would leave what float32 holds.
MIN_REPETITION_PENALTY = 0.01
MAX_REPETITION_PENALTY = 10.0


@dataclass(frozen=True, slots=True)
class Grammar:
    """What an output must match as a whole."""

    kind: GrammarKind
    """json_schema: JSON that fits a schema. regex: a regular expression without look-around.
    lark: a context-free grammar in Lark's notation whose rule `start` is the whole."""
    text: str
    """The schema as JSON, the expression, or the grammar."""


@dataclass(frozen=True, slots=True)
class SamplingParams:
    """How one request is to be continued, and when it ends.

    Raises:
        ValueError: a value is out of range; the message names the field, the value and the rule.
    """

    max_tokens: int
    """Tokens to generate at most."""
    min_tokens: int = 0
    """No stop id is chosen and no stop string ends the text before this many tokens."""
    temperature: float = 1.0
    """0: the likeliest token, always. Above: scores are divided by it."""
    top_p: float = 1.0
    """Only the likeliest tokens whose probabilities add up to this are eligible."""
    top_k: int = 0
    """Only this many of the likeliest tokens are eligible; 0: all."""
    min_p: float = 0.0
    """Only tokens at least this share as likely as the likeliest one are eligible."""
    repetition_penalty: float = 1.0
    """Scores of tokens of the prompt and of the output are divided (if positive) or multiplied (if
    negative) by it."""
    presence_penalty: float = 0.0
    """Taken once from the score of each token of the output."""
    frequency_penalty: float = 0.0
    """Taken from the score of a token as often as it stands in the output."""
    seed: int | None = None
    """The same seed gives the same text, whatever else the engine does. None: one is derived from
    the engine's seed and the request's id."""
    stop: tuple[str, ...] = ()
    """The text ends before the first of these strings."""
    stop_token_ids: tuple[int, ...] = ()
    """Ids that end the request beside the tokenizer's own."""
    include_stop_str_in_output: bool = False
    """Keep the stop string, or the text of the stop id, in the text."""
    skip_special_tokens: bool = True
    """Leave the names of control tokens out of the text."""
    ignore_eos: bool = False
    """The tokenizer's own stop ids are ordinary tokens."""
    logprobs: int | None = None
    """Alternatives that are reported for each token, 0 to 20; None: no log probabilities."""
    prompt_logprobs: int | None = None
    """The same for each token of the prompt from the second on, all of which is then computed
    anew. None: not reported."""
    selected_blocks: bool = False
    """Report what each token was made from. Its steps run without CUDA graphs."""
    logit_bias: Mapping[int, float] = field(default_factory=dict)
    """Added to the scores of these ids, -100 to 100."""
    allowed_token_ids: tuple[int, ...] = ()
    """Only these ids are eligible; empty: all."""
    bad_words: tuple[tuple[int, ...], ...] = ()
    """Sequences of ids that do not come about in the output."""
    grammar: Grammar | None = None
    """What the whole output must match. It ends where the grammar lets it and the model wants."""

    def __post_init__(self) -> None:
        _require(self.max_tokens >= 1, "max_tokens", self.max_tokens, "must be at least 1")
        _require(
            0 <= self.min_tokens <= self.max_tokens,
            "min_tokens",
            self.min_tokens,
            f"must lie between 0 and max_tokens={self.max_tokens}",
        )
        _require(
            0.0 <= self.temperature < math.inf,
            "temperature",
            self.temperature,
            "must be a finite number >= 0",
        )
        _require(0.0 < self.top_p <= 1.0, "top_p", self.top_p, "must lie in (0, 1]")
        _require(self.top_k >= 0, "top_k", self.top_k, "must not be negative (0: all tokens)")
        _require(0.0 <= self.min_p <= 1.0, "min_p", self.min_p, "must lie in [0, 1]")
        _require(
            MIN_REPETITION_PENALTY <= self.repetition_penalty <= MAX_REPETITION_PENALTY,
            "repetition_penalty",
            self.repetition_penalty,
            f"must lie in [{MIN_REPETITION_PENALTY}, {MAX_REPETITION_PENALTY}]",
        )
        for name in ("presence_penalty", "frequency_penalty"):
            value = getattr(self, name)
            _require(-2.0 <= value <= 2.0, name, value, "must lie in [-2, 2]")
        self._check_ends_and_reports()

    def _check_ends_and_reports(self) -> None:
        _require("" not in self.stop, "stop", self.stop, "must hold no empty string")
        _require(
            all(token >= 0 for token in self.stop_token_ids),
            "stop_token_ids",
            self.stop_token_ids,
            "must hold no negative id",
        )
        for name in ("logprobs", "prompt_logprobs"):
            value = getattr(self, name)
            _require(
                value is None or 0 <= value <= MAX_LOGPROBS,
                name,
                value,
                f"must lie between 0 and {MAX_LOGPROBS}",
            )
        _require(all(self.bad_words), "bad_words", self.bad_words, "must hold no empty sequence")
        if self.grammar is not None:
            rule = "cannot be combined with a grammar, which says itself where the output may end"
            _require(not self.ignore_eos, "ignore_eos", self.ignore_eos, rule)
            _require(self.min_tokens == 0, "min_tokens", self.min_tokens, rule)
        for token, bias in self.logit_bias.items():
            _require(
                token >= 0 and -MAX_LOGIT_BIAS <= bias <= MAX_LOGIT_BIAS,
                f"logit_bias[{token}]",
                bias,
                f"must be of an id >= 0 and lie in [-{MAX_LOGIT_BIAS:g}, {MAX_LOGIT_BIAS:g}]",
            )


@dataclass(frozen=True, slots=True)
class TokenLogprob:
    """Log probabilities at one generated token: of the model itself, before any of the request's
    settings (temperature, penalties, bias, cuts) changes them."""

    token_id: int
    logprob: float
    rank: int
    """1 for the likeliest token of the vocabulary."""
    top: tuple[tuple[int, float], ...]
    """The likeliest ids with their log probabilities, likeliest first."""


@dataclass(frozen=True, slots=True)
class BlockRead:
    """A stretch of a request's tokens, prompt and output, that the selected branch read."""

    start: int
    end: int
    """Behind its last token."""
    share: float
    """How many of all layers and key/value heads selected it, in (0, 1]."""


@dataclass(frozen=True, slots=True)
class Output:
    """One increment of one request."""

    request_id: str
    token_ids: tuple[int, ...]
    """New ids; an id that ended the request is among them."""
    text: str
    """New text. It may lag behind token_ids: half a character, or what may become a stop string,
    waits for the tokens that follow."""
    logprobs: tuple[TokenLogprob, ...] | None
    """One for each of token_ids, if asked for."""
    prompt_logprobs: tuple[TokenLogprob, ...] | None
    """With the first output, if asked for: one for each token of the prompt but the first."""
    selected_blocks: tuple[BlockRead, ...] | None
    """What the new token was made from, if asked for; beside it the compressed blocks and the
    window were read, as ever."""
    finish_reason: FinishReason | None
    """None: more will come."""
    stop_reason: str | int | None
    """The stop string or the id of stop_token_ids that ended the request; of an abort what it was
    for: "deadline", or "grammar" if nothing could follow."""
    num_prompt_tokens: int
    num_cached_tokens: int
    """Tokens of the prompt that did not have to be computed."""
    num_output_tokens: int
    """Tokens generated so far, these included."""
    queue_s: float | None
    """Seconds from its arrival at the engine to its first step; None: it ended before."""


class RequestState(Enum):
    """Where a request is: in exactly one of these places."""

    WAITING = "waiting"
    RUNNING = "running"
    FINISHED = "finished"


@dataclass(slots=True, eq=False)
class Request:
    """One request inside the engine. Its tokens are the prompt and what was generated since."""

    request_id: str
    prompt_ids: tuple[int, ...]
    params: SamplingParams
    arrival: int
    """Number of the request in the order of arrival: the smaller, the older."""
    seed: int
    """What its randomness hangs on."""
    keys: PageKeys
    """Names of its pages' contents: what the prefix cache knows them by."""
    num_to_compute: int
    """Tokens of the prompt that the prefix cache did not know when the request came."""
    priority: int = 0
    """The lower, the more important."""
    deadline_s: float = math.inf
    """When the first token must have come, by the engine's clock."""
    arrived_s: float = 0.0
    """When it came, by the same clock."""
    queue_s: float | None = None
    """Seconds from then to its first step; None: it has not begun."""
    stop_ids: frozenset[int] = frozenset()
    """Ids that end it: the tokenizer's own unless they are ignored, and params.stop_token_ids."""
    output_ids: list[int] = field(default_factory=list)
    pages: SequencePages = field(default_factory=SequencePages)
    """Places of the tokens that the model has seen, and of those of the step at hand."""
    deficit: float = 0.0
    """Prompt tokens that the scheduler owes it; below 0: that it has borrowed."""
    num_cached_tokens: int = 0
    """Tokens of the prompt that the prefix cache knew when the request began to run."""
    has_begun: bool = False
    """Whether it has run before; it may wait again after a preemption."""
    state: RequestState = RequestState.WAITING
    finish_reason: FinishReason | None = None
    stop_reason: str | int | None = None

    @property
    def rank(self) -> tuple[int, int]:
        """Who is served first: the smaller."""
        return self.priority, self.arrival

    @property
    def num_tokens(self) -> int:
        """Tokens that are known: prompt and output."""
        return len(self.prompt_ids) + len(self.output_ids)

    @property
    def num_pending(self) -> int:
        """Known tokens that have no place in the cache yet. After a preemption: all."""
        return self.num_tokens - self.pages.num_tokens

    @property
    def is_decoding(self) -> bool:
        """Whether the next token is all that is missing: its one pending token was generated, or is
        being put through the model before it is known."""
        return self.num_pending <= 1 and bool(self.output_ids)

    def update_keys(self) -> None:
        """Let the keys know all tokens that are known."""
        num_known = self.keys.num_tokens - len(self.prompt_ids)
        self.keys.append(self.output_ids[num_known:])

    def output(
        self,
        token_id: int | None = None,
        text: str = "",
        logprob: TokenLogprob | None = None,
        prompt_logprobs: tuple[TokenLogprob, ...] | None = None,
        selected_blocks: tuple[BlockRead, ...] | None = None,
    ) -> Output:
        """What is told of the request's newest token, or of its end without one."""
        wants_logprobs = self.params.logprobs is not None
        return Output(
            request_id=self.request_id,
            token_ids=() if token_id is None else (token_id,),
            text=text,
            logprobs=(() if logprob is None else (logprob,)) if wants_logprobs else None,
            prompt_logprobs=prompt_logprobs,
            selected_blocks=selected_blocks,
            finish_reason=self.finish_reason,
            stop_reason=self.stop_reason,
            num_prompt_tokens=len(self.prompt_ids),
            num_cached_tokens=self.num_cached_tokens,
            num_output_tokens=len(self.output_ids),
            queue_s=self.queue_s,
        )

    def tokens(self, start: int, end: int) -> list[int]:
        """Known tokens at positions [start, end)."""
        num_prompt = len(self.prompt_ids)
        if start >= num_prompt:
            return self.output_ids[start - num_prompt : end - num_prompt]
        return [*self.prompt_ids[start:end], *self.output_ids[: max(0, end - num_prompt)]]


def _require(holds: bool, name: str, value: object, rule: str) -> None:
    if not holds:
        raise ValueError(f"{name}={value} {rule}")
