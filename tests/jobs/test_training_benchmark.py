"""The training benchmark on a toy model: every kind of attention, failures, the page it becomes."""

import json
import os
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml

from jobs import training_benchmark
from jobs.ports import free_ports
from jobs.training_points import Point, attention_kernel, run_of
from jobs.training_report import joined, render, write_page
from jobs.training_scaling import Scaled, scaled
from nsa_kernels import full_attention
from nsa_platform.config.base import ConfigError
from nsa_platform.config.runs import PretrainRun
from nsa_platform.model import attention as attention_module
from nsa_platform.train.trial import Subject
from tests.platform.train.tiny_run import MODEL
from tests.platform.train.workers import start_workers

CONTEXTS = [16, 32]


@pytest.fixture(scope="module")
def config(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("config") / "tiny.yaml"
    tree = {
        "name": "tiny",
        "model": MODEL.model_dump(mode="json") | {"layers": 1},
        "data": {"path": "nowhere", "context_length": 48},
        # Rows and steps are the points': what stands here need not fit.
        "train": {"steps": 1, "tokens_per_step": 480, "activation_checkpointing": "full"},
        "cluster": {"num_workers": 5},
    }
    path.write_text(yaml.safe_dump(tree))
    return path


def benchmark(config: Path, target: Path, *more: str) -> dict[str, Any]:
    contexts = [str(context) for context in CONTEXTS]
    line = ["--config", str(config), "--json", str(target), "--contexts", *contexts]
    training_benchmark.main([*line, "--steps", "1", "--step-tokens", "32", *more])
    return json.loads(target.read_text())


@pytest.fixture(scope="module")
def result(config: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    target = tmp_path_factory.mktemp("result") / "tiny.json"
    return benchmark(config, target, "--attention", "nsa", "full", "full_sdpa")


def test_every_point_is_measured(result: dict[str, Any]) -> None:
    places = [(record["attention"], record["context"]) for record in result["records"]]
    kinds = ("nsa", "full", "full_sdpa")
    assert places == [(kind, context) for kind in kinds for context in CONTEXTS]
    assert (result["model"], result["workers"]) == (MODEL.name, 1)
    for record in result["records"]:
        assert record["recompute"] == "selective"
        assert record["value"] == pytest.approx(32 / record["step_s"])
        assert record["steps_s"] == [record["step_s"]]
        # On a CPU neither a peak nor memory is known.
        assert not {"mfu", "memory_gib"} & record.keys()


def test_modes_that_do_not_fit_give_way_and_other_failures_are_told(
    config: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    tried, calls = Subject.tried, []

    def too_small(self: Subject, stage: Any, **steps: int) -> Any:
        (mode,), context = stage.train.activation_checkpointing, stage.data.context_length
        calls.append((mode, context))
        if mode == "selective" or (mode == "branches" and context == 32):
            raise torch.OutOfMemoryError("CUDA out of memory")
        if context == 48:
            raise RuntimeError("no such kernel\nand much more")
        return tried(self, stage, **steps)

    monkeypatch.setattr(Subject, "tried", too_small)
    more = ["--attention", "nsa", "--recompute", "selective", "branches", "full"]
    with pytest.raises(SystemExit) as end:
        benchmark(config, tmp_path / "r.json", *more, "--contexts", "16", "32", "48")
    assert end.value.code == 1
    assert "1 of 3 points failed: RuntimeError: no such kernel\n" in capsys.readouterr().err
    result = json.loads((tmp_path / "r.json").read_text())
    assert [r["recompute"] for r in result["records"]] == ["branches", "full", "full"]
    assert ("selective", 32) not in calls and ("branches", 48) not in calls
    assert "| 48 | NSA | full | RuntimeError: no such kernel |" in render([result])


def one_of_several(rank: int, size: int, port: int, line: list[str]) -> None:
    """A worker as torchrun starts it; the second one never has room for `selective`."""
    place = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": size, "MASTER_PORT": port}
    os.environ |= {name: str(value) for name, value in place.items()}
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "TORCHELASTIC_RUN_ID": "benchmark"}
    tried = Subject.tried

    def too_small(self: Subject, stage: Any, **steps: int) -> Any:
        found = tried(self, stage, **steps)
        if rank == 1 and stage.train.activation_checkpointing == ("selective",):
            raise torch.OutOfMemoryError
        return found

    Subject.tried = too_small
    training_benchmark.main(line)


def test_workers_go_on_together_where_one_has_no_room(config: Path, tmp_path: Path) -> None:
    target = tmp_path / "r.json"
    line = ["--config", str(config), "--json", str(target), "--contexts", "32", "--steps", "1"]
    line += ["--attention", "nsa", "--set", "train.mesh.context_parallel_degree=2"]
    (port,) = free_ports(1)
    start_workers(one_of_several, port, line, size=2)
    result = json.loads(target.read_text())
    assert (result["workers"], result["mesh"]) == (2, "context 2, state over 2")
    assert result["command"].startswith("torchrun --nproc-per-node 2 -m jobs.training_benchmark")
    (record,) = result["records"]
    assert record["recompute"] == "full"
    assert record["value"] == pytest.approx(32 / record["step_s"] / 2)


def test_layers_may_differ_in_what_they_compute_again(
    config: Path, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    more = ["--attention", "nsa", "--recompute", "full,branches"]
    result = benchmark(config, tmp_path / "r.json", *more, "--set", "model.layers=2")
    assert [record["recompute"] for record in result["records"]] == ["full,branches"] * 2
    with pytest.raises(SystemExit) as end:
        benchmark(config, tmp_path / "s.json", "--recompute", "full,halves")
    assert end.value.code == 2
    assert "train.activation_checkpointing.1: " in capsys.readouterr().err
    assert not (tmp_path / "s.json").exists()


def test_the_record_says_how_memory_was_given_out(
    config: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    setting = "expandable_segments:True"
    monkeypatch.delenv("PYTORCH_ALLOC_CONF", raising=False)
    monkeypatch.setenv("PYTORCH_CUDA_ALLOC_CONF", setting)
    command = benchmark(config, tmp_path / "r.json", "--attention", "nsa")["command"]
    told = f"PYTORCH_CUDA_ALLOC_CONF={setting} python -m jobs.training_benchmark "
    assert command.startswith(told)


def test_nothing_fits(config: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def too_small(self: Subject, stage: Any, **steps: int) -> Any:
        raise torch.OutOfMemoryError

    monkeypatch.setattr(Subject, "tried", too_small)
    result = benchmark(config, tmp_path / "r.json", "--attention", "full", "--recompute", "full")
    failures = [record["failure"] for record in result["records"]]
    assert failures == ["out of memory", "out of memory at a shorter context"]


def test_dense_kernels_agree() -> None:
    torch.manual_seed(0)
    q, k, v = torch.randn(24, 4, 8), torch.randn(24, 2, 8), torch.randn(24, 2, 8)
    ends = torch.tensor([0, 12, 24], dtype=torch.int32)
    with attention_kernel("full_sdpa"):
        found = attention_module.full_attention(q, k, v, cu_seqlens=ends, scale=0.3)
    assert attention_module.full_attention is full_attention
    wanted = full_attention(q, k, v, cu_seqlens=ends, scale=0.3)
    torch.testing.assert_close(found, wanted)


def test_a_point_is_the_run_with_its_rows(config: Path) -> None:
    run = PretrainRun.load(config, ["cluster.num_workers=1", "model.max_context=64"])
    point = Point("full", 16, step_tokens=64, microbatch_tokens=40)
    tried = run_of(run, point, "none", workers=2)
    assert tried.model is not None and tried.model.attention.kind == "full"
    assert tried.train.sequences_per_microbatch == 2
    assert tried.train.tokens_per_step == 2 * 64
    with pytest.raises(ConfigError, match="needs a run with a model"):
        run_of(tried, point, "none", workers=2)


def test_bad_configuration_is_told_before_anything_runs(
    config: Path, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    with pytest.raises(SystemExit) as end:
        benchmark(config, tmp_path / "r.json", "--set", "train.mesh.context_parallel_degree=2")
    assert end.value.code == 2
    assert "context_parallel_degree=2" in capsys.readouterr().err


def test_dry_run_says_what_points_take(
    config: Path, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    line = ["--config", str(config), "--json", str(tmp_path / "r.json"), "--dry-run"]
    training_benchmark.main([*line, "--contexts", "32", "--recompute", "full"])
    shown = capsys.readouterr().out.splitlines()
    assert [row.split()[0] for row in shown] == ["nsa", "full_sdpa"]
    assert "GiB activations" in shown[0]
    assert not (tmp_path / "r.json").exists()


def test_page_and_picture(result: dict[str, Any], tmp_path: Path) -> None:
    rates = {"nsa/16": 1000.0, "nsa/32": 800.0, "full/32": 400.0, "full_sdpa/32": 500.0}
    for record in result["records"]:
        record["value"] = rates.get(record["name"], 900.0)
    write_page([result], tmp_path / "training.md")
    page = (tmp_path / "training.md").read_text()
    assert "NSA at 32 tokens has 80% of its rate at 16." in page
    assert "1.60x |" in page
    assert (tmp_path / "training_context.png").read_bytes().startswith(b"\x89PNG")


def test_several_workers_are_compared_with_one(result: dict[str, Any], tmp_path: Path) -> None:
    def rates(workers: int, mesh: str, recompute: str, *values: float) -> dict[str, Any]:
        return result | {
            "workers": workers,
            "mesh": mesh,
            "records": [
                record | {"recompute": recompute, "value": value}
                for record, value in zip(result["records"], values, strict=False)
            ],
        }

    alone = rates(1, "state over 1", "full", 1000.0, 800.0)
    four = rates(4, "state over 4", "full", 900.0, 760.0)
    context = rates(4, "context 4, state over 4", "full", 500.0)
    other = rates(4, "state over 4", "selective", 1100.0)
    found = scaled([alone, four, context, other])
    assert found == [
        Scaled("nsa", 16, "full", 4, "context 4", 500.0, 0.5),
        Scaled("nsa", 16, "full", 4, "state alone", 900.0, 0.9),
        Scaled("nsa", 32, "full", 4, "state alone", 760.0, 0.95),
    ]
    assert scaled([four, alone | {"commit": "another"}]) == []
    # Workers that share alike have one section, with the best of each context in the picture.
    sections = joined([four, context, other])
    assert [len(section["records"]) for section in sections] == [3, 1]
    page = render([alone, four, context, other])
    assert "NSA at 32 tokens has 69% of its rate at 16." in page
    assert "| 16 | NSA | full | 4 | context 4 | 500 | 50.0% |" in page
    write_page([alone, four], tmp_path / "training.md")
    assert (tmp_path / "training_scaling.png").read_bytes().startswith(b"\x89PNG")
