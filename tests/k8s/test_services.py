"""What the containers of services run, run here: the S3 server, its bucket, MLflow's arguments."""

import contextlib
import os
import subprocess
import sys
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import boto3
import pytest
import yaml
from botocore.exceptions import ClientError

from jobs.ports import free_ports
from tests.k8s.manifests import ROOT
from tests.waiting import eventually

KEYS = {"AWS_ACCESS_KEY_ID": "the-key", "AWS_SECRET_ACCESS_KEY": "the-secret"}


def container(path: str, kind: str, *, part: str = "containers") -> dict[str, Any]:
    trees = yaml.safe_load_all((ROOT / "k8s" / path).read_text())
    (tree,) = [each for each in trees if each["kind"] == kind]
    return tree["spec"]["template"]["spec"][part][0]


@pytest.fixture(scope="module")
def storage(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """The storage container's command on loopback and free ports; where its probe answered."""
    folder = tmp_path_factory.mktemp("storage")
    spec = container("components/storage/storage.yaml", "StatefulSet")
    s3, master, volume, filer = free_ports(4)
    arguments = [
        *(arg.replace("/data", str(folder)) for arg in spec["args"]),
        *(f"-master.port={master}", f"-volume.port={volume}", f"-filer.port={filer}"),
        *(f"-s3.port={s3}", "-s3.ip.bind=127.0.0.1"),
    ]
    program = Path(sys.executable).parent / spec["command"][0]
    assert {each["name"] for each in spec["env"]} == set(KEYS)
    probe = spec["readinessProbe"]["httpGet"]["path"]
    with (folder / "log").open("wb") as log:
        process = subprocess.Popen(
            [program, *arguments], env={**os.environ, **KEYS}, stdout=log, stderr=log, cwd=folder
        )
        try:
            address = f"http://127.0.0.1:{s3}"

            def answers() -> bool:
                assert process.poll() is None, (folder / "log").read_text()
                with contextlib.suppress(OSError), urllib.request.urlopen(f"{address}{probe}"):
                    return True
                return False

            eventually(answers, "the storage is ready", every_s=0.2)
            yield address
        finally:
            process.terminate()
            try:
                process.wait(3)
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()


@pytest.mark.cluster
def test_the_bucket_is_made_once_and_only_with_the_secret(storage: str) -> None:
    spec = container("base/mlflow.yaml", "Deployment", part="initContainers")
    command = [sys.executable, *spec["command"][1:], *spec["args"]]
    environment = {**os.environ, "AWS_ENDPOINT_URL": storage, "AWS_DEFAULT_REGION": "us-east-1"}
    for _ in range(2):
        subprocess.run(command, env={**environment, **KEYS}, check=True)
    client = boto3.client(
        "s3",
        endpoint_url=storage,
        region_name="us-east-1",
        aws_access_key_id=KEYS["AWS_ACCESS_KEY_ID"],
        aws_secret_access_key=KEYS["AWS_SECRET_ACCESS_KEY"],
    )
    assert [bucket["Name"] for bucket in client.list_buckets()["Buckets"]] == ["nsa"]
    stranger = boto3.client(
        "s3",
        endpoint_url=storage,
        region_name="us-east-1",
        aws_access_key_id=KEYS["AWS_ACCESS_KEY_ID"],
        aws_secret_access_key="another",
    )
    with pytest.raises(ClientError, match="SignatureDoesNotMatch"):
        stranger.list_buckets()


def test_mlflow_takes_its_arguments_and_its_clients_host() -> None:
    """By MLflow's own command line, in a process of its own; nothing is started."""
    spec = container("base/mlflow.yaml", "Deployment")
    environment = yaml.safe_load((ROOT / "k8s/base/environment.yaml").read_text())["data"]
    host = environment["MLFLOW_TRACKING_URI"].removeprefix("http://")
    program = (
        "import sys; from mlflow.cli import cli\n"
        "from mlflow.server.security_utils import is_allowed_host_header\n"
        "given = cli.commands['server'].make_context('server', sys.argv[2:]).params\n"
        "hosts = given['allowed_hosts'].split(',')\n"
        "assert is_allowed_host_header(hosts, sys.argv[1]), sys.argv[1]\n"
        "assert is_allowed_host_header(hosts, 'localhost:5000')\n"
        "assert not is_allowed_host_header(hosts, 'elsewhere.example')\n"
        "from sqlalchemy.engine import make_url\n"
        "url = make_url(given['backend_store_uri']); url.get_dialect().import_dbapi()\n"
        "assert url.password is None\n"
    )
    assert spec["command"] == ["mlflow", "server"]
    done = subprocess.run(
        [sys.executable, "-c", program, host, *spec["args"]],
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
