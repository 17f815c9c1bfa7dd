"""Load on a server of OpenAI's API: prompts of one length, and when the tokens of answers came."""

import asyncio
import os
import random
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy
from openai import APIConnectionError, AsyncOpenAI, OpenAI, OpenAIError

PIECE_CHARACTERS = 16_384
"""Of text that the server is asked to tokenize at once."""
BYTES_PER_CHARACTER = 4
PERCENTILES = (50, 90, 99)


class LoadError(RuntimeError):
    """The server, or the text, cannot do what is asked; the message is one line."""


@dataclass(frozen=True, slots=True)
class Sample:
    """One request. Times are seconds."""

    prompt_tokens: int
    output_tokens: int = 0
    cached_tokens: int = 0
    """Of the prompt's, those that the server did not have to compute."""
    ttft_s: float = 0.0
    """From sending to the first token."""
    itl_s: tuple[float, ...] = ()
    """From each piece of the answer to the next."""
    e2el_s: float = 0.0
    """From sending to the end."""
    error: str = ""
    """Why there is no answer; "" if there is one."""

    @property
    def tpot_s(self) -> float:
        """Per output token after the first."""
        return (self.e2el_s - self.ttft_s) / max(1, self.output_tokens - 1)


def api_key() -> str:
    """Of OPENAI_API_KEY, as OpenAI's client takes it; a server without keys takes any."""
    return os.environ.get("OPENAI_API_KEY") or "none"


def served_model(base_url: str, name: str | None) -> tuple[str, int]:
    """The model of this name, or the only one, and the tokens that a request of it may have.

    Raises:
        LoadError: the server does not answer, or serves no such model.
    """
    client = OpenAI(base_url=f"{base_url}/v1", api_key=api_key(), max_retries=1)
    try:
        models = {model.id: model for model in client.models.list()}
    except APIConnectionError as error:
        raise LoadError(f"{base_url} does not answer: {error}") from error
    except OpenAIError as error:
        raise LoadError(f"{base_url}/v1/models: {error}") from error
    finally:
        client.close()
    if name is None and len(models) == 1:
        name = next(iter(models))
    if name not in models:
        asked = "must be given" if name is None else f"{name!r} is not served"
        raise LoadError(f"--model: {asked}; {base_url} serves {', '.join(models)}")
    return name, int((models[name].model_extra or {}).get("max_model_len") or 0)


def tokens_of(
    base_url: str, model: str, texts: Sequence[Path], *, count: int, max_model_len: int
) -> list[int]:
    """At least `count` token ids of the texts, one after the other, by the server's tokenizer.

    Raises:
        LoadError: the texts hold fewer, or the server refuses them.
    """
    size = max(1, min(PIECE_CHARACTERS, max_model_len // BYTES_PER_CHARACTER - 1))
    client = OpenAI(base_url=base_url, api_key=api_key(), max_retries=1)
    ids: list[int] = []
    try:
        for path in texts:
            text = path.read_text(encoding="utf-8", errors="replace")
            for start in range(0, len(text), size):
                body = {"model": model, "prompt": text[start : start + size]}
                answer: Any = client.post("/tokenize", cast_to=object, body=body)
                ids += answer["tokens"]
                if len(ids) >= count:
                    return ids
    except OpenAIError as error:
        raise LoadError(
            f"{base_url}/tokenize: {error}: prompts are made of token ids by the server's tokenizer"
        ) from error
    finally:
        client.close()
    raise LoadError(f"--dataset-path: {len(ids)} tokens of text, and {count} are needed")


def draw_prompts(ids: Sequence[int], *, length: int, count: int, seed: int) -> list[list[int]]:
    """Windows of a long text that begin anywhere in it."""
    draw = random.Random(seed)
    starts = [draw.randrange(len(ids) - length + 1) for _ in range(count)]
    return [list(ids[start : start + length]) for start in starts]


def draw_turns(
    ids: Sequence[int],
    *,
    num_prefixes: int,
    prefix_len: int,
    suffix_len: int,
    count: int,
    seed: int,
) -> list[list[int]]:
    """Prompts that share beginnings: each begins with one of a few windows of a long text, in turn,
    and goes on with a window of its own. As turns of conversations, or questions on documents."""
    prefixes = draw_prompts(ids, length=prefix_len, count=num_prefixes, seed=seed)
    suffixes = draw_prompts(ids, length=suffix_len, count=count, seed=seed + 1)
    return [prefixes[place % num_prefixes] + suffix for place, suffix in enumerate(suffixes)]


def waits_s(request_rate: float, burstiness: float, *, seed: int) -> Iterator[float]:
    """Seconds from each request to the next: gamma distributed with this mean rate; burstiness 1 is
    a Poisson process, below 1 requests come in clumps, above 1 evenly."""
    draw = random.Random(seed)
    while True:
        yield draw.gammavariate(burstiness, 1 / (request_rate * burstiness))


async def run_load(
    base_url: str,
    model: str,
    prompts: Sequence[Sequence[int]],
    *,
    output_len: int,
    max_concurrency: int,
    request_rate: float,
    burstiness: float,
    seed: int,
    on_done: Callable[[Sample], None],
) -> tuple[list[Sample], float]:
    """Send every prompt and read every answer; the samples in the order of the prompts, and the
    seconds that all took.

    Args:
        max_concurrency: requests that are open at once; the others wait unsent.
        request_rate: requests a second; inf: all at once.
        burstiness: as for waits_s.
    """
    open_requests = asyncio.Semaphore(max_concurrency)
    is_paced = request_rate != float("inf")
    waits = waits_s(request_rate, burstiness, seed=seed) if is_paced else None

    async def one(client: AsyncOpenAI, prompt: Sequence[int]) -> Sample:
        async with open_requests:
            sample = await _ask(client, model, prompt, output_len)
        on_done(sample)
        return sample

    async with AsyncOpenAI(
        base_url=f"{base_url}/v1", api_key=api_key(), max_retries=0, timeout=3600
    ) as client:
        begin = time.perf_counter()
        tasks = []
        for prompt in prompts:
            tasks.append(asyncio.create_task(one(client, prompt)))
            if waits is not None:
                await asyncio.sleep(next(waits))
        samples = await asyncio.gather(*tasks)
        return samples, time.perf_counter() - begin


async def _ask(client: AsyncOpenAI, model: str, prompt: Sequence[int], output_len: int) -> Sample:
    begin = last = time.perf_counter()
    ttft, gaps, output_tokens, cached_tokens = 0.0, [], 0, 0
    try:
        stream = await client.completions.create(
            model=model,
            prompt=list(prompt),
            max_tokens=output_len,
            temperature=0,
            stream=True,
            stream_options={"include_usage": True},
            extra_body={"ignore_eos": True},
        )
        async for chunk in stream:
            now = time.perf_counter()
            if chunk.usage is not None:
                output_tokens = chunk.usage.completion_tokens
                details = chunk.usage.prompt_tokens_details
                cached_tokens = (details.cached_tokens if details else None) or 0
            if not chunk.choices:
                continue
            if ttft:
                gaps.append(now - last)
            else:
                ttft = now - begin
            last = now
    except OpenAIError as error:
        return Sample(len(prompt), error=" ".join(str(error).split()))
    if not output_tokens:
        return Sample(len(prompt), error="the stream ended without usage")
    return Sample(len(prompt), output_tokens, cached_tokens, ttft, tuple(gaps), last - begin)


def is_good(sample: Sample, goals_ms: Mapping[str, float]) -> bool:
    """Whether an answer kept all goals: of ttft, tpot and e2el, in milliseconds."""
    times = {"ttft": sample.ttft_s, "tpot": sample.tpot_s, "e2el": sample.e2el_s}
    return not sample.error and all(1e3 * times[name] <= goal for name, goal in goals_ms.items())


def summary(
    samples: Sequence[Sample], duration_s: float, goals_ms: Mapping[str, float] | None = None
) -> dict[str, Any]:
    """Totals, rates and times, under the names that `vllm bench serve` gives them."""
    done = [sample for sample in samples if not sample.error]
    total_input = sum(sample.prompt_tokens for sample in done)
    total_output = sum(sample.output_tokens for sample in done)
    result: dict[str, Any] = {
        "duration": duration_s,
        "completed": len(done),
        "failed": len(samples) - len(done),
        "total_input_tokens": total_input,
        "total_cached_tokens": sum(sample.cached_tokens for sample in done),
        "total_output_tokens": total_output,
        "request_throughput": len(done) / duration_s,
        "request_goodput": sum(is_good(sample, goals_ms) for sample in samples) / duration_s
        if goals_ms
        else None,
        "output_throughput": total_output / duration_s,
        "total_token_throughput": (total_input + total_output) / duration_s,
    }
    for name, seconds in {
        "ttft": [sample.ttft_s for sample in done],
        "tpot": [sample.tpot_s for sample in done if sample.output_tokens > 1],
        "itl": [gap for sample in done for gap in sample.itl_s],
        "e2el": [sample.e2el_s for sample in done],
    }.items():
        if seconds:
            ms = numpy.asarray(seconds) * 1e3
            result |= {f"mean_{name}_ms": ms.mean(), f"median_{name}_ms": numpy.median(ms)}
            result[f"std_{name}_ms"] = ms.std()
            result |= {f"p{p}_{name}_ms": numpy.percentile(ms, p) for p in PERCENTILES}
    return {key: round(float(v), 3) if isinstance(v, float) else v for key, v in result.items()}
