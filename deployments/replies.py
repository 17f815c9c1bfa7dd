"""Answers as OpenAI shapes them; only fields that were set are written."""

from typing import Literal

from pydantic import BaseModel, ConfigDict

FinishReason = Literal["stop", "length", "abort"]


class Reply(BaseModel):
    """Base of all answers."""

    model_config = ConfigDict(protected_namespaces=())

    def to_json(self) -> str:
        return self.model_dump_json(exclude_unset=True)


class PromptTokensDetails(Reply):
    """Where the prompt's tokens came from."""

    cached_tokens: int


class Usage(Reply):
    """Token counts of a request, over all its choices."""

    prompt_tokens: int
    completion_tokens: int
    total_tokens: int
    prompt_tokens_details: PromptTokensDetails


class TopLogprob(Reply):
    """One alternative at one token."""

    token: str
    logprob: float
    bytes: list[int] | None


class TokenLogprob(TopLogprob):
    """One token of a chat's answer."""

    top_logprobs: list[TopLogprob]


class ChatLogprobs(Reply):
    """Log probabilities of a chat's answer."""

    content: list[TokenLogprob]
    refusal: None = None


class CompletionLogprobs(Reply):
    """Log probabilities of a completion: one entry a token."""

    tokens: list[str]
    token_logprobs: list[float | None]
    """null: the first token of an echoed prompt."""
    top_logprobs: list[dict[str, float] | None]
    text_offset: list[int]
    """Where the token's text begins, in characters of the choice's text."""


class PromptLogprob(Reply):
    """One token, or one alternative, at one place of a prompt."""

    logprob: float
    rank: int
    """1 for the likeliest token."""
    decoded_token: str


class BlocksRead(Reply):
    """What tokens were made from (nsa.return_selected_blocks)."""

    block_size: int
    """Tokens of a block."""
    prompt_blocks: list[str] | None = None
    """Text of the prompt's blocks, one after the other; in a stream with the first event alone."""
    selected_blocks: list[list[tuple[int, int, float]]] | None = None
    """For each token the stretches of the context that were read: first token, the one behind the
    last, and how many of all layers and key/value heads read it, in (0, 1]."""


class AssistantMessage(Reply):
    """The answer of a chat."""

    role: Literal["assistant"]
    content: str
    refusal: None = None


class ChatChoice(Reply):
    """One answer."""

    index: int
    message: AssistantMessage
    logprobs: ChatLogprobs | None
    finish_reason: FinishReason
    stop_reason: str | int | None = None
    token_ids: list[int] | None = None
    nsa: BlocksRead | None = None


class ChatCompletion(Reply):
    """POST /v1/chat/completions."""

    id: str
    object: Literal["chat.completion"]
    created: int
    model: str
    choices: list[ChatChoice]
    usage: Usage
    system_fingerprint: str | None
    prompt_logprobs: list[dict[str, PromptLogprob] | None] | None = None
    prompt_token_ids: list[int] | None = None


class Delta(Reply):
    """What a chunk adds to the answer."""

    role: Literal["assistant"] | None = None
    content: str | None = None


class ChunkChoice(Reply):
    """What a chunk adds to one answer."""

    index: int
    delta: Delta
    logprobs: ChatLogprobs | None
    finish_reason: FinishReason | None
    stop_reason: str | int | None = None
    token_ids: list[int] | None = None
    nsa: BlocksRead | None = None


class ChatCompletionChunk(Reply):
    """One event of a streamed chat."""

    id: str
    object: Literal["chat.completion.chunk"]
    created: int
    model: str
    choices: list[ChunkChoice]
    usage: Usage | None = None
    system_fingerprint: str | None


class CompletionChoice(Reply):
    """One continuation, or what an event adds to it."""

    index: int
    text: str
    logprobs: CompletionLogprobs | None
    finish_reason: FinishReason | None
    stop_reason: str | int | None = None
    token_ids: list[int] | None = None
    nsa: BlocksRead | None = None
    prompt_logprobs: list[dict[str, PromptLogprob] | None] | None = None
    prompt_token_ids: list[int] | None = None


class Completion(Reply):
    """POST /v1/completions, whole or one event of a stream."""

    id: str
    object: Literal["text_completion"]
    created: int
    model: str
    choices: list[CompletionChoice]
    usage: Usage | None = None
    system_fingerprint: str | None


class ModelCard(Reply):
    """One model that is served."""

    id: str
    object: Literal["model"]
    created: int
    owned_by: str
    root: str
    """Where it was loaded from."""
    max_model_len: int | None = None
    """Tokens of one request; null while no replica has loaded the model."""


class ModelList(Reply):
    """GET /v1/models."""

    object: Literal["list"]
    data: list[ModelCard]


class Tokens(Reply):
    """POST /tokenize."""

    count: int
    max_model_len: int
    tokens: list[int]
    token_strs: list[str] | None = None


class Detokenized(Reply):
    """POST /detokenize."""

    prompt: str


class Health(Reply):
    """GET /health."""

    status: Literal["ok"]


class Load(Reply):
    """GET /load."""

    server_load: int
    """Choices that are being generated or wait, over all models and replicas."""


class Version(Reply):
    """GET /version."""

    version: str
