"""Fixtures of the manifests: kubectl, KubeRay's CRDs, and what every overlay builds."""

import os
import shutil
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml

from tests.k8s.manifests import ROOT, kuberay_schemas


def _lacking(what: str) -> None:
    """Skip on a person's machine; where changes are judged nothing may be left out."""
    if os.environ.get("CI") == "true":
        pytest.fail(f"{what}, but CI=true: all checks must run")
    pytest.skip(what)


@pytest.fixture(scope="session")
def kubectl() -> str:
    """The path of kubectl."""
    found = shutil.which("kubectl")
    if found is None:
        _lacking("kubectl is not on PATH: manifests are not built (k8s/README.md says where from)")
    return str(found)


@pytest.fixture(scope="session")
def schemas() -> dict[tuple[str, str], dict[str, Any]]:
    """Closed schemas of KubeRay's kinds, from the folder that KUBERAY_CRDS names."""
    folder = os.environ.get("KUBERAY_CRDS")
    if not folder:
        _lacking("KUBERAY_CRDS names no folder of CRDs: Ray's kinds are not validated")
    found = kuberay_schemas(ROOT / str(folder))
    if ("ray.io/v1", "RayJob") not in found:
        pytest.fail(f"KUBERAY_CRDS={folder} holds no CRD of ray.io/v1 RayJob")
    return found


@pytest.fixture(scope="session")
def build(kubectl: str) -> Callable[[str], list[dict[str, Any]]]:
    """Build a folder below k8s/ with kustomize; every object of it."""
    built: dict[str, list[dict[str, Any]]] = {}

    def objects(folder: str) -> list[dict[str, Any]]:
        if folder not in built:
            done = subprocess.run(
                [kubectl, "kustomize", str(Path("k8s") / folder)],
                cwd=ROOT,
                capture_output=True,
                text=True,
                check=False,
            )
            assert done.returncode == 0, done.stderr
            assert "deprecated" not in done.stderr, done.stderr
            built[folder] = list(yaml.load_all(done.stdout, Loader=yaml.CSafeLoader))
        return built[folder]

    return objects
