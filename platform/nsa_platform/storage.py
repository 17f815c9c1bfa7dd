"""Local paths and s3:// addresses through one door: bounded in time, whole or not at all.

A URI is a local path or `s3://bucket/key`. S3 is configured by the environment that every AWS tool
reads: AWS_ACCESS_KEY_ID, AWS_SECRET_ACCESS_KEY, AWS_REGION, AWS_ENDPOINT_URL, AWS_CA_BUNDLE.
Writing is atomic: a reader sees the old file or the new one. An endpoint that cannot be reached
is given up after about ten seconds, one that accepts and then stays silent after about thirty.
"""

import hashlib
import os
import re
import shutil
import tempfile
import uuid
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import NoReturn, TypeVar
from urllib.parse import urlsplit

import pyarrow as pa
from pyarrow import fs

CONNECT_TIMEOUT_S = 3.0
SILENCE_TIMEOUT_S = 10.0
ATTEMPTS = 3
Item = TypeVar("Item")

COPY_BYTES = 8 << 20
PARALLEL_COPIES = 8


class StorageError(OSError):
    """A file could not be read, written or listed; the message names the address and the reason."""


class MissingFileError(StorageError, FileNotFoundError):
    """There is nothing at the address."""


@dataclass(frozen=True, slots=True)
class FileEntry:
    """One file below a folder."""

    uri: str
    name: str
    """Path relative to the folder that was listed, with forward slashes."""
    size: int
    """Bytes."""
    modified_ns: int
    """Time of the last change, nanoseconds since 1970; object stores round to seconds."""


def is_remote(uri: str) -> bool:
    """Whether `uri` is an s3:// address. Raises StorageError for any other scheme."""
    scheme, separator, _ = uri.partition("://")
    if separator and scheme != "s3":
        raise StorageError(f"{uri}: unknown scheme {scheme}://, use a local path or s3://")
    return bool(separator)


def join(folder: str, *names: str) -> str:
    """Address of a name below a folder."""
    return "/".join([folder.rstrip("/"), *names]) if names else folder


def default_cache(name: str) -> Path:
    """The user's own folder below the system's temporary one for copies of remote files."""
    return Path(tempfile.gettempdir()) / f"nsa-platform-{os.getuid()}" / name


def exists(uri: str) -> bool:
    """Whether a file or a folder stands at `uri`. A prefix of object names counts as a folder."""
    if not is_remote(uri):
        return Path(uri).exists()
    with _explained("look for", uri):
        return _info(uri).type != fs.FileType.NotFound


def is_folder(uri: str) -> bool:
    """Whether `uri` is a folder, or a prefix of object names."""
    if not is_remote(uri):
        return Path(uri).is_dir()
    with _explained("look for", uri):
        return _info(uri).type == fs.FileType.Directory


def size(uri: str) -> int:
    """Bytes of a file. Raises MissingFileError."""
    with _explained("look for", uri):
        info = _info(uri)
    if info.type != fs.FileType.File:
        _missing(uri, "read")
    return info.size


def list_names(folder: str) -> list[str]:
    """Names of the files and folders directly below `folder`, sorted; none if it does not exist."""
    with _explained("list", folder):
        infos = _filesystem(folder).get_file_info(
            fs.FileSelector(_path(folder), recursive=False, allow_not_found=True)
        )
    return sorted(info.base_name for info in infos)


def walk(folder: str) -> list[FileEntry]:
    """Every file below `folder`, at any depth, sorted by name. Raises MissingFileError."""
    root = _path(folder)
    with _explained("list", folder):
        infos = _filesystem(folder).get_file_info(fs.FileSelector(root, recursive=True))
    entries = [
        FileEntry(
            uri=join(folder, name := info.path[len(root.rstrip("/")) + 1 :]),
            name=name,
            size=info.size,
            modified_ns=info.mtime_ns or 0,
        )
        for info in infos
        if info.type == fs.FileType.File
    ]
    return sorted(entries, key=lambda entry: entry.name)


def stat(uri: str) -> FileEntry:
    """Size and time of one file. Raises MissingFileError."""
    with _explained("look for", uri):
        info = _info(uri)
    if info.type != fs.FileType.File:
        _missing(uri, "read")
    return FileEntry(uri=uri, name=info.base_name, size=info.size, modified_ns=info.mtime_ns or 0)


def open_input(uri: str) -> pa.NativeFile:
    """Open a file for reading at any position. Raises MissingFileError."""
    with _explained("read", uri):
        return _filesystem(uri).open_input_file(_path(uri))


def read_bytes(uri: str) -> bytes:
    """The whole file."""
    with _explained("read", uri), _filesystem(uri).open_input_file(_path(uri)) as file:
        return file.read()


def read_text(uri: str) -> str:
    """The whole file as UTF-8 text."""
    return read_bytes(uri).decode("utf-8")


def write_bytes(uri: str, content: bytes) -> None:
    """Write a file at once: readers see the old content or the new, never a part."""
    if is_remote(uri):
        with (
            _explained("write", uri),
            _filesystem(uri).open_output_stream(_path(uri), compression=None) as stream,
        ):
            stream.write(content)
        return
    with writing(uri) as path:
        path.write_bytes(content)


def write_text(uri: str, content: str) -> None:
    """Write a UTF-8 text file at once."""
    write_bytes(uri, content.encode("utf-8"))


@contextmanager
def writing(uri: str) -> Iterator[Path]:
    """Hand out a local temporary path; when the block ends well its file becomes `uri`.

    If the block raises, nothing is left at `uri` nor beside it. The data has reached the disk (or
    the object store has acknowledged it) when the block ends.
    """
    if is_remote(uri):
        with tempfile.TemporaryDirectory(prefix="nsa-upload-") as folder:
            path = Path(folder) / "file"
            yield path
            upload_file(path, uri)
        return
    target = Path(uri)
    with _explained("write", uri):
        target.parent.mkdir(parents=True, exist_ok=True)
    path = target.parent / f".{target.name}.{uuid.uuid4().hex[:8]}.part"
    try:
        yield path
        with _explained("write", uri):
            _sync(path)
            path.replace(target)
            _sync(target.parent)
    finally:
        path.unlink(missing_ok=True)


def upload_file(local: str | Path, uri: str) -> None:
    """Copy a local file to `uri`, local or remote; a failed copy leaves nothing there."""
    if not Path(local).is_file():
        _missing(str(local), "read")
    if not is_remote(uri):
        with writing(uri) as path, _explained("write", uri):
            shutil.copyfile(local, path)
        return
    source = Path(local)
    filesystem, path = _filesystem(uri), _path(uri)
    with _explained("write", uri):
        with (
            source.open("rb") as reader,
            filesystem.open_output_stream(path, compression=None) as stream,
        ):
            while chunk := reader.read(COPY_BYTES):
                stream.write(chunk)
        arrived = filesystem.get_file_info(path).size
        if arrived != source.stat().st_size:
            filesystem.delete_file(path)
            raise OSError(f"{arrived} of {source.stat().st_size} bytes arrived")


def download_file(uri: str, local: str | Path) -> None:
    """Copy `uri` to a local path, which appears when it is whole. Raises MissingFileError."""
    with writing(str(local)) as path:
        with _explained("read", uri):
            expected = _info(uri)
            if expected.type != fs.FileType.File:
                raise FileNotFoundError(uri)
            with (
                _filesystem(uri).open_input_stream(_path(uri), compression=None) as stream,
                path.open("wb") as writer,
            ):
                shutil.copyfileobj(stream, writer, COPY_BYTES)
            arrived = path.stat().st_size
            if arrived != expected.size:
                raise OSError(f"{arrived} of {expected.size} bytes arrived")


def upload_tree(local: str | Path, uri: str) -> None:
    """Copy every file below a local folder to `uri`; each appears whole, in no given order."""
    names = [entry.name for entry in walk(str(local))]
    _each(lambda name: upload_file(Path(local) / name, join(uri, name)), names)


def download_tree(uri: str, local: str | Path) -> None:
    """Copy every file below `uri` to a local folder. Raises MissingFileError if there is none."""
    entries = walk(uri)
    if not entries:
        _missing(uri, "read")
    _each(lambda entry: download_file(entry.uri, Path(local) / entry.name), entries)


def delete_tree(uri: str) -> None:
    """Delete a file, or a folder with all below it. Nothing there: nothing happens."""
    # Some stores go on showing a folder for a while after its last object is gone.
    with _explained("delete", uri), suppress(FileNotFoundError):
        filesystem, path = _filesystem(uri), _path(uri)
        kind = filesystem.get_file_info(path).type
        if kind == fs.FileType.Directory:
            filesystem.delete_dir(path)
        elif kind != fs.FileType.NotFound:
            filesystem.delete_file(path)


def fetch(uri: str, cache_dir: str | Path) -> Path:
    """A local path of a file or folder: itself if local, else a copy in `cache_dir`.

    A copy is used again as long as the names, sizes and times of the original are the same.
    Raises MissingFileError.
    """
    if not is_remote(uri):
        if not Path(uri).exists():
            _missing(uri, "read")
        return Path(uri)
    folder = is_folder(uri)
    entries = walk(uri) if folder else [stat(uri)]
    key = repr([_endpoint(), uri, [(e.name, e.size, e.modified_ns) for e in entries]])
    place = Path(cache_dir) / hashlib.sha256(key.encode()).hexdigest()[:24]
    copy = place / uri.rstrip("/").rpartition("/")[2]
    if copy.exists():
        return copy
    if not folder:
        download_file(uri, copy)
        return copy
    place.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=place, prefix=".part-") as temporary:
        download_tree(uri, Path(temporary) / "tree")
        try:
            (Path(temporary) / "tree").rename(copy)
        except OSError:
            # Another process was faster; its copy is as good.
            if not copy.exists():
                raise
    return copy


def _each(action: Callable[[Item], None], items: list[Item]) -> None:
    with ThreadPoolExecutor(PARALLEL_COPIES) as pool:
        for _ in pool.map(action, items):
            pass


def _sync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _filesystem(uri: str) -> fs.FileSystem:
    return _s3(_s3_environment()) if is_remote(uri) else fs.LocalFileSystem()


def _path(uri: str) -> str:
    """What pyarrow calls the path: an absolute local one, or bucket/key."""
    if not is_remote(uri):
        return str(Path(uri).absolute())
    path = uri.removeprefix("s3://").rstrip("/")
    if not path.partition("/")[0]:
        raise StorageError(f"{uri}: names no bucket, must look like s3://bucket/key")
    return path


def _info(uri: str) -> fs.FileInfo:
    return _filesystem(uri).get_file_info(_path(uri))


def _endpoint() -> str:
    return os.environ.get("AWS_ENDPOINT_URL_S3") or os.environ.get("AWS_ENDPOINT_URL") or ""


def _s3_environment() -> tuple[tuple[str, str], ...]:
    """All AWS settings: a connection is shared for as long as none of them changes."""
    return tuple(sorted((k, v) for k, v in os.environ.items() if k.startswith("AWS_")))


@lru_cache(maxsize=4)
def _s3(environment: tuple[tuple[str, str], ...]) -> fs.S3FileSystem:
    settings = dict(environment)
    options: dict[str, str] = {}
    region = settings.get("AWS_REGION") or settings.get("AWS_DEFAULT_REGION")
    endpoint = urlsplit(_endpoint())
    if _endpoint():
        if endpoint.scheme not in ("http", "https") or not endpoint.netloc:
            raise StorageError(f"AWS_ENDPOINT_URL={_endpoint()!r} must look like http://host:port")
        options |= {"scheme": endpoint.scheme, "endpoint_override": endpoint.netloc}
        region = region or "us-east-1"
    if bundle := settings.get("AWS_CA_BUNDLE"):
        options["tls_ca_file_path"] = bundle
    return fs.S3FileSystem(
        region=region,
        connect_timeout=CONNECT_TIMEOUT_S,
        request_timeout=SILENCE_TIMEOUT_S,
        retry_strategy=fs.AwsStandardS3RetryStrategy(max_attempts=ATTEMPTS),
        **options,
    )


@contextmanager
def _explained(verb: str, uri: str) -> Iterator[None]:
    """Turn what pyarrow and the system raise into a StorageError that a person can act on."""
    try:
        yield
    except StorageError:
        raise
    except FileNotFoundError:
        _missing(uri, verb)
    except OSError as error:
        raise StorageError(f"cannot {verb} {_place(uri)}: {_reason(uri, error)}") from error


def _missing(uri: str, verb: str) -> NoReturn:
    if is_remote(uri):
        bucket = _path(uri).partition("/")[0]
        try:
            known = _filesystem(uri).get_file_info(bucket).type != fs.FileType.NotFound
        except OSError:
            # Asking for a bucket takes a right that reading a key does not: then nothing is known.
            known = True
        if not known:
            raise MissingFileError(f"cannot {verb} {_place(uri)}: no bucket {bucket!r} there")
    raise MissingFileError(f"cannot {verb} {_place(uri)}: it does not exist")


def _place(uri: str) -> str:
    return f"{uri} at {_endpoint() or 'AWS'}" if is_remote(uri) else uri


def _reason(uri: str, error: OSError) -> str:
    if not is_remote(uri):
        return os.strerror(error.errno) if error.errno else str(error)
    text = str(error)
    details = text.rpartition("Details: ")[2]
    if re.search(r"NETWORK_CONNECTION|curlCode", text):
        return f"the endpoint does not answer ({details})"
    if re.search(r"NO_SUCH_BUCKET|NoSuchBucket", text):
        return f"no bucket {_path(uri).partition('/')[0]!r} there"
    if re.search(r"ACCESS_DENIED|ACCESS_KEY|SIGNATURE|Signature|CLIENT_ID|CREDENTIALS", text):
        return f"access was refused, check AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY ({details})"
    return text
