"""From a request's chat or text to token ids, and from its settings to sampling parameters."""

from collections.abc import Sequence
from dataclasses import dataclass

from deployments.errors import ApiError, bad_request
from deployments.protocol import (
    MAX_CHOICES,
    ChatCompletionRequest,
    ChatMessage,
    CompletionRequest,
    Generation,
)
from nsa_platform.data.chat import ChatError, render_prompt
from nsa_platform.data.tokenizer import Tokenizer
from nsa_platform.serve.request import SamplingParams

COMPLETION_TOKENS = 16
"""What OpenAI generates for a completion that names no max_tokens."""


@dataclass(frozen=True, slots=True)
class Limits:
    """What a prompt must fit into."""

    max_model_len: int
    """Tokens of prompt and output together."""
    vocab_size: int
    """Token ids are below this."""
    longest_token_bytes: int
    """UTF-8 bytes of the longest token: a text of b bytes has at least b / this many tokens."""


@dataclass(frozen=True, slots=True)
class Prompt:
    """What the model continues."""

    ids: tuple[int, ...]
    text: str
    """The same as text; what `echo` repeats."""


def limits_of(tokenizer: Tokenizer, *, max_model_len: int, vocab_size: int) -> Limits:
    """Limits of a model with its tokenizer.

    Raises:
        TokenizerError: the tokenizer is not byte-level.
    """
    return Limits(max_model_len, vocab_size, max(1, int(tokenizer.token_bytes().max())))


def chat_prompt(tokenizer: Tokenizer, messages: Sequence[ChatMessage], limits: Limits) -> Prompt:
    """A chat as training saw it, up to where the assistant writes.

    Raises:
        ApiError: 400, the chat is malformed or does not fit.
    """
    texts = [
        message.content
        if isinstance(message.content, str)
        else "".join(part.text for part in message.content)
        for message in messages
    ]
    for text in texts:
        _check_bytes(text, limits, "messages")
    turns = [
        {"role": message.role, "content": text}
        for message, text in zip(messages, texts, strict=True)
    ]
    try:
        ids = render_prompt(tokenizer, turns)
    except ChatError as error:
        raise bad_request(str(error), param="messages") from None
    return _checked(Prompt(tuple(ids), ""), limits, "messages")


def text_prompt(tokenizer: Tokenizer, text: str, limits: Limits) -> Prompt:
    """A text as it stands.

    Raises:
        ApiError: 400, it is empty or does not fit.
    """
    _check_bytes(text, limits, "prompt")
    return _checked(Prompt(tuple(tokenizer.encode(text)), text), limits, "prompt")


def completion_prompts(
    tokenizer: Tokenizer, request: CompletionRequest, limits: Limits
) -> list[Prompt]:
    """One prompt for each that the request holds.

    Raises:
        ApiError: 400, one is empty, does not fit or holds an id that the model does not have.
    """
    given = request.prompt
    if isinstance(given, str):
        return [text_prompt(tokenizer, given, limits)]
    numbers = [each for each in given if isinstance(each, int)]
    if numbers:
        return [id_prompt(tokenizer, numbers, limits)]
    return [
        text_prompt(tokenizer, each, limits)
        if isinstance(each, str)
        else id_prompt(tokenizer, each, limits)
        for each in given
        if not isinstance(each, int)
    ]


def id_prompt(tokenizer: Tokenizer, ids: Sequence[int], limits: Limits) -> Prompt:
    """Token ids as they stand.

    Raises:
        ApiError: 400, there are too many or the model does not have one.
    """
    checked = _checked(Prompt(tuple(ids), ""), limits, "prompt")
    return Prompt(checked.ids, tokenizer.decode(checked.ids))


def sampling(request: Generation, prompt: Prompt, limits: Limits, *, copy: int) -> SamplingParams:
    """Parameters of one choice; of n choices each has its own randomness.

    Raises:
        ApiError: 400, the settings do not go together or the output does not fit.
    """
    asked, param = _max_tokens(request)
    room = limits.max_model_len - len(prompt.ids)
    default = min(COMPLETION_TOKENS, room) if isinstance(request, CompletionRequest) else room
    if asked is not None and asked > room:
        raise bad_request(
            f"This model's maximum context length is {limits.max_model_len} tokens; the prompt "
            f"has {len(prompt.ids)} and {param}={asked} more do not fit",
            param=param,
            code="context_length_exceeded",
        )
    stop = (request.stop,) if isinstance(request.stop, str) else tuple(request.stop or ())
    _check_ids([*(request.stop_token_ids or ())], limits, "stop_token_ids")
    bias = {int(token): value for token, value in (request.logit_bias or {}).items()}
    _check_ids([*bias], limits, "logit_bias")
    try:
        return SamplingParams(
            max_tokens=default if asked is None else asked,
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
            ignore_eos=bool(request.ignore_eos),
            logprobs=_logprobs(request),
            logit_bias=bias,
        )
    except ValueError as error:
        field = str(error).partition("=")[0]
        raise bad_request(
            str(error), param=field if field in type(request).model_fields else None
        ) from None


def check_choices(request: Generation, num_prompts: int) -> None:
    """Refuse more answers to one request than it may ask for. Raises ApiError."""
    total = num_prompts * (request.n or 1)
    if total > MAX_CHOICES:
        raise bad_request(
            f"n={request.n or 1} for {num_prompts} prompts are {total} answers, at most "
            f"{MAX_CHOICES} may be asked for at once",
            param="n",
        )


def _max_tokens(request: Generation) -> tuple[int | None, str]:
    if isinstance(request, ChatCompletionRequest) and request.max_completion_tokens is not None:
        return request.max_completion_tokens, "max_completion_tokens"
    return request.max_tokens, "max_tokens"


def _logprobs(request: Generation) -> int | None:
    if isinstance(request, CompletionRequest):
        return request.logprobs
    if isinstance(request, ChatCompletionRequest) and request.logprobs:
        return request.top_logprobs or 0
    return None


def _default(value: float | None, default: float) -> float:
    return default if value is None else value


def _check_bytes(text: str, limits: Limits, param: str) -> None:
    """Refuse what cannot fit before the tokenizer reads all of it."""
    least = len(text.encode()) // limits.longest_token_bytes
    if least > limits.max_model_len:
        raise _too_long(f"at least {least}", limits, param)


def _checked(prompt: Prompt, limits: Limits, param: str) -> Prompt:
    if not prompt.ids:
        raise bad_request(f"{param} is empty: at least one token is needed", param=param)
    _check_ids(prompt.ids, limits, param)
    if len(prompt.ids) >= limits.max_model_len:
        raise _too_long(str(len(prompt.ids)), limits, param)
    return prompt


def _check_ids(ids: Sequence[int], limits: Limits, param: str) -> None:
    if ids and max(ids) >= limits.vocab_size:
        raise bad_request(
            f"{param}: token ids must lie in [0, {limits.vocab_size}), got {max(ids)}", param=param
        )


def _too_long(count: str, limits: Limits, param: str) -> ApiError:
    return bad_request(
        f"This model's maximum context length is {limits.max_model_len} tokens; the prompt has "
        f"{count} tokens, and at least one more is generated",
        param=param,
        code="context_length_exceeded",
    )
