"""One engine behind OpenAI's endpoints, without HTTP: requests in, JSON pieces out."""

import asyncio
import time
import uuid
from collections.abc import AsyncGenerator, Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import aclosing
from dataclasses import replace
from typing import TypeVar

from deployments.answers import ChatAnswer, CompletionAnswer, Stamp, Wanted
from deployments.backend import Piece, Spent
from deployments.errors import ApiError, bad_request, overloaded, unavailable
from deployments.logprobs import LogprobShapes
from deployments.merging import merged
from deployments.metrics import Meter
from deployments.prompts import (
    Limits,
    Prompt,
    chat_prompt,
    check_choices,
    completion_prompts,
    text_prompt,
    with_blocks,
)
from deployments.protocol import (
    ChatCompletionRequest,
    CompletionRequest,
    DetokenizeRequest,
    Generation,
    TokenizeRequest,
)
from deployments.replies import Detokenized, Tokens
from deployments.settings import sampling
from deployments.token_text import TokenTexts
from nsa_platform.data.tokenizer import Tokenizer
from nsa_platform.serve.admission import QueueFull
from nsa_platform.serve.async_engine import AsyncEngine, EngineDead
from nsa_platform.serve.request import Output, SamplingParams

Result = TypeVar("Result")


class OpenAiService:
    """Answers requests for one model. Every method yields pieces and never raises for a bad one."""

    def __init__(
        self,
        engine: AsyncEngine,
        tokenizer: Tokenizer,
        *,
        limits: Limits,
        model_id: str,
        fingerprint: str,
        meter: Meter,
    ) -> None:
        self.limits = limits
        self.meter = meter
        self._engine = engine
        self._tokenizer = tokenizer
        self._texts = TokenTexts(tokenizer)
        self._model_id = model_id
        self._fingerprint = fingerprint
        # Long texts take a while, and transformers' tokenizers are not safe in several threads.
        self._reader = ThreadPoolExecutor(1, thread_name_prefix="tokenizer")

    async def chat(
        self, request: ChatCompletionRequest, request_id: str
    ) -> AsyncGenerator[Piece, None]:
        """POST /v1/chat/completions."""

        def read() -> list[Prompt]:
            return [
                chat_prompt(
                    self._tokenizer,
                    request.messages,
                    self.limits,
                    begin_turn=request.add_generation_prompt is not False,
                    continue_last=bool(request.continue_final_message),
                    keep=request.truncate_prompt_tokens,
                )
            ]

        def start(prompts: list[Prompt]) -> ChatAnswer:
            wanted = self._wanted(request, logprobs=bool(request.logprobs), echo=request.echo)
            stamp = self._stamp(f"chatcmpl-{request_id}")
            return ChatAnswer(stamp, prompts, wanted, self._shapes(request))

        async with aclosing(self._answered(request, read, start)) as pieces:
            async for piece in pieces:
                yield piece

    async def completions(
        self, request: CompletionRequest, request_id: str
    ) -> AsyncGenerator[Piece, None]:
        """POST /v1/completions."""

        def read() -> list[Prompt]:
            return completion_prompts(self._tokenizer, request, self.limits)

        def start(prompts: list[Prompt]) -> CompletionAnswer:
            has_logprobs = request.logprobs is not None
            wanted = self._wanted(request, logprobs=has_logprobs, echo=request.echo)
            stamp = self._stamp(f"cmpl-{request_id}")
            return CompletionAnswer(stamp, prompts, wanted, self._shapes(request))

        async with aclosing(self._answered(request, read, start)) as pieces:
            async for piece in pieces:
                yield piece

    async def tokenize(self, request: TokenizeRequest) -> Piece:
        """POST /tokenize."""

        def read() -> tuple[int, ...]:
            if request.messages is not None:
                return chat_prompt(
                    self._tokenizer,
                    request.messages,
                    self.limits,
                    begin_turn=request.add_generation_prompt is not False,
                    continue_last=bool(request.continue_final_message),
                ).ids
            return text_prompt(self._tokenizer, request.prompt or "", self.limits).ids

        try:
            ids = await self._read(read)
        except ApiError as error:
            return error.failure
        reply = Tokens(count=len(ids), max_model_len=self.limits.max_model_len, tokens=list(ids))
        if request.return_token_strs:
            strings = [self._texts.text(token) for token in ids]
            reply = reply.model_copy(update={"token_strs": strings})
        return reply.to_json()

    async def detokenize(self, request: DetokenizeRequest) -> Piece:
        """POST /detokenize."""
        highest = max(request.tokens, default=0)
        if highest >= self.limits.vocab_size:
            return bad_request(
                f"tokens: ids must lie in [0, {self.limits.vocab_size}), got {highest}",
                param="tokens",
            ).failure
        text = self._tokenizer.decode(request.tokens, skip_special_tokens=False)
        return Detokenized(prompt=text).to_json()

    def num_requests(self) -> int:
        """Choices that are being generated or wait."""
        stats = self._engine.stats()
        return stats.num_running + stats.num_waiting

    def reset_prefix_cache(self) -> None:
        """Forget all prompts and answers. Raises EngineDead."""
        self._engine.reset_prefix_cache()

    def close(self) -> None:
        """Stop the tokenizer's thread."""
        self._reader.shutdown(wait=False)

    async def _answered(
        self,
        request: Generation,
        read: Callable[[], list[Prompt]],
        start: Callable[[list[Prompt]], ChatAnswer | CompletionAnswer],
    ) -> AsyncGenerator[Piece, None]:
        def prepare() -> tuple[list[Prompt], list[tuple[Prompt, SamplingParams]]]:
            prompts, n = read(), request.n or 1
            check_choices(request, len(prompts), most=self._engine.engine.max_num_requests)
            if request.wants_blocks:
                size = self._engine.engine.block_size
                prompts = [with_blocks(self._tokenizer, prompt, size) for prompt in prompts]
            jobs = [
                (prompt, sampling(request, prompt, self._tokenizer, self.limits, copy=copy))
                for prompt in prompts
                for copy in range(n)
            ]
            self._compile(request, jobs[0][1])
            return prompts, jobs

        try:
            prompts, jobs = await self._read(prepare)
            self.meter.asked(max_tokens=jobs[0][1].max_tokens, n=request.n or 1)
            yield Spent(prompt_tokens=sum(len(prompt.ids) for prompt in prompts))
            async with aclosing(self._pieces(request, start(prompts), jobs)) as pieces:
                async for piece in pieces:
                    yield piece
        except ApiError as error:
            self.meter.refused(error.failure.code or "invalid")
            yield error.failure

    async def _pieces(
        self,
        request: Generation,
        answer: ChatAnswer | CompletionAnswer,
        jobs: Sequence[tuple[Prompt, SamplingParams]],
    ) -> AsyncGenerator[Piece, None]:
        options = request.stream_options
        streams = [self._generate(request, prompt, params) for prompt, params in jobs]
        only_prompt = request.max_tokens == 0
        async with aclosing(merged(streams)) as outputs:
            async for index, generated in outputs:
                output = _without_token(generated) if only_prompt else generated
                for event in answer.add(index, output) if request.stream else ():
                    if options is not None and options.include_usage:
                        usage = answer.usage() if options.continuous_usage_stats else None
                        event = event.model_copy(update={"usage": usage})
                    yield event.to_json()
                if not request.stream:
                    answer.add(index, output)
        if not request.stream:
            yield answer.whole().to_json()
        elif options is not None and options.include_usage:
            yield answer.usage_chunk().to_json()
        usage = answer.usage()
        yield Spent(
            completion_tokens=usage.completion_tokens,
            cached_tokens=usage.prompt_tokens_details.cached_tokens,
        )

    def _compile(self, request: Generation, params: SamplingParams) -> None:
        """Compile the grammar where nobody waits for it. Raises ApiError if it cannot be."""
        if params.grammar is None:
            return
        try:
            self._engine.engine.grammars.matcher(params.grammar)
        except ValueError as error:
            is_openais = request.structured_outputs is None
            param = "response_format" if is_openais else "structured_outputs"
            raise bad_request(str(error), param=param, code="invalid_grammar") from None

    async def _generate(
        self, request: Generation, prompt: Prompt, params: SamplingParams
    ) -> AsyncGenerator[Output, None]:
        """One choice's increments. Raises ApiError if the engine refuses or fails."""
        request_id = uuid.uuid4().hex
        started = begun = last = time.monotonic()
        is_first = True
        try:
            stream = self._engine.generate(
                prompt.ids,
                params,
                request_id,
                cache_salt=request.cache_salt,
                priority=request.priority or 0,
                deadline_s=None if request.nsa is None else request.nsa.deadline_s,
            )
            async with aclosing(stream):
                async for output in stream:
                    now = time.monotonic()
                    if is_first:
                        begun = now
                        if output.token_ids:
                            self.meter.first_token(now - started, queue_s=output.queue_s or 0.0)
                    else:
                        self.meter.next_token(now - last)
                    is_first, last = False, now
                    if output.finish_reason is not None:
                        self.meter.finished(
                            output.finish_reason,
                            prompt=len(prompt.ids),
                            generated=output.num_output_tokens,
                            seconds=now - started,
                            queue_s=output.queue_s,
                            decode_s=now - begun,
                        )
                    yield output
        except ValueError as error:
            raise bad_request(str(error)) from None
        except QueueFull as error:
            raise ApiError(overloaded(str(error), retry_after_s=error.retry_after_s)) from None
        except EngineDead as error:
            raise ApiError(unavailable(str(error))) from error

    async def _read(self, read: Callable[[], Result]) -> Result:
        return await asyncio.get_running_loop().run_in_executor(self._reader, read)

    def _wanted(self, request: Generation, *, logprobs: bool, echo: bool | None) -> Wanted:
        return Wanted(
            n=request.n or 1,
            logprobs=logprobs,
            prompt_logprobs=request.prompt_logprobs is not None,
            ids=bool(request.return_token_ids),
            echo=bool(echo),
            block_size=self._engine.engine.block_size if request.wants_blocks else None,
        )

    def _shapes(self, request: Generation) -> LogprobShapes:
        return LogprobShapes(self._texts, as_ids=bool(request.return_tokens_as_token_ids))

    def _stamp(self, answer_id: str) -> Stamp:
        return Stamp(
            id=answer_id,
            created=int(time.time()),
            model=self._model_id,
            system_fingerprint=self._fingerprint,
        )


def _without_token(output: Output) -> Output:
    """The one increment of a request that wanted no token: what was computed of its prompt."""
    return replace(
        output, token_ids=(), text="", logprobs=(), finish_reason="length", stop_reason=None
    )
