"""What the data is: raw sources to shards, and shards to batches."""

from typing import Annotated, Literal, Self

from pydantic import Field, PositiveFloat, PositiveInt, model_validator

from nsa_platform.config.base import Strict
from nsa_platform.config.locations import Location

LEAST_WITH_NUMBERS = 1_360
"""Bytes, control tokens, and the numbers of two and three digits."""


class TokenizerConfig(Strict):
    """Where the tokenizer comes from: exactly one of the two."""

    path: Location | None = None
    """A Hugging Face tokenizer folder, local or s3://."""
    train_vocab_size: Annotated[int, Field(ge=300)] | None = None
    """Train a byte-level BPE of this many tokens on the corpus."""
    train_all_numbers: bool = False
    """Each number of up to three digits is one token of the trained vocabulary, whether the corpus
    has it or not: 1,100 tokens, so that 1,360 are the least. Else those are that the corpus has
    often."""
    train_sample_mb: PositiveInt = 64
    """Megabytes of text that training reads at most: whole files, chosen by a hash of their path
    below the input; documents held out for validation are not among them."""

    @model_validator(mode="after")
    def _one_source(self) -> Self:
        if (self.path is None) == (self.train_vocab_size is None):
            raise ValueError(
                "give exactly one of path and train_vocab_size; --set 'tokenizer={path: ...}' "
                "replaces what the file says"
            )
        least = LEAST_WITH_NUMBERS
        if self.train_all_numbers and (self.train_vocab_size or 0) < least:
            raise ValueError(
                f"train_all_numbers=true is for a tokenizer that is trained, of train_vocab_size "
                f"{least} at least, got {self.train_vocab_size}"
            )
        return self


class CorpusConfig(Strict):
    """Raw documents: folders, files or s3:// addresses."""

    inputs: Annotated[tuple[Location, ...], Field(min_length=1)]
    """Files or folders; a folder is walked for the suffixes below."""
    kind: Literal["text", "chat"] = "text"
    """text: documents for pretraining. chat: OpenAI `messages` rows for SFT."""
    suffixes: tuple[str, ...] = (
        ".txt",
        ".md",
        ".rst",
        ".py",
        ".jsonl",
        ".jsonl.gz",
        ".jsonl.zst",
        ".parquet",
        ".arrow",
    )
    """File names that count, by their ending."""
    exclude: tuple[str, ...] = ()
    """Glob patterns of paths (relative to their input folder) that are left out."""
    text_field: str = "text"
    """Column or key of JSONL, Parquet and Arrow rows that holds the text."""
    messages_field: str = "messages"
    """Column or key that holds a chat."""
    invalid_utf8: Literal["replace", "skip", "error"] = "replace"
    """What happens to a document that is not UTF-8; every case is counted and reported."""


class DeduplicateConfig(Strict):
    """Which documents are copies. Of each set of them the first in the corpus's order stays: by
    input, then by path, then by place in the file. Both splits are looked at together."""

    near_similarity: Annotated[float, Field(ge=0.7, le=1)] | None = None
    """null: copies are documents of equal text, apart from white space and Unicode's spellings
    (NFKC). Else also those that have at least this share of their runs of five tokens in common
    (Jaccard, told by MinHash to about 0.04), and copies of copies. Of pairs at 0.7, 0.8 and 0.9 61,
    95 and 99.9 % are found. Chats that share a long system message are alike too."""


class MixtureSource(Strict):
    """Shards that rows are drawn from besides data.path."""

    path: Location
    """Folder made by prepare_data with the same tokenizer, local or s3://."""
    weight: PositiveFloat
    """Share of the rows, relative to the other weights."""


class Sources(Strict):
    """Folders that rows are drawn from."""

    path: Location
    """Folder made by prepare_data (tokenizer/, train/, validation/), local or s3://. Held-out rows
    come from here alone."""
    weight: PositiveFloat = 1.0
    """Share of this folder's rows, relative to the weights of mixture."""
    mixture: tuple[MixtureSource, ...] = ()
    """More folders to train on. Each gives its share to within one row at any point; a small one
    begins its next epoch while a large one is still in its first."""


class LoaderConfig(Sources):
    """How shards become batches."""

    context_length: PositiveInt
    """Tokens of one packed row. Documents that are longer are continued in the next row."""
    packing: Literal["split", "whole"] = "split"
    """split: documents are cut at row ends, only an epoch's last row is padded. whole: documents
    are never cut, rows are padded, a document longer than a row is truncated and counted (for
    chats)."""
    seed: int = 0
    """Decides, with the epoch, the order of shards, documents and rows."""
    shuffle_rows: PositiveInt = 2048
    """Rows are dealt in random order within windows of this many; 1: in the stream's order."""
    cache_gib: PositiveFloat = 32.0
    """Remote shards that were not used for longest are deleted from the cache beyond this."""
    cache_dir: Location | None = None
    """Where remote shards are kept locally; default: a folder under the system's temporary one."""
