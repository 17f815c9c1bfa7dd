"""Rows that teach retrieval: real text in which secret numbers are told, and told again.

    python -m jobs.needle_rows data/text data/needle_4k --length 4096 --rows 4096 --keys 60

Reads a folder of prepare_data; writes one like it (tokenizer/, train/, validation/) to pretrain on.
A row has exactly --length tokens. Each key, an English word, has a number in the sentence of the
evaluation's needle; the same sentence comes again farther on, half of them at the row's end, and
then the number can be known only from before. Many keys in a row make it worth learning soon to
copy what stood behind the same words; sentences lie anywhere, so that all distances occur.
With --answers-only these numbers are all that is learned: rows are chats then, for jobs.sft.
The output is a new or empty folder, or one that this command has written: needle_rows.json says so.
"""

import argparse
import json
import os
import random
from collections.abc import Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from functools import cache, partial
from pathlib import Path

import numpy as np

from jobs.cli import fail, interruptible
from nsa_platform import storage
from nsa_platform.data.haystack import NEEDLE, QUESTION, WORDS
from nsa_platform.data.manifest import SourceRecord
from nsa_platform.data.shards import ShardSet, ShardWriter
from nsa_platform.data.tokenizer import Tokenizer
from nsa_platform.evaluate.tasks.words import english

MARK = "needle_rows.json"
SHARD_TOKENS = 8_000_000
ROWS_AT_ONCE = 64
FILLER_TOKENS = 32_000_000
"""Of the text, at most so many tokens are read. A small model knows a shorter one by heart soon."""
TEXT_SHARE = 1 / 8
"""Of a row, at least so much is left to text."""


@dataclass(frozen=True, slots=True)
class Text:
    """Text between the sentences."""

    ids: np.ndarray
    """uint32, without end tokens."""
    line_ends: np.ndarray
    """Where a line has just ended, ascending."""

    @classmethod
    def read(cls, folder: str, split: str, tokenizer: Tokenizer) -> "Text":
        """The first tokens of prepared text.

        Raises:
            ValueError: there is too little of it.
            OSError: it cannot be read.
        """
        shards = ShardSet(storage.join(folder, split), tokenizer_fingerprint=tokenizer.fingerprint)
        parts, found = [np.zeros(0, dtype=np.uint32)], 0
        for index in range(len(shards)):
            if found < FILLER_TOKENS:
                parts.append(np.asarray(shards.open(index).ids, dtype=np.uint32))
                found += len(parts[-1])
        ids = np.concatenate(parts)[:FILLER_TOKENS]
        ids = ids[ids != tokenizer.eos_id]
        texts = [tokenizer.decode([token]) for token in range(tokenizer.vocab_size)]
        ends_line = np.array([text.endswith("\n") for text in texts])
        line_ends = np.flatnonzero(ends_line[ids]) + 1
        if not len(line_ends):
            raise ValueError(f"{folder}/{split}: holds no line of text")
        return cls(ids, line_ends)

    def piece(self, begin: int, length: int) -> np.ndarray:
        """`length` tokens from `begin`; the text begins again where it ends."""
        return np.take(self.ids, np.arange(begin, begin + length), mode="wrap")

    def line_end(self, begin: int, place: int) -> int:
        """The last line end at or before `place` of the piece that begins at `begin`."""
        where = (begin + place) % len(self.ids)
        before = int(np.searchsorted(self.line_ends, where, side="right")) - 1
        found = int(self.line_ends[max(0, before)])
        return max(0, place - max(0, where - found))


def words() -> list[str]:
    """The evaluation's words, and common nouns besides."""
    nouns = [word for word in english("noun") if word.isalpha() and word.isascii()]
    return sorted({*WORDS, *nouns})


@dataclass(frozen=True, slots=True)
class Sentence:
    """A word and its number."""

    ids: list[int]
    number: int
    """Where the number begins, with the blank before it."""


@dataclass(frozen=True, slots=True)
class Row:
    """One row, as training reads it."""

    ids: np.ndarray
    """uint32"""
    answers: np.ndarray
    """bool: tokens of numbers that were told before, up to the sentence's end."""


def make_row(
    tokenizer: Tokenizer, text: Text, pool: Sequence[str], *, length: int, keys: int, seed: str
) -> Row:
    """One row of exactly `length` tokens, the end token included.

    Sentences that would leave less than an eighth of the row to text are left out.

    Raises:
        ValueError: there is no room for a single one.
    """
    dice = random.Random(seed)
    chosen = dice.sample(pool, keys)
    lines = [NEEDLE.format(word=word, number=dice.randint(10_000, 99_999)) for word in chosen]
    questions = tokenizer.encode_batch([QUESTION.format(word=word) for word in chosen])
    sentences, room = [], length - 1
    for ids, question in zip(tokenizer.encode_batch(lines), questions, strict=True):
        if room - 2 * len(ids) >= length * TEXT_SHARE:
            sentences.append(Sentence(ids, number=len(question)))
            room -= 2 * len(ids)
    if not sentences:
        raise ValueError(f"--length={length} has no room for a sentence that is told twice")
    begin = dice.randrange(len(text.ids))
    told: list[tuple[int, int, Sentence]] = []
    for order, sentence in enumerate(sentences):
        first, second = sorted((dice.randint(0, room), dice.randint(0, room)))
        if dice.random() < 0.5:
            second = room
        told.append((text.line_end(begin, first), order, sentence))
        told.append((second if second == room else text.line_end(begin, second), order, sentence))
    # Those at the end come in another order than they were told in.
    told.sort(key=lambda each: (each[0], dice.random()))
    hay, row, done = text.piece(begin, room).tolist(), [], 0
    answers, known = np.zeros(length, dtype=bool), set()
    for place, order, sentence in told:
        row += [*hay[done:place], *sentence.ids]
        done = place
        if order in known:
            answers[len(row) - len(sentence.ids) + sentence.number : len(row)] = True
        known.add(order)
    return Row(np.array([*row, *hay[done:], tokenizer.eos_id], dtype=np.uint32), answers)


def room_for(tokenizer: Tokenizer, pool: Sequence[str], length: int) -> int:
    """Sentences of usual length that a row holds, each of them twice."""
    sentences = tokenizer.encode_batch([NEEDLE.format(word=word, number=99_999) for word in pool])
    usual = sum(map(len, sentences)) / len(sentences)
    return int((length - 1 - length * TEXT_SHARE) / (2 * usual))


@cache
def _material(folder: str, split: str) -> tuple[Tokenizer, Text, list[str]]:
    """What rows are made of, read once by each process."""
    tokenizer = Tokenizer(storage.join(folder, "tokenizer"))
    return tokenizer, Text.read(folder, split, tokenizer), words()


def _make_rows(
    folder: str, split: str, length: int, keys: int, seed: int, numbers: range
) -> list[Row]:
    """Rows of some numbers, in a process of their own."""
    tokenizer, text, pool = _material(folder, split)
    make = partial(make_row, tokenizer, text, pool, length=length, keys=keys)
    seeds = (f"{seed}/{split}/{length}/{number}" for number in numbers)
    return [make(seed=each) for each in seeds]


def write_rows(
    folder: str,
    output: str,
    *,
    length: int,
    rows: int,
    keys: int,
    seed: int,
    processes: int,
    answers_only: bool,
) -> None:
    """Write both splits, of which validation has a thirty-second of `rows`, at least 8.

    Raises:
        ValueError, OSError: the text or the sizes do not do.
    """
    for place in (folder, output):
        if storage.is_remote(place):
            raise ValueError(f"{place}: rows are made from and in local folders")
    tokenizer = Tokenizer(storage.join(folder, "tokenizer"))
    # Before anything is written.
    if keys > len(pool := words()):
        raise ValueError(
            f"--keys={keys} must not exceed {len(pool)}, the words that there are; --length="
            f"{length} has room for about {room_for(tokenizer, pool, length)}"
        )
    _claim(folder, output)
    _make_rows(folder, "validation", length, keys, seed, range(1))
    record = ShardSet(storage.join(folder, "train")).manifest.tokenizer
    made = {"data": folder, "length": length, "rows": rows, "keys": keys, "seed": seed}
    made["answers_only"] = answers_only
    storage.write_text(storage.join(output, MARK), json.dumps(made, indent=1) + "\n")
    tokenizer.save(storage.join(output, "tokenizer"))
    num_bytes = tokenizer.token_bytes()
    for split, count in (("train", rows), ("validation", max(8, rows // 32))):
        writer = ShardWriter(
            storage.join(output, split),
            kind="chat" if answers_only else "text",
            split=split,
            tokenizer=record,
            shard_tokens=SHARD_TOKENS,
        )
        for row in _rows_of(folder, split, count, processes, (length, keys, seed)):
            size = int(num_bytes[row.ids].sum())
            learned = row.answers.tolist() if answers_only else None
            writer.add(row.ids.tolist(), text_bytes=size, loss_mask=learned)
        writer.finish(SourceRecord(files=0, bytes=0, documents=count))


def _claim(folder: str, output: str) -> None:
    """Raise ValueError unless the output folder is ours to write."""
    if Path(folder).resolve() == Path(output).resolve():
        raise ValueError(f"{output}: is the data itself; give another folder to write")
    if MARK in storage.list_names(folder):
        raise ValueError(f"{folder}: holds such rows already; give the text that they are made of")
    found = storage.list_names(output)
    if found and MARK not in found:
        raise ValueError(f"{output}: holds other files ({found[0]}, ...); give a new folder")


def _rows_of(
    folder: str, split: str, count: int, processes: int, sizes: tuple[int, int, int]
) -> Iterator[Row]:
    parts = [range(i, min(i + ROWS_AT_ONCE, count)) for i in range(0, count, ROWS_AT_ONCE)]
    work = partial(_make_rows, folder, split, *sizes)
    with ProcessPoolExecutor(min(processes, len(parts))) as pool:
        for made in pool.map(work, parts):
            yield from made


@interruptible("interrupted; the same command begins anew")
def main(argv: Sequence[str] | None = None) -> None:
    """Write the rows."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("data", help="a folder that prepare_data has written")
    parser.add_argument("output", help="the folder to write")
    parser.add_argument("--length", type=int, required=True, help="tokens of a row")
    parser.add_argument("--rows", type=int, required=True, help="of the training split")
    parser.add_argument("--keys", type=int, required=True, help="numbers told in a row, at most")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--processes", type=int, default=os.cpu_count() or 1)
    parser.add_argument(
        "--answers-only",
        action="store_true",
        help="learn the numbers that were told before, not the text",
    )
    options = parser.parse_args(argv)
    sizes = {name: getattr(options, name) for name in ("length", "rows", "keys", "processes")}
    for name, value in sizes.items():
        if value < 1:
            parser.error(f"--{name} must be at least 1, got {value}")
    try:
        write_rows(
            options.data,
            options.output,
            seed=options.seed,
            answers_only=options.answers_only,
            **sizes,
        )
    except (ValueError, OSError) as error:
        fail(str(error))
    kind = "chats, for jobs.sft" if options.answers_only else "texts, for jobs.pretrain"
    print(f"{options.output}: {options.rows:,} rows of {options.length:,} tokens, {kind}")


if __name__ == "__main__":
    main()
