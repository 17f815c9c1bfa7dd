"""What an evaluation reads: held-out rows, and the text of a haystack."""

import argparse
import random
import shlex
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from datetime import UTC, datetime

from jobs.cli import warn
from jobs.task_bars import Bars
from nsa_platform import storage
from nsa_platform.config.data import LoaderConfig
from nsa_platform.config.evaluate import BitsPerByteConfig, NeedleConfig, PatternSearchConfig
from nsa_platform.config.runs import EvaluateRun
from nsa_platform.data.haystack import synthetic_filler
from nsa_platform.data.loader import Batch, Loader
from nsa_platform.data.shards import ShardSet
from nsa_platform.data.tokenizer import Tokenizer
from nsa_platform.evaluate.bits_per_byte import BitsPerByte, bits_per_byte, first_batches
from nsa_platform.evaluate.scores import Score
from nsa_platform.evaluate.tasks.words import uuid_pairs
from nsa_platform.tracking import origin_tags


def held_out_parser(description: str | None) -> argparse.ArgumentParser:
    """Arguments of a command that reads held-out rows with an exported model."""
    parser = argparse.ArgumentParser(
        description=description, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("model")
    parser.add_argument("data")
    parser.add_argument("output")
    parser.add_argument("--length", type=int, required=True, help="tokens of a text")
    parser.add_argument("--texts", type=int, default=4, help="held-out rows that are read")
    return parser


def held_out_origin(job: str, argv: Sequence[str] | None) -> dict[str, str]:
    """How, when and with what code such a command measures, for its record."""
    words = sys.argv[1:] if argv is None else argv
    return {
        "commit": origin_tags(job, "").get("mlflow.source.git.commit", ""),
        "date": datetime.now(UTC).date().isoformat(),
        "command": shlex.join(["python", "-m", f"jobs.{job}", *words]),
    }


def held_out_texts(data: str, tokenizer: Tokenizer, *, length: int, texts: int) -> list[Batch]:
    """The first held-out rows of such a command; a warning says where there are fewer.

    Raises:
        ValueError, OSError: the data is not there, or was made with another tokenizer.
    """
    loader = open_loader(data, "validation", tokenizer, length)
    rows = list(first_batches(loader, tokens=texts * length, batch_rows=1))
    if len(rows) < texts:
        warn(f"--texts={texts}: there are {len(rows)} held-out rows of {length} tokens, all read")
    return rows


def counted(batches: Iterator[Batch], advance: Callable[[int], None]) -> Iterator[Batch]:
    for batch in batches:
        yield batch
        advance(len(batch.ids))


def check_text(run: EvaluateRun, tokenizer: Tokenizer) -> None:
    """Find out before anything begins that the data is there, and text in what is read of it.

    Raises:
        ValueError: a split was made with another tokenizer, or is read and holds nothing.
        OSError: a split is not there.
    """
    searched = run.baselines.minference if run.baselines is not None else None
    needs = {
        "bits_per_byte": run.bits_per_byte is not None,
        "needle.filler=heldout": run.needle is not None and run.needle.filler == "heldout",
        "baselines.minference.sample=heldout": searched is not None
        and searched.sample == "heldout",
    }
    readers = {
        "validation": [key for key, is_needed in needs.items() if is_needed],
        "train": [] if run.bits_per_byte is None else ["bits_per_byte"],
    }
    for split, keys in readers.items():
        folder = storage.join(run.data, split)
        shards = ShardSet(folder, tokenizer_fingerprint=tokenizer.fingerprint)
        if keys and not shards.manifest.tokens:
            raise ValueError(f"{folder} holds no tokens, but {', '.join(keys)} reads it")
        config = run.bits_per_byte
        if split == "validation" and config is not None and "tokens" in config.model_fields_set:
            if config.tokens > (held := shards.manifest.tokens):
                warn(f"bits_per_byte.tokens={config.tokens}: {folder} holds {held}, all are read")


def open_loader(data: str, split: str, tokenizer: Tokenizer, context_length: int) -> Loader:
    shards = ShardSet(storage.join(data, split), tokenizer_fingerprint=tokenizer.fingerprint)
    return Loader(shards, LoaderConfig(path=data, context_length=context_length))


def score_text(
    run: EvaluateRun,
    config: BitsPerByteConfig,
    scorers: Mapping[str, Score],
    tokenizer: Tokenizer,
    bars: Bars,
    *,
    title: str,
) -> dict[str, BitsPerByte]:
    """Scorers on the held-out text; it is the same for each call."""
    loader = open_loader(run.data, "validation", tokenizer, config.context_length)
    rows = min(max(1, config.tokens // config.context_length), loader.rows_per_epoch)
    task = bars.add_task(title, total=rows * config.context_length)
    return bits_per_byte(
        dict(scorers),
        first_batches(loader, tokens=config.tokens, batch_rows=config.sequences_per_batch),
        tokenizer.token_bytes(),
        context_length=config.context_length,
        buckets=config.position_buckets,
        advance=lambda tokens: bars.advance(task, tokens),
    )


def filler_of(run: EvaluateRun, config: NeedleConfig, tokenizer: Tokenizer) -> list[int]:
    """Ids of the haystack's text."""
    if config.filler == "synthetic":
        return synthetic_filler(tokenizer)
    return heldout_ids(run, tokenizer, rows=16, length=max(config.lengths))


def pattern_sample(
    run: EvaluateRun, config: PatternSearchConfig, tokenizer: Tokenizer, max_context: int
) -> list[int]:
    """Ids of the text on which MInference's patterns are searched."""
    size = min(config.tokens, max_context)
    if config.sample == "heldout":
        return heldout_ids(run, tokenizer, rows=2, length=size)[:size]
    # A pair has more than 16 tokens in any vocabulary: there is enough of them to cut from.
    text = uuid_pairs(random.Random(config.seed), size // 16 + 1)
    return tokenizer.encode(text)[-size:]


def heldout_ids(run: EvaluateRun, tokenizer: Tokenizer, *, rows: int, length: int) -> list[int]:
    """Ids of the first rows of held-out text, without those between documents."""
    loader = open_loader(run.data, "validation", tokenizer, length)
    batches = first_batches(loader, tokens=rows * length, batch_rows=1)
    ids = [token for batch in batches for token in batch.ids.tolist()]
    return [token for token in ids if token not in (tokenizer.eos_id, tokenizer.pad_id)]


def num_trials(config: NeedleConfig) -> int:
    return len(config.lengths) * len(config.depths) * config.samples
