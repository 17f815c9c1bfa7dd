"""What a RayService serves, and the pods that it takes.

A Ray Serve config becomes serveConfigV2. With a model's sizes and a GPU's name, its pods get what
the planner (nsa_platform.serve.planning) works out: GPUs, memory, as many of them as replicas.
"""

from math import ceil
from typing import Any

import yaml

from deployments.config import LLMConfig, read_args
from jobs.manifest_yaml import to_yaml
from jobs.rayjob import ROOT
from nsa_platform.config.base import ConfigError, Strict, read_yaml
from nsa_platform.config.runs import PretrainRun
from nsa_platform.serve.capacity import model_len_of
from nsa_platform.serve.planning import GPUS, ServingPlan, plan_serving

GIB = 1 << 30
INGRESS_CPUS = 2
"""For a pod's proxy and ingress, beside its replica."""
MOST_SHARED_GIB = 8
WORKERS = "/spec/rayClusterConfig/workerGroupSpecs/0"


class PodPlan(Strict):
    """What pods are planned for."""

    model: str
    """A pretraining YAML with the served model's sizes, seen from the repository's root."""
    gpu: str
    """Of each pod, by a name that jobs.plan knows."""


class ServeSource(Strict):
    """What an overlay serves."""

    config: str
    """A Ray Serve config, seen from the repository's root."""
    set: tuple[str, ...] = ()
    """Overrides a.0.b=value; a number is a place in a list."""
    plan: PodPlan | None = None
    """null: pods are as the overlay's own patches say."""


def render_service(source: ServeSource) -> dict[str, Any]:
    """The patch that tells a RayService what to serve.

    Raises:
        ConfigError: the file is missing or not a Ray Serve config, or an override does not fit.
    """
    tree = _serve_config(source)
    # The service's pods are those of replicas: each needs a proxy, one that others can reach.
    tree["proxy_location"] = "EveryNode"
    tree["http_options"] = {**tree.get("http_options", {}), "host": "0.0.0.0", "port": 8000}
    return {
        "apiVersion": "ray.io/v1",
        "kind": "RayService",
        "metadata": {"name": "llm"},
        "spec": {"serveConfigV2": to_yaml(tree)},
    }


def render_pods(source: ServeSource) -> list[dict[str, Any]]:
    """A JSON patch of a RayService: what its pods ask for, and how many there are at most.

    Raises:
        ConfigError: the plan names no model or no GPU that there is, the file serves several
            models, or not one request of the greatest length fits.
    """
    assert source.plan is not None
    applications = _serve_config(source)["applications"]
    models = [
        model
        for each in applications
        for model in read_args(each.get("args", {}), root=ROOT).llm_configs
    ]
    if len(models) != 1:
        raise ConfigError(f"{source.config}: pods are planned for one model, got {len(models)}")
    served = models[0]
    if not served.num_gpus:
        raise ConfigError(f"{source.config}: serves on CPUs, and plan.gpu={source.plan.gpu!r}")
    ranks, settings = served.num_ranks, served.deployment_config
    memory = -(-_plan(source.plan, served, source.config).host_bytes // GIB) * ranks
    autoscaling = settings.autoscaling_config
    most = autoscaling.max_replicas if autoscaling else settings.num_replicas or 1
    cpus = INGRESS_CPUS + ranks * ceil(settings.ray_actor_options.num_cpus or 1)
    asked = {"cpu": str(cpus), "memory": f"{memory}Gi", "nvidia.com/gpu": str(ranks)}
    pod = f"{WORKERS}/template/spec"
    # /dev/shm counts as memory: a quarter of it at most.
    shared = f"{min(MOST_SHARED_GIB, memory // 4)}Gi"
    changes = {
        f"{pod}/containers/0/resources": {"requests": asked, "limits": asked},
        f"{pod}/volumes/0/emptyDir/sizeLimit": shared,
        f"{WORKERS}/maxReplicas": most,
    }
    return [{"op": "replace", "path": path, "value": value} for path, value in changes.items()]


def _plan(asked: PodPlan, served: LLMConfig, source: str) -> ServingPlan:
    engine = served.engine_kwargs
    model = PretrainRun.load(ROOT / asked.model).model
    if model is None:
        raise ConfigError(f"plan.model={asked.model}: has no model with sizes")
    if asked.gpu not in GPUS:
        raise ConfigError(f"plan.gpu={asked.gpu!r} must be one of {', '.join(sorted(GPUS))}")
    model = engine.hf_overrides.of(model)
    try:
        context = model_len_of(model, engine)
        plan = plan_serving(model, GPUS[asked.gpu], engine, context=context)
    except ValueError as error:
        raise ConfigError(f"{source}: engine_kwargs: {error}") from error
    if not plan.num_sequences:
        raise ConfigError(
            f"{source}: not one request of {context:,} tokens fits on "
            f"{engine.tensor_parallel_size} x {asked.gpu}: a larger tensor_parallel_size, a lower "
            "max_model_len or kv_cache_dtype=fp8 helps"
        )
    return plan


def _serve_config(source: ServeSource) -> dict[str, Any]:
    tree = read_yaml(ROOT / source.config)
    if not isinstance(tree.get("applications"), list):
        raise ConfigError(f"{source.config}: applications: is required, a list")
    for override in source.set:
        _replace(tree, override, source.config)
    return tree


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
