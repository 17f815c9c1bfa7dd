"""From the engine's increments to OpenAI's answers: whole, or chunk by chunk."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import TypeVar

from deployments.prompts import Prompt
from deployments.replies import (
    AssistantMessage,
    ChatChoice,
    ChatCompletion,
    ChatCompletionChunk,
    ChatLogprobs,
    ChunkChoice,
    Completion,
    CompletionChoice,
    CompletionLogprobs,
    Delta,
    FinishReason,
    PromptTokensDetails,
    Reply,
    TokenLogprob,
    TopLogprob,
    Usage,
)
from deployments.token_text import TokenTexts
from nsa_platform.serve.request import Output
from nsa_platform.serve.request import TokenLogprob as Logprob

C = TypeVar("C", ChatChoice, ChunkChoice, CompletionChoice)


@dataclass(frozen=True, slots=True)
class Stamp:
    """What every piece of one answer carries."""

    id: str
    created: int
    """Seconds since 1970."""
    model: str
    system_fingerprint: str
    """Digest of the weights."""


@dataclass(slots=True)
class _Choice:
    """What has arrived of one choice."""

    prompt: Prompt
    text: str = ""
    token_ids: list[int] = field(default_factory=list)
    logprobs: list[Logprob] = field(default_factory=list)
    offset: int = 0
    """Characters of all tokens so far, for text_offset."""
    cached_tokens: int = 0
    finish_reason: FinishReason | None = None
    stop_reason: str | int | None = None


class _Tally:
    """All choices of a request, in the order prompt by prompt, n for each."""

    def __init__(self, prompts: Sequence[Prompt], n: int) -> None:
        self.prompts = prompts
        self.choices = [_Choice(prompt) for prompt in prompts for _ in range(n)]

    def add(self, index: int, output: Output) -> bool:
        """Take in an increment; whether it is the first of its choice."""
        choice = self.choices[index]
        is_first = not choice.token_ids
        choice.text += output.text
        choice.token_ids.extend(output.token_ids)
        choice.logprobs.extend(output.logprobs or ())
        choice.cached_tokens = output.num_cached_tokens
        choice.finish_reason, choice.stop_reason = output.finish_reason, output.stop_reason
        return is_first

    def usage(self) -> Usage:
        prompt_tokens = sum(len(prompt.ids) for prompt in self.prompts)
        completion_tokens = sum(len(choice.token_ids) for choice in self.choices)
        cached = {id(choice.prompt): choice.cached_tokens for choice in self.choices}
        return Usage(
            prompt_tokens=prompt_tokens,
            completion_tokens=completion_tokens,
            total_tokens=prompt_tokens + completion_tokens,
            prompt_tokens_details=PromptTokensDetails(cached_tokens=sum(cached.values())),
        )


class ChatAnswer:
    """The answer to a chat."""

    def __init__(
        self,
        stamp: Stamp,
        prompts: Sequence[Prompt],
        *,
        n: int,
        texts: TokenTexts,
        with_ids: bool,
        with_logprobs: bool,
    ) -> None:
        self._stamp = stamp
        self._tally = _Tally(prompts, n)
        self._texts = texts
        self._with_ids = with_ids
        self._with_logprobs = with_logprobs

    def add(self, index: int, output: Output) -> list[Reply]:
        """Take in an increment of a choice; the events of a stream that tell of it."""
        events: list[Reply] = []
        if self._tally.add(index, output):
            events.append(self._chunk(index, Delta(role="assistant", content="")))
        events.append(self._chunk(index, Delta(content=output.text), output))
        if output.finish_reason is not None:
            events.append(self._end(index, output))
        return events

    def usage(self) -> Usage:
        return self._tally.usage()

    def usage_chunk(self) -> Reply:
        """The event after the last: token counts and no choice."""
        return self._event([], usage=self.usage())

    def whole(self) -> Reply:
        """The answer, when every choice is finished."""
        choices: list[ChatChoice] = []
        for index, choice in enumerate(self._tally.choices):
            assert choice.finish_reason is not None
            reply = ChatChoice(
                index=index,
                message=AssistantMessage(role="assistant", content=choice.text, refusal=None),
                logprobs=self._logprobs(choice.logprobs),
                finish_reason=choice.finish_reason,
                stop_reason=choice.stop_reason,
            )
            choices.append(_with_ids(reply, choice.token_ids) if self._with_ids else reply)
        return ChatCompletion(
            id=self._stamp.id,
            object="chat.completion",
            created=self._stamp.created,
            model=self._stamp.model,
            choices=choices,
            usage=self.usage(),
            system_fingerprint=self._stamp.system_fingerprint,
        )

    def _chunk(self, index: int, delta: Delta, output: Output | None = None) -> Reply:
        logprobs = self._logprobs(output.logprobs or ()) if output is not None else None
        choice = ChunkChoice(index=index, delta=delta, logprobs=logprobs, finish_reason=None)
        if self._with_ids and output is not None:
            choice = _with_ids(choice, list(output.token_ids))
        return self._event([choice])

    def _end(self, index: int, output: Output) -> Reply:
        choice = ChunkChoice(
            index=index,
            delta=Delta(),
            logprobs=None,
            finish_reason=output.finish_reason,
            stop_reason=output.stop_reason,
        )
        return self._event([choice])

    def _event(self, choices: list[ChunkChoice], *, usage: Usage | None = None) -> Reply:
        chunk = ChatCompletionChunk(
            id=self._stamp.id,
            object="chat.completion.chunk",
            created=self._stamp.created,
            model=self._stamp.model,
            choices=choices,
            system_fingerprint=self._stamp.system_fingerprint,
        )
        return chunk if usage is None else chunk.model_copy(update={"usage": usage})

    def _logprobs(self, entries: Sequence[Logprob]) -> ChatLogprobs | None:
        if not self._with_logprobs:
            return None
        return ChatLogprobs(content=[self._entry(entry) for entry in entries], refusal=None)

    def _entry(self, entry: Logprob) -> TokenLogprob:
        token = self._top(entry.token_id, entry.logprob)
        alternatives = [self._top(token_id, logprob) for token_id, logprob in entry.top]
        return TokenLogprob(
            token=token.token,
            logprob=token.logprob,
            bytes=token.bytes,
            top_logprobs=alternatives,
        )

    def _top(self, token_id: int, logprob: float) -> TopLogprob:
        stands_for = self._texts.bytes(token_id)
        return TopLogprob(
            token=stands_for.decode(errors="replace"), logprob=logprob, bytes=list(stands_for)
        )


class CompletionAnswer:
    """The continuations of one or several prompts."""

    def __init__(
        self,
        stamp: Stamp,
        prompts: Sequence[Prompt],
        *,
        n: int,
        texts: TokenTexts,
        with_ids: bool,
        with_logprobs: bool,
        echo: bool,
    ) -> None:
        self._stamp = stamp
        self._tally = _Tally(prompts, n)
        self._texts = texts
        self._with_ids = with_ids
        self._with_logprobs = with_logprobs
        self._echo = echo

    def add(self, index: int, output: Output) -> list[Reply]:
        """Take in an increment of a choice; the one event of a stream that tells of it."""
        choice = self._tally.choices[index]
        is_first = self._tally.add(index, output)
        text = choice.prompt.text + output.text if self._echo and is_first else output.text
        reply = CompletionChoice(
            index=index,
            text=text,
            logprobs=self._logprobs(choice, output.logprobs or ()),
            finish_reason=output.finish_reason,
            stop_reason=output.stop_reason,
        )
        if self._with_ids:
            reply = _with_ids(reply, list(output.token_ids))
        return [self._event([reply])]

    def usage(self) -> Usage:
        return self._tally.usage()

    def usage_chunk(self) -> Reply:
        """The event after the last: token counts and no choice."""
        return self._event([], usage=self.usage())

    def whole(self) -> Reply:
        """The answer, when every choice is finished."""
        choices: list[CompletionChoice] = []
        for index, choice in enumerate(self._tally.choices):
            choice.offset = 0
            reply = CompletionChoice(
                index=index,
                text=choice.prompt.text + choice.text if self._echo else choice.text,
                logprobs=self._logprobs(choice, choice.logprobs),
                finish_reason=choice.finish_reason,
                stop_reason=choice.stop_reason,
            )
            choices.append(_with_ids(reply, choice.token_ids) if self._with_ids else reply)
        return self._event(choices, usage=self.usage())

    def _event(self, choices: list[CompletionChoice], *, usage: Usage | None = None) -> Reply:
        event = Completion(
            id=self._stamp.id,
            object="text_completion",
            created=self._stamp.created,
            model=self._stamp.model,
            choices=choices,
            system_fingerprint=self._stamp.system_fingerprint,
        )
        return event if usage is None else event.model_copy(update={"usage": usage})

    def _logprobs(self, choice: _Choice, entries: Sequence[Logprob]) -> CompletionLogprobs | None:
        if not self._with_logprobs:
            return None
        offsets: list[int] = []
        for entry in entries:
            offsets.append(choice.offset)
            choice.offset += len(self._texts.text(entry.token_id))
        return CompletionLogprobs(
            tokens=[self._texts.name(entry.token_id) for entry in entries],
            token_logprobs=[entry.logprob for entry in entries],
            top_logprobs=[
                {self._texts.name(entry.token_id): entry.logprob}
                | {self._texts.name(token): logprob for token, logprob in entry.top}
                for entry in entries
            ],
            text_offset=offsets,
        )


def _with_ids(choice: C, ids: list[int]) -> C:
    return choice.model_copy(update={"token_ids": ids})
