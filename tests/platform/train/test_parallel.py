"""Two workers compute what one does, sharded or replicated, and take over each other's state."""

import json
from pathlib import Path

import pytest
import torch.distributed as dist

from nsa_platform.config.data import LoaderConfig
from nsa_platform.config.train import TrainConfig
from nsa_platform.train import loss
from nsa_platform.train.preemption import TrainingPreempted
from tests.platform.train.tiny_run import (
    MODEL,
    MOE,
    VOCAB,
    Recorded,
    run,
    settings,
    write_data,
)
from tests.platform.train.workers import start_workers

# The same sums in another order: float32 with a few hundred terms.
ROUNDING = 2e-5
# bfloat16 keeps 8 bits; six steps of a toy model stay this near.
BFLOAT16_ROUNDING = 3e-2


def _worker(
    rank: int, size: int, folder: str, data: LoaderConfig, jobs: list[tuple[str, TrainConfig, bool]]
) -> None:
    """Run the jobs one after the other in a group of `size` processes."""
    # A file of its own for each group: an old one would name ports of processes that are gone.
    meeting = (Path(folder) / f"group-{size}-{jobs[0][0]}").as_uri()
    dist.init_process_group("gloo", init_method=meeting, rank=rank, world_size=size)
    for name, config, has_experts in jobs:
        place = Path(folder) / name
        loss.LOGITS_PER_CHUNK = 10 * VOCAB if "chunks" in name else 1 << 26
        steps: list[str] = []

        def leaves(steps: list[str] = steps, name: str = name) -> str | None:
            steps.append(name)
            is_told = name == "preempted" and rank == 1 and len(steps) >= 4
            return "told so" if is_told else None

        model = MOE if has_experts else MODEL
        try:
            recorded = run(config, data, place, model_config=model, notice=leaves)
        except TrainingPreempted as preempted:
            recorded = Recorded(lines=[str(preempted)])
        if rank == 0:
            (Path(folder) / f"{name}-{size}.json").write_text(
                json.dumps({"metrics": recorded.metrics, "lines": recorded.lines})
            )
    dist.destroy_process_group()


def _run_all(
    size: int, folder: Path, data: LoaderConfig, jobs: list[tuple[str, TrainConfig, bool]]
) -> dict[str, dict[int, dict[str, float]]]:
    if size == 1:
        _worker(0, 1, str(folder), data, jobs)
    else:
        start_workers(_worker, str(folder), data, jobs, size=size)
    found = {}
    for name, _, _ in jobs:
        tree = json.loads((folder / f"{name}-{size}.json").read_text())
        assert tree["lines"] == (
            ["saved step 4: worker 1: told so"] if name == "preempted" and size == 2 else []
        )
        found[name] = {int(step): metrics for step, metrics in tree["metrics"].items()}
    return found


def _losses(metrics: dict[int, dict[str, float]]) -> list[float]:
    return [metrics[step]["train/loss"] for step in sorted(metrics)]


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> dict[str, dict[int, dict[str, float]]]:
    """Every job once by two workers; `...-resumed` goes on with the other number of workers."""
    folder = tmp_path_factory.mktemp("runs")
    data = write_data(folder / "data")
    shard, replicate = settings(parallel="shard"), settings(parallel="replicate")
    half = {"steps": 3, "optimizer": {"learning_rate": 1e-2, "warmup_steps": 6}}
    whole = half | {"steps": 6}
    two = _run_all(
        2,
        folder,
        data,
        [
            ("shard", shard, False),
            ("shard-chunks", shard, False),
            ("replicate", replicate, False),
            ("experts", replicate, True),
            ("experts-shard", shard, True),
            ("bfloat16", settings(dtype="bfloat16"), False),
            ("two-to-one", settings(parallel="shard", **half), False),
            ("preempted", shard, False),
        ],
    )
    one = _run_all(
        1,
        folder,
        data,
        [
            ("alone", replicate, False),
            ("experts-alone", replicate, True),
            ("warm", settings(**whole), False),
            ("two-to-one", settings(parallel="replicate", **whole), False),
            ("one-to-two", settings(parallel="replicate", **half), False),
        ],
    )
    again = _run_all(2, folder, data, [("one-to-two", settings(parallel="shard", **whole), False)])
    three = _run_all(3, folder, data, [("preempted", shard, False), ("three", replicate, False)])
    return {
        **two,
        **one,
        **three,
        "two-to-one-begin": two["two-to-one"],
        "one-to-two-begin": one["one-to-two"],
        "one-to-two": again["one-to-two"],
    }


@pytest.mark.parametrize(
    ("name", "reference", "tolerance"),
    [
        ("shard", "alone", ROUNDING),
        ("shard-chunks", "shard", ROUNDING),
        ("replicate", "alone", ROUNDING),
        ("three", "alone", ROUNDING),
        ("experts-shard", "experts", ROUNDING),
        ("bfloat16", "alone", BFLOAT16_ROUNDING),
    ],
)
def test_two_workers_compute_what_one_computes(runs, name, reference, tolerance) -> None:
    assert _losses(runs[name]) == pytest.approx(_losses(runs[reference]), rel=tolerance)
    for metric in ("valid/loss", "valid/bits_per_byte", "train/grad_norm"):
        wanted = runs[reference][6][metric]
        assert runs[name][6][metric] == pytest.approx(wanted, rel=10 * tolerance)


def test_experts_balance_within_their_microbatch(runs) -> None:
    """The balance loss is a mean over each microbatch, so it depends a little on the cut."""
    assert _losses(runs["experts"]) == pytest.approx(_losses(runs["experts-alone"]), rel=1e-3)


@pytest.mark.parametrize("name", ["two-to-one", "one-to-two"])
def test_another_number_of_workers_goes_on(runs, name) -> None:
    assert sorted(runs[name]) == [4, 5, 6]
    losses = _losses(runs[f"{name}-begin"]) + _losses(runs[name])
    assert losses == pytest.approx(_losses(runs["warm"]), rel=ROUNDING)


def test_three_workers_go_on_where_one_of_two_was_told_to_leave(runs) -> None:
    """Eight rows in microbatches of two do not come out even between three."""
    assert sorted(runs["preempted"]) == [5, 6]
    assert _losses(runs["preempted"]) == pytest.approx(_losses(runs["alone"])[4:], rel=ROUNDING)


def test_bfloat16_is_not_float32(runs) -> None:
    assert _losses(runs["bfloat16"]) != _losses(runs["alone"])
