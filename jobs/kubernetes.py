"""Kubernetes objects rendered from the YAML files of jobs and deployments.

    python -m jobs.kubernetes render            rewrites what overlays hold of them; `make k8s`
    python -m jobs.kubernetes render --check    changes nothing, names what would change

A run becomes one RayJob: k8s/rayjob.yaml with the run's YAML as an annotation, which its head sees
as the file /etc/nsa/run.yaml. A Ray Serve config becomes a RayService's serveConfigV2. Each
k8s/overlays/<name>/runs.yaml says which, and which places its cluster gives them.

Exit status: 0 done (or nothing to do, with --check); 1 something would change; 2 a file is wrong.
"""

import argparse
import json
import re
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import yaml

from jobs.cli import EXIT_BAD_CONFIG, fail
from nsa_platform.config.base import ConfigError, Strict, read_yaml
from nsa_platform.config.generate import GenerateRun
from nsa_platform.config.locations import SQLITE, is_local, locations
from nsa_platform.config.runs import EvaluateRun, PrepareDataRun, PretrainRun, SftRun

ROOT = Path(__file__).resolve().parents[1]
OVERLAYS = ROOT / "k8s" / "overlays"
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
WRITTEN_BY = "# Written by `make k8s`: change {source} instead.\n"


class JobSource(Strict):
    """A job of an overlay."""

    job: str
    """Which entry point: prepare_data, pretrain, sft or evaluate."""
    config: str
    """The run's YAML, seen from the repository's root."""
    set: tuple[str, ...] = ()
    """Overrides a.b=value, as on the command line: the places that this cluster has."""


class ServeSource(Strict):
    """What an overlay serves."""

    config: str
    """A Ray Serve config, seen from the repository's root."""
    set: tuple[str, ...] = ()
    """Overrides a.0.b=value; a number is a place in a list."""


class OverlayRuns(Strict):
    """What is rendered into an overlay."""

    serve: ServeSource
    jobs: dict[str, JobSource]
    """By the name of the file that each becomes."""


class _Dumper(yaml.SafeDumper):
    """Plain YAML: no anchors, and text of several lines as a block."""

    def ignore_aliases(self, data: Any) -> bool:
        return True


def _text(dumper: yaml.SafeDumper, value: str) -> yaml.ScalarNode:
    style = "|" if "\n" in value else None
    return dumper.represent_scalar("tag:yaml.org,2002:str", value, style=style)


_Dumper.add_representer(str, _text)


def to_yaml(tree: dict[str, Any]) -> str:
    """The object as YAML, keys in the order in which they stand."""
    return yaml.dump(tree, Dumper=_Dumper, sort_keys=False, allow_unicode=True, width=100)


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


def render_service(source: ServeSource) -> dict[str, Any]:
    """The patch that tells a RayService what to serve.

    Raises:
        ConfigError: the file is missing or not a Ray Serve config, or an override does not fit.
    """
    tree = read_yaml(ROOT / source.config)
    if not isinstance(tree.get("applications"), list):
        raise ConfigError(f"{source.config}: applications: is required, a list")
    for override in source.set:
        _replace(tree, override, source.config)
    # The service's pods are those of replicas: each needs a proxy, one that others can reach.
    tree["proxy_location"] = "EveryNode"
    tree["http_options"] = {**tree.get("http_options", {}), "host": "0.0.0.0", "port": 8000}
    return {
        "apiVersion": "ray.io/v1",
        "kind": "RayService",
        "metadata": {"name": "llm"},
        "spec": {"serveConfigV2": to_yaml(tree)},
    }


def rendered_files(overlay: Path) -> Iterator[tuple[Path, str]]:
    """Every file of an overlay that is rendered, with what it should hold."""
    runs = OverlayRuns.load(overlay / "runs.yaml")
    yield overlay / "serve.yaml", _written(runs.serve.config, render_service(runs.serve))
    for name, each in runs.jobs.items():
        if each.job not in JOBS:
            raise ConfigError(f"jobs.{name}.job={each.job!r} must be one of {', '.join(JOBS)}")
        tree, _ = render_job(each.job, ROOT / each.config, each.set)
        yield overlay / "jobs" / f"{name}.yaml", _written(each.config, tree)


def main(argv: Sequence[str] | None = None) -> int:
    """Render every overlay, or say what rendering would change."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("command", choices=["render"])
    parser.add_argument("--check", action="store_true", help="write nothing")
    options = parser.parse_args(argv)
    try:
        files = [
            pair
            for runs in sorted(OVERLAYS.glob("*/runs.yaml"))
            for pair in rendered_files(runs.parent)
        ]
    except ConfigError as error:
        fail(str(error), status=EXIT_BAD_CONFIG)
    stale = [(path, text) for path, text in files if not _holds(path, text)]
    for path, text in stale:
        print(f"{'stale' if options.check else 'written'}: {path.relative_to(OVERLAYS)}")
        if not options.check:
            path.parent.mkdir(exist_ok=True)
            path.write_text(text, encoding="utf-8")
    return 1 if options.check and stale else 0


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


def _replace(tree: Any, override: str, source: str) -> None:
    """Set one value of a tree of mappings and lists; its parents must be there."""
    key, equals, text = override.partition("=")
    if not equals:
        raise ConfigError(f"{source}: set: {override}: must look like a.0.b=value")
    *parents, last = [int(part) if part.isdigit() else part for part in key.split(".")]
    node = tree
    for parent in [*parents, last][:-1]:
        try:
            node = node[parent]
        except (KeyError, IndexError, TypeError):
            raise ConfigError(f"{source}: set: {override}: there is no {parent!r}") from None
    node[last] = yaml.safe_load(text)


def _written(source: str, tree: dict[str, Any]) -> str:
    return WRITTEN_BY.format(source=f"{source} or runs.yaml") + to_yaml(tree)


def _holds(path: Path, text: str) -> bool:
    return path.exists() and path.read_text(encoding="utf-8") == text


def _is_relative(place: str) -> bool:
    return is_local(place) and not Path(place.removeprefix(SQLITE)).is_absolute()


if __name__ == "__main__":
    raise SystemExit(main())
