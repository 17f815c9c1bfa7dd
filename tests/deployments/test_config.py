"""Configurations in Ray's shape: what is refused and how, what reaches Ray Serve."""

from pathlib import Path
from typing import Any

import pytest
import yaml
from ray import serve
from ray.serve.schema import ServeDeploySchema

from deployments.config import LLMConfig, read_args
from deployments.config_file import ServeFile
from deployments.llm import build_openai_app, deployment_options
from deployments.serve import main, reason_of
from deployments.server import LLMServer
from nsa_platform.config.base import ConfigError

CONFIGS = sorted((Path(__file__).parents[2] / "deployments" / "configs").glob("*.yaml"))
LOADING = {"model_id": "m", "model_source": "models/m"}


def args(**fields: Any) -> dict[str, Any]:
    return {"llm_configs": [{"model_loading_config": LOADING, **fields}]}


def scaled(**settings: Any) -> dict[str, Any]:
    return args(deployment_config={"autoscaling_config": settings})


@pytest.mark.parametrize(
    ("tree", "message"),
    [
        ({}, "llm_configs: is required"),
        ({"llm_configs": []}, "at least 1 item"),
        ({"llm_configs": [3]}, "must be mappings or paths of YAML files, got 3"),
        (args(engine_kwarg={}), "did you mean 'engine_kwargs'"),
        (args(engine_kwargs={"max_modellen": 3}), "did you mean 'max_model_len'"),
        (args(engine_kwargs={"max_model_len": 0}), "max_model_len"),
        (args(llm_engine="vLLM"), "llm_engine: must be 'NSA', got 'vLLM'"),
        (args(deployment_config={"autoscaling": {}}), "did you mean 'autoscaling_config'"),
        (
            args(deployment_config={"autoscaling_config": {"max_replica": 2}}),
            "did you mean 'max_replicas'",
        ),
        (
            args(deployment_config={"autoscaling_config": {"min_replicas": 3, "max_replicas": 2}}),
            "min_replicas=3 must not exceed max_replicas=2",
        ),
        (
            args(deployment_config={"num_replicas": 2, "autoscaling_config": {}}),
            "num_replicas and autoscaling_config exclude each other",
        ),
        (scaled(policy={"policy_kwargs": {"target_kv_usage": 7}}), "target_kv_usage=7 must lie in"),
        (scaled(policy={"policy_kwargs": {"target_kv": 0.7}}), "'target_kv'"),
        (
            args(
                deployment_config={
                    "request_router_config": {"request_router_kwargs": {"max_holders": 0}}
                }
            ),
            "max_holders=0 must be at least 1",
        ),
        (
            args(
                accelerator_type="H100",
                deployment_config={"ray_actor_options": {"num_gpus": 0}},
            ),
            "accelerator_type='H100' needs",
        ),
        (
            args(
                engine_kwargs={"tensor_parallel_size": 4},
                deployment_config={"ray_actor_options": {"num_gpus": 2}},
            ),
            "engine_kwargs.tensor_parallel_size=4 needs as many GPUs, one for each rank, and "
            "deployment_config.ray_actor_options.num_gpus=2",
        ),
        ({"llm_configs": args()["llm_configs"] * 2}, "model_ids m, m differ in no letter"),
    ],
)
def test_wrong_arguments_are_refused_with_the_key(tree, message):
    with pytest.raises(ConfigError) as caught:
        build_openai_app(tree)
    assert message in str(caught.value)


def test_a_model_may_lie_in_a_file_of_its_own(tmp_path):
    (tmp_path / "m.yaml").write_text(yaml.safe_dump({"model_loading_config": LOADING}))
    (config,) = read_args({"llm_configs": ["m.yaml"]}, root=tmp_path).llm_configs
    assert config.model_loading_config.model_source == str(tmp_path / "models/m")
    (tmp_path / "m.yaml").write_text(yaml.safe_dump({"model_loading_confg": LOADING}))
    with pytest.raises(ConfigError, match=r"m\.yaml: .*did you mean 'model_loading_config'"):
        read_args({"llm_configs": ["m.yaml"]}, root=tmp_path)


def test_addresses_stay_as_they_are(tmp_path):
    loading = {
        "model_id": "m",
        "model_source": "models:/m@champion",
        "tokenizer_source": "s3://bucket/tokenizer",
        "tracking_uri": "sqlite:///runs/mlflow.db",
    }
    tree = {"llm_configs": [{"model_loading_config": loading}]}
    found = read_args(tree, root=tmp_path).llm_configs[0].model_loading_config
    assert found.model_source == "models:/m@champion"
    assert found.tokenizer_source == "s3://bucket/tokenizer"
    assert found.tracking_uri == f"sqlite:///{tmp_path}/runs/mlflow.db"


def test_options_reach_ray_serve():
    config = LLMConfig.parse(
        {
            "model_loading_config": LOADING,
            "accelerator_type": "H100",
            "deployment_config": {
                "autoscaling_config": {
                    "max_replicas": 3,
                    "target_ongoing_requests": 5,
                    "policy": {"policy_kwargs": {"target_ttft_s": 3}},
                },
                "request_router_config": {"request_router_kwargs": {"max_imbalance": 3}},
                "max_ongoing_requests": 7,
                "max_queued_requests": 9,
                "graceful_shutdown_timeout_s": 11,
                "health_check_period_s": 13,
                "ray_actor_options": {"num_cpus": 2},
            },
        }
    )
    options = deployment_options(config)
    assert options["ray_actor_options"] == {
        "num_cpus": 2,
        "num_gpus": 1,
        "accelerator_type": "H100",
    }
    assert options["autoscaling_config"]["target_ongoing_requests"] == 5
    application = build_openai_app({"llm_configs": [config.model_dump()]})
    arguments: tuple[Any, ...] = application._bound_deployment.init_args
    server = arguments[1]
    deployment = server._bound_deployment
    assert deployment.name == "LLMServer-m"
    assert (deployment.max_ongoing_requests, deployment.max_queued_requests) == (7, 9)
    settings = deployment._deployment_config
    assert settings.graceful_shutdown_timeout_s == 11
    assert settings.health_check_period_s == 13
    assert settings.autoscaling_config.max_replicas == 3
    assert settings.backpressure_config.status_code == 429
    policy = settings.autoscaling_config.policy
    assert policy.get_policy()(**policy.policy_kwargs)._policy.target_ttft_s == 3
    router = settings.request_router_config
    assert router.get_request_router_class().__name__ == "PrefixCacheRouter"
    assert router.request_router_kwargs == {"max_imbalance": 3}


def test_ranks_lie_side_by_side_on_one_node():
    def options(**config: Any) -> dict[str, Any]:
        engine = {"tensor_parallel_size": 2}
        tree = {"model_loading_config": LOADING, "engine_kwargs": engine, **config}
        found = deployment_options(LLMConfig.parse(tree))
        # Ray Serve's own checks: the replica fits into the first bundle.
        serve.deployment(LLMServer).options(**found)
        return found

    found = options(
        accelerator_type="H100",
        deployment_config={
            "ray_actor_options": {"num_cpus": 3, "label_selector": {"zone": "a"}},
        },
    )
    bundle = {"CPU": 3, "GPU": 1, "accelerator_type:H100": 0.001}
    assert found["placement_group_bundles"] == [bundle, bundle]
    assert found["placement_group_strategy"] == "STRICT_PACK"
    assert found["placement_group_bundle_label_selector"] == [{"zone": "a"}] * 2
    actor = {"num_cpus": 3, "num_gpus": 1, "accelerator_type": "H100"}
    assert found["ray_actor_options"] == actor
    assert options()["placement_group_bundles"] == [{"CPU": 1}] * 2


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.stem)
def test_files_are_rays_own(path):
    assert ServeFile.read(path).applications[0].name == "llm"
    schema = ServeDeploySchema.model_validate(yaml.safe_load(path.read_text()))
    build_openai_app(schema.applications[0].args)


def test_there_are_files():
    assert {path.stem for path in CONFIGS} >= {"quickstart", "smoke", "nsa_150m"}


def test_keys_are_patched_by_place():
    source = "applications.0.args.llm_configs.0.model_loading_config.model_source=elsewhere"
    file = ServeFile.read(CONFIGS[0], ["http_options.port=8123", source])
    assert file.http_options.port == 8123
    found = file.serving_args(Path("/")).llm_configs[0].model_loading_config
    assert found.model_source == "/elsewhere"


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("http_options.prot=1", "did you mean 'port'"),
        ("http_options.port=0", "http_options.port"),
        ("applications.1.name=x", "'1' must be a place in a list of 1"),
        ("applications.x.name=x", "'x' must be a place in a list of 1"),
        ("proxy_location.x=1", "proxy_location is a value and has no keys below it"),
        ("port", "must look like"),
        ("applications.0.args.llm_config=1", "did you mean 'llm_configs'"),
        ("applications.0.import_path=ray.serve.llm:build_openai_app", "must be deployments.llm"),
    ],
)
def test_wrong_overrides_start_nothing(override, message, capsys):
    with pytest.raises(SystemExit) as caught:
        main(["--config", str(CONFIGS[0]), "--set", override])
    assert caught.value.code == 2
    assert message in capsys.readouterr().err


def test_a_wrong_model_is_told_in_one_line(capsys):
    key = "applications.0.args.llm_configs.0.engine_kwargs.max_num_sqs=3"
    with pytest.raises(SystemExit):
        main(["--config", str(CONFIGS[0]), "--set", key])
    (line,) = capsys.readouterr().err.splitlines()
    assert "did you mean 'max_num_seqs'" in line


def test_dry_run_prints_and_stops(capsys):
    main(["--config", str(CONFIGS[0]), "--dry-run"])
    assert "build_openai_app" in capsys.readouterr().out


def test_the_reason_is_found_in_rays_account():
    account = "failed 3 times\nTraceback\n  x.py\ndeployments.loading.StartError: model 'm': gone\n"
    assert reason_of(account) == "model 'm': gone"
    assert reason_of("no nodes") == "no nodes"
    assert reason_of("Traceback\nnsa_platform.config.base.ConfigError: keys: x") == "keys: x"
