"""Fixtures that several rooms share: a real S3 server, and small data made by the real code."""

import contextlib
import json
import os
import shutil
import signal
import subprocess
import sys
import sysconfig
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
from hypothesis import HealthCheck, settings
from pyarrow import fs

from jobs import ports
from jobs.ports import free_ports
from nsa_platform.config.data import CorpusConfig, TokenizerConfig
from nsa_platform.config.runs import PrepareDataRun
from nsa_platform.data.preparation import prepare_here
from tests.kernels.interpreted import import_kernels
from tests.waiting import eventually

# Files without a cluster that take half a minute and more.
SLOW = ("test_compile_ahead", "test_loop", "test_mesh", "test_paged", "test_parallel", "test_ops")

# Every worker draws ports from a part of its own: what one has drawn and not bound yet, another
# would draw too. The port behind that part is its dashboard's (jobs/conftest.py).
if worker := os.environ.get("PYTEST_XDIST_WORKER"):
    ports.FIRST += 300 * (int(worker.removeprefix("gw")) % 9)
    ports.LAST = ports.FIRST + 298
# A busy machine is no failure.
settings.register_profile("patient", deadline=None, suppress_health_check=[HealthCheck.too_slow])
settings.load_profile("patient")
# At import: the conftest.py files and tests below import the kernels before any hook runs.
import_kernels()
# Started in the background a shell has the tests ignore Ctrl-C, and they hand that down to the
# programs whose answer to Ctrl-C they test.
signal.signal(signal.SIGINT, signal.default_int_handler)


def pytest_configure(config: pytest.Config) -> None:
    """Tests turn warnings into errors, but for this one of MLflow's (tracking/library.py)."""
    ignored = "ignore:The ``noload`` loader strategy is deprecated"
    config.addinivalue_line("filterwarnings", ignored)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Slow files come first, lest a worker ends with one alone: with a cluster, and SLOW ones."""
    slow = {item.path for item in items if item.get_closest_marker("cluster")}
    slow |= {item.path for item in items if item.path.stem in SLOW}
    items.sort(key=lambda item: item.path not in slow)


@pytest.fixture(autouse=True)
def gpu_memory_is_given_back(request: pytest.FixtureRequest) -> Iterator[None]:
    """Several processes share a GPU: what one test has had is free for the tests of others."""
    yield
    if request.node.get_closest_marker("gpu"):
        torch.cuda.empty_cache()


@dataclass
class S3Server:
    """An S3 server with one keyed identity, which can be killed and started again."""

    port: int
    access_key: str
    secret_key: str
    command: list[str]
    folder: Path
    writer_key: str = "writer"
    """May read, write and list, but not make buckets; the secret is the same."""
    process: subprocess.Popen[bytes] | None = None

    @property
    def _log(self) -> Path:
        return self.folder / "weed.log"

    @property
    def endpoint(self) -> str:
        return f"http://127.0.0.1:{self.port}"

    def start(self) -> None:
        """Return when it answers."""
        with self._log.open("ab") as output:
            self.process = subprocess.Popen(
                self.command, stdout=output, stderr=output, cwd=self.folder
            )
        eventually(self._answers, "the S3 server answers", every_s=0.3)

    def _answers(self) -> bool:
        assert self.process is not None and self.process.poll() is None, self._log.read_text()
        with contextlib.suppress(OSError):
            self.bucket("ready")
            return True
        return False

    def kill(self) -> None:
        """kill -9."""
        assert self.process is not None
        self.process.kill()
        self.process.wait()

    @property
    def environment(self) -> dict[str, str]:
        """What a process needs in its environment to use this server."""
        return {
            "AWS_ENDPOINT_URL": self.endpoint,
            "AWS_ACCESS_KEY_ID": self.access_key,
            "AWS_SECRET_ACCESS_KEY": self.secret_key,
            "AWS_REGION": "us-east-1",
        }

    def bucket(self, name: str) -> str:
        """Create a bucket if it is not there; return its s3:// address."""
        filesystem = fs.S3FileSystem(
            access_key=self.access_key,
            secret_key=self.secret_key,
            endpoint_override=self.endpoint.removeprefix("http://"),
            scheme="http",
            region="us-east-1",
            allow_bucket_creation=True,
        )
        filesystem.create_dir(name)
        return f"s3://{name}"


def _identity(name: str, access_key: str, secret_key: str, *more: str) -> dict[str, object]:
    return {
        "name": name,
        "credentials": [{"accessKey": access_key, "secretKey": secret_key}],
        "actions": ["Read", "Write", "List", "Tagging", *more],
    }


@pytest.fixture(scope="session")
def s3_server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[S3Server]:
    """A real SeaweedFS server on loopback that checks signatures; stopped at the end."""
    folder = tmp_path_factory.mktemp("weed")
    s3, master, volume, filer = free_ports(4)
    command = [
        *(str(Path(sys.executable).parent / "weed"), "server", f"-dir={folder}", "-s3"),
        *("-ip=127.0.0.1", "-ip.bind=127.0.0.1", "-filer=true", f"-s3.config={folder}/s3.json"),
        *(f"-s3.port={s3}", f"-master.port={master}", f"-volume.port={volume}"),
        *(f"-filer.port={filer}", "-master.volumeSizeLimitMB=64", "-volume.max=300"),
        *("-master.volumePreallocate=false", "-master.telemetry=false"),
        # Services that would take a fixed port, so that two servers could not run side by side.
        *("-s3.port.iceberg=0", "-s3.port.lance=0"),
    ]
    server = S3Server(s3, "testing", "testingsecret", command, folder)
    identities = [
        _identity("tests", server.access_key, server.secret_key, "Admin"),
        _identity("writer", server.writer_key, server.secret_key),
    ]
    (folder / "s3.json").write_text(json.dumps({"identities": identities}))
    try:
        server.start()
        yield server
    finally:
        if server.process is not None:
            server.process.terminate()
            try:
                server.process.wait(3)
            except subprocess.TimeoutExpired:
                server.kill()


@pytest.fixture
def s3_environment(s3_server: S3Server, monkeypatch: pytest.MonkeyPatch) -> S3Server:
    """The S3 server, with this process's environment pointing at it."""
    for name, value in s3_server.environment.items():
        monkeypatch.setenv(name, value)
    return s3_server


@dataclass(frozen=True)
class DataFolder:
    """What prepare_data makes of a small corpus."""

    path: Path
    """Holds tokenizer/, train/ and validation/."""
    tokenizer: Path
    inputs: Path
    """The raw files."""


@pytest.fixture(scope="session")
def tiny_corpus(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder of 40 small sources of the standard library, about 0.8 MB."""
    folder = tmp_path_factory.mktemp("corpus")
    sources = sorted(Path(sysconfig.get_path("stdlib")).glob("*.py"))
    for source in [path for path in sources if 2_000 < path.stat().st_size < 60_000][:40]:
        shutil.copyfile(source, folder / source.name)
    return folder


@pytest.fixture(scope="session")
def tiny_shards(tiny_corpus: Path, tmp_path_factory: pytest.TempPathFactory) -> DataFolder:
    """Text shards of tiny_corpus with a tokenizer of 512 tokens trained on it."""
    path = tmp_path_factory.mktemp("shards") / "text"
    run = PrepareDataRun(
        name="tiny-text",
        corpus=CorpusConfig(inputs=(str(tiny_corpus),)),
        tokenizer=TokenizerConfig(train_vocab_size=512),
        output=str(path),
        shard_tokens=50_000,
        validation_fraction=0.1,
    )
    prepare_here(run)
    return DataFolder(path, path / "tokenizer", tiny_corpus)


@pytest.fixture(scope="session")
def tiny_chat_shards(
    tiny_shards: DataFolder, tmp_path_factory: pytest.TempPathFactory
) -> DataFolder:
    """Chat shards of 200 short chats, with the tokenizer of tiny_shards."""
    folder = tmp_path_factory.mktemp("chats")
    inputs = folder / "chats.jsonl"
    with inputs.open("w") as file:
        for number in range(200):
            question = {"role": "user", "content": f"What is {number} plus {number}?"}
            answer = {"role": "assistant", "content": f"It is {2 * number}."}
            messages = [question, answer]
            if number % 4 == 0:
                messages.insert(0, {"role": "system", "content": "Add numbers."})
                messages += [{"role": "user", "content": "Sure?"}, answer]
            file.write(json.dumps({"messages": messages}) + "\n")
    run = PrepareDataRun(
        name="tiny-chat",
        corpus=CorpusConfig(inputs=(str(inputs),), kind="chat"),
        tokenizer=TokenizerConfig(path=str(tiny_shards.tokenizer)),
        output=str(folder / "shards"),
        shard_tokens=2_000,
        validation_fraction=0.1,
    )
    prepare_here(run)
    return DataFolder(folder / "shards", folder / "shards" / "tokenizer", inputs)
