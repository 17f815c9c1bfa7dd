"""jobs.evaluate on a small exported model: what it records, and what it refuses."""

import json
import re
import shutil
import subprocess
import sys
from pathlib import Path
from typing import NoReturn

import pytest
import ray
import yaml

from jobs import evaluate as job
from jobs import task_bars
from jobs.cluster import LOCAL_ENVIRONMENT, QUIET
from jobs.evaluation import evaluate, measure_on_gpu
from nsa_platform.config.runs import EvaluateRun
from nsa_platform.config.train import TrackingConfig
from nsa_platform.tracking import open_run, register_model
from nsa_platform.tracking.library import MlflowClient
from nsa_platform.tracking.store import connect
from tests.platform.evaluate.small import Corpus, export, make_corpus, make_model, write_split

SETTINGS = {
    "name": "evaluation",
    "bits_per_byte": {"tokens": 1000, "context_length": 64, "position_buckets": 4},
    "needle": {"lengths": [80, 120], "depths": [0.0, 1.0], "samples": 1},
    "tracking": {"uri": "sqlite:///mlflow.db", "experiment": "test"},
}
FIGURES = {
    "bits_per_byte.png",
    "bits_per_byte_by_position.png",
    "needle_exact.png",
    "needle_tokens.png",
    "needle_lift.png",
}
TABLES = {"bits_per_byte_by_position.json", "needle_trials.json"}
TASKS = [
    {"kind": "mqar", "lengths": [64, 128], "pairs": 4, "samples": 2},
    {"kind": "aime", "file": "aime.jsonl", "attempts": 2, "max_new_tokens": [4],
     "max_problem_tokens": 150},
]  # fmt: skip


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A working directory with data/ and models."""
    place = tmp_path_factory.mktemp("evaluate")
    corpus = make_corpus(place / "data")
    for folder, kind in (("model", "nsa"), ("full", "full"), ("moba", "moba")):
        model = make_model(corpus.tokenizer.vocab_size, max_context=160, kind=kind)
        export(corpus, model, place / folder)
    shutil.copytree(place / "model", place / "cut")
    weights = place / "cut" / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-100])
    shutil.copytree(place / "data", place / "empty")
    shutil.rmtree(place / "empty" / "validation")
    write_split(place / "empty", "validation", [], corpus.tokenizer)
    (place / "aime.jsonl").write_text('{"problem": "1+1?", "answer": 2}\n')
    return place


@pytest.fixture(autouse=True)
def here(place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(place)


def config_file(place: Path, **changes: object) -> str:
    tree = {**SETTINGS, "checkpoint": "model", "data": "data", **changes}
    (place / "run.yaml").write_text(yaml.safe_dump(tree))
    return str(place / "run.yaml")


def tracking(place: Path) -> TrackingConfig:
    return TrackingConfig(uri=f"sqlite:///{place}/mlflow.db", experiment="test")


def client(place: Path) -> MlflowClient:
    return connect(tracking(place).uri, creates=True)


def number_of_runs(place: Path) -> int:
    experiment = client(place).get_experiment_by_name("test")
    return len(client(place).search_runs([experiment.experiment_id])) if experiment else 0


def parent_run(place: Path) -> tuple[str, Path]:
    handle = open_run(
        tracking(place),
        job="sft",
        name="sft",
        params={"a": 1},
        tags={},
        yaml_text="a: 1",
        queue_dir=place / "queue",
    )
    assert handle.run_id is not None
    register_model(handle, place / "model", "evaluated", "champion")
    return handle.run_id, place / "queue"


def test_the_dry_run_starts_nothing(place: Path, capsys: pytest.CaptureFixture[str]) -> None:
    job.main(["--config", config_file(place), "--dry-run"])
    assert "position_buckets: 4" in capsys.readouterr().out
    assert not (place / "mlflow.db").exists()


def test_results_are_printed_and_recorded(place: Path, capsys: pytest.CaptureFixture[str]) -> None:
    job.main(["--config", config_file(place)])
    out = capsys.readouterr().out
    for word in ("bits per byte", "bigram", "unigram", "number written exactly", "MLflow run"):
        assert word in out

    experiment = client(place).get_experiment_by_name("test")
    assert experiment is not None
    (run,) = client(place).search_runs([experiment.experiment_id])
    assert run.info.status == "FINISHED"
    assert run.data.tags["nsa.job"] == "evaluate"
    assert run.data.params["bits_per_byte.tokens"] == "1000"
    assert set(run.data.metrics) == {
        "eval/loss",
        "eval/bits_per_byte",
        "eval/bits_per_byte_bigram",
        "eval/bits_per_byte_unigram",
        "eval/needle_exact",
        "eval/needle_tokens",
        "eval/needle_lift",
    }
    files = client(place).list_artifacts(run.info.run_id, "evaluation")
    assert {Path(file.path).name for file in files} == FIGURES | TABLES | {"results.json"}
    assert run.inputs is not None
    (dataset,) = run.inputs.dataset_inputs
    manifest = json.loads((place / "data" / "validation" / "manifest.json").read_text())
    assert dataset.dataset.digest == manifest["digest"][:36]
    assert json.loads(str(dataset.dataset.profile))["digest"] == manifest["digest"]
    artifacts = Path(str(run.info.artifact_uri))
    results = json.loads((artifacts / "evaluation" / "results.json").read_text())
    value = results["bits_per_byte"]["model"]["bits_per_byte"]
    assert value == pytest.approx(run.data.metrics["eval/bits_per_byte"])
    assert len(results["needle"]["trials"]) == 4


@pytest.mark.cluster
def test_a_worker_measures_what_this_process_does(
    place: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(task_bars, "LINE_EVERY_S", 0.0)
    run = EvaluateRun.load(config_file(place))
    here = evaluate(run)
    capsys.readouterr()
    handle = open_run(
        tracking(place),
        job="evaluate",
        name="distant",
        params={},
        tags={},
        yaml_text="",
        queue_dir=place / "distant",
    )
    # Ray is told of a GPU; the run does not ask for one, and the worker computes as this process.
    root = str(Path(__file__).parents[2])
    for name, value in {**LOCAL_ENVIRONMENT, "PYTHONPATH": root}.items():
        monkeypatch.setenv(name, value)
    ray.init(address="local", num_cpus=2, num_gpus=1, **QUIET)
    try:
        with task_bars.TaskBars() as bars:
            there = measure_on_gpu(run, str(place / "model"), handle, 0, bars)
    finally:
        ray.shutdown()
    assert there["bits_per_byte"] == here["bits_per_byte"]
    assert there["needle"] == here["needle"]
    out = capsys.readouterr().out
    assert "waiting for a worker with a free GPU: 1 of 1 are free now\n" in out
    assert "bits per byte: " in out


def test_policies_are_measured_beside_the_model(
    place: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(task_bars, "LINE_EVERY_S", 0.0)
    systems = ["full", "streaming", "quest", "minference"]
    changes = {
        "checkpoint": "full",
        "baselines": {"systems": systems, "tokens": 20},
        "tasks": [{"kind": "mqar", "lengths": [96, 64], "pairs": 3, "samples": 2}, TASKS[1]],
    }
    results = evaluate(EvaluateRun.load(config_file(place, **changes)))
    job.print_results(results)
    out = capsys.readouterr().out
    for word in ("streaming", "numbers exact", "tokens of", "(95 %)", "keys per", " to "):
        assert word in out
    assert "minference: heads' patterns: 8 of 8" in out
    run = client(place).get_run(results["run_id"])
    own, full = run.data.metrics, results["baselines"]["full"]
    assert full["bits_per_byte"] == pytest.approx(own["eval/bits_per_byte"], abs=1e-4)
    assert full["mqar/64"] == own["eval/mqar/64"]
    assert full["mqar/96"] == own["eval/mqar/96"]
    assert full["aime/4"] == own["eval/aime/4"]
    assert full["needle_lift"] == pytest.approx(own["eval/needle_lift"], abs=1e-3)
    for name in systems:
        assert own[f"eval/baselines/{name}/needle_tokens"] >= 0
        assert 0 <= own[f"eval/baselines/{name}/mqar/64"] <= 1
        reads = {(r["task"], r["length"]): r for r in results["baselines"][name]["reads"]}
        tasks = {("mqar", 64), ("mqar", 96), ("aime", None)}
        assert set(reads) == {("text", 64), ("needle", 80), ("needle", 120), *tasks}
        phase = "prefill" if name in ("full", "minference") else "decode"
        assert own[f"eval/baselines/{name}/text/{phase}/64/bytes_per_step"] > 0
        intervals = results["baselines"][name]["intervals"]
        scores = ["needle_exact", "needle_tokens", "mqar/64", "mqar/96", "aime/4"]
        assert list(intervals) == scores
        for key, (low, high) in intervals.items():
            assert low <= results["baselines"][name][key] <= high
        if phase == "decode":
            assert reads["needle", 120]["count"]["keys_per_query"] <= 20
    kinds = results["baselines"]["minference"]["patterns"]
    assert set(kinds) <= {"AShape", "VerticalSlash", "BlockSparse"}
    assert sum(kinds.values()) == 2 * 4, "a pattern for each head of each layer"
    files = client(place).list_artifacts(run.info.run_id, "evaluation")
    names = {Path(file.path).name for file in files if "baselines" in file.path}
    assert names == {
        "baselines_bits_per_byte.png",
        "baselines_bits_per_byte_by_position.json",
        "baselines_needle.json",
        "baselines_needle.png",
        "baselines_needle_trials.json",
        "baselines_patterns.json",
        "baselines_reads.json",
        "baselines_tasks.json",
        "baselines_tasks.png",
    }
    table = client(place).download_artifacts(
        run.info.run_id, "evaluation/baselines_needle.json", str(place)
    )
    rows = json.loads(Path(table).read_text())["data"]
    assert [row[:3] for row in rows] == [
        [name, length, 2] for name in ("model", *systems) for length in (80, 120)
    ]


def test_an_interrupted_evaluation_does_not_go_on(
    place: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def interrupted(_: EvaluateRun) -> NoReturn:
        raise KeyboardInterrupt

    monkeypatch.setattr(job, "evaluate", interrupted)
    with pytest.raises(SystemExit) as end:
        job.main(["--config", config_file(place)])
    assert end.value.code == 130
    said = "error: interrupted; the same command measures everything anew\n"
    assert capsys.readouterr().err == said


def test_a_registered_model_is_evaluated_below_its_training_run(place: Path) -> None:
    parent, _ = parent_run(place)
    run = EvaluateRun.load(config_file(place, checkpoint="models:/evaluated@champion", needle=None))
    results = evaluate(run)
    tags = client(place).get_run(results["run_id"]).data.tags
    assert tags["mlflow.parentRunId"] == parent
    assert "needle" not in results


def test_tasks_are_measured_and_recorded(place: Path, capsys: pytest.CaptureFixture[str]) -> None:
    job.main(["--config", config_file(place, tasks=TASKS, needle=None, bits_per_byte=None)])
    out = capsys.readouterr().out
    assert "mqar" in out and "95 % interval" in out
    experiment = client(place).get_experiment_by_name("test")
    assert experiment is not None
    run = client(place).search_runs([experiment.experiment_id])[0]
    names = {"mqar/64", "mqar/128", "mqar/mean", "aime/4", "aime/mean"}
    assert set(run.data.metrics) == {f"eval/{name}" for name in names}
    files = client(place).list_artifacts(run.info.run_id, "evaluation")
    each = {
        f"{name}{end}" for name in ("mqar", "aime") for end in (".json", "_answers.json", ".png")
    }
    assert {Path(file.path).name for file in files} == each | {"tasks.png", "results.json"}
    folder = Path(str(run.info.artifact_uri)) / "evaluation"
    cells = json.loads((folder / "results.json").read_text())["tasks"]["mqar"]["cells"]
    assert list(cells) == ["64", "128"]
    assert cells["64"]["mean"] == pytest.approx(run.data.metrics["eval/mqar/64"])
    assert cells["64"]["low"] <= cells["64"]["mean"] <= cells["64"]["high"]
    table = json.loads((folder / "aime_answers.json").read_text())
    assert len(table["data"]) == 2 and table["columns"][-1] == "score"


def test_a_model_that_does_not_generate_is_scored(place: Path) -> None:
    changes = {"checkpoint": "moba", "needle": None, "tasks": TASKS[:1]}
    results = evaluate(EvaluateRun.load(config_file(place, **changes)))
    assert results["bits_per_byte"]["model"]["bits_per_byte"] > 0
    assert list(results["tasks"]["mqar"]["cells"]) == ["64", "128"]


def test_results_go_into_a_given_run_and_leave_it_as_it_was(place: Path) -> None:
    parent, queue_dir = parent_run(place)
    before = client(place).get_run(parent)
    results = evaluate(EvaluateRun.load(config_file(place, needle=None)), run_id=parent, step=7)
    assert results["run_id"] == parent
    after = client(place).get_run(parent)
    assert (after.info.status, after.data.params) == (before.info.status, before.data.params)
    assert after.data.tags["nsa.job"] == "sft"
    (point,) = client(place).get_metric_history(parent, "eval/bits_per_byte")
    assert point.step == 7
    assert queue_dir.exists()


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"needle": {"lengths": [159]}}, "needle.lengths: 159 and 16 tokens for the answer"),
        ({"bits_per_byte": {"context_length": 161}}, "bits_per_byte.context_length=161 must not"),
        (
            {"tasks": [{"kind": "mqar", "lengths": [161]}]},
            "tasks.0: mqar: the longest of lengths are 161 tokens",
        ),
        (
            {
                "tasks": [
                    {"kind": "longbench", "folder": "l", "datasets": ["lcc"], "max_length": 97}
                ]
            },
            "tasks.0: longbench: max_length and the longest answer of datasets are 161 tokens",
        ),
        ({"tasks": [{**TASKS[1], "file": "no"}]}, "it should be JSON lines with `problem`"),
        ({"needle": {"lengths": [130], "values": 2}}, "130 and 32 tokens for the answer"),
        ({"engine": {"max_model_len": 135}}, "engine.max_model_len=135 must be at least 136"),
        ({"engine": {"max_model_len": 161}}, "engine: max_model_len=161 must not exceed the model"),
        (
            {"engine": {"num_kv_tokens": 153}, "needle": None, "tasks": TASKS},
            "engine.num_kv_tokens=153 must be at least 154",
        ),
        ({"checkpoint": "moba"}, "engine: attention.kind=moba has no cache"),
        ({"baselines": {}}, "policies need a model with attention.kind=full"),
        ({"checkpoint": "missing"}, "missing"),
        ({"checkpoint": "data"}, "data: has no config.json; an exported model is a folder with"),
        ({"checkpoint": "aime.jsonl"}, "aime.jsonl: has no config.json; an exported model is a"),
        ({"checkpoint": "models:/evaluated@nobody"}, "no model 'evaluated' with the alias"),
        ({"data": "nowhere"}, "nowhere/validation/manifest.json"),
        ({"data": "other"}, "was made with tokenizer"),
        ({"data": "empty"}, "empty/validation holds no tokens, but bits_per_byte, needle.filler="),
        ({"checkpoint": "cut"}, "cut/model.safetensors: is not a whole safetensors file"),
        (
            {"needle": {"lengths": [96, 64], "keys": 8, "values": 2, "queries": 2}},
            "needle.lengths=64 must be more than",
        ),
        ({"storage": "aime.jsonl"}, "error: storage=/"),
    ],
)
def test_what_does_not_fit_ends_with_its_name_and_status_1(
    place: Path,
    changes: dict[str, object],
    message: str,
    capsys: pytest.CaptureFixture[str],
) -> None:
    if changes.get("data") == "other" and not (place / "other").exists():
        make_other(place / "other")
    before = number_of_runs(place)
    with pytest.raises(SystemExit) as end:
        job.main(["--config", config_file(place, name="never", **changes)])
    assert end.value.code == 1
    said = capsys.readouterr().err
    assert message in said and "warning: " not in said
    assert number_of_runs(place) == before
    assert not (place / "runs" / "never").exists(), "no run waits to be delivered"


@pytest.mark.parametrize("flags", [[], ["--dry-run"]])
def test_a_budget_of_the_whole_context_is_said(
    place: Path, flags: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    changes = {"checkpoint": "full", "needle": None, "baselines": {"systems": ["full"]}}
    job.main(["--config", config_file(place, **changes), *flags])
    warning = "warning: baselines: at 64 tokens the budget is the whole context, and every policy"
    assert capsys.readouterr().err == f"{warning} reads everything\n"


def test_more_text_than_there_is_is_said(place: Path, capsys: pytest.CaptureFixture[str]) -> None:
    bits = {"context_length": 32, "position_buckets": 4, "tokens": 10**6}
    job.main(["--config", config_file(place, needle=None, bits_per_byte=bits)])
    warning = capsys.readouterr().err
    assert re.search(r"tokens=1000000: .*/data/validation holds \d+, all are read", warning)


def test_a_package_that_scores_a_task_is_missed_before_anything(
    place: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setitem(sys.modules, "jieba", None)
    before = number_of_runs(place)
    tasks = [{"kind": "longbench", "folder": "nowhere", "datasets": ["multifieldqa_zh"]}]
    with pytest.raises(SystemExit) as end:
        job.main(["--config", config_file(place, checkpoint="models:/not@there", tasks=tasks)])
    assert end.value.code == 1
    assert capsys.readouterr().err == (
        "error: tasks: longbench: multifieldqa_zh: scored with jieba, not installed here: "
        "pip install jieba\n"
    )
    assert number_of_runs(place) == before


def test_packages_that_score_tasks_are_not_imported_at_the_start() -> None:
    code = "import sys, jobs.evaluate; "
    code += "sys.exit(not {'jieba', 'rapidfuzz', 'rouge'}.isdisjoint(sys.modules))"
    # The working directory is another: what is imported is where this file is.
    subprocess.run([sys.executable, "-c", code], cwd=Path(__file__).parents[2], check=True)


def make_other(path: Path) -> Corpus:
    return make_corpus(path, vocab_size=310)


@pytest.mark.parametrize(
    "engine",
    [
        {"tensor_parallel_size": 2},
        {"dtype": "bfloat16"},
        {"hf_overrides": {"max_context": 320}},
    ],
    ids=lambda engine: next(iter(engine)),
)
def test_an_engine_has_the_model_that_is_measured(
    place: Path, engine: dict[str, object], capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as end:
        job.main(["--config", config_file(place, engine=engine)])
    assert end.value.code == 2
    assert f"engine: {next(iter(engine))} must stay as it is" in capsys.readouterr().err
    with pytest.raises(SystemExit):
        job.main(["--help"])
    keys = re.findall(r"^  engine\.(\w+)", capsys.readouterr().out, flags=re.MULTILINE)
    assert "max_num_seqs" in keys and next(iter(engine)) not in keys


def test_a_wrong_flag_ends_with_status_2_and_a_line(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as end:
        job.main([])
    assert end.value.code == 2
    said = "error: the following arguments are required: --config\n"
    assert capsys.readouterr().err == said


def test_a_mistyped_key_ends_with_status_2_before_anything(
    place: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as end:
        job.main(["--config", config_file(place), "--set", "needle.lenghts=[64]"])
    assert end.value.code == 2
    assert "did you mean 'lengths'" in capsys.readouterr().err
