"""Clock, throughput, history and health: numbers by hand."""

import json
from types import SimpleNamespace

import pytest
import torch

from nsa_platform.model.probe import LayerHealth
from nsa_platform.train.health import health_figures, health_metrics, health_values
from nsa_platform.train.history import MOST_POINTS, History
from nsa_platform.train.metrics import StepClock, Throughput, memory_metrics, peak_flops

SPARSE = LayerHealth({"cmp": 0.5, "slc": 0.25, "win": 0.75}, [0.5, 0.0, 0.5], 0.9)
FULL = LayerHealth({"full": 1.0}, [], None)


def test_the_clock_leaves_pauses_out(monkeypatch: pytest.MonkeyPatch) -> None:
    now = [7.0]
    monkeypatch.setattr(
        "nsa_platform.train.metrics.time", SimpleNamespace(perf_counter=lambda: now[0])
    )
    clock = StepClock()
    for _ in range(2):
        with clock.data():
            now[0] += 0.25
        now[0] += 0.5
        clock.tick()
    with clock.pause():
        now[0] += 4.0
    assert clock.read() == (0.75, 0.25)
    now[0] += 2.0
    clock.tick()
    assert clock.read() == (2.0, 0.0)


def test_throughput() -> None:
    clock = StepClock()
    clock.tick()
    metrics = Throughput(100, 2.0, 1e3, dense_flops_per_token=6.0, workers=4).metrics(clock)
    step_s = metrics["train/step_s"]
    wanted = {
        "tokens_per_s": 100,
        "tps_per_worker": 25,
        "tflops_per_worker": 50e-12,
        "tflops_per_worker_dense": 150e-12,
        "mfu": 0.2,
        "mfu_dense": 0.6,
        "data_s": 0,
        "data_share": 0,
    }
    for name, value in wanted.items():
        assert metrics[f"train/{name}"] == pytest.approx(value / step_s)
    unknown = Throughput(100, 2.0, None).metrics(StepClock())
    assert not {"train/mfu", "train/mfu_dense"} & unknown.keys()


def test_a_cpu_has_no_known_peak() -> None:
    assert peak_flops(torch.device("cpu")) is None
    assert memory_metrics(torch.device("cpu")) == {}


def test_history_survives_json_and_stays_short() -> None:
    history = History(valid=[(10, 2.0)], health=[(1, health_values({0: SPARSE}))])
    for step in range(3 * MOST_POINTS):
        history.add_train(step, 1.0)
    assert len(history.train) <= MOST_POINTS
    assert history.train[0] == (0, 1.0)
    assert history.train[-1][0] > 3 * MOST_POINTS - 10
    assert History.from_dict(json.loads(json.dumps(history.to_dict()))) == history


def test_health_by_layer_and_branch() -> None:
    assert health_metrics({3: SPARSE}) == {
        "nsa/gate_mean/cmp/3": 0.5,
        "nsa/gate_mean/slc/3": 0.25,
        "nsa/gate_mean/win/3": 0.75,
        "nsa/selected_distance/0/3": 0.5,
        "nsa/selected_distance/1/3": 0.0,
        "nsa/selected_distance/2/3": 0.5,
        "nsa/selection_entropy/3": 0.9,
    }
    assert health_metrics({0: FULL}) == {"nsa/gate_mean/full/0": 1.0}


def test_figures_are_drawn_for_what_there_is() -> None:
    sparse = {0: SPARSE, 1: LayerHealth({"cmp": 0.1, "slc": 0.2, "win": 0.3}, [1.0], None)}
    names = set(health_figures([(1, health_values(sparse))], sparse, block_size=64))
    assert names == {
        "figures/gate_means.png",
        "figures/selection_entropy.png",
        "figures/selected_distance.png",
    }
    gated = health_figures([(1, health_values({0: FULL}))], {0: FULL}, block_size=None)
    assert set(gated) == {"figures/gate_means.png"}
    assert health_figures([], {}, block_size=None) == {}
