"""The RayJob of a run: k8s/rayjob.yaml, filled in.

The run's YAML travels inside as an annotation, which the head sees as the file /etc/nsa/run.yaml.
"""

import json
import re
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import yaml

from nsa_platform.config.base import ConfigError, Strict
from nsa_platform.config.generate import GenerateRun
from nsa_platform.config.locations import SQLITE, is_local, locations
from nsa_platform.config.runs import EvaluateRun, PrepareDataRun, PretrainRun, SftRun

ROOT = Path(__file__).resolve().parents[1]
TEMPLATE = ROOT / "k8s" / "rayjob.yaml"
JOBS: dict[str, type[Strict]] = {
    "prepare_data": PrepareDataRun,
    "pretrain": PretrainRun,
    "sft": SftRun,
    "evaluate": EvaluateRun,
    "generate": GenerateRun,
}
RUN_FILE = "/etc/nsa/run.yaml"
RUN_ANNOTATION = "nsa-platform/run.yaml"
# KubeRay appends to a RayJob's name to make those of the cluster, its pods and services.
MAX_NAME = 47


def relative_places(run: Strict) -> dict[str, tuple[str, ...]]:
    """Every place of the run, by dotted key, that only the folder of this process can tell."""
    return {key: places for key, places in locations(run).items() if any(map(_is_relative, places))}


def refuse_relative(run: Strict, *, source: str, cluster: str) -> None:
    """Raise ConfigError if the run names places that another machine cannot see."""
    relative = relative_places(run)
    if relative:
        listed = ", ".join(f"{key}={' '.join(places)}" for key, places in relative.items())
        raise ConfigError(
            f"{source}: {cluster} cannot see places relative to this folder: {listed}; give "
            "addresses (s3://, http://) or absolute paths of a file system that all nodes share"
        )


def object_name(run_name: str) -> str:
    """A run's name as Kubernetes allows it.

    Raises:
        ConfigError: it is longer than KubeRay takes.
    """
    name = re.sub(r"[^a-z0-9]+", "-", run_name.lower()).strip("-")
    if len(name) > MAX_NAME:
        raise ConfigError(
            f"name={run_name!r} has {len(name)} characters, a RayJob's at most {MAX_NAME}"
        )
    return name


def render_job(
    job: str,
    config: str | Path,
    overrides: Sequence[str] = (),
    *,
    namespace: str | None = None,
    image: str | None = None,
) -> tuple[dict[str, Any], Strict]:
    """The RayJob of a run, and the run.

    Args:
        image: for every pod of the job; default: the template's for its kind of workers.

    Raises:
        ConfigError: the configuration is wrong or names places that pods cannot see.
    """
    run = JOBS[job].load(config, overrides)
    refuse_relative(run, source=str(config), cluster="a Kubernetes cluster")
    # By way of JSON, so that nothing that was one anchor in the template stays one object.
    tree: dict[str, Any] = json.loads(json.dumps(yaml.safe_load(TEMPLATE.read_text())))
    name = object_name(run.model_dump()["name"])
    metadata, spec = tree["metadata"], tree["spec"]
    metadata["name"] = name
    if namespace is not None:
        metadata["namespace"] = namespace
    labels = {"nsa-platform/job": job.replace("_", "-"), "nsa-platform/run": name}
    metadata["labels"] |= labels
    spec["entrypoint"] = f"python -m jobs.{job} --config {RUN_FILE}"
    cluster = spec["rayClusterSpec"]
    worker = _worker_group(run, cluster["workerGroupSpecs"])
    cluster["workerGroupSpecs"] = [worker]
    text = yaml.safe_dump(
        run.model_dump(mode="json", exclude_unset=True), sort_keys=False, allow_unicode=True
    )
    head = cluster["headGroupSpec"]["template"]
    head["metadata"]["annotations"] = {RUN_ANNOTATION: text}
    for template in (head, worker["template"], spec["submitterPodTemplate"]):
        template["metadata"]["labels"] |= labels
    image = image or worker["template"]["spec"]["containers"][0]["image"]
    for container in _containers(spec):
        container["image"] = image
    return tree, run


def _worker_group(run: Strict, groups: list[dict[str, Any]]) -> dict[str, Any]:
    """The template's group of CPU or GPU workers, as many and as wide as the run asks for."""
    shape = run.cluster if isinstance(run, PretrainRun | SftRun | GenerateRun) else None
    use_gpu = shape.use_gpu if shape else isinstance(run, EvaluateRun) and run.use_gpu
    wanted = "gpu" if use_gpu else "cpu"
    group = next(each for each in groups if each["groupName"] == wanted)
    if shape:
        for key in ("replicas", "minReplicas", "maxReplicas"):
            group[key] = shape.num_workers
        resources = group["template"]["spec"]["containers"][0]["resources"]
        for kind in ("requests", "limits"):
            resources[kind] = {**resources[kind], "cpu": str(shape.cpus_per_worker)}
    return group


def _containers(spec: dict[str, Any]) -> Iterator[dict[str, Any]]:
    cluster = spec["rayClusterSpec"]
    yield from spec["submitterPodTemplate"]["spec"]["containers"]
    for group in (cluster["headGroupSpec"], *cluster["workerGroupSpecs"]):
        yield from group["template"]["spec"]["containers"]


def _is_relative(place: str) -> bool:
    return is_local(place) and not Path(place.removeprefix(SQLITE)).is_absolute()
