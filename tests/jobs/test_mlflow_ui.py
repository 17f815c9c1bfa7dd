"""What a run has recorded is seen in MLflow's real pages in a real browser, offline."""

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

from nsa_platform import figures
from nsa_platform.config.train import TrackingConfig
from nsa_platform.tracking import Tracker, open_run, register_model
from nsa_platform.tracking.store import connect
from tests.jobs.mlflow_pages import assert_curve_visible, need_chromium, open_page, pages_of

pytestmark = [pytest.mark.browser, pytest.mark.cluster]


@dataclass(frozen=True)
class Recorded:
    uri: str
    run_id: str


@pytest.fixture(scope="module")
def recorded(tmp_path_factory: pytest.TempPathFactory) -> Recorded:
    """A store with one finished run: curves, a figure, a registered model."""
    need_chromium()
    place = tmp_path_factory.mktemp("ui")
    config = TrackingConfig(uri=f"sqlite:///{place}/mlflow.db", experiment="seen")
    handle = open_run(
        config,
        job="pretrain",
        name="seen-run",
        params={"train": {"steps": 30}},
        tags={},
        yaml_text="a: 1\n",
        queue_dir=place / "queue",
    )
    assert handle.run_id is not None
    tracker = Tracker(handle)
    for step in range(1, 31):
        tracker.log_metrics({"train/loss": 5 / step, "train/lr": 0.1, "valid/loss": 6 / step}, step)
    curve = [(step, 5 / step) for step in range(1, 31)]
    tracker.log_figure(figures.loss_curve(curve), "figures/loss.png")
    assert tracker.finish("FINISHED") == 0
    (place / "model").mkdir()
    (place / "model" / "config.json").write_text("{}")
    register_model(handle, place / "model", "seen-model", "champion")
    return Recorded(handle.uri, handle.run_id)


@pytest.fixture(scope="module")
def address(recorded: Recorded) -> Iterator[str]:
    with pages_of(recorded.uri) as address:
        yield address


def test_a_curve_is_seen(recorded: Recorded, address: str, tmp_path: Path) -> None:
    picture = tmp_path / "page.png"
    assert_curve_visible(address, "seen", recorded.run_id, "train/loss", screenshot=picture)
    assert picture.stat().st_size > 10_000


def test_figure_and_model_are_seen(recorded: Recorded, address: str) -> None:
    experiment = connect(recorded.uri).get_experiment_by_name("seen")
    assert experiment is not None
    run = f"{address}/#/experiments/{experiment.experiment_id}/runs/{recorded.run_id}"
    with open_page(f"{run}/artifacts/figures/loss.png") as page:
        page.wait_for_function(
            "[...document.images].some(image => image.naturalWidth >= 900)", timeout=60_000
        )
    with open_page(f"{address}/#/models/seen-model") as page:
        page.get_by_text("champion").first.wait_for()
