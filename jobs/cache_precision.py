"""What an fp8 cache costs: held-out text scored by the engine that serves, with either cache.

    python -m jobs.cache_precision runs/nsa-150m/model runs/data/pretrain out --length 8192

MODEL is an exported model, DATA a folder of prepare_data with its tokenizer: held-out rows are
read, each as one prompt of --length tokens less the one that is sampled, whose log probabilities
are asked for. Writes cache_precision.json below OUTPUT.
"""

import json
import math
from collections.abc import Sequence
from statistics import fmean
from typing import Any, Literal

import torch
from rich.console import Console
from rich.progress import Progress

from jobs.cli import fail, interruptible
from jobs.evaluation_inputs import held_out_parser, open_loader
from nsa_platform import storage
from nsa_platform.config.serve import EngineConfig
from nsa_platform.data.tokenizer import Tokenizer
from nsa_platform.evaluate.bits_per_byte import first_batches
from nsa_platform.serve.loading import load_engine
from nsa_platform.serve.request import SamplingParams, TokenLogprob
from nsa_platform.train.metrics import device_name

CacheDtype = Literal["auto", "fp8"]


@interruptible("interrupted; the same command begins anew")
def main(argv: Sequence[str] | None = None) -> None:
    """Score, write and print."""
    parser = held_out_parser(__doc__)
    options = parser.parse_args(argv)
    for name, least in (("length", 3), ("texts", 1)):
        if getattr(options, name) < least:
            parser.error(f"--{name} must be at least {least}, got {getattr(options, name)}")
    try:
        record = measure(
            options.model, options.data, options.output, length=options.length, texts=options.texts
        )
    except (ValueError, OSError) as error:
        fail(str(error))
    for name in ("auto", "fp8"):
        print(f"{name}: {record[name]['bits_per_byte']:.4f} bits per byte")
    print(
        f"log probabilities differ by {record['mean_difference']:.4f} on average, the likeliest "
        f"token is the same at {record['same_likeliest']:.2%} of {record['tokens']:,} places"
    )


def measure(
    model_folder: str, data: str, output: str, *, length: int, texts: int
) -> dict[str, Any]:
    """Score held-out rows with both caches, write the record and return it.

    Raises:
        ValueError, OSError: model, data and sizes do not fit, or cannot be read or written.
    """
    tokenizer = Tokenizer(model_folder)
    loader = open_loader(data, "validation", tokenizer, length)
    rows = first_batches(loader, tokens=texts * length, batch_rows=1)
    prompts = [row.ids[:-1].tolist() for row in rows]
    # A model that cannot have this cache is refused before anything is read.
    rounded, about_fp8 = _scores(model_folder, prompts, "fp8")
    exact, about = _scores(model_folder, prompts, "auto")
    sizes = tokenizer.token_bytes()
    num_bytes = sum(int(sizes[token]) for prompt in prompts for token in prompt[1:])
    if not num_bytes:
        raise ValueError("the held-out text has no byte to predict")
    pairs = list(zip(exact, rounded, strict=True))
    record = {
        **about,
        "length": length,
        "texts": len(prompts),
        "tokens": len(pairs),
        "auto": {"bits_per_byte": _bits(exact) / num_bytes, **about["cache"]},
        "fp8": {"bits_per_byte": _bits(rounded) / num_bytes, **about_fp8["cache"]},
        "mean_difference": fmean(abs(a.logprob - b.logprob) for a, b in pairs),
        "max_difference": max(abs(a.logprob - b.logprob) for a, b in pairs),
        "same_likeliest": fmean(a.top[0][0] == b.top[0][0] for a, b in pairs),
    }
    del record["cache"]
    storage.write_text(
        storage.join(output, "cache_precision.json"), json.dumps(record, indent=1) + "\n"
    )
    return record


def _scores(
    model_folder: str, prompts: Sequence[Sequence[int]], dtype: CacheDtype
) -> tuple[list[TokenLogprob], dict[str, Any]]:
    """Of every token but each prompt's first, by an engine with such a cache; and what it was."""
    config = EngineConfig(
        kv_cache_dtype=dtype,
        max_num_seqs=1,
        max_step_ms=None,
        max_num_queued=len(prompts),
        enforce_eager=True,
        num_kv_tokens=max(map(len, prompts)) + 1,
        identity_mismatch="ignore",
    )
    engine = load_engine(model_folder, config, "cuda" if torch.cuda.is_available() else "cpu")
    params = SamplingParams(max_tokens=1, temperature=0.0, prompt_logprobs=1)
    for number, prompt in enumerate(prompts):
        engine.add(str(number), prompt, params)
    found: dict[str, tuple[TokenLogprob, ...]] = {}
    with Progress(console=Console(stderr=True)) as progress:
        task = progress.add_task(f"texts with the {dtype} cache", total=len(prompts))
        while engine.has_work:
            for out in engine.step():
                found[out.request_id] = out.prompt_logprobs or ()
                progress.advance(task)
    about = {
        "model": engine.cache.config.name,
        "device": device_name(engine.cache.device),
        "cache": {
            "cache_dtype": engine.cache.description()["cache_dtype"],
            "cache_bytes": engine.cache.num_bytes(),
        },
    }
    return [score for number in range(len(prompts)) for score in found[str(number)]], about


def _bits(scores: Sequence[TokenLogprob]) -> float:
    return -sum(score.logprob for score in scores) / math.log(2)


if __name__ == "__main__":
    main()
