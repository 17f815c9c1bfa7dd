"""The loop learns, resumes bit for bit, and does not depend on how a step is cut up."""

import math
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch

from nsa_platform.config.data import LoaderConfig
from nsa_platform.config.model import ModelConfig
from nsa_platform.train import step
from nsa_platform.train.guard import TrainingDiverged
from nsa_platform.train.snapshots import snapshots
from tests.platform.train.tiny_run import CONTEXT, MOE, VOCAB, run, settings, write_data

pytestmark = pytest.mark.usefixtures("process_group")

# The same sums in another order: float32 with a few hundred terms.
ROUNDING = 2e-5


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> LoaderConfig:
    return write_data(tmp_path_factory.mktemp("data"))


def test_the_loss_falls(data: LoaderConfig, tmp_path: Path) -> None:
    config = settings(steps=30, validate_every_steps=15, checkpoint={"every_steps": 100})
    recorded = run(config, data, tmp_path)
    losses = recorded.losses()
    assert math.isclose(losses[0], math.log(VOCAB), rel_tol=0.3)
    assert losses[-1] < 0.7 * losses[0]
    assert recorded.metrics[30]["valid/loss"] < recorded.metrics[15]["valid/loss"]


def test_what_is_reported(data: LoaderConfig, tmp_path: Path) -> None:
    config = settings(log_every_steps=2, checkpoint={"every_steps": 100})
    recorded = run(config, data, tmp_path)
    assert sorted(recorded.metrics) == [2, 3, 4, 6]
    names = set(recorded.metrics[6])
    assert {
        *("train/loss", "train/lr", "train/grad_norm", "train/tokens", "train/tokens_per_s"),
        *("train/step_s", "train/data_s", "valid/loss", "valid/bits_per_byte"),
        *("nsa/gate_mean/cmp/0", "nsa/gate_mean/win/1", "nsa/selection_entropy/1"),
        "nsa/selected_distance/0/0",
    } <= names
    assert "train/mfu" not in names
    # A step between two that are logged, after which the model is validated.
    assert {"train/loss", "train/tokens_per_s", "valid/loss"} <= set(recorded.metrics[3])
    assert "valid/loss" not in recorded.metrics[2]
    assert recorded.metrics[6]["train/tokens"] == 6 * 8 * CONTEXT


def test_six_steps_are_three_and_three(data: LoaderConfig, tmp_path: Path) -> None:
    straight = run(settings(), data, tmp_path / "straight")
    config = settings()
    # The first half must not know that the run ends early: the schedule is that of six steps.
    interrupted = _until_step_three(config, data, tmp_path / "parts")
    resumed = run(config, data, tmp_path / "parts")
    assert interrupted + resumed.losses() == straight.losses()
    assert sorted(resumed.metrics) == [4, 5, 6]
    for name, weight in straight.weights.items():
        assert torch.equal(resumed.weights[name], weight), name


def _until_step_three(config, data: LoaderConfig, folder: Path) -> list[float]:
    """Losses of the steps up to the snapshot of step 3, as a crash after step 4 leaves them."""
    losses = run(config, data, folder).losses()
    for beyond in sorted(folder.iterdir())[1:]:
        for file in beyond.iterdir():
            file.unlink()
        beyond.rmdir()
    assert [place.name for place in folder.iterdir()] == ["step-00000003"]
    return losses[:3]


@pytest.mark.parametrize("rows", [1, 4, 8])
def test_microbatches_do_not_matter(data: LoaderConfig, tmp_path: Path, rows: int) -> None:
    pair = run(settings(), data, tmp_path / "pair")
    other = run(settings(sequences_per_microbatch=rows), data, tmp_path / "other")
    assert other.losses() == pytest.approx(pair.losses(), rel=ROUNDING)
    for name in ("valid/loss", "valid/bits_per_byte"):
        assert other.metrics[6][name] == pytest.approx(pair.metrics[6][name], rel=ROUNDING)


def test_experts_train_with_a_balance_loss(data: LoaderConfig, tmp_path: Path) -> None:
    recorded = run(settings(), data, tmp_path, model_config=MOE)
    last = recorded.metrics[6]
    assert last["train/balance_loss"] > 0
    loads = [last[f"moe/load/1/{expert}"] for expert in range(4)]
    assert sum(loads) == pytest.approx(4)
    assert (last["moe/load_max/1"], last["moe/load_min/1"]) == (max(loads), min(loads))
    assert "moe/load_max/1" in recorded.metrics[2]
    assert "moe/load/1/0" not in recorded.metrics[2]
    assert recorded.losses()[-1] < recorded.losses()[0]


def test_a_divergence_stops_before_it_is_saved(data: LoaderConfig, tmp_path: Path) -> None:
    config = settings(optimizer={"learning_rate": 1e30, "max_grad_norm": 1e30})
    with pytest.raises(TrainingDiverged, match=r"train/\w+ is (nan|inf) at step 6, the last of 5"):
        run(config, data, tmp_path)
    assert not list(tmp_path.glob("step-*"))


def test_a_broken_step_is_skipped_and_not_saved(
    data: LoaderConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    straight = run(settings(), data, tmp_path / "straight")
    clip = step.clip_gradients
    calls: list[int] = []

    def broken_at_step_three(*arguments: Any) -> torch.Tensor:
        calls.append(1)
        norm = clip(*arguments)
        return norm * math.nan if len(calls) == 3 else norm

    monkeypatch.setattr(step, "clip_gradients", broken_at_step_three)
    recorded = run(settings(), data, tmp_path / "broken")
    assert recorded.lines == ["step 3 was skipped: train/grad_norm is nan"]
    assert recorded.metrics[3]["train/skipped_steps"] == 1
    assert "train/grad_norm" not in recorded.metrics[3]
    assert recorded.losses()[:3] == straight.losses()[:3]
    # The weights are those of step 2, so the loss of the next step is another.
    assert recorded.losses()[3] != straight.losses()[3]
    assert [each.step for each in snapshots(str(tmp_path / "broken"))] == [6, 4]
    shutil.rmtree(tmp_path / "broken" / "step-00000006")
    assert run(settings(), data, tmp_path / "broken").losses() == recorded.losses()[4:]


@pytest.mark.filterwarnings("ignore")  # the compiler warns of what it meets inside itself
def test_compiled_layers_learn_the_same(data: LoaderConfig, tmp_path: Path) -> None:
    short = {"steps": 2, "validate_every_steps": 9, "tokens_per_step": 2 * CONTEXT}
    # One layer, for each is compiled; it has experts, which are left out.
    tree = MOE.model_dump()
    model = ModelConfig.parse(tree | {"layers": 1, "moe": tree["moe"] | {"dense_layers": 0}})
    plain = run(settings(**short), data, tmp_path / "plain", model_config=model)
    config = settings(compile=True, **short)
    compiled = run(config, data, tmp_path / "compiled", model_config=model)
    assert compiled.losses() == pytest.approx(plain.losses(), rel=1e-3)
    for name in ("valid/loss", "nsa/gate_mean/cmp/0"):
        assert compiled.metrics[2][name] == pytest.approx(plain.metrics[2][name], rel=1e-3)
