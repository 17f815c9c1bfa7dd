"""Pretrain variants of one configuration with several seeds, and compare them.

    python -m jobs.sweep --config jobs/configs/sweep/controls.yaml --dry-run
    python -m jobs.sweep --config X.yaml --set 'seeds=[0]' --set 'overrides=[train.steps=20]'

Reads a SweepRun. The runs follow each other on workers that stay; each is an MLflow run below the
sweep's own. After each, results.json, report.md and two figures are written anew below
storage/name. The same command goes on with what is not finished.
Exit status: 0 all are trained; 1 some have come to nothing; 2 the config is wrong (nothing was
started); 130 stopped.
"""

from collections.abc import Sequence

from jobs.cli import EXIT_BAD_CONFIG, fail, interruptible, read_run
from jobs.sweeping import Sweep
from nsa_platform.config.base import ConfigError
from nsa_platform.config.runs import SweepRun


def main(argv: Sequence[str] | None = None) -> None:
    run, dry_run = read_run(SweepRun, __doc__ or "", argv)
    try:
        sweep = Sweep.plan(run)
        sweep.show()
    except ConfigError as error:
        fail(str(error), status=EXIT_BAD_CONFIG)
    except (ValueError, OSError, RuntimeError) as error:
        fail(str(error))
    if dry_run:
        return
    with interruptible("stopped; the same command goes on with what is not finished"):
        try:
            lost = sweep.run()
        except (ValueError, OSError, RuntimeError) as error:
            fail(str(error))
    if lost:
        fail("; ".join(lost))


if __name__ == "__main__":
    main()
