"""The image: its Dockerfile read as Docker reads it, against what the manifests expect of it."""

import json
import re
import shlex
import shutil
import tomllib
from typing import Any

import pytest
import yaml
from dockerfile_parse import DockerfileParser

from jobs.kubernetes import OVERLAYS, OverlayRuns
from tests.k8s.manifests import ROOT

DOCKERFILE = ROOT / "k8s" / "Dockerfile"
TEMPLATE = ROOT / "k8s" / "rayjob.yaml"


@pytest.fixture(scope="module")
def parsed(tmp_path_factory: pytest.TempPathFactory) -> DockerfileParser:
    # The parser opens its file for writing, so it gets a copy.
    copy = tmp_path_factory.mktemp("image") / "Dockerfile"
    shutil.copyfile(DOCKERFILE, copy)
    return DockerfileParser(str(copy))


@pytest.fixture(scope="module")
def stages(parsed: DockerfileParser) -> dict[str, list[dict[str, Any]]]:
    """Instructions by stage."""
    found: dict[str, list[dict[str, Any]]] = {}
    name = ""
    for each in parsed.structure:
        if each["instruction"] == "FROM":
            name = each["value"].split()[-1]
            found[name] = []
        if name and each["instruction"] != "COMMENT":
            found[name].append(dict(each))
    return found


def values(stage: list[dict[str, Any]], instruction: str) -> list[str]:
    return [each["value"] for each in stage if each["instruction"] == instruction]


def test_both_targets_run_as_the_uid_of_the_manifests(
    stages: dict[str, list[dict[str, Any]]],
) -> None:
    assert list(stages) == ["build", "runtime", "gpu", "cpu"]
    template = yaml.safe_load(TEMPLATE.read_text())
    security = template["spec"]["submitterPodTemplate"]["spec"]["securityContext"]
    expected = f"{security['runAsUser']}:{security['runAsGroup']}"
    for target in ("cpu", "gpu"):
        assert values(stages[target], "FROM") == [f"runtime AS {target}"]
        # The last word on the user, and a number, so that runAsNonRoot can be checked.
        assert stages[target][-1]["instruction"] == "USER"
        assert values(stages[target], "USER") == [expected]
    assert "--uid 1000" in " ".join(values(stages["runtime"], "RUN"))


def test_the_base_is_pinned_and_the_python_is_ours(parsed: DockerfileParser) -> None:
    (image,) = [
        each["value"].partition("=")[2]
        for each in parsed.structure
        if each["instruction"] == "ARG" and each["value"].startswith("PYTHON_IMAGE")
    ]
    version = re.fullmatch(r"python:(\d+)\.(\d+)\.\d+-slim-bookworm", image)
    assert version
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    least = re.fullmatch(r">=(\d+)\.(\d+)", project["requires-python"])
    assert least
    assert (int(version[1]), int(version[2])) >= (int(least[1]), int(least[2]))


def test_everything_is_installed_by_the_pins(stages: dict[str, list[dict[str, Any]]]) -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    installs = [run for run in values(stages["build"], "RUN") if "pip install" in run]
    assert len(installs) == 2
    for run in installs:
        assert "--constraint constraints.txt" in run
    extras = re.search(r'"\.\[([a-z,]+)\]"', installs[1])
    assert extras and set(extras[1].split(",")) <= set(project["optional-dependencies"])
    assert "pip check" in installs[1]


def test_what_is_written_lies_on_volumes(stages: dict[str, list[dict[str, Any]]]) -> None:
    (volumes,) = values(stages["runtime"], "VOLUME")
    mounted = set(json.loads(volumes))
    template = yaml.safe_load(TEMPLATE.read_text())
    head = template["spec"]["rayClusterSpec"]["headGroupSpec"]["template"]["spec"]
    mounts = {mount["mountPath"] for mount in head["containers"][0]["volumeMounts"]}
    assert mounted == {"/tmp", "/home/nsa"} <= mounts
    environment = dict(
        pair.split("=", 1)
        for value in values(stages["runtime"], "ENV")
        for pair in shlex.split(value)
    )
    for name in ("HOME", "XDG_CACHE_HOME", "TMPDIR"):
        assert any(environment[name].startswith(folder) for folder in mounted), name


def test_the_folders_that_runs_read_are_in_the_image(
    stages: dict[str, list[dict[str, Any]]],
) -> None:
    copied = {value.split()[-1] for value in values(stages["runtime"], "COPY")}
    assert {"/opt/nsa/jobs", "/opt/nsa/deployments", "/opt/venv"} == copied
    for runs in OVERLAYS.glob("*/runs.yaml"):
        for job in OverlayRuns.load(runs).jobs.values():
            local = re.findall(r"(/[a-z/]+)[,\]]", " ".join(job.set).replace("s3://", ""))
            assert {path for path in local if path.startswith("/opt")} <= copied


def test_no_secret_and_no_history_enters(
    stages: dict[str, list[dict[str, Any]]],
) -> None:
    ignored = (ROOT / ".dockerignore").read_text().split("\n")
    allowed = {line.removeprefix("!") for line in ignored if line.startswith("!")}
    assert ignored[1] == "*", "all is left out but what is named"
    sources = {
        source
        for name in ("build", "runtime")
        for value in values(stages[name], "COPY")
        if not value.startswith("--from")
        for source in value.split()[:-1]
    }
    assert sources == allowed
    for source in sources:
        assert (ROOT / source).exists()
    words = " ".join(each["value"] for stage in stages.values() for each in stage).lower()
    assert not re.search(r"secret|password|token|aws_", words)


def test_the_build_has_what_the_wheel_is_made_of(
    stages: dict[str, list[dict[str, Any]]],
) -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())
    packages = project["tool"]["hatch"]["build"]["targets"]["wheel"]["packages"]
    folders = {package.split("/")[0] for package in packages}
    copied = {word for value in values(stages["build"], "COPY") for word in value.split()}
    assert folders | {"pyproject.toml", project["project"]["readme"], "LICENSE"} <= copied
