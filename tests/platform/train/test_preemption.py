"""A notice saves the state at once; what is trained afterwards is what would have been."""

import signal
from pathlib import Path

import pytest
import torch

from nsa_platform.config.data import LoaderConfig
from nsa_platform.train.notice import TerminationNotice
from nsa_platform.train.preemption import TrainingPreempted
from tests.platform.train.tiny_run import run, settings, write_data


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> LoaderConfig:
    return write_data(tmp_path_factory.mktemp("data"))


@pytest.mark.usefixtures("process_group")
def test_a_preempted_run_loses_no_step(data: LoaderConfig, tmp_path: Path) -> None:
    straight = run(settings(), data, tmp_path / "straight")
    asked: list[int] = []

    def at_the_fourth_step() -> str | None:
        asked.append(1)
        return "the node goes" if len(asked) >= 4 else None

    with pytest.raises(TrainingPreempted, match="saved step 4: worker 0: the node goes"):
        run(settings(), data, tmp_path / "parts", notice=at_the_fourth_step)
    names = sorted(place.name for place in (tmp_path / "parts").iterdir())
    assert names == ["step-00000003", "step-00000004"]
    resumed = run(settings(), data, tmp_path / "parts")
    assert sorted(resumed.metrics) == [5, 6]
    assert resumed.losses() == straight.losses()[4:]
    for name, weight in straight.weights.items():
        assert torch.equal(resumed.weights[name], weight), name


@pytest.mark.usefixtures("process_group")
def test_a_notice_at_the_last_step_lets_the_run_finish(data: LoaderConfig, tmp_path: Path) -> None:
    config = settings(steps=1)
    recorded = run(config, data, tmp_path, notice=lambda: "too late")
    assert sorted(recorded.metrics) == [1]


def test_sigterm_is_a_notice_while_it_is_heeded_and_an_order_otherwise() -> None:
    orders: list[int] = []
    before = signal.signal(signal.SIGTERM, lambda number, _: orders.append(number))
    try:
        notice = TerminationNotice()
        notice.install()
        signal.raise_signal(signal.SIGTERM)
        assert (notice(), len(orders)) == (None, 1)
        with notice.heeded():
            signal.raise_signal(signal.SIGTERM)
            assert notice() == "it was told to end (SIGTERM)"
            assert len(orders) == 1
            signal.raise_signal(signal.SIGTERM)
            assert len(orders) == 2
        signal.raise_signal(signal.SIGTERM)
        assert len(orders) == 3
    finally:
        signal.signal(signal.SIGTERM, before)
