"""From the engine's increments to OpenAI's answers: whole, or chunk by chunk."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import TypeVar

from deployments.logprobs import LogprobShapes, joined
from deployments.prompts import Prompt
from deployments.replies import (
    AssistantMessage,
    BlocksRead,
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
    Usage,
)
from nsa_platform.serve.request import Output
from nsa_platform.serve.request import TokenLogprob as Logprob

C = TypeVar("C", ChatChoice, ChunkChoice, CompletionChoice)

Reads = list[tuple[int, int, float]]
"""Stretches that one token was made from: first token, the one behind the last, share."""


@dataclass(frozen=True, slots=True)
class Stamp:
    """What every piece of one answer carries."""

    id: str
    created: int
    """Seconds since 1970."""
    model: str
    system_fingerprint: str
    """Digest of the weights."""


@dataclass(frozen=True, slots=True)
class Wanted:
    """What an answer carries beside its text."""

    n: int
    """Choices for each prompt."""
    logprobs: bool
    prompt_logprobs: bool
    ids: bool
    """Token ids of prompt and output."""
    echo: bool
    """The text begins with the prompt."""
    block_size: int | None
    """Tokens of a block, where it is to be told which were read; else None."""


@dataclass(slots=True)
class _Choice:
    """What has arrived of one choice."""

    prompt: Prompt
    text: str = ""
    token_ids: list[int] = field(default_factory=list)
    logprobs: list[Logprob] = field(default_factory=list)
    prompt_logprobs: tuple[Logprob, ...] = ()
    reads: list[Reads] = field(default_factory=list)
    has_begun: bool = False
    offset: int = 0
    """Characters of all tokens that were reported, for text_offset."""
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
        is_first, choice.has_begun = not choice.has_begun, True
        choice.prompt_logprobs = output.prompt_logprobs or choice.prompt_logprobs
        choice.text += output.text
        choice.token_ids.extend(output.token_ids)
        choice.logprobs.extend(output.logprobs or ())
        choice.reads.extend(_reads(output))
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
        self, stamp: Stamp, prompts: Sequence[Prompt], wanted: Wanted, shapes: LogprobShapes
    ) -> None:
        self._stamp = stamp
        self._wanted = wanted
        self._tally = _Tally(prompts, wanted.n)
        self._shapes = shapes

    def add(self, index: int, output: Output) -> list[Reply]:
        """Take in an increment of a choice; the events of a stream that tell of it."""
        events: list[Reply] = []
        if self._tally.add(index, output):
            begun = self._tally.prompts[0].text if self._wanted.echo else ""
            events.append(self._chunk(index, Delta(role="assistant", content=begun)))
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
        begun = self._tally.prompts[0].text if self._wanted.echo else ""
        for index, choice in enumerate(self._tally.choices):
            assert choice.finish_reason is not None
            content = begun + choice.text
            reply = ChatChoice(
                index=index,
                message=AssistantMessage(role="assistant", content=content, refusal=None),
                logprobs=self._logprobs(choice.logprobs),
                finish_reason=choice.finish_reason,
                stop_reason=choice.stop_reason,
            )
            reply = _with_reads(reply, self._wanted, choice.reads, choice.prompt)
            choices.append(_with_ids(reply, choice.token_ids) if self._wanted.ids else reply)
        answer = ChatCompletion(
            id=self._stamp.id,
            object="chat.completion",
            created=self._stamp.created,
            model=self._stamp.model,
            choices=choices,
            usage=self.usage(),
            system_fingerprint=self._stamp.system_fingerprint,
        )
        first = self._tally.choices[0]
        return answer.model_copy(update=_of_prompt(first, self._wanted, self._shapes))

    def _chunk(self, index: int, delta: Delta, output: Output | None = None) -> Reply:
        logprobs = self._logprobs(output.logprobs or ()) if output is not None else None
        choice = ChunkChoice(index=index, delta=delta, logprobs=logprobs, finish_reason=None)
        if output is None:  # the first event
            choice = _with_reads(choice, self._wanted, None, self._tally.choices[index].prompt)
            return self._event([choice])
        choice = _with_reads(choice, self._wanted, _reads(output))
        if self._wanted.ids:
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
        return self._shapes.chat(entries) if self._wanted.logprobs else None


class CompletionAnswer:
    """The continuations of one or several prompts."""

    def __init__(
        self, stamp: Stamp, prompts: Sequence[Prompt], wanted: Wanted, shapes: LogprobShapes
    ) -> None:
        self._stamp = stamp
        self._wanted = wanted
        self._tally = _Tally(prompts, wanted.n)
        self._shapes = shapes

    def add(self, index: int, output: Output) -> list[Reply]:
        """Take in an increment of a choice; the one event of a stream that tells of it."""
        choice = self._tally.choices[index]
        is_first = self._tally.add(index, output)
        text = choice.prompt.text + output.text if self._wanted.echo and is_first else output.text
        reply = CompletionChoice(
            index=index,
            text=text,
            logprobs=self._logprobs(choice, output.logprobs or (), is_first=is_first),
            finish_reason=output.finish_reason,
            stop_reason=output.stop_reason,
        )
        prompt = choice.prompt if is_first else None
        reply = _with_reads(reply, self._wanted, _reads(output), prompt)
        if self._wanted.ids:
            reply = _with_ids(reply, list(output.token_ids))
        if is_first:
            reply = reply.model_copy(update=_of_prompt(choice, self._wanted, self._shapes))
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
            reply = CompletionChoice(
                index=index,
                text=choice.prompt.text + choice.text if self._wanted.echo else choice.text,
                logprobs=self._logprobs(choice, choice.logprobs, is_first=True),
                finish_reason=choice.finish_reason,
                stop_reason=choice.stop_reason,
            )
            reply = _with_reads(reply, self._wanted, choice.reads, choice.prompt)
            if self._wanted.ids:
                reply = _with_ids(reply, choice.token_ids)
            update = _of_prompt(choice, self._wanted, self._shapes)
            choices.append(reply.model_copy(update=update))
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

    def _logprobs(
        self, choice: _Choice, entries: Sequence[Logprob], *, is_first: bool
    ) -> CompletionLogprobs | None:
        if not self._wanted.logprobs:
            return None
        prompt = None
        if is_first:
            choice.offset = 0
            if self._wanted.echo:
                prompt = self._shapes.echoed(choice.prompt.ids, choice.prompt_logprobs)
                choice.offset = sum(map(self._shapes.width, choice.prompt.ids))
        report = self._shapes.completion(entries, offset=choice.offset)
        choice.offset += sum(self._shapes.width(entry.token_id) for entry in entries)
        return report if prompt is None else joined(prompt, report)


def _with_ids(choice: C, ids: list[int]) -> C:
    return choice.model_copy(update={"token_ids": ids})


def _with_reads(
    choice: C, wanted: Wanted, reads: list[Reads] | None, prompt: Prompt | None = None
) -> C:
    """With what tokens were made from, and the prompt's blocks, if that was asked for."""
    if wanted.block_size is None:
        return choice
    told: dict[str, object] = {"block_size": wanted.block_size}
    if prompt is not None:
        told["prompt_blocks"] = list(prompt.blocks)
    if reads is not None:
        told["selected_blocks"] = reads
    return choice.model_copy(update={"nsa": BlocksRead.model_validate(told)})


def _reads(output: Output) -> list[Reads]:
    """What each new token of an increment was made from."""
    if output.selected_blocks is None:
        return []
    return [[(one.start, one.end, round(one.share, 4)) for one in output.selected_blocks]]


def _of_prompt(choice: _Choice, wanted: Wanted, shapes: LogprobShapes) -> dict[str, object]:
    """What is reported of a choice's prompt, if anything was asked for."""
    update: dict[str, object] = {}
    if wanted.ids:
        update["prompt_token_ids"] = list(choice.prompt.ids)
    if wanted.prompt_logprobs:
        update["prompt_logprobs"] = shapes.prompt(choice.prompt_logprobs)
    return update
