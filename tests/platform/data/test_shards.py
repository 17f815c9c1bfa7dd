"""Shards: verified against the manifest; whatever is wrong is named and nothing is skipped."""

import json
import os
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
from pyarrow import ipc

from nsa_platform import storage
from nsa_platform.config.data import LoaderConfig
from nsa_platform.data import shards as shards_module
from nsa_platform.data.loader import Loader
from nsa_platform.data.manifest import (
    Manifest,
    ManifestError,
    ManifestMismatch,
    MissingShard,
    ShardError,
    SourceRecord,
    TokenizerMismatch,
    TokenizerRecord,
    read_manifest,
    write_manifest,
)
from nsa_platform.data.shard_file import concatenate_rows, file_sha256, read_shard
from nsa_platform.data.shards import ShardSet, ShardWriter, open_split
from tests.waiting import eventually

TOKENIZER = TokenizerRecord(fingerprint="ab" * 32, vocab_size=5000, eos_id=0, pad_id=3)


def write(folder: str, *, rows: int = 20, kind: str = "text") -> Manifest:
    writer = ShardWriter(folder, kind=kind, split="train", tokenizer=TOKENIZER, shard_tokens=30)  # pyright: ignore
    for row in range(rows):
        ids = [100 * row + i for i in range(1, 1 + row % 9 + 1)]
        mask = [i % 2 == 0 for i in ids] if kind == "chat" else None
        writer.add(ids, text_bytes=7, loss_mask=mask)
    return writer.finish(SourceRecord(files=1, bytes=2, documents=rows))


def test_what_is_written_is_read(tmp_path: Path) -> None:
    manifest = write(str(tmp_path), kind="chat")
    shards = ShardSet(str(tmp_path))
    assert shards.manifest == manifest == read_manifest(str(tmp_path))
    assert len(shards) == len(manifest.shards) > 2
    documents: list[list[int]] = []
    for number in range(len(shards)):
        shard = shards.open(number)
        assert shard.ids.dtype == np.uint32 and not shard.ids.flags.owndata
        assert shard.loss_mask is not None
        assert shard.loss_mask.tolist() == (shard.ids % 2 == 0).tolist()
        bounds = zip(shard.offsets[:-1], shard.offsets[1:], strict=True)
        documents += [shard.ids[a:b].tolist() for a, b in bounds]
    assert documents == [[100 * r + i for i in range(1, r % 9 + 2)] for r in range(20)]
    assert manifest.rows == 20 and manifest.text_bytes == 140
    assert manifest.tokens == sum(map(len, documents))
    assert all(shard.tokens <= 30 for shard in manifest.shards)


def test_a_document_longer_than_a_shard_has_its_own(tmp_path: Path) -> None:
    writer = ShardWriter(
        str(tmp_path), kind="text", split="train", tokenizer=TOKENIZER, shard_tokens=10
    )
    for length in (5, 50, 5):
        writer.add(range(1, length + 1), text_bytes=1)
    manifest = writer.finish(SourceRecord(1, 1, 3))
    assert [shard.tokens for shard in manifest.shards] == [5, 50, 5]


def test_equal_content_gives_equal_files_and_digest(tmp_path: Path) -> None:
    first, second = write(str(tmp_path / "a")), write(str(tmp_path / "b"))
    assert first.digest == second.digest
    assert write(str(tmp_path / "c"), rows=21).digest != first.digest
    for shard in first.shards:
        left, right = tmp_path / "a" / shard.name, tmp_path / "b" / shard.name
        assert left.read_bytes() == right.read_bytes()


def test_without_finish_there_is_nothing_to_read(tmp_path: Path) -> None:
    write(str(tmp_path))
    (tmp_path / "manifest.json").unlink()
    with pytest.raises(ManifestError, match=r"manifest\.json: is missing.*no finished shards"):
        ShardSet(str(tmp_path))


def test_texts_have_no_mask_and_chats_do(tmp_path: Path) -> None:
    for kind, mask in (("text", [True]), ("chat", None)):
        writer = ShardWriter(
            str(tmp_path),
            kind=kind,  # pyright: ignore
            split="train",
            tokenizer=TOKENIZER,
            shard_tokens=10,
        )
        with pytest.raises(ShardError, match="loss_mask"):
            writer.add([1], text_bytes=1, loss_mask=mask)
        with pytest.raises(ShardError, match="at least one token"):
            writer.add([], text_bytes=1, loss_mask=None if kind == "text" else [])


def flip_a_bit(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)


@pytest.mark.parametrize(
    ("damage", "error", "message"),
    [
        (lambda path: os.truncate(path, 400), ManifestMismatch, "has 400 bytes, the manifest says"),
        (flip_a_bit, ManifestMismatch, "has sha256 .* the manifest says"),
        (lambda path: path.unlink(), MissingShard, "listed in the manifest but missing"),
    ],
)
def test_damage_names_the_file(
    tmp_path: Path, damage: Callable[[Path], None], error: type[Exception], message: str
) -> None:
    write(str(tmp_path))
    damage(tmp_path / "shard-00001.arrow")
    shards = ShardSet(str(tmp_path))
    shards.open(0)
    with pytest.raises(error, match=rf"shard-00001\.arrow: .*{message}"):
        shards.open(1)


def test_the_loader_stops_at_a_damaged_shard(tmp_path: Path) -> None:
    write(str(tmp_path / "train"))
    flip_a_bit(tmp_path / "train" / "shard-00001.arrow")
    config = LoaderConfig(path=str(tmp_path), context_length=8)
    loader = Loader(open_split(config, "train"), config)
    with pytest.raises(ManifestMismatch, match=r"shard-00001"):
        loader.next_step(loader.rows_per_epoch)


def rewrite(folder: Path, table: pa.Table, *, batches: int = 1) -> None:
    """Put a table into the only shard, with a manifest that vouches for it."""
    manifest = write(str(folder), rows=3)
    (record,) = manifest.shards
    path = folder / record.name
    with pa.OSFile(str(path), "wb") as sink, ipc.new_file(sink, table.schema) as writer:
        for _ in range(batches):
            writer.write_table(table)
    tree = json.loads((folder / "manifest.json").read_text())
    tree["shards"][0] |= {"bytes": path.stat().st_size, "sha256": file_sha256(path)}
    shard = type(record)(**tree["shards"][0])
    write_manifest(str(folder), type(manifest)(**{**_fields(manifest), "shards": (shard,)}))


def _fields(manifest: Manifest) -> dict[str, Any]:
    return {name: getattr(manifest, name) for name in manifest.__dataclass_fields__}


@pytest.mark.parametrize(
    ("table", "batches", "message"),
    [
        (pa.table({"text": ["a"]}), 1, "has columns"),
        (pa.table({"ids": pa.array([[1]], pa.list_(pa.int64()))}), 1, "has columns"),
        (None, 2, "holds 2 record batches"),
    ],
)
def test_a_foreign_arrow_file(
    tmp_path: Path, table: pa.Table | None, batches: int, message: str
) -> None:
    write(str(tmp_path / "other"), rows=3)
    own = pa.Table.from_batches([read_shard(tmp_path / "other" / "shard-00000.arrow")])
    rewrite(tmp_path, own if table is None else table, batches=batches)
    with pytest.raises(ShardError, match=rf"shard-00000\.arrow: {message}"):
        ShardSet(str(tmp_path)).open(0)


def test_rows_or_ids_that_the_manifest_does_not_know(tmp_path: Path) -> None:
    write(str(tmp_path / "other"), rows=3)
    batch = read_shard(tmp_path / "other" / "shard-00000.arrow")
    rewrite(tmp_path, concatenate_rows([batch.slice(0, 2)]))
    with pytest.raises(ManifestMismatch, match=r"holds 2 rows and 3 tokens, .* 3 and 6"):
        ShardSet(str(tmp_path)).open(0)
    ids = pa.array([[1], [2, 3], [4, 5, 5000]], pa.list_(pa.uint32()))
    rewrite(tmp_path, pa.table([ids], schema=batch.schema))
    with pytest.raises(ManifestMismatch, match="beyond the vocabulary of 5000"):
        ShardSet(str(tmp_path)).open(0)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda tree: tree.update(version=2), "version must be 1, got 2"),
        (lambda tree: tree.update(tokens=1), "was altered"),
        (lambda tree: tree["shards"].pop(), "was altered"),
        (lambda tree: tree["source"].update(files=77), "was altered"),
        (lambda tree: tree.pop("tokenizer"), "malformed"),
        (lambda tree: tree["shards"][0].update(more=1), "malformed"),
    ],
)
def test_a_manifest_that_was_touched(
    tmp_path: Path, change: Callable[[dict], None], message: str
) -> None:
    write(str(tmp_path))
    tree = json.loads((tmp_path / "manifest.json").read_text())
    change(tree)
    (tmp_path / "manifest.json").write_text(json.dumps(tree))
    with pytest.raises(ManifestError, match=rf"manifest\.json: .*{message}"):
        ShardSet(str(tmp_path))


def test_a_manifest_that_is_no_json(tmp_path: Path) -> None:
    write(str(tmp_path))
    os.truncate(tmp_path / "manifest.json", 20)
    with pytest.raises(ManifestError, match="is not JSON"):
        ShardSet(str(tmp_path))


def test_another_tokenizer(tmp_path: Path) -> None:
    write(str(tmp_path))
    ShardSet(str(tmp_path), tokenizer_fingerprint=TOKENIZER.fingerprint)
    with pytest.raises(TokenizerMismatch, match=r"made with tokenizer abababababab.*cdcdcdcdcdcd"):
        ShardSet(str(tmp_path), tokenizer_fingerprint="cd" * 32)


def cached(folder: Path) -> set[str]:
    return {path.stem for path in folder.glob("*.arrow")}


@pytest.mark.cluster
def test_remote_shards_are_fetched_once_and_ahead(s3_environment: Any, tmp_path: Path) -> None:
    uri = storage.join(s3_environment.bucket("shards"), "set/train")
    manifest = write(uri)
    config = LoaderConfig(
        path="s3://shards/set", context_length=8, shuffle_rows=1, cache_dir=str(tmp_path / "cache")
    )
    local = tmp_path / "local"
    storage.download_tree(uri, local / "train")
    same = LoaderConfig(path=str(local), context_length=8, shuffle_rows=1)
    remote_loader = Loader(open_split(config, "train"), config)
    local_loader = Loader(open_split(same, "train"), same)
    first = remote_loader.next_step(1)
    eventually(lambda: len(cached(tmp_path / "cache")) == 2, "the next shard comes before its turn")
    assert first[0].ids.tolist() == local_loader.next_step(1)[0].ids.tolist()
    for _ in range(2 * local_loader.rows_per_epoch):
        left, right = remote_loader.next_step(1)[0], local_loader.next_step(1)[0]
        assert left.ids.tolist() == right.ids.tolist()
    assert cached(tmp_path / "cache") == {shard.sha256 for shard in manifest.shards}
    storage.delete_tree(storage.join(uri, manifest.shards[0].name))
    ShardSet(uri, cache_dir=str(tmp_path / "cache")).open(0)
    with pytest.raises(MissingShard, match=r"s3://shards/set/train/shard-00000\.arrow"):
        ShardSet(uri, cache_dir=str(tmp_path / "elsewhere")).open(0)


@pytest.mark.cluster
def test_remote_damage_is_found_and_not_kept(s3_environment: Any, tmp_path: Path) -> None:
    uri = storage.join(s3_environment.bucket("damaged"), "train")
    name = write(uri).shards[0].name
    content = storage.read_bytes(storage.join(uri, name))
    storage.write_bytes(storage.join(uri, name), content[:-8] + b"\0" * 8)
    with pytest.raises(ManifestMismatch, match=rf"s3://damaged/train/{name}: has sha256"):
        ShardSet(uri, cache_dir=str(tmp_path)).open(0)
    assert cached(tmp_path) == set()
    storage.write_bytes(storage.join(uri, name), content)
    shards = ShardSet(uri, cache_dir=str(tmp_path))
    shards.open(0)
    (path,) = tmp_path.glob("*.arrow")
    flip_a_bit(path)
    with pytest.raises(ManifestMismatch, match="sha256"):
        ShardSet(uri, cache_dir=str(tmp_path)).open(0)


@pytest.mark.cluster
def test_the_cache_is_bounded(
    s3_environment: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(shards_module, "OPEN_SHARDS", 1)
    uri = storage.join(s3_environment.bucket("bounded"), "train")
    manifest = write(uri)
    limit = manifest.shards[0].bytes + manifest.shards[1].bytes
    shards = ShardSet(uri, cache_dir=str(tmp_path), cache_bytes=limit)
    kept = shards.open(0)
    values = kept.ids.tolist()
    for number in [*range(len(shards)), 0]:
        shards.open(number)
        assert sum(path.stat().st_size for path in tmp_path.glob("*.arrow")) <= limit
    assert kept.ids.tolist() == values


@pytest.mark.cluster
def test_an_unreachable_store_is_an_error_not_an_end(
    s3_environment: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("nsa_platform.data.shards.FETCH_DELAYS_S", (0.1, 0.2))
    uri = storage.join(s3_environment.bucket("gone"), "train")
    write(uri)
    shards = ShardSet(uri, cache_dir=str(tmp_path))
    monkeypatch.setenv("AWS_ENDPOINT_URL", "http://127.0.0.1:9")
    with pytest.raises(storage.StorageError, match="does not answer"):
        shards.open(0)
    with pytest.raises(storage.StorageError, match="does not answer"):
        ShardSet(uri)


@pytest.mark.cluster
def test_a_store_that_comes_back_is_waited_for(
    s3_environment: Any,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    monkeypatch.setattr("nsa_platform.data.shards.FETCH_DELAYS_S", (0.1, 0.1, 60.0))
    uri = storage.join(s3_environment.bucket("returns"), "train")
    write(uri)
    shards = ShardSet(uri, cache_dir=str(tmp_path))
    monkeypatch.setenv("AWS_ENDPOINT_URL", "http://127.0.0.1:9")
    waits: list[float] = []

    def wait(delay_s: float) -> None:
        waits.append(delay_s)
        if len(waits) == 2:
            monkeypatch.setenv("AWS_ENDPOINT_URL", s3_environment.endpoint)

    monkeypatch.setattr("nsa_platform.retry.time", SimpleNamespace(sleep=wait))
    shards.open(0)
    assert waits == [0.1, 0.1]
    assert [record.message.split(" failed")[0] for record in caplog.records] == [
        f"reading {storage.join(uri, 'shard-00000.arrow')}"
    ] * 2
