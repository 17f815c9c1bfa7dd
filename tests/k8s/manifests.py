"""Manifests as kustomize builds them, and strict schemas to hold them against."""

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jsonschema
import kubernetes_validate
import yaml

ROOT = Path(__file__).resolve().parents[2]
BUILDS = ("base", "overlays/local-cpu", "overlays/gpu")
ROADS = ("overlays/local-cpu", "overlays/gpu")
"""The folders that hold jobs/, built by themselves."""

Tree = dict[str, Any]
Kind = tuple[str, str]


@dataclass(frozen=True)
class Pod:
    """A pod's template within an object, as the operator will label it."""

    owner: str
    labels: dict[str, str]
    spec: Tree
    metadata: Tree

    @property
    def containers(self) -> list[Tree]:
        return [*self.spec.get("initContainers", []), *self.spec["containers"]]


def closed(schema: Tree) -> Tree:
    """A CRD's schema as JSON schema in which a field that it does not name is an error.

    The API server drops such fields without a word; a misspelt key would simply not act.
    """
    result = {key: value for key, value in schema.items() if not key.startswith("x-kubernetes-")}
    if schema.get("x-kubernetes-int-or-string"):
        result.pop("type", None)
        result.setdefault("anyOf", [{"type": "integer"}, {"type": "string"}])
    for name, of in schema.get("properties", {}).items():
        result["properties"] = {**result["properties"], name: closed(of)}
    if "items" in schema:
        result["items"] = closed(schema["items"])
    if isinstance(schema.get("additionalProperties"), dict):
        result["additionalProperties"] = closed(schema["additionalProperties"])
    elif schema.get("type") == "object" and not schema.get("x-kubernetes-preserve-unknown-fields"):
        result.setdefault("additionalProperties", False)
    return result


def kuberay_schemas(folder: Path) -> dict[Kind, Tree]:
    """The closed schema of every kind and version that a folder of CRDs defines."""
    found: dict[Kind, Tree] = {}
    for path in sorted(folder.glob("*.yaml")):
        crd = yaml.load(path.read_text(), Loader=yaml.CSafeLoader)["spec"]
        for version in crd["versions"]:
            schema = closed(version["schema"]["openAPIV3Schema"])
            # An object's own metadata is the API server's; `problems` looks at it.
            schema["properties"]["metadata"] = {"type": "object"}
            found[f"{crd['group']}/{version['name']}", crd["names"]["kind"]] = schema
    return found


def problems(tree: Tree, schemas: dict[Kind, Tree]) -> list[str]:
    """What is wrong with one object: unknown fields, wrong types, missing fields."""
    kind = (tree["apiVersion"], tree["kind"])
    own = schemas.get(kind)
    if own is None:
        return _core_problems(tree)
    found = [
        f"{'/'.join(map(str, error.absolute_path))}: {error.message[:200]}"
        for error in jsonschema.Draft202012Validator(own).iter_errors(tree)
    ]
    envelope = {"apiVersion": "v1", "kind": "ConfigMap", "metadata": tree["metadata"]}
    return found + _core_problems(envelope)


def _core_problems(tree: Tree) -> list[str]:
    try:
        kubernetes_validate.validate(tree, kubernetes_validate.latest_version(), strict=True)
    except kubernetes_validate.ValidationError as error:
        return [f"{tree['kind']}: {error.message[:200]}"]
    return []


def pods(tree: Tree) -> Iterator[Pod]:
    """Every pod template of an object, with the labels that KubeRay adds."""
    owner = f"{tree['kind']}/{tree['metadata']['name']}"
    spec = tree.get("spec", {})
    if tree["kind"] in ("Deployment", "StatefulSet", "Job"):
        yield _pod(owner, spec["template"])
    if "submitterPodTemplate" in spec:
        yield _pod(f"{owner} submitter", spec["submitterPodTemplate"])
    if (cluster := ray_cluster(tree)) is None:
        return
    head = cluster["headGroupSpec"]["template"]
    yield _pod(f"{owner} head", head, {"ray.io/node-type": "head"})
    for group in cluster["workerGroupSpecs"]:
        labels = {"ray.io/node-type": "worker", "ray.io/group": group["groupName"]}
        yield _pod(f"{owner} {group['groupName']}", group["template"], labels)


def ray_cluster(tree: Tree) -> Tree | None:
    """The Ray cluster that an object describes, if it does."""
    key = {"RayJob": "rayClusterSpec", "RayService": "rayClusterConfig"}.get(tree["kind"])
    if tree["kind"] == "RayCluster":
        return tree["spec"]
    return tree["spec"][key] if key else None


def selects(selector: Tree, labels: dict[str, str]) -> bool:
    """Whether a label selector matches; the operators that the manifests use."""
    exact = selector.get("matchLabels", {})
    expressions = selector.get("matchExpressions", [])
    assert all(each["operator"] == "In" for each in expressions)
    return all(labels.get(key) == value for key, value in exact.items()) and all(
        labels.get(each["key"]) in each["values"] for each in expressions
    )


def amount(quantity: str | int) -> float:
    """A Kubernetes quantity as a number: "500m", "4Gi", 2."""
    text = str(quantity)
    for suffix, factor in {"m": 1e-3, "Ki": 2**10, "Mi": 2**20, "Gi": 2**30, "Ti": 2**40}.items():
        if text.endswith(suffix):
            return float(text.removesuffix(suffix)) * factor
    return float(text)


def _pod(owner: str, template: Tree, more: dict[str, str] | None = None) -> Pod:
    metadata = template.get("metadata", {})
    return Pod(owner, {**metadata.get("labels", {}), **(more or {})}, template["spec"], metadata)
