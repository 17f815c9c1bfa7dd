"""From a request's settings to sampling parameters."""

from collections.abc import Sequence

from deployments.errors import bad_request
from deployments.prompts import Limits, Prompt, check_ids
from deployments.protocol import ChatCompletionRequest, CompletionRequest, Generation
from deployments.structured import grammar_of
from nsa_platform.data.tokenizer import Tokenizer
from nsa_platform.serve.request import SamplingParams

COMPLETION_TOKENS = 16
"""What OpenAI generates for a completion that names no max_tokens."""


def sampling(
    request: Generation, prompt: Prompt, tokenizer: Tokenizer, limits: Limits, *, copy: int
) -> SamplingParams:
    """Parameters of one choice; of n choices each has its own randomness.

    Raises:
        ApiError: 400, the settings do not go together or the output does not fit.
    """
    max_tokens = _max_tokens(request, prompt, limits)
    stop = (request.stop,) if isinstance(request.stop, str) else tuple(request.stop or ())
    bias = {int(token): value for token, value in (request.logit_bias or {}).items()}
    for name in ("stop_token_ids", "allowed_token_ids"):
        check_ids(getattr(request, name) or (), limits, name)
    check_ids([*bias], limits, "logit_bias")
    try:
        return SamplingParams(
            max_tokens=max_tokens,
            min_tokens=request.min_tokens or 0,
            temperature=_default(request.temperature, 1.0),
            top_p=_default(request.top_p, 1.0),
            top_k=min(max(request.top_k or 0, 0), limits.vocab_size),
            min_p=_default(request.min_p, 0.0),
            repetition_penalty=_default(request.repetition_penalty, 1.0),
            presence_penalty=_default(request.presence_penalty, 0.0),
            frequency_penalty=_default(request.frequency_penalty, 0.0),
            seed=None if request.seed is None else request.seed + copy,
            stop=stop,
            stop_token_ids=tuple(request.stop_token_ids or ()),
            include_stop_str_in_output=bool(request.include_stop_str_in_output),
            skip_special_tokens=request.skip_special_tokens is not False,
            ignore_eos=bool(request.ignore_eos),
            logprobs=_logprobs(request),
            prompt_logprobs=_prompt_logprobs(request),
            selected_blocks=request.wants_blocks,
            logit_bias=bias,
            allowed_token_ids=tuple(request.allowed_token_ids or ()),
            bad_words=_bad_words(request.bad_words or (), tokenizer),
            grammar=grammar_of(request.response_format, request.structured_outputs),
        )
    except ValueError as error:
        field = str(error).partition("=")[0]
        raise bad_request(
            str(error), param=field if field in type(request).model_fields else None
        ) from None


def _max_tokens(request: Generation, prompt: Prompt, limits: Limits) -> int:
    """Tokens to generate; one at least, for a request that wants none too."""
    asked, param = request.max_tokens, "max_tokens"
    if isinstance(request, ChatCompletionRequest) and request.max_completion_tokens is not None:
        asked, param = request.max_completion_tokens, "max_completion_tokens"
    room = limits.max_model_len - len(prompt.ids)
    if asked is not None and asked > room:
        raise bad_request(
            f"This model's maximum context length is {limits.max_model_len} tokens; the prompt "
            f"has {len(prompt.ids)} and {param}={asked} more do not fit",
            param=param,
            code="context_length_exceeded",
        )
    default = min(COMPLETION_TOKENS, room) if isinstance(request, CompletionRequest) else room
    return default if asked is None else max(1, asked)


def _logprobs(request: Generation) -> int | None:
    if isinstance(request, CompletionRequest):
        return request.logprobs
    if isinstance(request, ChatCompletionRequest) and request.logprobs:
        return request.top_logprobs or 0
    return None


def _prompt_logprobs(request: Generation) -> int | None:
    """As asked for, or for the prompt that a completion begins with."""
    asked = [request.prompt_logprobs]
    if isinstance(request, CompletionRequest) and request.echo:
        asked.append(request.logprobs)
    return max((count for count in asked if count is not None), default=None)


def _bad_words(words: Sequence[str], tokenizer: Tokenizer) -> tuple[tuple[int, ...], ...]:
    """Each word as it stands and as it follows a space."""
    spellings = {text for word in words for text in (word, " " + word.lstrip())}
    return tuple(tuple(tokenizer.encode(text)) for text in sorted(spellings))


def _default(value: float | None, default: float) -> float:
    return default if value is None else value
