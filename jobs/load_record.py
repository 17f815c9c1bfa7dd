"""What a load on a server took, as an MLflow run: rates, times, the record and pictures."""

import hashlib
import json
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from jobs.serving_load import Sample
from nsa_platform import figures
from nsa_platform.config.train import TrackingConfig
from nsa_platform.tracking import Tracker, open_run

RESULT = "benchmark.json"


def record_load(
    tracking: TrackingConfig,
    *,
    base_url: str,
    settings: Mapping[str, Any],
    result: Mapping[str, Any],
    samples: Sequence[Sample],
) -> str | None:
    """Record it as a run of its own; a store that is out of reach gets it later.

    Args:
        settings: what was asked for; becomes the run's parameters.
        result: as `summary` of serving_load gives it, and what stands in the file beside it.

    Returns the run's id, None if the store has not been reached.
    """
    key = hashlib.sha256(f"{tracking.uri} {base_url}".encode()).hexdigest()[:12]
    handle = open_run(
        tracking,
        job="benchmark",
        name=f"benchmark-{result['model_id']}-{result['input_len']}-{result['output_len']}",
        params=settings,
        tags={"nsa.model": result["model_id"], "nsa.context": str(result["input_len"])},
        yaml_text=json.dumps(settings, indent=1),
        queue_dir=Path.home() / ".cache" / "nsa_platform" / "benchmarks" / key,
        continues=False,
    )
    tracker = Tracker(handle)
    numbers = {
        f"serve/{name}": float(value)
        for name, value in result.items()
        if isinstance(value, int | float) and re.search("_ms$|throughput|goodput|total_", name)
    }
    tracker.log_metrics(numbers | {"serve/failed": float(result["failed"])}, step=0)
    tracker.log_dict(result, RESULT)
    done = [sample for sample in samples if not sample.error]
    if done:
        waits = {
            "first token": [1e3 * sample.ttft_s for sample in done],
            "between tokens": [1e3 * gap for sample in done for gap in sample.itl_s],
            "whole answer": [1e3 * sample.e2el_s for sample in done],
        }
        title = f"{result['model_id']}: {result['input_len']:,} tokens in, "
        figure = figures.latencies(
            {name: values for name, values in waits.items() if values},
            title=title + f"{result['output_len']:,} out, {len(done)} answers",
        )
        tracker.log_figure(figure, "figures/latencies.png")
    tracker.finish("FINISHED")
    return tracker.run_id
