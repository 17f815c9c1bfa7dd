"""Rendering: a run as a RayJob, a Serve config as a RayService's, and the files that hold them."""

import importlib
import shlex
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml

from deployments.config import read_args
from jobs import kubernetes
from jobs.cli import read_run
from jobs.kubernetes import OVERLAYS, OverlayRuns, main
from jobs.manifest_yaml import to_yaml
from jobs.rayjob import JOBS, ROOT, RUN_ANNOTATION, RUN_FILE, object_name, render_job
from jobs.rayservice import PodPlan, ServeSource, render_pods, render_service
from nsa_platform.config.base import ConfigError

SMOKE = ROOT / "jobs/configs/pretrain/smoke.yaml"
PLACES = ("data.path=s3://b/data", "storage=s3://b/runs", "tracking.uri=http://mlflow:5000")
ROADS = sorted(path.parent.name for path in OVERLAYS.glob("*/runs.yaml"))
RENDERED = [
    (road, name) for road in ROADS for name in OverlayRuns.load(OVERLAYS / road / "runs.yaml").jobs
]


def worker(tree: dict[str, Any]) -> dict[str, Any]:
    (group,) = tree["spec"]["rayClusterSpec"]["workerGroupSpecs"]
    return group


def embedded(tree: dict[str, Any]) -> str:
    return tree["spec"]["rayClusterSpec"]["headGroupSpec"]["template"]["metadata"]["annotations"][
        RUN_ANNOTATION
    ]


def test_what_lies_in_the_overlays_is_rendered_from_the_configs() -> None:
    assert ROADS == ["gpu", "local-cpu"]
    assert main(["render", "--check"]) == 0, "stale: make k8s"


def test_a_drift_is_found_and_mended(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    shutil.copytree(OVERLAYS, tmp_path / "overlays")
    monkeypatch.setattr(kubernetes, "OVERLAYS", tmp_path / "overlays")
    serve = tmp_path / "overlays/gpu/serve.yaml"
    serve.write_text(serve.read_text().replace("max_replicas: 4", "max_replicas: 5"))
    (tmp_path / "overlays/local-cpu/jobs/sft.yaml").unlink()
    assert main(["render", "--check"]) == 1
    said = capsys.readouterr().out
    assert "stale: gpu/serve.yaml" in said and "stale: local-cpu/jobs/sft.yaml" in said
    assert "max_replicas: 5" in serve.read_text()
    assert main(["render"]) == 0
    assert main(["render", "--check"]) == 0


@pytest.mark.parametrize(("road", "name"), RENDERED)
def test_an_entry_point_reads_what_travels_with_it(
    road: str, name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The RayJob as it lies there, by the command line of the job itself."""
    source = OverlayRuns.load(OVERLAYS / road / "runs.yaml").jobs[name]
    tree = yaml.safe_load((OVERLAYS / road / "jobs" / f"{name}.yaml").read_text())
    python, flag, module, *words = shlex.split(tree["spec"]["entrypoint"])
    assert (python, flag, module) == ("python", "-m", f"jobs.{source.job}")
    entry = importlib.import_module(module)
    assert callable(entry.main)
    seen = tmp_path / "run.yaml"
    seen.write_text(embedded(tree))
    monkeypatch.chdir(tmp_path)
    run, _ = read_run(
        JOBS[source.job], entry.__doc__ or "", [str(seen) if w == RUN_FILE else w for w in words]
    )
    assert run == JOBS[source.job].load(ROOT / source.config, source.set)


def test_the_file_is_where_the_entry_point_looks() -> None:
    tree, _ = render_job("pretrain", SMOKE, PLACES)
    pod = tree["spec"]["rayClusterSpec"]["headGroupSpec"]["template"]["spec"]
    mount = next(m for m in pod["containers"][0]["volumeMounts"] if m["name"] == "run")
    volume = next(v for v in pod["volumes"] if v["name"] == "run")
    (item,) = volume["downwardAPI"]["items"]
    assert f"{mount['mountPath']}/{item['path']}" == RUN_FILE
    assert item["fieldRef"]["fieldPath"] == f"metadata.annotations['{RUN_ANNOTATION}']"


def test_overrides_travel_and_defaults_do_not() -> None:
    tree, run = render_job("pretrain", SMOKE, [*PLACES, "train.steps=7"])
    travels = yaml.safe_load(embedded(tree))
    assert travels["train"]["steps"] == 7
    assert "compile" not in travels["train"]
    assert JOBS["pretrain"].parse(travels) == run


def test_workers_are_those_of_the_run() -> None:
    sizes = ["cluster.num_workers=2", "cluster.cpus_per_worker=3"]
    tree, _ = render_job("pretrain", SMOKE, [*PLACES, *sizes])
    group = worker(tree)
    assert [group[k] for k in ("replicas", "minReplicas", "maxReplicas")] == [2, 2, 2]
    resources = group["template"]["spec"]["containers"][0]["resources"]
    assert resources["requests"]["cpu"] == resources["limits"]["cpu"] == "3"
    assert group["groupName"] == "cpu"


@pytest.mark.parametrize(("job", "key"), [("pretrain", "cluster.use_gpu"), ("evaluate", "use_gpu")])
def test_a_run_on_gpus_gets_them(job: str, key: str) -> None:
    config = ROOT / f"jobs/configs/{job}/smoke.yaml"
    places = {
        "pretrain": PLACES,
        "evaluate": ("checkpoint=s3://b/m", "data=s3://b/d", *PLACES[1:]),
    }[job]
    plain, _ = render_job(job, config, places)
    assert "nvidia.com/gpu" not in to_yaml(plain)
    tree, _ = render_job(job, config, [*places, f"{key}=true"])
    limits = worker(tree)["template"]["spec"]["containers"][0]["resources"]["limits"]
    assert limits["nvidia.com/gpu"] == "1"
    head = tree["spec"]["rayClusterSpec"]["headGroupSpec"]["template"]["spec"]["containers"][0]
    assert head["image"].endswith("-gpu")
    assert "nvidia.com/gpu" not in head["resources"]["limits"]


def test_an_image_is_for_every_pod() -> None:
    tree, _ = render_job("pretrain", SMOKE, PLACES, image="registry.example/nsa:7")
    assert to_yaml(tree).count("image: registry.example/nsa:7") == 3
    assert "nsa-platform:" not in to_yaml(tree)


def test_no_place_that_only_this_folder_knows() -> None:
    with pytest.raises(ConfigError, match=r"cannot see places relative.*data\.path=runs/smoke"):
        render_job("pretrain", SMOKE, PLACES[1:])
    with pytest.raises(ConfigError, match=r"tracking\.uri=sqlite:///runs"):
        render_job("pretrain", SMOKE, PLACES[:2])


def test_names_are_those_kubernetes_allows() -> None:
    assert object_name("nsa_150M.v2") == "nsa-150m-v2"
    with pytest.raises(ConfigError, match="48 characters, a RayJob's at most 47"):
        object_name("x" * 48)


@pytest.mark.parametrize("road", ROADS)
def test_a_cluster_serves_what_the_config_says(road: str) -> None:
    source = OverlayRuns.load(OVERLAYS / road / "runs.yaml").serve
    rendered = yaml.safe_load(render_service(source)["spec"]["serveConfigV2"])
    local = yaml.safe_load((ROOT / source.config).read_text())
    different = {
        key for key, value in _leaves(rendered).items() if _leaves(local).get(key) != value
    }
    named = {override.partition("=")[0] for override in source.set}
    assert named <= different <= named | {"proxy_location", "http_options.host"}
    assert _leaves(local).keys() == _leaves(rendered).keys()


@pytest.mark.parametrize("road", ROADS)
def test_what_is_served_is_valid_and_fits_its_pods(road: str) -> None:
    source = OverlayRuns.load(OVERLAYS / road / "runs.yaml").serve
    rendered = yaml.safe_load(render_service(source)["spec"]["serveConfigV2"])
    (application,) = rendered["applications"]
    assert application["import_path"] == "deployments.llm:build_openai_app"
    args = read_args(application["args"], root=Path("/nowhere"))
    base = yaml.safe_load((ROOT / "k8s/base/rayservice.yaml").read_text())
    group = base["spec"]["rayClusterConfig"]["workerGroupSpecs"][0]
    for model in args.llm_configs:
        settings = model.deployment_config
        grace = group["template"]["spec"]["terminationGracePeriodSeconds"]
        assert settings.graceful_shutdown_timeout_s < grace
        autoscaling = settings.autoscaling_config
        most = autoscaling.max_replicas if autoscaling else settings.num_replicas or 1
        assert most <= group["maxReplicas"]
        # Found from anywhere in the cluster, not below some folder.
        assert model.model_loading_config.model_source.startswith(("models:/", "s3://"))
        assert model.model_loading_config.tracking_uri is None


NSA_1B = PodPlan(model="jobs/configs/pretrain/nsa_1b.yaml", gpu="H100")
ENGINE = "applications.0.args.llm_configs.0.engine_kwargs"


def planned(*changes: str, plan: PodPlan = NSA_1B, name: str = "nsa_150m") -> dict[str, Any]:
    """Values of the patch of pods, by the end of their paths."""
    source = ServeSource(config=f"deployments/configs/{name}.yaml", set=changes, plan=plan)
    return {each["path"].rpartition("/")[2]: each["value"] for each in render_pods(source)}


def test_pods_are_what_the_planner_says() -> None:
    one = planned()
    assert one["resources"]["requests"] == one["resources"]["limits"]
    # 1.43B parameters of two bytes, twice, and 8 GiB.
    assert one["resources"]["limits"] == {"cpu": "4", "memory": "14Gi", "nvidia.com/gpu": "1"}
    assert one["sizeLimit"] == "3Gi" and one["maxReplicas"] == 4
    gpus = "applications.0.args.llm_configs.0.deployment_config.ray_actor_options.num_gpus=2"
    two = planned(f"{ENGINE}.tensor_parallel_size=2", gpus)
    assert two["resources"]["limits"] == {"cpu": "6", "memory": "22Gi", "nvidia.com/gpu": "2"}


def test_a_plan_that_cannot_be_is_refused() -> None:
    def refusal(*changes: str, **options: Any) -> str:
        with pytest.raises(ConfigError) as caught:
            planned(*changes, **options)
        return str(caught.value)

    longest = f"{ENGINE}.hf_overrides={{max_context: 16777216}}"
    assert "not one request of 16,777,216 tokens fits on 1 x H100" in refusal(longest)
    assert "max_model_len=999999 must not exceed" in refusal(f"{ENGINE}.max_model_len=999999")
    other = NSA_1B.model_copy(update={"gpu": "H1000"})
    assert "plan.gpu='H1000' must be one of A100" in refusal(plan=other)
    assert "serves on CPUs, and plan.gpu='H100'" in refusal(name="smoke")


def test_ray_serve_takes_what_is_rendered() -> None:
    """By Ray's own schema, in a process of its own: its import brings warnings along."""
    sources = [OverlayRuns.load(OVERLAYS / road / "runs.yaml").serve for road in ROADS]
    texts = [render_service(source)["spec"]["serveConfigV2"] for source in sources]
    program = (
        "import sys, yaml; from ray.serve.schema import ServeDeploySchema\n"
        "for each in yaml.safe_load_all(sys.stdin): ServeDeploySchema.model_validate(each)"
    )
    done = subprocess.run(
        [sys.executable, "-c", program],
        input="---\n".join(texts),
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr


def test_an_override_that_meets_nothing_is_refused() -> None:
    config = "deployments/configs/smoke.yaml"
    with pytest.raises(ConfigError, match="there is no 'args_'"):
        render_service(ServeSource(config=config, set=("applications.0.args_.x=1",)))
    with pytest.raises(ConfigError, match="there is no 3"):
        render_service(ServeSource(config=config, set=("applications.3.name=x",)))
    with pytest.raises(ConfigError, match="must look like"):
        render_service(ServeSource(config=config, set=("applications",)))


def _leaves(tree: Any, prefix: str = "") -> dict[str, Any]:
    if isinstance(tree, dict | list):
        pairs = tree.items() if isinstance(tree, dict) else enumerate(tree)
        found: dict[str, Any] = {}
        for key, value in pairs:
            found |= _leaves(value, f"{prefix}.{key}" if prefix else str(key))
        return found
    return {prefix: tree}
