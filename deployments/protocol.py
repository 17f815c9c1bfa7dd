"""Requests as OpenAI shapes them: types, ranges, and what is refused rather than ignored."""

import difflib
from collections.abc import Mapping
from typing import Annotated, Any, Literal

from pydantic import (
    AfterValidator,
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    model_validator,
)
from pydantic_core import PydanticCustomError

MAX_CHOICES = 128
MAX_STOPS = 16
MAX_LOGPROBS = 20
INT64 = 2**63 - 1


def _refuse(value: object) -> object:
    if value is not None:
        raise PydanticCustomError("unsupported", "is not supported by this server; leave it out")
    return value


def _writable(text: str) -> str:
    try:
        text.encode()
    except UnicodeEncodeError:
        raise PydanticCustomError(
            "not_unicode", "holds half of a surrogate pair, which is no Unicode text"
        ) from None
    return text


Unsupported = Annotated[None, BeforeValidator(_refuse)]
"""A field of OpenAI's that would change the answer, and that this server does not know."""

Text = Annotated[str, AfterValidator(_writable)]
TokenId = Annotated[int, Field(ge=0, le=2**31 - 1)]
Penalty = Annotated[float, Field(ge=-2, le=2)]


class Body(BaseModel):
    """Base of all requests: no coercion, no NaN, no field that nobody reads."""

    model_config = ConfigDict(
        strict=True, extra="forbid", allow_inf_nan=False, use_attribute_docstrings=True
    )

    @model_validator(mode="before")
    @classmethod
    def _known_fields(cls, tree: Any) -> Any:
        for name in tree if isinstance(tree, Mapping) else ():
            if name not in cls.model_fields:
                near = difflib.get_close_matches(str(name), cls.model_fields, n=1, cutoff=0.6)
                hint = f"; did you mean {near[0]!r}?" if near else ""
                raise PydanticCustomError(
                    "unknown_field",
                    "unknown field {field}{hint}",
                    {"field": repr(name)[:200], "hint": hint, "name": str(name)[:200]},
                )
        return tree


class StreamOptions(Body):
    """What a stream carries beside the text."""

    include_usage: bool | None = None
    """One more chunk at the end holds the token counts."""
    continuous_usage_stats: bool | None = None
    """Every chunk holds the token counts so far."""


class ResponseFormat(Body):
    """Only plain text can be asked for."""

    type: Literal["text"]


class Generation(Body):
    """What both endpoints take: sampling, ends, reports."""

    model: Text
    """One of the ids of /v1/models."""
    temperature: Annotated[float, Field(ge=0, le=2)] | None = None
    """0: the likeliest token, always. Default 1."""
    top_p: Annotated[float, Field(gt=0, le=1)] | None = None
    """Only the likeliest tokens whose probabilities add up to this are eligible. Default 1."""
    top_k: Annotated[int, Field(ge=-1, le=INT64)] | None = None
    """Only this many of the likeliest tokens are eligible; 0 and -1: all."""
    min_p: Annotated[float, Field(ge=0, le=1)] | None = None
    """Only tokens at least this share as likely as the likeliest one are eligible."""
    repetition_penalty: Annotated[float, Field(ge=0.01, le=10)] | None = None
    """Above 1: tokens of prompt and output become less likely. Default 1."""
    presence_penalty: Penalty | None = None
    """Taken once from the score of every token of the output."""
    frequency_penalty: Penalty | None = None
    """Taken from the score of a token as often as it stands in the output."""
    logit_bias: (
        dict[
            Annotated[str, Field(pattern=r"^\d{1,9}$")],
            Annotated[float, Field(ge=-100, le=100)],
        ]
        | None
    ) = None
    """Added to the scores of these token ids."""
    seed: Annotated[int, Field(ge=-INT64, le=INT64)] | None = None
    """The same seed gives the same text, whatever else the server does."""
    n: Annotated[int, Field(ge=1, le=MAX_CHOICES)] | None = None
    """Answers to one prompt. Default 1."""
    stop: (
        Annotated[Text, Field(min_length=1)]
        | Annotated[list[Annotated[Text, Field(min_length=1)]], Field(max_length=MAX_STOPS)]
        | None
    ) = None
    """The text ends before the first of these strings."""
    stop_token_ids: Annotated[list[TokenId], Field(max_length=MAX_CHOICES)] | None = None
    """Ids that end the text beside the model's own."""
    include_stop_str_in_output: bool | None = None
    """Keep the stop string in the text."""
    ignore_eos: bool | None = None
    """Do not end where the model wants to."""
    min_tokens: Annotated[int, Field(ge=0, le=INT64)] | None = None
    """Tokens before which nothing ends the text but max_tokens."""
    max_tokens: Annotated[int, Field(ge=1, le=INT64)] | None = None
    """Tokens to generate at most."""
    stream: bool | None = None
    """Send the text token by token, as server-sent events."""
    stream_options: StreamOptions | None = None
    """What a stream carries beside the text."""
    return_token_ids: bool | None = None
    """Report the ids of the generated tokens as `token_ids` of each choice."""
    user: Text | None = None
    """Accepted for compatibility; nothing is done with it."""

    @model_validator(mode="after")
    def _options_need_a_stream(self) -> "Generation":
        if self.stream_options is not None and not self.stream:
            raise ValueError("stream_options needs stream=true")
        return self


class TextPart(Body):
    """A piece of a message. Only text can be read; images and sound cannot."""

    type: Literal["text"]
    text: Text


class ChatMessage(Body):
    """One turn of a chat."""

    role: Literal["system", "user", "assistant"]
    """Who speaks; system only as the first."""
    content: Text | Annotated[list[TextPart], Field(min_length=1)]
    """What is said."""
    name: Unsupported = None
    refusal: Unsupported = None
    tool_calls: Unsupported = None
    function_call: Unsupported = None
    audio: Unsupported = None
    annotations: Unsupported = None


class ChatCompletionRequest(Generation):
    """POST /v1/chat/completions."""

    messages: Annotated[list[ChatMessage], Field(min_length=1)]
    """The chat so far."""
    max_completion_tokens: Annotated[int, Field(ge=1, le=INT64)] | None = None
    """OpenAI's newer name of max_tokens. Default: as far as the context goes."""
    logprobs: bool | None = None
    """Report the log probability of every token."""
    top_logprobs: Annotated[int, Field(ge=0, le=MAX_LOGPROBS)] | None = None
    """Alternatives that are reported for every token; needs logprobs."""
    response_format: ResponseFormat | None = None
    """{"type": "text"} or nothing."""
    metadata: dict[str, Text] | None = None
    """Accepted for compatibility; nothing is done with it."""
    store: Literal[False] | None = None
    """Nothing is ever stored."""
    tool_choice: Literal["none"] | None = None
    """There are no tools."""
    tools: Unsupported = None
    functions: Unsupported = None
    function_call: Unsupported = None
    modalities: Unsupported = None
    audio: Unsupported = None
    prediction: Unsupported = None
    reasoning_effort: Unsupported = None
    web_search_options: Unsupported = None

    @model_validator(mode="after")
    def _consistent(self) -> "ChatCompletionRequest":
        if self.top_logprobs is not None and not self.logprobs:
            raise ValueError("top_logprobs needs logprobs=true")
        given = (self.max_tokens, self.max_completion_tokens)
        if None not in given and given[0] != given[1]:
            raise ValueError(
                f"max_tokens={given[0]} and max_completion_tokens={given[1]} mean the same: "
                "give one"
            )
        return self


class CompletionRequest(Generation):
    """POST /v1/completions."""

    prompt: (
        Text
        | Annotated[list[Text], Field(min_length=1, max_length=MAX_CHOICES)]
        | Annotated[list[TokenId], Field(min_length=1)]
        | Annotated[
            list[Annotated[list[TokenId], Field(min_length=1)]],
            Field(min_length=1, max_length=MAX_CHOICES),
        ]
    )
    """Text or token ids, or a list of either."""
    echo: bool | None = None
    """Begin the text with the prompt; not together with logprobs."""
    logprobs: Annotated[int, Field(ge=0, le=MAX_LOGPROBS)] | None = None
    """Alternatives that are reported for every token."""
    best_of: Unsupported = None
    suffix: Unsupported = None

    @model_validator(mode="after")
    def _consistent(self) -> "CompletionRequest":
        if self.echo and self.logprobs is not None:
            raise ValueError("echo cannot be combined with logprobs")
        return self


class TokenizeRequest(Body):
    """POST /tokenize: a prompt, or a chat as it is put before the model."""

    model: Text | None = None
    """One of the ids of /v1/models; null: the only one."""
    prompt: Text | None = None
    """Plain text."""
    messages: Annotated[list[ChatMessage], Field(min_length=1)] | None = None
    """A chat, rendered up to where the assistant is to write."""
    return_token_strs: bool | None = None
    """Report each token's text too."""

    @model_validator(mode="after")
    def _one_of_two(self) -> "TokenizeRequest":
        if (self.prompt is None) == (self.messages is None):
            raise ValueError("give prompt or messages, and not both")
        return self


class DetokenizeRequest(Body):
    """POST /detokenize."""

    model: Text | None = None
    """One of the ids of /v1/models; null: the only one."""
    tokens: list[TokenId]
    """Token ids."""
