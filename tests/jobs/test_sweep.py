"""Sweeps: which runs they have, and what their comparison says. test_training.py trains one."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml
from scipy import stats

from jobs import sweep
from jobs.sweep_record import QUANTILES, draw, interval, report_of, summary_of
from jobs.sweeping import Sweep
from nsa_platform.config.base import ConfigError
from nsa_platform.config.model import NsaAttentionConfig
from nsa_platform.config.runs import SweepRun

ROOT = Path(__file__).resolve().parents[2]
BASE = ROOT / "jobs/configs/pretrain/smoke.yaml"


def config(**changes: Any) -> SweepRun:
    tree = {
        "name": "s",
        "base": str(BASE),
        "seeds": [3, 4],
        "overrides": ["train.steps=8"],
        "variants": [
            {"name": "wide", "overrides": ["model.ffn_width=96"]},
            {"name": "short", "overrides": ["train.steps=4"], "seeds": [4]},
        ],
    }
    return SweepRun.parse(tree | changes)


def test_runs_are_variants_times_seeds_with_the_overrides_in_order() -> None:
    runs = [trial.run for trial in Sweep.plan(config()).trials]
    assert [run.name for run in runs] == ["s-wide-seed3", "s-wide-seed4", "s-short-seed4"]
    assert [(run.train.seed, run.data.seed) for run in runs] == [(3, 3), (4, 4), (4, 4)]
    assert [run.train.steps for run in runs] == [8, 8, 4]
    assert [run.model.ffn_width == 96 for run in runs if run.model] == [True, True, False]
    assert {run.tracking.parent for run in runs} == {"s"}


def test_sizes_are_swept_around_the_papers() -> None:
    trials = Sweep.plan(SweepRun.load(ROOT / "jobs/configs/sweep/sizes.yaml")).trials
    sizes, shares = [], []
    for trial in trials:
        assert trial.run.model is not None
        heads = trial.run.model.attention
        assert isinstance(heads, NsaAttentionConfig)
        l, d = heads.compression_block_size, heads.compression_stride
        chosen = heads.selection_block_size, heads.num_selected_blocks
        sizes.append((l, d, *chosen, heads.window_size))
        shares.append(heads.selection_top_p)
    # What reads a share of the importance has the paper's sizes, and no two are the same.
    assert sizes[0] == (32, 16, 64, 16, 512) and shares[0] is None
    assert {size for size, share in zip(sizes, shares, strict=True) if share} == {sizes[0]}
    assert len(set(zip(sizes, shares, strict=True))) == len(trials)
    for place, size in enumerate(sizes[0]):
        assert {size // 2, size * 2} <= {each[place] for each in sizes}


@pytest.mark.parametrize(
    ("changes", "told"),
    [
        ({"variants": [{"name": "a"}, {"name": "a"}]}, "variants: a must not stand twice"),
        ({"seeds": [1, 1]}, r"seeds=\[1, 1\] must name each seed once"),
        ({"variants": []}, "variants"),
        (
            {"variants": [{"name": "a"}, {"name": "b", "overrides": ["train.stepps=1"]}]},
            r"variants.1 \(b\): .*train.stepps: unknown key; did you mean 'steps'",
        ),
        (
            {"variants": [{"name": "a"}, {"name": "b", "overrides": ["storage=/elsewhere"]}]},
            "b: cluster and storage must be those of a",
        ),
        ({"base": "nowhere.yaml"}, "^base: nowhere.yaml: cannot be read"),
    ],
)
def test_what_is_wrong_is_told_before_anything_starts(changes: dict[str, Any], told: str) -> None:
    with pytest.raises(ConfigError, match=told):
        Sweep.plan(config(**changes))


def test_a_dry_run_shows_the_variants(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = tmp_path / "s.yaml"
    file.write_text(yaml.safe_dump(config().model_dump(mode="json")))
    sweep.main(["--config", str(file), "--dry-run"])
    shown = capsys.readouterr().out
    assert "wide" in shown and "3, 4" in shown and "model.ffn_width=96" in shown
    with pytest.raises(SystemExit) as end:
        sweep.main(["--config", str(file), "--set", "overrides=[train.steps=0]"])
    assert end.value.code == 2


def test_intervals_are_students() -> None:
    for count, quantile in enumerate(QUANTILES, start=2):
        assert quantile == pytest.approx(stats.t.ppf(0.975, count - 1), abs=1e-3)
    values = [1.0, 1.5, 1.75]
    low, high = stats.t.interval(0.95, 2, loc=1.41666667, scale=stats.sem(values))
    found = interval(values)
    assert (found["low"], found["high"]) == (
        pytest.approx(low, abs=1e-3),
        pytest.approx(high, abs=1e-3),
    )
    assert interval([2.0]) == {"mean": 2.0, "low": None, "high": None}


def trial(variant: str, seed: int, loss: float) -> dict[str, Any]:
    metrics = {"valid/loss": loss, "valid/loss_at/16": loss + 1, "valid/loss_at/48": loss - 1}
    curve = [[100.0 * step, loss + 1 / step] for step in range(1, 31)]
    return {"variant": variant, "seed": seed, "metrics": metrics, "train": curve}


def test_variants_are_compared_seed_by_seed() -> None:
    # b is better by 0.1 with either seed; means over other seeds would say that it is worse.
    done = [trial("a", 0, 1.0), trial("a", 1, 2.0), trial("a", 2, 0.0)]
    done += [trial("b", 0, 0.9), trial("b", 1, 1.9)]
    first, second, third = (summary_of(name, done, "a") for name in ("a", "b", "c"))
    assert first["values"]["valid/loss"]["mean"] == pytest.approx(1.0)
    assert first["differences"] == {}
    assert second["seeds"] == [0, 1]
    difference = second["differences"]["valid/loss"]
    assert difference["mean"] == pytest.approx(-0.1)
    assert difference["high"] - difference["low"] == pytest.approx(0.0, abs=1e-9)
    assert third == {"variant": "c", "seeds": [], "values": {}, "differences": {}}
    record = {
        "name": "s",
        "device": "CPU",
        "context_length": 48,
        "runs": 6,
        "summary": [first, second, third],
        "trials": done,
    }
    report = report_of(record)
    assert "5 of 6 runs" in report and "| c |" not in report
    assert "| b | 2 | 1.4000 ± " in report and "| -0.1000 ± 0.0000 |" in report
    drawn = draw(record)
    assert set(drawn) == {"loss.png", "loss_by_position.png"}
    for figure in drawn.values():
        lines = figure.axes[1].get_lines()
        # The difference of b, and the line at 0.
        assert len(lines) == 2
        heights = np.asarray(lines[0].get_ydata())
        assert len(heights) and heights == pytest.approx(-0.1)
    assert draw(record | {"trials": []}) == {}
