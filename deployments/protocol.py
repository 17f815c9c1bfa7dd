"""Requests as OpenAI shapes them: types, ranges, and what is refused rather than ignored."""

from typing import Annotated, Literal, Self

from pydantic import Field, model_validator

from deployments.fields import (
    INT64,
    MAX_ALLOWED,
    MAX_CHOICES,
    MAX_LOGPROBS,
    MAX_STOPS,
    Body,
    Penalty,
    Text,
    TokenId,
    Unsupported,
    conflict,
)
from deployments.structured import ResponseFormat, StructuredOutputs


class StreamOptions(Body):
    """What a stream carries beside the text."""

    include_usage: bool | None = None
    """One more chunk at the end holds the token counts."""
    continuous_usage_stats: bool | None = None
    """Every chunk holds the token counts so far."""


class NsaOptions(Body):
    """This server's own settings."""

    deadline_s: Annotated[float, Field(gt=0, le=86_400)] | None = None
    """Seconds until which the first token must come: a request that is predicted to miss it is
    refused with 429, and one that does ends with `abort`."""
    return_selected_blocks: bool | None = None
    """Report as `nsa` of each choice which blocks of the context each token was made from, and once
    the text of the prompt's blocks."""


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
            Annotated[str, Field(pattern=r"^[0-9]{1,9}$")],
            Annotated[float, Field(ge=-100, le=100)],
        ]
        | None
    ) = None
    """Added to the scores of these token ids."""
    seed: Annotated[int, Field(ge=-INT64, le=INT64)] | None = None
    """The same seed gives the same text, whatever else the server does."""
    allowed_token_ids: (
        Annotated[list[TokenId], Field(min_length=1, max_length=MAX_ALLOWED)] | None
    ) = None
    """Only these ids are eligible."""
    bad_words: (
        Annotated[list[Annotated[Text, Field(min_length=1)]], Field(max_length=MAX_CHOICES)] | None
    ) = None
    """Words that do not come about in the text, at its beginning or after a space."""
    response_format: ResponseFormat | None = None
    """What the text must be: anything, JSON, JSON of a schema, or what matches an expression."""
    structured_outputs: StructuredOutputs | None = None
    """The same in vLLM's shape, with choices and grammars besides."""
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
    truncate_prompt_tokens: Annotated[int, Field(ge=1, le=INT64)] | None = None
    """Of a longer prompt only the last tokens, this many, are read."""
    prompt_logprobs: Annotated[int, Field(ge=0, le=MAX_LOGPROBS)] | None = None
    """Report the log probability of every token of the prompt, with this many alternatives; not
    in a stream."""
    skip_special_tokens: bool | None = None
    """Leave the names of control tokens out of the text. Default true."""
    spaces_between_special_tokens: bool | None = None
    """Accepted for compatibility: nothing ever stands between tokens but what they say."""
    add_special_tokens: bool | None = None
    """Accepted for compatibility: these tokenizers add nothing to a text."""
    stream: bool | None = None
    """Send the text token by token, as server-sent events."""
    stream_options: StreamOptions | None = None
    """What a stream carries beside the text."""
    return_token_ids: bool | None = None
    """Report the ids of the prompt as `prompt_token_ids`, those that were generated as
    `token_ids` of each choice."""
    return_tokens_as_token_ids: bool | None = None
    """Name tokens `token_id:N` in log probabilities."""
    cache_salt: Annotated[Text, Field(min_length=1, max_length=256)] | None = None
    """Prompts of different salts share nothing in the prefix cache, so that nobody can find out by
    the clock what others have asked."""
    priority: Annotated[int, Field(ge=-(2**31), lt=2**31)] | None = None
    """The lower, the sooner. Default 0."""
    nsa: NsaOptions | None = None
    """What no other server has."""
    user: Text | None = None
    """Accepted for compatibility; nothing is done with it."""
    safety_identifier: Text | None = None
    """Accepted for compatibility; nothing is done with it."""
    chat_template: Unsupported = None
    chat_template_kwargs: Unsupported = None
    kv_transfer_params: Unsupported = None
    vllm_xargs: Unsupported = None

    @property
    def wants_blocks(self) -> bool:
        """Whether nsa.return_selected_blocks is set."""
        return self.nsa is not None and bool(self.nsa.return_selected_blocks)

    @model_validator(mode="after")
    def _goes_together(self) -> Self:
        if self.stream_options is not None and not self.stream:
            raise conflict("stream_options", "stream_options needs stream=true")
        if self.prompt_logprobs is not None and self.stream:
            raise conflict("prompt_logprobs", "prompt_logprobs cannot be combined with stream=true")
        if self.structured_outputs is not None and self.response_format is not None:
            raise conflict(
                "structured_outputs",
                "response_format and structured_outputs mean the same: give one",
            )
        return self


class TextPart(Body):
    """A piece of a message. Only text can be read; images and sound cannot."""

    type: Literal["text"]
    text: Text


class ChatMessage(Body):
    """One turn of a chat."""

    role: Literal["system", "developer", "user", "assistant"]
    """Who speaks; system, whose newer name is developer, only as the first."""
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
    add_generation_prompt: bool | None = None
    """Begin the assistant's turn after the last message. Default true."""
    continue_final_message: bool | None = None
    """Go on with the last message instead of beginning a turn; needs
    add_generation_prompt=false."""
    echo: bool | None = None
    """Begin the answer with the last message, if it is the assistant's."""
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
    def _consistent(self) -> Self:
        if self.top_logprobs is not None and not self.logprobs:
            raise conflict("top_logprobs", "top_logprobs needs logprobs=true")
        given = (self.max_tokens, self.max_completion_tokens)
        if None not in given and given[0] != given[1]:
            raise conflict(
                "max_tokens",
                f"max_tokens={given[0]} and max_completion_tokens={given[1]} mean the same: "
                "give one",
            )
        _check_turn(self.add_generation_prompt, self.continue_final_message)
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
    """Begin the text with the prompt; with logprobs those of the prompt come first."""
    logprobs: Annotated[int, Field(ge=0, le=MAX_LOGPROBS)] | None = None
    """Alternatives that are reported for every token."""
    max_tokens: Annotated[int, Field(ge=0, le=INT64)] | None = None
    """Tokens to generate at most; default 16. 0, with echo: only look at the prompt."""
    best_of: Unsupported = None
    suffix: Unsupported = None

    @model_validator(mode="after")
    def _consistent(self) -> Self:
        if self.max_tokens == 0 and not self.echo:
            raise conflict("max_tokens", "max_tokens=0 needs echo=true")
        return self


class TokenizeRequest(Body):
    """POST /tokenize: a prompt, or a chat as it is put before the model."""

    model: Text | None = None
    """One of the ids of /v1/models; null: the only one."""
    prompt: Text | None = None
    """Plain text."""
    messages: Annotated[list[ChatMessage], Field(min_length=1)] | None = None
    """A chat, rendered up to where the assistant is to write."""
    add_generation_prompt: bool | None = None
    """As for a chat. Default true."""
    continue_final_message: bool | None = None
    """As for a chat."""
    add_special_tokens: bool | None = None
    """Accepted for compatibility: these tokenizers add nothing to a text."""
    return_token_strs: bool | None = None
    """Report each token's text too."""

    @model_validator(mode="after")
    def _consistent(self) -> Self:
        if (self.prompt is None) == (self.messages is None):
            raise conflict("prompt", "give prompt or messages, and not both")
        _check_turn(self.add_generation_prompt, self.continue_final_message)
        return self


class DetokenizeRequest(Body):
    """POST /detokenize."""

    model: Text | None = None
    """One of the ids of /v1/models; null: the only one."""
    tokens: list[TokenId]
    """Token ids."""


def _check_turn(add_generation_prompt: bool | None, continue_final_message: bool | None) -> None:
    if continue_final_message and add_generation_prompt is not False:
        raise conflict(
            "continue_final_message", "continue_final_message needs add_generation_prompt=false"
        )
