"""Pretrain a model on text shards with Ray Train: a new one, or an exported one further.

    python -m jobs.pretrain --config jobs/configs/pretrain/smoke.yaml --dry-run
    python -m jobs.pretrain --config X.yaml --set train.steps=20

Reads a PretrainRun. Writes checkpoints and the model below storage/name and records an MLflow run.
The same command goes on from the newest checkpoint. --dry-run also says what the run will take.
Exit status: 0 trained; 2 the config is wrong (nothing was started); 130 stopped; 1 anything else.
"""

from collections.abc import Sequence

from jobs.cli import fail, interruptible, read_run
from jobs.training import run_training
from jobs.training_inputs import find_origin
from jobs.training_plan import show_plan
from nsa_platform.config.runs import PretrainRun


def main(argv: Sequence[str] | None = None) -> None:
    run, dry_run = read_run(PretrainRun, __doc__ or "", argv)
    with interruptible():
        try:
            origin = find_origin(run)
        except (ValueError, OSError, RuntimeError) as error:
            fail(str(error))
        show_plan(run, origin)
        if not dry_run:
            run_training("pretrain", run, origin)


if __name__ == "__main__":
    main()
