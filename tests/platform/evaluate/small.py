"""A small text in shards, its tokenizer, an untrained model: made by the real code."""

import random
from dataclasses import dataclass
from pathlib import Path

from nsa_platform.config.data import LoaderConfig
from nsa_platform.config.model import ModelConfig
from nsa_platform.data.loader import Loader
from nsa_platform.data.manifest import SourceRecord, TokenizerRecord
from nsa_platform.data.shards import ShardSet, ShardWriter
from nsa_platform.data.tokenizer import Tokenizer, train_tokenizer
from nsa_platform.model.transformer import Transformer, init_weights
from nsa_platform.model.weights import export_model


@dataclass(frozen=True)
class Corpus:
    """A folder as prepare_data makes it."""

    path: Path
    tokenizer: Tokenizer
    documents: dict[str, list[str]]

    def loader(self, split: str, context_length: int) -> Loader:
        config = LoaderConfig(path=str(self.path), context_length=context_length)
        return Loader(ShardSet(str(self.path / split)), config)


def sentences(dice: random.Random, count: int) -> str:
    """Text with structure: some words follow others, so that a bigram beats a unigram."""
    follow = {"the": ("cat", "dog", "häuser"), "a": ("bird", "fish"), "cat": ("sat", "ran")}
    words = ["the", "a", "cat", "over", "under", "house", "tree", "sat"]
    lines = []
    for _ in range(count):
        line = [dice.choice(words)]
        while len(line) < 8:
            line.append(dice.choice(follow.get(line[-1], tuple(words))))
        lines.append(" ".join(line) + ".\n")
    return "".join(lines)


def write_split(path: Path, split: str, texts: list[str], tokenizer: Tokenizer) -> None:
    """Texts as prepare_data writes a split."""
    writer = ShardWriter(
        str(path / split),
        kind="text",
        split=split,
        tokenizer=TokenizerRecord(
            tokenizer.fingerprint, tokenizer.vocab_size, tokenizer.eos_id, tokenizer.pad_id
        ),
        shard_tokens=4000,
    )
    for text in texts:
        ids = [*tokenizer.encode(text), tokenizer.eos_id]
        writer.add(ids, text_bytes=len(text.encode()))
    writer.finish(SourceRecord(files=1, bytes=1, documents=len(texts)))


def make_corpus(path: Path, *, vocab_size: int = 300) -> Corpus:
    dice = random.Random(0)
    documents = {
        "train": [sentences(dice, dice.randint(3, 40)) for _ in range(60)],
        "validation": [sentences(dice, dice.randint(1, 40)) for _ in range(20)],
    }
    tokenizer = train_tokenizer(documents["train"], vocab_size, path / "tokenizer")
    for split, texts in documents.items():
        write_split(path, split, texts, tokenizer)
    return Corpus(path, tokenizer, documents)


def make_model(vocab_size: int, *, max_context: int = 512, kind: str = "nsa") -> Transformer:
    """An untrained model; kind: nsa or moba, with blocks that fit into short prompts, or full."""
    heads = {"query_heads": 4, "kv_heads": 2, "key_width": 16, "value_width": 16}
    blocks = {"selection_block_size": 8, "num_selected_blocks": 4}
    compressed = {"compression_block_size": 8, "compression_stride": 4, "window_size": 16}
    sizes = {"nsa": {**blocks, **compressed}, "moba": blocks, "full": {}}
    tree = {
        "vocab_size": vocab_size,
        "layers": 2,
        "width": 32,
        "ffn_width": 64,
        "max_context": max_context,
        "attention": {"kind": kind, **heads, **sizes[kind]},
    }
    model = Transformer(ModelConfig.parse(tree))
    init_weights(model, 0)
    return model.eval()


def export(corpus: Corpus, model: Transformer, folder: Path) -> Path:
    """The model as training leaves it."""
    return export_model(
        folder, model.config, model.state_dict(), tokenizer_dir=corpus.path / "tokenizer"
    )
