"""Inspect prepared data: check every shard, count documents and tokens, find copies, show samples.

    python -m jobs.inspect_data runs/data/text
    python -m jobs.inspect_data s3://bucket/text --tasks 64 --samples 5 --output report.json

Reads a folder that jobs.prepare_data has made, local or s3://. Copies are documents of equal token
ids; near copies have at least about 80 % of their runs of five tokens in common. jobs.prepare_data
leaves both out with `deduplicate`. With --tasks the shards are read by that many Ray tasks at once.
--output also writes the report as JSON.

Exit status: 0 inspected; 2 the folder or a shard is wrong; 130 stopped; 1 anything else.
"""

import argparse
import json
from collections.abc import Sequence
from typing import Any

import numpy as np
from rich.console import Console
from rich.table import Table

from jobs.cli import EXIT_BAD_CONFIG, fail, interruptible
from jobs.cluster import connect
from jobs.preparation import TaskPool
from nsa_platform import storage
from nsa_platform.data.each import Each, in_turn
from nsa_platform.data.inspection import Content, copies, inspect, leaked, statistics
from nsa_platform.data.manifest import ShardError
from nsa_platform.data.shards import ShardSet
from nsa_platform.data.tokenizer import Tokenizer, open_tokenizer

SAMPLE_TOKENS = 120


def main(argv: Sequence[str] | None = None) -> None:
    """Run the job; ends the process with an exit status if it fails."""
    options = _parser().parse_args(argv)
    console = Console(highlight=False, soft_wrap=True)
    with interruptible("interrupted; nothing was written"):
        try:
            report, contents = _inspect(options)
            if options.output is not None:
                storage.write_text(options.output, json.dumps(report, indent=1) + "\n")
            cache = options.cache_dir or storage.default_cache("files")
            tokenizer = open_tokenizer(storage.join(options.folder, "tokenizer"), cache)
            _show(report, tokenizer, console)
            if contents and options.samples:
                _show_samples(options, tokenizer, console)
        except (ShardError, storage.MissingFileError) as error:
            fail(str(error), status=EXIT_BAD_CONFIG)
        except (OSError, ValueError) as error:
            fail(str(error))


def _inspect(options: argparse.Namespace) -> tuple[dict[str, Any], dict[str, Content]]:
    """The report, and what was found in each split that holds anything."""
    splits = {name: _open(options, name) for name in ("train", "validation")}
    held = {name: shards for name, shards in splits.items() if shards.manifest.rows}
    if options.tasks > 1:
        with connect():
            contents = _contents(held, options, TaskPool(options.tasks))
    else:
        contents = _contents(held, options, in_turn)
    report: dict[str, Any] = {"folder": options.folder, "splits": {}}
    for name, content in contents.items():
        manifest = splits[name].manifest
        report["splits"][name] = {
            "shards": len(manifest.shards),
            "digest": manifest.digest,
            **statistics(content),
            "text_bytes": manifest.text_bytes,
            "copies": copies(content),
        }
    if len(contents) == 2:
        report["leaked"] = leaked(contents["train"], contents["validation"])
    return report, contents


def _contents(
    splits: dict[str, ShardSet], options: argparse.Namespace, each: Each
) -> dict[str, Content]:
    return {name: inspect(shards, options.cache_dir, each=each) for name, shards in splits.items()}


def _open(options: argparse.Namespace, split: str) -> ShardSet:
    return ShardSet(storage.join(options.folder, split), cache_dir=options.cache_dir)


def _show(report: dict[str, Any], tokenizer: Tokenizer, console: Console) -> None:
    table = Table(title=report["folder"], title_justify="left")
    table.add_column("")
    for name in report["splits"]:
        table.add_column(name, justify="right")
    columns = [_lines(split, tokenizer) for split in report["splits"].values()]
    for label in columns[0] if columns else ():
        table.add_row(label, *(column[label] for column in columns))
    console.print(table)
    if "leaked" in report:
        console.print(f"validation that stands in train: {_copies(report['leaked'])}")


def _lines(split: dict[str, Any], tokenizer: Tokenizer) -> dict[str, str]:
    tokens = split["tokens"]
    lengths = ", ".join(f"p{p} {value:,}" for p, value in split["length_percentiles"].items())
    long = split["share_of_tokens_in_documents_of"]
    ids = split["most_frequent_ids"]
    frequent = [repr(tokenizer.decode([each], skip_special_tokens=False)) for each in ids]
    return {
        "shards, all as their manifest says": f"{split['shards']:,}",
        "documents": f"{split['documents']:,}",
        "tokens": f"{tokens:,}",
        "that count for the loss": f"{split['loss_tokens'] / tokens:.1%}",
        "bytes of text per token": f"{split['text_bytes'] / tokens:.2f}",
        "tokens of a document": f"{lengths}, longest {split['longest']:,}",
        "tokens in documents of at least": ", ".join(
            f"{int(length) // 1024}k {share:.1%}" for length, share in long.items()
        ),
        "vocabulary in use": f"{split['vocabulary_in_use']:.1%}",
        "entropy": f"{split['bits_per_token']:.2f} bits per token",
        "most frequent": " ".join(frequent),
        "copies": _copies(split["copies"]),
    }


def _copies(found: dict[str, Any]) -> str:
    return ", ".join(
        f"{part['documents']:,} {kind} ({part['share_of_tokens']:.1%} of the tokens)"
        for kind, part in found.items()
    )


def _show_samples(options: argparse.Namespace, tokenizer: Tokenizer, console: Console) -> None:
    """Beginnings of documents drawn at random from the first split that holds any."""
    shards = next(s for s in map(lambda n: _open(options, n), ("train", "validation")) if len(s))
    rng = np.random.default_rng(options.seed)
    for _ in range(options.samples):
        number = int(rng.integers(len(shards)))
        shard = shards.open(number)
        row = int(rng.integers(len(shard.offsets) - 1))
        begin, end = (int(edge) for edge in shard.offsets[row : row + 2])
        shown = shard.ids[begin : min(end, begin + SAMPLE_TOKENS)].tolist()
        console.rule(f"shard {number}, document {row}, {end - begin:,} tokens", align="left")
        console.print(tokenizer.decode(shown, skip_special_tokens=False), markup=False)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("folder", help="made by jobs.prepare_data, local or s3://")
    parser.add_argument("--samples", type=int, default=3, help="documents to show (3)")
    parser.add_argument("--seed", type=int, default=0, help="which documents are shown (0)")
    parser.add_argument("--tasks", type=int, default=1, help="Ray tasks at once; 1: no Ray (1)")
    parser.add_argument("--output", help="JSON file to write, local or s3://")
    parser.add_argument("--cache-dir", help="where remote shards are kept locally")
    return parser


if __name__ == "__main__":
    main()
