"""Fixtures of the manifests: kubectl, KubeRay's CRDs, and what every overlay builds."""

import os
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml

from tests.k8s.manifests import ROOT, kuberay_schemas
from tests.k8s.needs import find_kubectl, lacking


@pytest.fixture(scope="session")
def kubectl() -> str:
    """The path of kubectl."""
    return find_kubectl()


@pytest.fixture(scope="session")
def schemas() -> dict[tuple[str, str], dict[str, Any]]:
    """Closed schemas of KubeRay's kinds, from the folder that KUBERAY_CRDS names."""
    folder = os.environ.get("KUBERAY_CRDS")
    if not folder:
        lacking("KUBERAY_CRDS names no folder of CRDs (k8s/README.md says where to get them)")
    found = kuberay_schemas(ROOT / folder)
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
