"""What is deployed: the shape of ray.serve.llm's configuration, for NSA models."""

import importlib
import inspect
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any, Literal, Self

from pydantic import (
    Field,
    NonNegativeFloat,
    NonNegativeInt,
    PositiveFloat,
    PositiveInt,
    model_validator,
)

from deployments.autoscaling import PressurePolicy
from deployments.keys import AccessSettings
from deployments.prefix_routes import PrefixRoutes
from nsa_platform.config.base import ConfigError, Strict, read_yaml
from nsa_platform.config.locations import (
    Location,
    ModelLocation,
    ServiceLocation,
    resolve_locations,
)
from nsa_platform.config.serve import EngineConfig

OWN_POLICY = "deployments.autoscaling:KvPressurePolicy"
OWN_ROUTER = "deployments.request_router:PrefixCacheRouter"


def _try(kind: Callable[..., object], arguments: Mapping[str, Any], key: str) -> None:
    """Raise ValueError unless an object can be made with these arguments."""
    try:
        kind(**arguments)
    except TypeError as error:
        valid = ", ".join(inspect.signature(kind).parameters)
        raise ValueError(f"{key}: {error} (valid: {valid})") from None


def _check_import(path: str, key: str) -> None:
    """Raise ValueError unless there is what module:name names. A module that is not here may be in
    the cluster's runtime environment."""
    module, _, name = path.replace(":", ".").rpartition(".")
    if not module or not name:
        raise ValueError(f"{key}={path!r} must look like module:name")
    try:
        found = importlib.import_module(module)
    except ImportError:
        return
    if not hasattr(found, name):
        raise ValueError(f"{key}={path!r}: {module} has no {name}")


class ModelLoadingConfig(Strict):
    """Which model is served, and under which name."""

    model_id: Annotated[str, Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._:/-]{0,127}$")]
    """The name that clients put into `model`."""
    model_source: ModelLocation
    """An exported model: a folder, s3://bucket/key, models:/name@alias or models:/name/version."""
    tokenizer_source: Location | None = None
    """A tokenizer folder, local or s3://; null: the one beside the weights."""
    tracking_uri: ServiceLocation | None = None
    """MLflow store that models:/ is looked up in; null: MLFLOW_TRACKING_URI of the replica."""


class ScalingPolicy(Strict):
    """Who decides how many replicas there are."""

    policy_function: str = OWN_POLICY
    """A function or class in Ray Serve's sense, as module:name."""
    policy_kwargs: dict[str, Any] = Field(default_factory=dict)
    """Arguments of a class; of KvPressurePolicy those of deployments.autoscaling.PressurePolicy."""

    @model_validator(mode="after")
    def _arguments_fit(self) -> Self:
        # Ray would find out in its controller, which then scales nothing any more.
        if self.policy_function == OWN_POLICY:
            _try(PressurePolicy, self.policy_kwargs, "policy_kwargs")
        else:
            _check_import(self.policy_function, "policy_function")
        return self


class AutoscalingSettings(Strict):
    """Ray Serve's AutoscalingConfig."""

    min_replicas: NonNegativeInt = 1
    """0: the model's last replica stops too when nobody asks."""
    initial_replicas: NonNegativeInt | None = None
    """At the first deployment; null: min_replicas."""
    max_replicas: PositiveInt = 1
    """Replicas at most."""
    target_ongoing_requests: PositiveFloat = 8.0
    """Requests, running and queued, for which one replica is meant."""
    look_back_period_s: PositiveFloat = 30.0
    """Seconds over which requests are averaged."""
    upscale_delay_s: NonNegativeFloat = 10.0
    """Seconds that more load must last before replicas are added."""
    downscale_delay_s: NonNegativeFloat = 300.0
    """Seconds that less load must last before replicas are stopped."""
    downscale_to_zero_delay_s: NonNegativeFloat | None = None
    """The same for the last replica; null: downscale_delay_s."""
    upscaling_factor: PositiveFloat | None = None
    """Damps (below 1) or hastens each step up."""
    downscaling_factor: PositiveFloat | None = None
    """Damps (below 1) or hastens each step down."""
    aggregation_function: Literal["mean", "max", "min"] = "mean"
    """How the load within look_back_period_s becomes one number."""
    policy: ScalingPolicy | None = None
    """null: Ray's own, by target_ongoing_requests, which KvPressurePolicy does not look at."""

    @model_validator(mode="after")
    def _ordered(self) -> Self:
        if self.min_replicas > self.max_replicas:
            raise ValueError(
                f"min_replicas={self.min_replicas} must not exceed max_replicas={self.max_replicas}"
            )
        initial = self.initial_replicas
        if initial is not None and not self.min_replicas <= initial <= self.max_replicas:
            raise ValueError(
                f"initial_replicas={initial} must lie between min_replicas={self.min_replicas} "
                f"and max_replicas={self.max_replicas}"
            )
        return self


class BackpressureSettings(Strict):
    """How a request is refused when the queue is full."""

    status_code: Literal[429, 503] = 429
    retry_after_s: PositiveInt = 1
    """Value of the Retry-After header, in seconds."""


class RouterSettings(Strict):
    """Who decides which replica gets a request."""

    request_router_class: str = OWN_ROUTER
    """A RequestRouter in Ray Serve's sense, as module:name."""
    request_router_kwargs: dict[str, Any] = Field(default_factory=dict)
    """Its arguments; of PrefixCacheRouter those of deployments.prefix_routes.PrefixRoutes."""
    request_routing_stats_period_s: PositiveFloat = 1.0
    """Seconds between a replica's reports to routers."""

    @model_validator(mode="after")
    def _arguments_fit(self) -> Self:
        if self.request_router_class == OWN_ROUTER:
            _try(PrefixRoutes, self.request_router_kwargs, "request_router_kwargs")
        else:
            _check_import(self.request_router_class, "request_router_class")
        return self


class RayActorOptions(Strict):
    """What one replica takes from the cluster. Where ranks share its model, each of them takes
    these CPUs, this memory and these resources."""

    num_cpus: NonNegativeFloat | None = None
    """null: 1."""
    num_gpus: NonNegativeFloat | None = None
    """null: one for each rank if accelerator_type is given, else 0. The model runs on GPUs exactly
    if > 0."""
    memory: PositiveFloat | None = None
    """Bytes that Ray reserves."""
    resources: dict[str, NonNegativeFloat] | None = None
    """Custom resources."""
    label_selector: dict[str, str] | None = None
    """Labels that the node must carry."""
    runtime_env: dict[str, Any] | None = None
    """Ray's runtime environment of the replica, as {env_vars: {...}}."""


class DeploymentSettings(Strict):
    """Ray Serve's options of the model's deployment."""

    num_replicas: PositiveInt | None = None
    """A fixed number of replicas; null: autoscaling_config decides."""
    autoscaling_config: AutoscalingSettings | None = None
    """null without num_replicas: one replica."""
    max_ongoing_requests: PositiveInt = 64
    """Requests that one replica takes; those beyond its engine's max_num_seqs wait inside."""
    max_queued_requests: Annotated[int, Field(ge=-1)] = 256
    """Requests that wait in front of the replicas; more are refused. -1: no limit."""
    backpressure_config: BackpressureSettings = BackpressureSettings()
    """The answer to those that are refused."""
    request_router_config: RouterSettings = RouterSettings()
    """Which replica gets a request."""
    graceful_shutdown_wait_loop_s: PositiveFloat = 1.0
    """Seconds between looks whether a stopping replica is idle."""
    graceful_shutdown_timeout_s: NonNegativeFloat = 600.0
    """Seconds that a stopping replica has to finish its streams."""
    health_check_period_s: PositiveFloat = 5.0
    """Seconds between health checks."""
    health_check_timeout_s: PositiveFloat = 30.0
    """Seconds without an answer after which a replica is replaced."""
    max_constructor_retry_count: PositiveInt = 3
    """Failed starts after which a deployment is given up."""
    ray_actor_options: RayActorOptions = RayActorOptions()
    """What one replica takes from the cluster."""

    @model_validator(mode="after")
    def _one_way_to_count(self) -> Self:
        if self.num_replicas is not None and self.autoscaling_config is not None:
            raise ValueError(
                "num_replicas and autoscaling_config exclude each other: give a fixed number or "
                "a range"
            )
        return self


class LLMConfig(Strict):
    """One model."""

    model_loading_config: ModelLoadingConfig
    """Which model."""
    llm_engine: Literal["NSA"] = "NSA"
    """The only engine there is."""
    engine_kwargs: EngineConfig = EngineConfig()
    """Sizes of the engine of each replica."""
    accelerator_type: str | None = None
    """Ray's name of the GPU that a replica needs, such as H100; null: no particular one."""
    deployment_config: DeploymentSettings = DeploymentSettings()
    """Options of Ray Serve."""

    @property
    def model_id(self) -> str:
        return self.model_loading_config.model_id

    @property
    def deployment_name(self) -> str:
        """What Ray Serve calls the model's deployment."""
        letters = (letter if letter.isalnum() else "-" for letter in self.model_id)
        return "LLMServer-" + "".join(letters)

    @property
    def num_ranks(self) -> int:
        """Processes that compute the model of one replica together."""
        return self.engine_kwargs.tensor_parallel_size

    @property
    def num_gpus(self) -> float:
        """GPUs of one replica, over all its ranks."""
        asked = self.deployment_config.ray_actor_options.num_gpus
        if asked is not None:
            return asked
        return float(self.num_ranks) if self.accelerator_type is not None else 0.0

    @model_validator(mode="after")
    def _an_accelerator_is_a_gpu(self) -> Self:
        if self.accelerator_type is not None and self.num_gpus == 0:
            raise ValueError(
                f"accelerator_type={self.accelerator_type!r} needs "
                "deployment_config.ray_actor_options.num_gpus > 0"
            )
        return self

    @model_validator(mode="after")
    def _each_rank_has_a_gpu(self) -> Self:
        if self.num_ranks > 1 and self.num_gpus not in (0, self.num_ranks):
            raise ValueError(
                f"engine_kwargs.tensor_parallel_size={self.num_ranks} needs as many GPUs, one for "
                f"each rank, and deployment_config.ray_actor_options.num_gpus={self.num_gpus:g}"
            )
        return self


class IngressSettings(Strict):
    """Ray Serve's options of the HTTP deployment, which holds no model."""

    num_replicas: PositiveInt = 1
    """Processes that speak HTTP."""
    max_ongoing_requests: PositiveInt = 1000
    """Connections that one of them serves at once."""
    graceful_shutdown_timeout_s: NonNegativeFloat = 600.0
    """Seconds that a stopping one has to finish its streams."""
    ray_actor_options: RayActorOptions = RayActorOptions(num_cpus=0.0)
    """What one of them takes from the cluster."""


class LLMServingArgs(Strict):
    """Arguments of build_openai_app."""

    llm_configs: Annotated[tuple[LLMConfig, ...], Field(min_length=1)]
    """Models; in YAML each is a mapping or the path of a YAML file that holds one."""
    ingress_deployment_config: IngressSettings = IngressSettings()
    """Options of the HTTP deployment."""
    access: AccessSettings = AccessSettings()
    """API keys and logs."""

    @model_validator(mode="after")
    def _names_differ(self) -> Self:
        names = [config.deployment_name for config in self.llm_configs]
        twice = [
            config.model_id
            for config in self.llm_configs
            if names.count(config.deployment_name) > 1
        ]
        if twice:
            raise ValueError(
                f"llm_configs: the model_ids {', '.join(twice)} differ in no letter or digit"
            )
        return self


def read_args(args: Mapping[str, Any], *, root: Path) -> LLMServingArgs:
    """Validated arguments of build_openai_app, with relative places seen from `root`.

    Raises:
        ConfigError: a key is unknown or a value is wrong; one line for each problem.
    """
    tree = dict(args)
    configs = tree.get("llm_configs")
    if isinstance(configs, Sequence) and not isinstance(configs, str):
        tree["llm_configs"] = [_config_tree(entry, root) for entry in configs]
    parsed = LLMServingArgs.parse(tree, source="args")
    return parsed.model_copy(
        update={
            "llm_configs": tuple(resolve_locations(each, root) for each in parsed.llm_configs),
            "access": resolve_locations(parsed.access, root),
        }
    )


def _config_tree(entry: Any, root: Path) -> Any:
    if isinstance(entry, LLMConfig):
        return entry
    if isinstance(entry, str):
        tree = read_yaml(root / entry)
        # Validated on its own first, so that a problem is told with the file's name.
        LLMConfig.parse(tree, source=entry)
        return tree
    if not isinstance(entry, Mapping):
        raise ConfigError(
            f"args: llm_configs: must be mappings or paths of YAML files, got {entry!r}"
        )
    return dict(entry)
