"""Kubernetes objects rendered from the YAML files of jobs and deployments.

    python -m jobs.kubernetes render            rewrites what overlays hold of them; `make k8s`
    python -m jobs.kubernetes render --check    changes nothing, names what would change

Each k8s/overlays/<name>/runs.yaml says which runs become RayJobs (rayjob.py), what its RayService
serves and on what GPU (rayservice.py), and which places its cluster gives them.

Exit status: 0 done (or nothing to do, with --check); 1 something would change; 2 a file is wrong.
"""

import argparse
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from jobs.cli import EXIT_BAD_CONFIG, fail
from jobs.manifest_yaml import to_yaml
from jobs.rayjob import JOBS, ROOT, render_job
from jobs.rayservice import ServeSource, render_pods, render_service
from nsa_platform.config.base import ConfigError, Strict

OVERLAYS = ROOT / "k8s" / "overlays"
WRITTEN_BY = "# Written by `make k8s`: change {source} instead.\n"


class JobSource(Strict):
    """A job of an overlay."""

    job: str
    """Which entry point: prepare_data, pretrain, sft or evaluate."""
    config: str
    """The run's YAML, seen from the repository's root."""
    set: tuple[str, ...] = ()
    """Overrides a.b=value, as on the command line: the places that this cluster has."""


class OverlayRuns(Strict):
    """What is rendered into an overlay."""

    serve: ServeSource
    jobs: dict[str, JobSource]
    """By the name of the file that each becomes."""


def rendered_files(overlay: Path) -> Iterator[tuple[Path, str]]:
    """Every file of an overlay that is rendered, with what it should hold."""
    runs = OverlayRuns.load(overlay / "runs.yaml")
    serve = runs.serve
    yield overlay / "serve.yaml", _written(serve.config, render_service(serve))
    if serve.plan is not None:
        yield overlay / "serve-pods.yaml", _written(serve.config, render_pods(serve))
    for name, each in runs.jobs.items():
        if each.job not in JOBS:
            raise ConfigError(f"jobs.{name}.job={each.job!r} must be one of {', '.join(JOBS)}")
        tree, _ = render_job(each.job, ROOT / each.config, each.set)
        yield overlay / "jobs" / f"{name}.yaml", _written(each.config, tree)


def main(argv: Sequence[str] | None = None) -> int:
    """Render every overlay, or say what rendering would change."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("command", choices=["render"])
    parser.add_argument("--check", action="store_true", help="write nothing")
    options = parser.parse_args(argv)
    try:
        files = [
            pair
            for runs in sorted(OVERLAYS.glob("*/runs.yaml"))
            for pair in rendered_files(runs.parent)
        ]
    except ConfigError as error:
        fail(str(error), status=EXIT_BAD_CONFIG)
    stale = [(path, text) for path, text in files if not _holds(path, text)]
    for path, text in stale:
        print(f"{'stale' if options.check else 'written'}: {path.relative_to(OVERLAYS)}")
        if not options.check:
            path.parent.mkdir(exist_ok=True)
            path.write_text(text, encoding="utf-8")
    return 1 if options.check and stale else 0


def _written(source: str, tree: Any) -> str:
    return WRITTEN_BY.format(source=f"{source} or runs.yaml") + to_yaml(tree)


def _holds(path: Path, text: str) -> bool:
    return path.exists() and path.read_text(encoding="utf-8") == text


if __name__ == "__main__":
    raise SystemExit(main())
