"""Compare autoscaling policies on one trace in the simulator: a record and its picture.

    python -m jobs.scaling_study             plays it (minutes) into results/autoscaling.json
    python -m jobs.scaling_study --draw      draws docs/autoscaling.png from the record

The trace holds phases of many short chats and of few prompts of 80k to 250k tokens in turn. Ray
Serve's own policy counts open requests; KvPressurePolicy looks at pages, prompts in line and waits.
"""

import argparse
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from deployments.autoscaling import PressurePolicy
from deployments.replay import Decide, by_pressure, by_requests, mixed_trace, replay, violations
from jobs.cli import interruptible
from nsa_platform import figures

ROOT = Path(__file__).resolve().parents[1]
RECORD = ROOT / "results" / "autoscaling.json"
PICTURE = ROOT / "docs" / "autoscaling.png"
SECONDS, PHASE_S = 600.0, 150.0
TARGETS = (1, 2, 4, 8)
"""Of target_ongoing_requests; Ray Serve's default is 2."""


@interruptible("interrupted; the same command begins anew")
def main(argv: Sequence[str] | None = None) -> None:
    """Play and record, or draw."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--draw", action="store_true", help="only draw what is recorded")
    if not parser.parse_args(argv).draw:
        RECORD.write_text(json.dumps(study(SECONDS, PHASE_S), indent=1) + "\n", encoding="utf-8")
        print(RECORD)
    draw(json.loads(RECORD.read_text(encoding="utf-8")), PICTURE)
    print(PICTURE)


def study(seconds: float, phase_s: float) -> dict[str, Any]:
    """Violations, replica-seconds and the number of replicas over time of each policy."""
    trace = mixed_trace(seconds, phase_s=phase_s)
    policies: dict[str, Decide] = {"pressure": by_pressure(PressurePolicy())}
    policies |= {f"{target} requests": by_requests(target) for target in TARGETS}
    runs: dict[str, dict[str, Any]] = {}
    for name, decide in policies.items():
        result = replay(trace, decide)
        runs[name] = {
            "violations": violations(result),
            "replica_seconds": round(result.replica_seconds, 1),
            "replicas": [(round(time_s, 1), count) for time_s, count in result.num_replicas],
        }
    return {
        "name": "autoscaling",
        "device": "simulator",
        "command": "python -m jobs.scaling_study",
        "requests": len(trace),
        "seconds": seconds,
        "phase_s": phase_s,
        "runs": runs,
    }


def draw(record: dict[str, Any], path: Path) -> None:
    """Violations against replica-seconds, and the replicas over time."""
    runs = record["runs"]
    title = f"{record['requests']:,} requests, chats and long documents in turn"
    points = {name: (run["replica_seconds"], run["violations"]) for name, run in runs.items()}
    steps = {name: runs[name]["replicas"] for name in ("pressure", "2 requests")}
    figures.scaling(points, steps, title=title).savefig(path, dpi=110)


if __name__ == "__main__":
    main()
