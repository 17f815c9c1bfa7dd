"""One door to local files and S3: whole or not at all, and errors that name address and reason."""

import os
import socket
from pathlib import Path
from typing import Any

import pytest

from nsa_platform import storage
from nsa_platform.storage import MissingFileError, StorageError


def tree(folder: Path) -> dict[str, bytes]:
    """A folder with files of awkward sizes."""
    contents = {
        "a.txt": b"a",
        "named.gz": b"not compressed",
        "empty": b"",
        "sub/deep/b.bin": os.urandom(9_000_000),
    }
    for name, content in contents.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(content)
    return contents


def read_tree(folder: Path) -> dict[str, bytes]:
    return {e.name: Path(e.uri).read_bytes() for e in storage.walk(str(folder))}


def test_remote_is_s3_and_nothing_else() -> None:
    assert storage.is_remote("s3://bucket/key")
    assert not storage.is_remote("/data/x")
    assert not storage.is_remote("data/x")
    with pytest.raises(StorageError, match=r"gs://b/k: unknown scheme gs://"):
        storage.is_remote("gs://b/k")


def test_join() -> None:
    assert storage.join("s3://b/x/", "y", "z") == "s3://b/x/y/z"
    assert storage.join("/", "y") == "/y"
    assert storage.join("a", "b") == "a/b"


def check_reading_and_writing(root: str) -> None:
    uri = storage.join(root, "x", "y.txt")
    assert not storage.exists(uri)
    storage.write_text(uri, "grüß")
    storage.write_text(uri, "grüß dich")
    assert storage.exists(uri) and storage.exists(storage.join(root, "x"))
    assert storage.is_folder(storage.join(root, "x")) and not storage.is_folder(uri)
    assert storage.read_text(uri) == "grüß dich"
    assert storage.size(uri) == storage.stat(uri).size == len("grüß dich".encode())
    assert storage.list_names(root) == ["x"]
    assert storage.list_names(storage.join(root, "nowhere")) == []
    with storage.open_input(uri) as file:
        file.seek(3)
        assert file.read(2) == "grüß".encode()[3:5]
    storage.delete_tree(storage.join(root, "x"))
    storage.delete_tree(storage.join(root, "x"))
    assert not storage.exists(uri)


def check_trees(root: str, tmp_path: Path) -> None:
    contents = tree(tmp_path / "from")
    storage.upload_tree(tmp_path / "from", storage.join(root, "t"))
    entries = storage.walk(storage.join(root, "t"))
    assert {e.name: e.size for e in entries} == {n: len(c) for n, c in contents.items()}
    assert [e.name for e in entries] == sorted(contents)
    storage.download_tree(storage.join(root, "t"), tmp_path / "to")
    assert read_tree(tmp_path / "to") == contents


def check_missing(root: str, tmp_path: Path) -> None:
    uri = storage.join(root, "none")
    for action in (storage.read_bytes, storage.size, storage.stat, storage.open_input):
        with pytest.raises(MissingFileError, match=r"none.*does not exist"):
            action(uri)
    with pytest.raises(MissingFileError, match="none"):
        storage.walk(uri)
    with pytest.raises(MissingFileError, match="none"):
        storage.download_file(uri, tmp_path / "copy")
    with pytest.raises(MissingFileError, match="none"):
        storage.fetch(uri, tmp_path / "cache")
    assert not (tmp_path / "copy").exists()


def check_a_failed_write_changes_nothing(root: str) -> None:
    uri = storage.join(root, "w", "file.gz")
    storage.write_bytes(uri, b"old")
    with pytest.raises(RuntimeError, match="midway"), storage.writing(uri) as path:
        path.write_bytes(b"half")
        raise RuntimeError("midway")
    assert storage.read_bytes(uri) == b"old"
    assert storage.list_names(storage.join(root, "w")) == ["file.gz"]


def test_local_files(tmp_path: Path) -> None:
    root = tmp_path / "root"
    root.mkdir()
    check_reading_and_writing(str(root))
    check_trees(str(root), tmp_path)
    check_missing(str(root), tmp_path)
    check_a_failed_write_changes_nothing(str(root))
    assert storage.fetch(str(root), tmp_path / "cache") == root


def test_local_reasons_name_the_path(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("x")
    with pytest.raises(StorageError, match=r"cannot write .*file/below"):
        storage.write_bytes(str(tmp_path / "file" / "below"), b"")
    with pytest.raises(StorageError, match=r"^cannot list .*/file: Not a directory$"):
        storage.list_names(str(tmp_path / "file"))
    with pytest.raises(MissingFileError, match="source"):
        storage.upload_file(tmp_path / "source", str(tmp_path / "target"))


@pytest.mark.cluster
def test_s3_objects(s3_environment: Any, tmp_path: Path) -> None:
    root = storage.join(s3_environment.bucket("objects"), "root")
    check_reading_and_writing(root)
    check_trees(root, tmp_path)
    check_missing(root, tmp_path)
    check_a_failed_write_changes_nothing(root)


@pytest.mark.cluster
def test_a_fetched_copy_is_used_until_the_original_changes(
    s3_environment: Any, tmp_path: Path
) -> None:
    bucket = s3_environment.bucket("fetch")
    tree(tmp_path / "from")
    storage.upload_tree(tmp_path / "from", storage.join(bucket, "t"))
    first = storage.fetch(storage.join(bucket, "t"), tmp_path / "cache")
    assert read_tree(first) == read_tree(tmp_path / "from")
    (first / "a.txt").write_bytes(b"marked")
    again = storage.fetch(storage.join(bucket, "t"), tmp_path / "cache")
    assert again == first and (again / "a.txt").read_bytes() == b"marked"
    storage.write_bytes(storage.join(bucket, "t", "a.txt"), b"changed")
    renewed = storage.fetch(storage.join(bucket, "t"), tmp_path / "cache")
    assert renewed != first and (renewed / "a.txt").read_bytes() == b"changed"
    file = storage.fetch(storage.join(bucket, "t", "a.txt"), tmp_path / "cache")
    assert file.read_bytes() == b"changed"


@pytest.mark.cluster
@pytest.mark.parametrize("name", ["AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY"])
def test_wrong_credentials(s3_environment: Any, monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    bucket = s3_environment.bucket("keyed")
    storage.write_bytes(storage.join(bucket, "k"), b"1")
    monkeypatch.setenv(name, "wrong")
    for action in (storage.read_bytes, storage.exists, storage.list_names, storage.walk):
        with pytest.raises(StorageError, match=r"s3://keyed/k at http.*access was refused"):
            action(storage.join(bucket, "k"))
    with pytest.raises(StorageError, match=r"cannot write s3://keyed/k .*access was refused"):
        storage.write_bytes(storage.join(bucket, "k"), b"2")


@pytest.mark.cluster
def test_missing_bucket(s3_environment: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", s3_environment.writer_key)
    with pytest.raises(StorageError, match="no bucket 'nowhere'"):
        storage.read_bytes("s3://nowhere/k")
    with pytest.raises(StorageError, match="no bucket 'nowhere'"):
        storage.walk("s3://nowhere/k")
    with pytest.raises(StorageError, match=r"cannot write s3://nowhere/k"):
        storage.write_bytes("s3://nowhere/k", b"")


def unreachable(monkeypatch: pytest.MonkeyPatch, endpoint: str) -> None:
    monkeypatch.setenv("AWS_ENDPOINT_URL", endpoint)
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", "a")
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "b")


@pytest.mark.timeout(120)
def test_unreachable_endpoint(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    with socket.socket() as port:
        port.bind(("127.0.0.1", 0))
        endpoint = f"http://127.0.0.1:{port.getsockname()[1]}"
        unreachable(monkeypatch, endpoint)
        with pytest.raises(StorageError, match=rf"s3://b/k at {endpoint}.*does not answer"):
            storage.read_bytes("s3://b/k")
        with pytest.raises(StorageError, match="does not answer"):
            storage.write_bytes("s3://b/k", b"1")


def test_silent_endpoint(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(storage, "SILENCE_TIMEOUT_S", 1.0)
    with socket.create_server(("127.0.0.1", 0), backlog=16) as server:
        unreachable(monkeypatch, f"http://127.0.0.1:{server.getsockname()[1]}")
        with pytest.raises(StorageError, match="does not answer"):
            storage.read_bytes("s3://b/k")


@pytest.mark.parametrize("endpoint", ["localhost:9000", "ftp://x"])
def test_malformed_endpoint(monkeypatch: pytest.MonkeyPatch, endpoint: str) -> None:
    unreachable(monkeypatch, endpoint)
    with pytest.raises(
        StorageError, match=r"AWS_ENDPOINT_URL='.*' must look like http://host:port"
    ):
        storage.exists("s3://b/k")


def test_an_address_without_a_bucket() -> None:
    with pytest.raises(StorageError, match="names no bucket"):
        storage.read_bytes("s3://")
