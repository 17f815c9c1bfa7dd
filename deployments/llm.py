"""build_openai_app: from a configuration in ray.serve.llm's shape to a Ray Serve application."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from ray import serve
from ray.serve import Application

from deployments.config import (
    IngressSettings,
    LLMConfig,
    LLMServingArgs,
    RayActorOptions,
    read_args,
)
from deployments.handles import OpenAiIngress
from deployments.server import LLMServer


def build_openai_app(args: Mapping[str, Any]) -> Application:
    """A Ray Serve application that answers OpenAI's API for the models of `args`.

    Relative places in `args` are seen from the working directory.

    Args:
        args: as LLMServingArgs; in a Serve configuration file the `args` of the application.

    Raises:
        ConfigError: a key is unknown or a value is wrong; nothing has been started.
    """
    parsed = read_args(args, root=Path.cwd())
    return bind(parsed)


def bind(args: LLMServingArgs) -> Application:
    """The same from validated arguments."""
    servers = [
        serve.deployment(LLMServer).options(**deployment_options(config)).bind(config)
        for config in args.llm_configs
    ]
    ingress = serve.deployment(serve.ingress()(OpenAiIngress)).options(
        **_ingress_options(args.ingress_deployment_config)
    )
    return ingress.bind(args, *servers)


def deployment_options(config: LLMConfig) -> dict[str, Any]:
    """Ray Serve's options of a model's deployment."""
    settings = config.deployment_config
    options = settings.model_dump(exclude={"ray_actor_options"}, exclude_none=True)
    resources = _actor_options(settings.ray_actor_options)
    if config.num_gpus > 0:
        resources["num_gpus"] = config.num_gpus / config.num_ranks
    if config.accelerator_type is not None:
        resources["accelerator_type"] = config.accelerator_type
    if config.num_ranks > 1:
        options |= _placement(config, resources.pop("label_selector", None))
    return {**options, "name": config.deployment_name, "ray_actor_options": resources}


def _placement(config: LLMConfig, labels: dict[str, str] | None) -> dict[str, Any]:
    """One bundle for each rank, all on one node, where sums between them are fast."""
    settings = config.deployment_config.ray_actor_options
    bundle = {
        "CPU": 1.0 if settings.num_cpus is None else settings.num_cpus,
        "GPU": config.num_gpus / config.num_ranks,
        "memory": settings.memory or 0.0,
        **(settings.resources or {}),
    }
    if config.accelerator_type is not None:
        bundle[f"accelerator_type:{config.accelerator_type}"] = 0.001
    bundle = {name: amount for name, amount in bundle.items() if amount}
    options: dict[str, Any] = {
        "placement_group_bundles": [bundle] * config.num_ranks,
        "placement_group_strategy": "STRICT_PACK",
    }
    if labels is not None:
        options["placement_group_bundle_label_selector"] = [labels] * config.num_ranks
    return options


def _ingress_options(settings: IngressSettings) -> dict[str, Any]:
    options = settings.model_dump(exclude={"ray_actor_options"})
    return {
        **options,
        "name": "OpenAiIngress",
        "ray_actor_options": _actor_options(settings.ray_actor_options),
    }


def _actor_options(settings: RayActorOptions) -> dict[str, Any]:
    return settings.model_dump(exclude_none=True)
