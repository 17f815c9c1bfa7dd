"""What jobs leave in MLflow for people: runs below one run, reports, loads, preparations."""

import json
from pathlib import Path

import pytest

from jobs import decode_arithmetic, gates, needle_record, record
from jobs.gates import record as record_gates
from jobs.load_record import record_load
from jobs.model_tags import model_tags
from jobs.preparation_record import record_preparation
from jobs.run_report import evaluation_report, training_report
from jobs.serving_load import Sample, summary
from jobs.training_inputs import Inputs, Origin
from nsa_platform.config.runs import EvaluateRun, PrepareDataRun, PretrainRun
from nsa_platform.config.train import TrackingConfig
from nsa_platform.data.manifest import SourceRecord, TokenizerRecord
from nsa_platform.data.plan import Prepared
from nsa_platform.data.shards import ShardWriter
from nsa_platform.tracking import Tracker, open_parent, open_run
from nsa_platform.tracking.library import MlflowClient, Run
from nsa_platform.tracking.store import connect

ROOT = Path(__file__).resolve().parents[2]
FACTS = {
    "step": 160,
    "first_loss": 7.06,
    "last_loss": 4.5,
    "metrics": {"valid/loss": 4.6, "valid/bits_per_byte": 2.16, "train/tokens_per_s": 1234.5},
    "device": "NVIDIA H100",
    "model": "/runs/model",
    "registered": "models:/nsa@champion (version 3)",
}


@pytest.fixture(scope="module")
def tracking(tmp_path_factory: pytest.TempPathFactory) -> TrackingConfig:
    """A store of its own; runs stand below `road`."""
    place = tmp_path_factory.mktemp("store")
    return TrackingConfig(uri=f"sqlite:///{place}/mlflow.db", experiment="e", parent="road")


@pytest.fixture(autouse=True)
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(tmp_path / "home"))


def runs_of(tracking: TrackingConfig, name: str) -> tuple[MlflowClient, list[Run]]:
    client = connect(tracking.uri)
    experiment = client.get_experiment_by_name("e")
    assert experiment is not None
    found = client.search_runs([experiment.experiment_id], f"run_name = '{name}'")
    return client, list(found)


def pretrain_run() -> PretrainRun:
    return PretrainRun.load(ROOT / "jobs/configs/pretrain/quickstart.yaml")


def test_runs_of_one_road_stand_below_one_run(tracking: TrackingConfig, tmp_path: Path) -> None:
    model = pretrain_run().model
    assert model is not None
    for name in ("data", "train"):
        handle = open_run(
            tracking,
            job=name,
            name=name,
            params={},
            tags=model_tags(model, 512) if name == "train" else {},
            yaml_text="a: 1\n",
            queue_dir=tmp_path / name,
        )
        _, (above,) = runs_of(tracking, "road")
        assert above.info.status == "RUNNING", "as the run below it that moved last"
        Tracker(handle).finish("FINISHED")
    client, (above,) = runs_of(tracking, "road")
    for name in ("data", "train"):
        (run,) = runs_of(tracking, name)[1]
        assert run.data.tags["mlflow.parentRunId"] == above.info.run_id
        assert run.info.status == "FINISHED"
    assert above.info.status == "FINISHED"
    assert "mlflow.parentRunId" not in above.data.tags
    tags = runs_of(tracking, "train")[1][0].data.tags
    assert tags["nsa.attention"] == "nsa" and tags["nsa.context"] == "512"
    assert int(tags["nsa.parameters"]) > 1_000_000

    tracker = Tracker(open_parent(tracking, queue_dir=tmp_path / "above"))
    tracker.log_text("# all of it\n", "report.md")
    assert tracker.finish("FINISHED") == 0
    assert [file.path for file in client.list_artifacts(above.info.run_id)] == ["report.md"]


def test_gates_of_runs_one_after_the_other(tracking: TrackingConfig, tmp_path: Path) -> None:
    folders = []
    for name, steps, gate in (("gates-pretrain", 4, 0.5), ("gates-sft", 2, 0.9)):
        queue = tmp_path / name
        handle = open_run(
            tracking, job="x", name=name, params={}, tags={}, yaml_text="", queue_dir=queue
        )
        tracker = Tracker(handle)
        for step in range(2, steps + 1, 2):
            for layer in (0, 1):
                means = {"cmp": gate, "slc": gate / step, "win": 0.1 * layer}
                tracker.log_metrics(
                    {f"nsa/gate_mean/{key}/{layer}": value for key, value in means.items()}, step
                )
        assert tracker.finish("FINISHED") == 0
        facts = {"run_id": handle.run_id, "handle": {"uri": tracking.uri}, "step": steps}
        folder = tmp_path / "runs" / name
        folder.mkdir(parents=True)
        (folder / "finished.json").write_text(json.dumps(facts | {"device": "cpu"}))
        folders.append(folder)
    found = record_gates(folders, name="gates")
    values = {each["name"]: each["value"] for each in found["records"]}
    assert values["gates-pretrain/slc/first"] == pytest.approx(0.25)
    assert values["gates-pretrain/slc/last"] == pytest.approx(0.125)
    assert values["gates-sft/cmp/last"] == pytest.approx(0.9)
    assert values["gates-sft/win/last"] == pytest.approx(0.05)  # a mean of two layers
    assert [phase["begins"] for phase in found["phases"]] == [0, 4]
    assert [step for phase in found["phases"] for step, _ in phase["gates"]] == [2, 4, 6]
    assert found["command"] == f"python -m jobs.gates {folders[0]} {folders[1]}"
    with pytest.raises(
        ValueError, match=r"gates-sft: its run gates-sft has the name of one before"
    ):
        record_gates([*folders, folders[1]])
    with pytest.raises(
        ValueError, match=r"nowhere: holds no finished run \(finished\.json: No such"
    ):
        record_gates([tmp_path / "nowhere"])
    # It lies where the flags say, and nowhere else; and is drawn again from its file.
    kept, picture = tmp_path / "new" / "gates_tiny.json", tmp_path / "docs" / "gates.png"
    stored = {path.name for path in (ROOT / "results").iterdir()}
    gates.main([*map(str, folders), "--json", str(kept)])
    assert json.loads(kept.read_text())["name"] == "gates_tiny" and not picture.exists()
    assert {path.name for path in (ROOT / "results").iterdir()} == stored
    gates.main(["--draw", str(kept), "--picture", str(picture)])
    assert picture.read_bytes().startswith(b"\x89PNG")


def test_a_record_without_gates_is_named(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "other.json"
    path.write_text('{"records": []}')
    with pytest.raises(SystemExit):
        gates.main(["--draw", str(path), "--picture", str(tmp_path / "x.png")])
    assert f"{path} holds no gates: it has no phases" in capsys.readouterr().err


def test_needles_of_evaluations_the_best_first(
    tracking: TrackingConfig, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    ids = []
    for name, lost in (("worse", 3), ("better", 1)):
        handle = open_run(
            tracking,
            job="evaluate",
            name=name,
            params={},
            tags={},
            yaml_text="",
            queue_dir=tmp_path,
        )
        tracker = Tracker(handle)
        cells = [(length, depth) for length in (64, 128) for depth in (0.0, 1.0)] * 2
        trials = [
            {"length": length, "depth": depth, "exact": float(number >= lost)}
            for number, (length, depth) in enumerate(cells)
        ]
        count = {"queries": 9, "keys_per_query": 7.0, "union_per_group": 8.0, "bytes_per_step": 1.0}
        reads = [
            {"task": task, "length": 64, "phase": "decode", "count": count}
            for task in ("needle", "vt")
        ]
        policy = {"needle_exact": 0.25, "intervals": {"needle_exact": [0.1, 0.5]}, "reads": reads}
        results = {
            "device": "cpu",
            "needle": {"exact": 1 - lost / 8, "trials": trials},
            "baselines": {"low": policy, "high": {**policy, "needle_exact": 0.375}},
        }
        tracker.log_dict(results, "evaluation/results.json")
        rows = [
            [policy, *trial.values()] for policy in ("model", "low", "high") for trial in trials
        ]
        columns = ["policy", *trials[0]]
        tracker.log_table(columns, rows, "evaluation/baselines_needle_trials.json")
        assert tracker.finish("FINISHED") == 0
        ids.append(handle.run_id)
    target, picture = tmp_path / "needles.json", tmp_path / "needles.png"
    command = [*ids, "--uri", tracking.uri, "--json", str(target), "--picture", str(picture)]
    needle_record.main(command)
    found = json.loads(target.read_text())
    values = {each["name"]: (each["value"], each.get("low")) for each in found["records"]}
    (read,) = (each for each in found["records"] if each["name"] == "worse/low/decode/64")
    assert (read["value"], read["union_per_group"], read["unit"]) == (7.0, 8.0, "keys per query")
    assert [grid["run"] for grid in found["grids"]] == ["better", "worse"]
    # The first needles are lost: 64/0.0, 64/1.0 and 128/0.0 of the worse run's eight.
    assert values["worse/needle_exact"] == (0.625, pytest.approx(0.3057, abs=1e-4))
    assert [values[f"worse/needle_exact/{length}"][0] for length in (64, 128)] == [0.5, 0.75]
    assert found["grids"][1]["cells"] == [[[0, 1], [0, 1]], [[0, 1], [1, 1]]]
    assert found["grids"][1]["policies"]["low"]["cells"] == found["grids"][1]["cells"]
    ranked = [name for name in values if name.startswith("better/needle_exact/")]
    assert ranked[2:] == ["better/needle_exact/high", "better/needle_exact/low"]
    assert picture.read_bytes().startswith(b"\x89PNG")
    assert "better/needle_exact: 0.875" in capsys.readouterr().out
    again = tmp_path / "again.png"
    needle_record.main(["--draw", str(target), "--picture", str(again)])
    assert again.read_bytes() == picture.read_bytes()
    needle_record.main(["worse", "--draw", str(target), "--picture", str(again)])
    assert again.read_bytes() != picture.read_bytes()
    assert capsys.readouterr().out == ""
    other = tmp_path / "others.json"
    other.write_text(json.dumps({**found, "grids": found["grids"][:1]}))
    both = ["others/better", "worse", "needles/better", "--draw", str(target), str(other)]
    needle_record.main([*both, "--picture", str(again)])
    broken = {**found["grids"][0], "cells": [[[]]]}
    for name, grids in (("empty", [broken]), ("runs", [{"run": "a"}]), ("tree", {"run": "a"})):
        (tmp_path / f"{name}.json").write_text(json.dumps({**found, "grids": grids}))
    for wrong, line in (
        (["better", *both[3:]], "no run better: there are needles/better, worse, others/better"),
        (["worse", "worse", *both[3:]], "a run must be named once"),
        (["--draw", str(target), str(target)], "the same name: needles/better, needles/worse"),
        (["--draw", str(tmp_path / "empty.json")], "empty.json: no grid of needles"),
        (["--draw", str(tmp_path / "runs.json")], "runs.json holds no needles"),
        (["--draw", str(tmp_path / "tree.json")], "tree.json holds no needles"),
        (["best", "--draw", str(target)], "no run best: there are better, worse"),
        (["--draw", str(ROOT / "results" / "kernels.json")], "kernels.json"),
        (ids, "give ids of runs, --uri and --json, or --draw"),
        (["--draw", str(target), "--uri", "x"], "and not with --uri"),
    ):
        with pytest.raises(SystemExit):
            needle_record.main([*wrong, "--picture", str(again)])
        assert line in capsys.readouterr().err
    assert found["command"].split()[2:] == ["jobs.needle_record", *command]
    for runs, line in ((["0" * 32], "0" * 32), ([ids[0], ids[0]], "a run must be named once")):
        with pytest.raises(SystemExit):
            needle_record.main([*runs, *command[2:]])
        assert line in capsys.readouterr().err
    half = [*command[:-3], str(tmp_path / "half.json"), "--picture", "/proc/x.png"]
    with pytest.raises(SystemExit):
        needle_record.main(half)
    assert "x.png" in capsys.readouterr().err and not (tmp_path / "half.json").exists()
    other = open_run(
        tracking, job="sft", name="other", params={}, tags={}, yaml_text="", queue_dir=tmp_path
    )
    assert Tracker(other).finish("FINISHED") == 0
    with pytest.raises(ValueError, match=r"other: must be a run of jobs\.evaluate, is one of sft"):
        needle_record.record([str(other.run_id)], uri=tracking.uri)
    older = open_run(
        tracking, job="evaluate", name="older", params={}, tags={}, yaml_text="", queue_dir=tmp_path
    )
    tracker = Tracker(older)
    tracker.log_dict({"needle": {"exact": 1, "trials": trials}}, "evaluation/results.json")
    assert tracker.finish("FINISHED") == 0
    with pytest.raises(ValueError, match="older: its results say no 'device': evaluate anew"):
        needle_record.record([str(older.run_id)], uri=tracking.uri)
    again = open_run(
        tracking, job="evaluate", name="worse", params={}, tags={}, yaml_text="", queue_dir=tmp_path
    )
    tracker = Tracker(again)
    results = {"device": "cpu", "needle": {"exact": 1, "trials": trials}}
    tracker.log_dict(results, "evaluation/results.json")
    assert tracker.finish("FINISHED") == 0
    with pytest.raises(ValueError, match="runs must not have the same name: worse"):
        needle_record.record([*ids, str(again.run_id)], uri=tracking.uri)


def test_a_parent_must_be_named(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"tracking\.parent names no run"):
        open_parent(TrackingConfig(), queue_dir=tmp_path)


def test_a_load_is_a_run_with_its_pictures(tracking: TrackingConfig) -> None:
    samples = [Sample(100, 3, ttft_s=0.5, itl_s=(0.1, 0.3), e2el_s=0.9), Sample(9, error="no")]
    result = {"model_id": "tiny", "input_len": 100, "output_len": 3, **summary(samples, 2.0)}
    run_id = record_load(
        tracking,
        base_url="http://127.0.0.1:1",
        settings={"num_prompts": "2"},
        result=result,
        samples=samples,
    )
    client, (run,) = runs_of(tracking, "benchmark-tiny-100-3")
    assert run.info.run_id == run_id and run.info.status == "FINISHED"
    assert run.data.metrics["serve/mean_ttft_ms"] == 500
    assert run.data.metrics["serve/output_throughput"] == 1.5
    assert run.data.metrics["serve/failed"] == 1
    assert run.data.params == {"num_prompts": "2"}
    figures = [file.path for file in client.list_artifacts(run.info.run_id, "figures")]
    assert figures == ["figures/latencies.png"]
    kept = Path(client.download_artifacts(run.info.run_id, "benchmark.json"))
    assert json.loads(kept.read_text()) == result


def test_a_preparation_is_a_run_with_its_data(tracking: TrackingConfig, tmp_path: Path) -> None:
    run = PrepareDataRun.parse(
        {
            "name": "text",
            "corpus": {"inputs": [str(tmp_path)]},
            "tokenizer": {"train_vocab_size": 300},
            "output": str(tmp_path / "out"),
        }
    )
    record = TokenizerRecord(fingerprint="0" * 64, vocab_size=300, eos_id=0, pad_id=1)
    for split, rows in (("train", 2), ("validation", 0)):
        writer = ShardWriter(
            f"{run.output}/{split}", kind="text", split=split, tokenizer=record, shard_tokens=100
        )
        for _ in range(rows):
            writer.add([2, 3, 0], text_bytes=5)
        writer.finish(SourceRecord(files=1, bytes=10, documents=rows))
    done = Prepared(
        fingerprint="f",
        files=1,
        source_bytes=10,
        documents={"train": 2, "validation": 0},
        tokens={"train": 6, "validation": 0},
        text_bytes={"train": 10, "validation": 0},
        shards={"train": 1, "validation": 0},
        digests={},
        skipped={"empty": 3},
        replaced_utf8=0,
        vocab_size=300,
        parts=1,
        reused_parts=0,
    )
    record_preparation(run, tracking, done, seconds=2.5)
    _, (found,) = runs_of(tracking, "text")
    assert found.data.metrics["data/train_tokens"] == 6
    assert found.data.metrics["data/skipped_documents"] == 3
    assert found.data.metrics["data/seconds"] == 2.5
    assert found.inputs is not None
    (dataset,) = found.inputs.dataset_inputs
    assert dataset.tags[0].value == "training", "an empty split is no input"


def test_a_training_report_says_what_where_and_what_it_cost() -> None:
    run = pretrain_run()
    assert run.model is not None
    priced = run.model_copy(
        update={"cluster": run.cluster.model_copy(update={"price_per_worker_hour": 2.5})}
    )
    described = ({"data_digest": "d" * 64},)
    inputs = Inputs((True,), described, None, [])
    origin = Origin(model=run.model, start_from=None, local=None)
    report = training_report(priced, origin, inputs, FACTS, seconds=3 * 3600)
    for words in (
        "# pretrain",
        "nsa-quickstart, nsa attention",
        "random weights",
        "runs/quickstart/text, digest dddddddddddd |",
        "327,680 tokens in 160 steps, rows of 512 |",
        "2 x NVIDIA H100",
        "3 h 0 min 0 s",
        "6.000 worker hours, 15.00 at 2.5 each",
        "| training loss, nats per token | 7.060 | 4.500 |",
        "| held-out bits per byte |  | 2.160 |",
        "models:/nsa@champion (version 3)",
    ):
        assert words in report
    assert "utilization" not in report, "what was not measured is not shown"
    resumed = Inputs((True,), described, {"step": 80}, [])
    report = training_report(run, origin, resumed, FACTS, seconds=61)
    assert "1 min 1 s, since step 80, where this attempt began" in report
    assert "0.034 worker hours, since step 80" in report


def test_an_evaluation_report_shows_what_was_measured() -> None:
    run = EvaluateRun.load(ROOT / "jobs/configs/evaluate/quickstart.yaml")
    results = {
        "device": "CPU",
        "bits_per_byte": {"model": {"bits_per_byte": 2.16, "nats_per_token": 4.6}},
        "needle": {"exact": 0.5, "tokens": 0.75, "lift": 1.25, "trials": [{}] * 30},
        "baselines": {
            "quest": {
                "bits_per_byte": 2.5,
                "needle_exact": 0.5,
                "needle_tokens": 0.25,
                "mqar/512": 0.375,
                "intervals": {
                    "needle_exact": [0.3, 0.7],
                    "needle_tokens": [0.125, 0.5],
                    "mqar/512": [0.25, 0.5],
                },
                "reads": [{"task": "text", "count": {"keys_per_query": 39.96}}],
            }
        },
        "tasks": {"mqar": {"cells": {"512": {"samples": 8, "mean": 0.5, "low": 0.2, "high": 0.8}}}},
    }
    report = evaluation_report(run, results, seconds=5)
    for words in (
        "models:/nsa-quickstart@champion",
        "| model | 2.160 | 4.600 |",
        "| number written exactly | 50% |",
        "| quest | 2.500 | 50% (30 to 70) | 25% (12 to 50) | 40.0 |",
        "| mqar | 512 | quest | 0.375 | 0.250 to 0.500 |",
        "| mqar | 512 | 8 | 0.500 | 0.200 to 0.800 |",
    ):
        assert words in report


@pytest.mark.parametrize(
    ("job", "more"),
    [(gates, ["--picture", "x.png"]), (decode_arithmetic, ["--picture", "x.png"]), (record, [])],
    ids=["gates", "decode_arithmetic", "record"],
)
@pytest.mark.parametrize(
    ("text", "reason"),
    [("# Heading", "is not JSON"), ('{"points": []}', "holds no measured figures")],
)
def test_a_file_that_is_no_record_is_named(job, more, text, reason, tmp_path, capsys):
    path = tmp_path / "other.json"
    path.write_text(text)
    with pytest.raises(SystemExit):
        job.main(["--draw", str(path), *more])
    assert f"{path} {reason}" in capsys.readouterr().err


def test_a_name_is_no_way_out_of_the_results(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit):
        record.main([str(tmp_path), "--device", "cpu", "--name", "../../other"])
    assert "--name must be a plain name, got ../../other" in capsys.readouterr().err
