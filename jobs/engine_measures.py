"""An engine of random weights on this device, and what its prompts, decodes and waits take."""

import gc
import random
import sysconfig
import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from itertools import count
from pathlib import Path
from statistics import median
from typing import Any

import numpy
import torch
from torch.profiler import ProfilerActivity, profile

from nsa_platform.config.model import ModelConfig
from nsa_platform.config.serve import EngineConfig
from nsa_platform.data.tokenizer import Tokenizer, train_tokenizer
from nsa_platform.model.cost import cache_bytes
from nsa_platform.model.transformer import Transformer
from nsa_platform.serve.capacity import blocks_per_page_of, make_cache, memory_budget
from nsa_platform.serve.engine import Engine
from nsa_platform.serve.kv_cache import page_size_of
from nsa_platform.serve.pages import SequencePages
from nsa_platform.serve.request import SamplingParams

WARM_STEPS = 4
"""Steps of decoding before those that are measured."""
PROFILED_STEPS = 8
OTHER_STEPS = WARM_STEPS + PROFILED_STEPS + 6
"""Steps beside the measured ones: the last six until all prompts are through, and to spare."""
CHARACTERS_PER_ID = 200
"""Text that a tokenizer is trained on."""
WARM_PROMPT = 4096
"""Tokens of the prompt before the one that is measured, at most: kernels are compiled then."""


def random_model(config: ModelConfig, *, device: torch.device, dtype: torch.dtype) -> Transformer:
    """Weights of the right sizes, drawn on the device: norms 1, biases 0, matrices normal."""
    with torch.device("meta"):
        model = Transformer(config).to(dtype)
    model = model.to_empty(device=device).requires_grad_(False).eval()
    torch.manual_seed(0)
    for name, parameter in model.named_parameters():
        if parameter.ndim == 1:
            parameter.fill_(float(name.endswith("norm.weight")))
        else:
            parameter.normal_(0.0, parameter.shape[1] ** -0.5)
    return model


def text_tokenizer(vocab_size: int) -> Tokenizer:
    """A tokenizer of at most so many ids, trained on as much of Python's standard library as they
    need."""
    texts: list[str] = []
    for source in sorted(Path(sysconfig.get_path("stdlib")).glob("*.py")):
        if sum(map(len, texts)) < CHARACTERS_PER_ID * vocab_size:
            texts.append(source.read_text(encoding="utf-8", errors="replace"))
    with tempfile.TemporaryDirectory(prefix="nsa-tokenizer-") as folder:
        return train_tokenizer(texts, vocab_size, folder)


def sized_for(
    config: EngineConfig, model: ModelConfig, *, batch_size: int, context: int
) -> EngineConfig:
    """The engine for so many sequences of this length at once. Each has a page to spare, without
    which the last one would wait for the others to end."""
    page_size = page_size_of(model, blocks_per_page_of(model, config))
    changes = {
        "max_model_len": context,
        "max_num_seqs": batch_size,
        "num_kv_tokens": batch_size * (context + page_size),
        "max_num_partial_prefills": batch_size,
        "max_long_partial_prefills": batch_size,
    }
    return config.model_copy(update=changes)


def fitting_batch(
    models: Sequence[ModelConfig], config: EngineConfig, *, context: int, device: torch.device
) -> int:
    """Sequences of so many tokens, at most max_num_seqs, whose caches fit for each model, one model
    at a time; 0: not even one. All models' weights are on the device already."""
    if device.type == "cpu":
        return config.max_num_seqs
    budget, meta = memory_budget(config, device), torch.device("meta")
    for size in range(config.max_num_seqs, 0, -1):
        sized = (sized_for(config, m, batch_size=size, context=context) for m in models)
        caches = (
            make_cache(model, one, device=meta, dtype=torch.bfloat16)
            for model, one in zip(models, sized, strict=True)
        )
        if max(cache.num_bytes() for cache in caches) <= budget:
            return size
    return 0


@contextmanager
def started_engine(
    model: Transformer, tokenizer: Tokenizer, config: EngineConfig
) -> Iterator[Engine]:
    """The engine that a server would run, with graphs of decode steps where the device has them;
    its memory is free afterwards."""
    engine = Engine(model, tokenizer, config)
    try:
        if engine.cache.device.type == "cuda" and not config.enforce_eager:
            engine.capture(context_lens=[engine.max_model_len])
        engine.warm_up()
        if config.max_step_ms is not None:
            engine.calibrate()
        yield engine
    finally:
        engine.runner.graphs = None
        engine.cache.layers.clear()
        del engine
        gc.collect()
        if torch.cuda.is_available():
            torch.cuda.empty_cache()


def fill_cache(engine: Engine) -> None:
    """Normal noise in every page. Keys then score as evenly as keys of a model that knows nothing,
    and blocks are chosen from everywhere: no locality helps."""
    for layer in engine.cache.layers:
        for tensor in layer.page_tensors() + layer.window_tensors():
            # Not in place: fp8 has no random numbers of its own.
            tensor.copy_(torch.randn(tensor.shape, dtype=torch.bfloat16, device=tensor.device))


def know_prompts(engine: Engine, prompts: Sequence[Sequence[int]], *, is_computed: bool) -> None:
    """Let the prefix cache hold whole prompts: requests for them find their pages and go on behind.

    is_computed: by prefilling each; else their pages are named and keep whatever is in them.
    """
    book = engine.cache.book
    engine.reset_prefix_cache()
    for number, prompt in enumerate(prompts):
        if is_computed:
            engine.add(f"known-{number}", prompt, SamplingParams(max_tokens=1, temperature=0.0))
            _finish(engine)
            continue
        sequence, keys = SequencePages(), book.keys(prompt)
        while rest := len(prompt) - sequence.num_tokens:
            book.extend(sequence, min(book.page_size, rest))
        book.publish(sequence, keys)
        book.release(sequence)


def random_prompts(engine: Engine, number: int, length: int, *, seed: int) -> list[list[int]]:
    """Prompts of random ids."""
    generator = numpy.random.default_rng(seed)
    return generator.integers(0, engine.vocab_size, (number, length)).tolist()


def decode_speed(
    engine: Engine, *, batch_size: int, context: int, num_steps: int, is_computed: bool
) -> dict[str, Any]:
    """Steps that decode one token for each of batch_size sequences with contexts of `context`
    tokens, the last ones of them generated here.

    is_computed: as for know_prompts.
    """
    num_outputs = num_steps + OTHER_STEPS
    prompts = random_prompts(engine, batch_size, context - num_outputs, seed=batch_size)
    know_prompts(engine, prompts, is_computed=is_computed)
    params = SamplingParams(max_tokens=num_outputs, temperature=0.0, ignore_eos=True)
    for number, prompt in enumerate(prompts):
        engine.add(f"decode-{number}", prompt, params)
    while engine.scheduler.waiting or engine.scheduler.prompts():
        engine.step()
    for _ in range(WARM_STEPS):
        engine.step()
    times_s = [_timed_step(engine, batch_size) for _ in range(num_steps)]
    stats, cache = engine.stats(), engine.cache
    used = stats.pages_used * _page_bytes(engine, "page_tensors")
    used += stats.window_pages_used * _page_bytes(engine, "window_tensors")
    formula = cache_bytes(
        cache.config,
        engine.scheduler.running[0].pages.num_tokens,
        element_bytes=cache.layers[0].page_tensors()[-1].itemsize,
        kv_bytes=cache.layers[0].page_tensors()[0].itemsize,
        page_size=cache.page_size,
    )
    busy_s = _device_seconds(engine)
    for number in range(batch_size):
        engine.abort(f"decode-{number}")
    engine.check()
    step_s = median(times_s)
    return {
        "tokens_per_s": batch_size * num_steps / sum(times_s),
        "step_ms": 1e3 * step_s,
        "device_ms": None if busy_s is None else 1e3 * busy_s,
        "overhead": None if busy_s is None else max(0.0, 1 - busy_s / step_s),
        "has_graph": engine.runner.graphs is not None,
        "pages_used": stats.pages_used,
        "window_pages_used": stats.window_pages_used,
        "cache_bytes": used,
        "cache_bytes_formula": formula.total * batch_size,
        "cache_bytes_reserved": cache.num_bytes(),
    }


def prefill_speed(engine: Engine, *, length: int) -> dict[str, Any]:
    """Time of a prompt of so many tokens, alone, from its arrival to its first token."""
    params = SamplingParams(max_tokens=1, temperature=0.0)
    for name, size in (("warm", min(length, WARM_PROMPT)), ("measured", length)):
        engine.reset_prefix_cache()
        (prompt,) = random_prompts(engine, 1, size, seed=0)
        started = time.perf_counter()
        engine.add(name, prompt, params)
        num_steps = _finish(engine)
    ttft_s = time.perf_counter() - started
    engine.reset_prefix_cache()
    return {"ttft_ms": 1e3 * ttft_s, "tokens_per_s": length / ttft_s, "steps": num_steps}


def arrival_waits(
    engine: Engine, *, number: int, length: int, rate: float, long_length: int | None
) -> list[float]:
    """Seconds to the first token of each of `number` prompts of `length` tokens that come at
    random, `rate` a second; with long_length a prompt of so many tokens is prefilled all the while.
    A wait counts from when the prompt came, also where the engine was in a step then.
    """
    engine.reset_prefix_cache()
    params = SamplingParams(max_tokens=1, temperature=0.0)
    prompts = random_prompts(engine, number, length, seed=1)
    gaps, long_numbers = random.Random(0), count()
    started = time.perf_counter()
    due, waits, next_s = {}, {}, started + gaps.expovariate(rate)
    long_id = ""
    while len(waits) < number:
        if long_length is not None and not long_id:
            long_id = f"long-{next(long_numbers)}"
            engine.add(long_id, random_prompts(engine, 1, long_length, seed=len(waits))[0], params)
        while len(due) < number and next_s <= time.perf_counter():
            name = f"short-{len(due)}"
            engine.add(name, prompts[len(due)], params)
            due[name] = next_s
            next_s += gaps.expovariate(rate)
        outputs = engine.step() if engine.has_work else []
        now = time.perf_counter()
        for output in outputs:
            if output.request_id == long_id:
                long_id = ""
            else:
                waits[output.request_id] = now - due[output.request_id]
    if long_id:
        engine.abort(long_id)
    engine.check()
    return [waits[name] for name in due]


def _finish(engine: Engine) -> int:
    """Run until nothing is left; in how many steps."""
    num_steps = 0
    while engine.has_work:
        engine.step()
        num_steps += 1
    return num_steps


def _timed_step(engine: Engine, batch_size: int) -> float:
    started = time.perf_counter()
    outputs = engine.step()
    elapsed = time.perf_counter() - started
    assert len(outputs) == batch_size, "a step was not of decodes alone"
    return elapsed


def _page_bytes(engine: Engine, pool: str) -> int:
    """Bytes of a page of page_tensors or window_tensors, over all layers."""
    tensors = [tensor for layer in engine.cache.layers for tensor in getattr(layer, pool)()]
    return sum(tensor[0].nbytes for tensor in tensors)


def _device_seconds(engine: Engine) -> float | None:
    """Seconds of a step in which the GPU computes or copies, a mean over some; None without one.

    Kernels are timed by the GPU itself, also those of a graph.
    """
    if engine.cache.device.type != "cuda":
        for _ in range(PROFILED_STEPS):
            engine.step()
        return None
    torch.cuda.synchronize()  # what is under way already is not counted
    with profile(activities=[ProfilerActivity.CUDA]) as profiled:
        for _ in range(PROFILED_STEPS):
            engine.step()
        torch.cuda.synchronize()
    spans = sorted(
        (event.time_range.start, event.time_range.end)
        for event in profiled.events() or ()
        if event.device_type.name == "CUDA"
    )
    if not spans:
        return None
    busy, reached = 0.0, spans[0][0]
    for start, end in spans:
        busy += max(0.0, end - max(start, reached))
        reached = max(reached, end)
    return busy / 1e6 / PROFILED_STEPS
