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
        resources["num_gpus"] = config.num_gpus
    if config.accelerator_type is not None:
        resources["accelerator_type"] = config.accelerator_type
    return {**options, "name": config.deployment_name, "ray_actor_options": resources}


def _ingress_options(settings: IngressSettings) -> dict[str, Any]:
    options = settings.model_dump(exclude={"ray_actor_options"})
    return {
        **options,
        "name": "OpenAiIngress",
        "ray_actor_options": _actor_options(settings.ray_actor_options),
    }


def _actor_options(settings: RayActorOptions) -> dict[str, Any]:
    return settings.model_dump(exclude_none=True)
