"""What the overlays build: strictly valid, complete, non-root, and at one with the rest."""

import copy
import re
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import yaml

from nsa_platform import __version__
from tests.k8s.manifests import (
    BUILDS,
    ROADS,
    ROOT,
    Pod,
    Tree,
    amount,
    pods,
    problems,
    ray_cluster,
    selects,
)

Build = Callable[[str], list[Tree]]
Schemas = dict[tuple[str, str], Tree]

FOLDERS = [*BUILDS, *(f"{road}/jobs" for road in ROADS)]
UPSTREAM_IMAGES = {"postgres:17.6-bookworm", "chrislusf/seaweedfs:4.48"}


def whole(build: Build, road: str) -> list[Tree]:
    """All that a cluster of this kind is given: the platform, its jobs and the secrets."""
    secrets = yaml.safe_load_all((ROOT / "k8s/secrets.example.yaml").read_text())
    return [*build(road), *build(f"{road}/jobs"), *secrets]


def all_pods(trees: list[Tree]) -> list[Pod]:
    return [pod for tree in trees for pod in pods(tree)]


def named(trees: list[Tree], kind: str, name: str) -> Tree:
    return next(t for t in trees if t["kind"] == kind and t["metadata"]["name"] == name)


@pytest.mark.parametrize("folder", FOLDERS)
def test_every_object_is_strictly_valid(build: Build, schemas: Schemas, folder: str) -> None:
    found = {f"{t['kind']}/{t['metadata']['name']}": problems(t, schemas) for t in build(folder)}
    assert {name: wrong for name, wrong in found.items() if wrong} == {}


def test_the_template_and_the_secrets_are_strictly_valid(schemas: Schemas) -> None:
    for name in ("rayjob.yaml", "secrets.example.yaml"):
        for tree in yaml.safe_load_all((ROOT / "k8s" / name).read_text()):
            assert problems(tree, schemas) == []


@pytest.mark.parametrize(
    ("kind", "path"),
    [
        ("RayJob", ("spec",)),
        ("RayJob", ("spec", "rayClusterSpec", "headGroupSpec", "template", "spec")),
        ("RayService", ("spec", "rayClusterConfig", "workerGroupSpecs", 0)),
        ("RayCluster", ("metadata",)),
        ("Deployment", ("spec", "template", "spec", "containers", 0)),
        ("NetworkPolicy", ("spec",)),
        ("PodDisruptionBudget", ("spec",)),
    ],
)
def test_a_misspelt_field_is_found(
    build: Build, schemas: Schemas, kind: str, path: tuple[str | int, ...]
) -> None:
    tree = copy.deepcopy(next(t for t in whole(build, "overlays/local-cpu") if t["kind"] == kind))
    assert problems(tree, schemas) == []
    node: Any = tree
    for part in path:
        node = node[part]
    node["shutdownAfterJobFinsihes"] = True
    assert "shutdownAfterJobFinsihes" in " ".join(problems(tree, schemas))


def test_a_wrong_type_is_found(build: Build, schemas: Schemas) -> None:
    tree = copy.deepcopy(named(build("overlays/gpu/jobs"), "RayJob", "nsa-150m"))
    tree["spec"]["ttlSecondsAfterFinished"] = "soon"
    assert "ttlSecondsAfterFinished" in " ".join(problems(tree, schemas))


@pytest.mark.parametrize("road", ROADS)
def test_everything_that_is_named_exists(build: Build, road: str) -> None:
    trees = whole(build, road)
    config_maps = {t["metadata"]["name"] for t in trees if t["kind"] == "ConfigMap"}
    secrets = {t["metadata"]["name"]: t["stringData"] for t in trees if t["kind"] == "Secret"}
    claims = {
        claim["metadata"]["name"]
        for t in trees
        if t["kind"] == "StatefulSet"
        for claim in t["spec"]["volumeClaimTemplates"]
    }
    used: set[str] = set()
    for pod in all_pods(trees):
        volumes = {volume["name"]: volume for volume in pod.spec.get("volumes", [])}
        for container in pod.containers:
            for source in container.get("envFrom", []):
                assert source["configMapRef"]["name"] in config_maps
            for variable in container.get("env", []):
                reference = variable.get("valueFrom", {}).get("secretKeyRef")
                if reference:
                    assert reference["key"] in secrets[reference["name"]], pod.owner
                    used.add(reference["name"])
            for mount in container.get("volumeMounts", []):
                assert mount["name"] in volumes.keys() | claims, (pod.owner, mount)
        for volume in volumes.values():
            assert volume.keys() & {"emptyDir", "downwardAPI"}, (pod.owner, volume)
    assert used == set(secrets)
    services = {t["metadata"]["name"] for t in trees if t["kind"] == "Service"}
    environment = named(trees, "ConfigMap", "nsa-environment")["data"]
    hosts = re.findall(r"http://([a-z]+):", " ".join(environment.values()))
    assert {"mlflow", "storage"} == set(hosts) <= services


@pytest.mark.parametrize("road", ROADS)
def test_images_are_pinned_and_of_this_version(build: Build, road: str) -> None:
    target = "gpu" if road.endswith("gpu") else "cpu"
    images = {c["image"] for pod in all_pods(whole(build, road)) for c in pod.containers}
    assert images == {f"nsa-platform:{__version__}-{target}"} | UPSTREAM_IMAGES


@pytest.mark.parametrize("folder", [*FOLDERS])
def test_every_pod_is_restricted(build: Build, folder: str) -> None:
    """What the namespace's "restricted" standard asks, and a root that cannot be written."""
    found = all_pods(build(folder))
    assert found
    for pod in found:
        security = pod.spec["securityContext"]
        assert security["runAsNonRoot"] is True and security["runAsUser"] > 0, pod.owner
        assert security["seccompProfile"] == {"type": "RuntimeDefault"}, pod.owner
        assert not pod.spec.keys() & {"hostNetwork", "hostPID", "hostIPC"}, pod.owner
        for container in pod.containers:
            assert container["securityContext"] == {
                "allowPrivilegeEscalation": False,
                "readOnlyRootFilesystem": True,
                "capabilities": {"drop": ["ALL"]},
            }, pod.owner
            mounts = {mount["mountPath"] for mount in container["volumeMounts"]}
            assert "/tmp" in mounts, pod.owner
            if container["image"].startswith("nsa-platform"):
                assert "/home/nsa" in mounts, pod.owner
    autoscaled = [c for t in build(folder) if (c := ray_cluster(t)) and "autoscalerOptions" in c]
    for cluster in autoscaled:
        assert cluster["autoscalerOptions"]["version"] == "v2"
        assert cluster["autoscalerOptions"]["securityContext"]["readOnlyRootFilesystem"] is True


@pytest.mark.parametrize("folder", FOLDERS)
def test_resources_are_bounded_and_shared_memory_fits(build: Build, folder: str) -> None:
    for pod in all_pods(build(folder)):
        volumes = {volume["name"]: volume for volume in pod.spec.get("volumes", [])}
        for container in pod.containers:
            requests, limits = (container["resources"][kind] for kind in ("requests", "limits"))
            assert requests.keys() == limits.keys() >= {"cpu", "memory"}
            for what, wanted in requests.items():
                assert amount(wanted) <= amount(limits[what]), (pod.owner, what)
            if container["name"] in ("ray-head", "ray-worker"):
                shm = next(m for m in container["volumeMounts"] if m["mountPath"] == "/dev/shm")
                directory = volumes[shm["name"]]["emptyDir"]
                assert directory["medium"] == "Memory"
                # It counts as the container's memory; the rest is for the processes.
                assert amount(directory["sizeLimit"]) <= amount(limits["memory"]) / 4


@pytest.mark.parametrize("folder", BUILDS)
def test_what_serves_has_probes(build: Build, folder: str) -> None:
    """Ray's containers get theirs from the operator, which also knows when Serve is ready."""
    for tree in build(folder):
        if tree["kind"] in ("Deployment", "StatefulSet"):
            for container in tree["spec"]["template"]["spec"]["containers"]:
                assert container.keys() >= {"startupProbe", "readinessProbe", "livenessProbe"}
                ports = {port["name"] for port in container["ports"]}
                for probe in ("startupProbe", "readinessProbe", "livenessProbe"):
                    handler = container[probe]
                    assert "exec" in handler or handler["httpGet"]["port"] in ports


@pytest.mark.parametrize("road", ROADS)
def test_selectors_meet_pods_and_ports_have_names(build: Build, road: str) -> None:
    trees = whole(build, road)
    everyone = all_pods(trees)

    def selected(selector: Tree) -> list[Pod]:
        return [pod for pod in everyone if selects(selector, pod.labels)]

    for tree in trees:
        spec = tree.get("spec", {})
        if tree["kind"] == "Service":
            chosen = selected({"matchLabels": spec["selector"]})
            assert len(chosen) == 1, tree["metadata"]["name"]
            names = {port["name"] for c in chosen[0].containers for port in c.get("ports", [])}
            assert {port["targetPort"] for port in spec["ports"]} <= names
        if tree["kind"] == "PodDisruptionBudget":
            assert selected(spec["selector"]), tree["metadata"]["name"]
            # Pods of a custom resource without a scale: only a number that stays is honoured.
            assert isinstance(spec["minAvailable"], int) and "maxUnavailable" not in spec
        if tree["kind"] == "NetworkPolicy":
            assert selected(spec["podSelector"]), tree["metadata"]["name"]
            for selector in _peers(spec):
                assert selected(selector), (tree["metadata"]["name"], selector)


def _peers(policy: Tree) -> Iterator[Tree]:
    """Pod selectors of this namespace that a policy lets talk."""
    for direction, end in (("ingress", "from"), ("egress", "to")):
        for rule in policy.get(direction, []):
            for peer in rule.get(end, []):
                if "podSelector" in peer and "namespaceSelector" not in peer:
                    yield peer["podSelector"]


@pytest.mark.parametrize("road", ROADS)
def test_nothing_is_open_that_no_policy_names(build: Build, road: str) -> None:
    policies = [t["spec"] for t in build(road) if t["kind"] == "NetworkPolicy"]
    assert any(
        p["podSelector"] == {} and set(p["policyTypes"]) == {"Ingress", "Egress"}
        and "ingress" not in p and "egress" not in p
        for p in policies
    )  # fmt: skip
    postgres = {"app.kubernetes.io/component": "postgres"}
    ours = [p for p in policies if p["podSelector"].get("matchLabels") == postgres]
    assert [list(_peers(p)) for p in ours] == [
        [{"matchLabels": {"app.kubernetes.io/component": "mlflow"}}]
    ]


def test_ray_is_the_pinned_version(build: Build) -> None:
    pin = re.search(r"^ray==(.+)$", (ROOT / "constraints.txt").read_text(), re.MULTILINE)
    assert pin
    clusters = [
        cluster
        for road in ROADS
        for tree in whole(build, road)
        if (cluster := ray_cluster(tree)) is not None
    ]
    assert clusters
    for cluster in clusters:
        assert cluster["rayVersion"] == pin[1]
        assert cluster["authOptions"] == {"mode": "token"}
        assert cluster["headGroupSpec"]["rayStartParams"] == {"num-cpus": "0"}


def test_gpus_are_asked_for_and_tolerated(build: Build) -> None:
    for pod in all_pods(whole(build, "overlays/gpu")):
        gpus = [c["resources"]["limits"].get("nvidia.com/gpu") for c in pod.containers]
        if any(gpus):
            keys = {each["key"] for each in pod.spec["tolerations"]}
            assert keys == {"nvidia.com/gpu"}, pod.owner
    with_gpu = [
        pod.owner for pod in all_pods(whole(build, "overlays/gpu")) if "tolerations" in pod.spec
    ]
    assert with_gpu == [
        "RayCluster/workbench workers",
        "RayService/llm replicas",
        "RayJob/nsa-150m gpu",
        "RayJob/nsa-150m-sft gpu",
    ]
    cpu_pods = all_pods(whole(build, "overlays/local-cpu"))
    assert not [pod.owner for pod in cpu_pods if "tolerations" in pod.spec]


@pytest.mark.parametrize("folder", FOLDERS)
def test_no_secret_is_built(build: Build, folder: str) -> None:
    assert "Secret" not in {tree["kind"] for tree in build(folder)}
    assert not re.search(r"password=|change-me", yaml.safe_dump_all(build(folder)))
