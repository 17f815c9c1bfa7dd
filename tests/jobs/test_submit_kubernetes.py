"""`jobs.submit --k8s`: what is printed, what is refused, and kubectl's talk with an API server."""

import json
import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import yaml

from jobs import submit_kubernetes
from jobs.rayjob import ROOT, render_job
from jobs.submit import main
from nsa_platform.config.runs import PretrainRun
from tests.k8s.api_server import Cluster, serving
from tests.k8s.manifests import Tree, kuberay_schemas, problems
from tests.k8s.needs import find_kubectl

CONFIG = "jobs/configs/pretrain/smoke.yaml"
PLACES = ["data.path=s3://b/data", "storage=s3://b/runs", "tracking.uri=http://mlflow:5000"]
RUN = ["pretrain", "--config", CONFIG, "--k8s", *(w for p in PLACES for w in ("--set", p))]


def running(job_id: str = "smoke-a") -> dict[str, str]:
    return {"jobDeploymentStatus": "Running", "jobStatus": "RUNNING", "jobId": job_id}


WAITING = {"jobDeploymentStatus": "Initializing"}
DONE = {**running(), "jobDeploymentStatus": "Complete", "jobStatus": "SUCCEEDED"}
FAILED = {
    **running(),
    "jobDeploymentStatus": "Failed",
    "jobStatus": "FAILED",
    "reason": "AppFailed",
    "message": "Job entrypoint command failed with exit code 1",
}


@pytest.fixture(autouse=True)
def at_root(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.chdir(ROOT)
    monkeypatch.setattr(submit_kubernetes, "POLL_S", 0.05)
    # kubectl's caches and a kubeconfig of the person who runs the tests stay out of this.
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.delenv("KUBECONFIG", raising=False)
    monkeypatch.delenv("KUBERNETES_SERVICE_HOST", raising=False)


@pytest.fixture(scope="module")
def judge() -> Callable[[Tree], list[str]] | None:
    """What an API server with KubeRay's CRDs says of an object; None: they are not at hand."""
    folder = os.environ.get("KUBERAY_CRDS")
    if not folder:
        return None
    schemas = kuberay_schemas(ROOT / folder)
    return lambda tree: problems(tree, schemas)


@pytest.fixture
def cluster(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, judge: Callable[[Tree], list[str]] | None
) -> Iterator[Cluster]:
    """A cluster in which a job waits, runs and succeeds; it takes what KubeRay's CRDs allow."""
    find_kubectl()
    with serving(Cluster([WAITING, running(), DONE], judge=judge)) as played:
        monkeypatch.setenv("KUBECONFIG", str(played.kubeconfig(tmp_path / "kubeconfig")))
        yield played


def test_dry_run_prints_the_object_and_nothing_else(capsys: pytest.CaptureFixture[str]) -> None:
    assert main([*RUN, "--dry-run", "--namespace", "mine", "--image", "r.example/nsa:7"]) == 0
    printed = capsys.readouterr().out
    expected, _ = render_job("pretrain", CONFIG, PLACES, namespace="mine", image="r.example/nsa:7")
    assert yaml.safe_load(printed) == expected
    assert expected["metadata"]["namespace"] == "mine"
    assert "--namespace mine --image r.example/nsa:7 | kubectl create --filename -" in printed


def test_the_printed_line_does_the_same(cluster: Cluster) -> None:
    """As a person would paste it, through a real shell."""
    dry = [sys.executable, "-m", "jobs.submit", *RUN, "--dry-run"]
    comment = subprocess.run(dry, capture_output=True, text=True, check=True).stdout.split("\n")[0]
    line = comment.removeprefix("# The same by hand: ").replace("python ", f"{sys.executable} ", 1)
    done = subprocess.run(line, shell=True, capture_output=True, text=True, check=False)
    assert "rayjob.ray.io/smoke created" in done.stdout, done.stderr
    expected, _ = render_job("pretrain", CONFIG, PLACES, namespace="nsa")
    assert cluster.taken == [expected]


def test_a_job_is_created_followed_and_succeeds(
    cluster: Cluster, capfd: pytest.CaptureFixture[str]
) -> None:
    assert main(RUN) == 0
    expected, _ = render_job("pretrain", CONFIG, PLACES, namespace="nsa")
    assert cluster.taken == [expected]
    said = capfd.readouterr().out
    assert said.count("step 10/10") == 1
    assert "Job smoke: Complete SUCCEEDED" in said
    assert "kubectl --namespace nsa delete rayjob smoke" in said


def test_a_failed_job_fails_here_with_its_reason(
    cluster: Cluster, capfd: pytest.CaptureFixture[str]
) -> None:
    cluster.states = [running(), FAILED]
    assert main(RUN) == 1
    assert "error: AppFailed: Job entrypoint command failed" in capfd.readouterr().err


def test_a_job_that_ends_before_anyone_looks_still_shows_its_log(
    cluster: Cluster, capfd: pytest.CaptureFixture[str]
) -> None:
    cluster.states = [DONE]
    assert main(RUN) == 0
    assert capfd.readouterr().out.count("step 10/10") == 1


def test_every_attempt_is_shown(cluster: Cluster, capfd: pytest.CaptureFixture[str]) -> None:
    retrying = {"jobDeploymentStatus": "Retrying", "jobStatus": "FAILED", "jobId": "smoke-a"}
    again = {**DONE, "jobId": "smoke-b"}
    cluster.states = [running(), retrying, WAITING, running("smoke-b"), again]
    assert main(RUN) == 0
    assert capfd.readouterr().out.count("step 10/10") == 2


def test_no_wait_leaves_the_job_alone(cluster: Cluster, capfd: pytest.CaptureFixture[str]) -> None:
    cluster.states = [FAILED]
    assert main([*RUN, "--no-wait"]) == 0
    assert len(cluster.taken) == 1
    assert "kubectl --namespace nsa logs --follow job/smoke" in capfd.readouterr().out


def test_the_same_name_is_refused_with_the_way_on(
    cluster: Cluster, capfd: pytest.CaptureFixture[str]
) -> None:
    assert main([*RUN, "--no-wait"]) == 0
    with pytest.raises(SystemExit) as caught:
        main(RUN)
    assert caught.value.code == 1
    said = capfd.readouterr().err
    assert "already exists" in said
    assert "after `kubectl --namespace nsa delete rayjob smoke` the same command goes on" in said


def test_a_refusal_of_the_cluster_is_told(
    cluster: Cluster, capfd: pytest.CaptureFixture[str]
) -> None:
    cluster.judge = lambda tree: ["quota of nvidia.com/gpu exceeded"]
    with pytest.raises(SystemExit) as caught:
        main(RUN)
    assert caught.value.code == 1
    assert "quota of nvidia.com/gpu exceeded" in capfd.readouterr().err
    assert cluster.taken == []


def test_a_deleted_job_is_not_waited_for(
    cluster: Cluster, capfd: pytest.CaptureFixture[str]
) -> None:
    cluster.states = [WAITING]
    kubectl = submit_kubernetes.Kubectl("nsa")
    with pytest.raises(SystemExit) as caught:
        submit_kubernetes.follow(kubectl, "smoke")
    assert caught.value.code == 1
    assert "RayJob smoke has been deleted" in capfd.readouterr().err


def test_an_unreachable_cluster_is_said_in_a_line(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    find_kubectl()
    with serving(Cluster([DONE])) as gone:
        monkeypatch.setenv("KUBECONFIG", str(gone.kubeconfig(tmp_path / "kubeconfig")))
    with pytest.raises(SystemExit) as caught:
        main(RUN)
    assert caught.value.code == 1
    assert "the cluster did not take RayJob smoke" in capfd.readouterr().err


def test_without_a_kubeconfig_nothing_happens(capfd: pytest.CaptureFixture[str]) -> None:
    find_kubectl()
    with pytest.raises(SystemExit) as caught:
        main(RUN)
    assert caught.value.code == 2
    said = capfd.readouterr().err
    assert "set KUBECONFIG" in said and "nothing was submitted" in said


def test_without_kubectl_nothing_happens(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(SystemExit) as caught:
        main(RUN)
    assert caught.value.code == 2
    assert "kubectl is not on PATH; nothing was submitted" in capfd.readouterr().err


@pytest.mark.parametrize(
    ("words", "complaint"),
    [
        (["--address", "http://h:8265"], "--k8s makes one for the job"),
        (["--set", "train.stpes=3"], "did you mean 'steps'"),
        (["--set", "storage=runs"], "storage=runs"),
    ],
)
def test_bad_input_is_refused(
    words: list[str], complaint: str, capfd: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as caught:
        main([*RUN, *words])
    assert caught.value.code == 2
    assert complaint in capfd.readouterr().err


def test_flags_of_kubernetes_need_it(capfd: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as caught:
        main(["pretrain", "--config", CONFIG, "--image", "x"])
    assert caught.value.code == 2
    assert "go with --k8s" in capfd.readouterr().err


def test_the_annotation_stays_below_what_kubernetes_allows() -> None:
    """256 KiB for all annotations of an object; the largest of our runs is far from it."""
    for path in sorted((ROOT / "jobs/configs/pretrain").glob("*.yaml")):
        run = PretrainRun.load(path)
        stages = [stage.model_dump(mode="json") for stage in run.stages]
        for stage in stages:
            if stage["data"] is not None:
                stage["data"]["path"] = "s3://b/data"
        places = [*PLACES, f"stages={json.dumps(stages)}"]
        if run.checkpoint is not None:
            places.append("checkpoint=s3://b/model")
        tree, _ = render_job("pretrain", path, places)
        head = tree["spec"]["rayClusterSpec"]["headGroupSpec"]["template"]["metadata"]
        assert len(json.dumps(head["annotations"])) < 64 * 1024
