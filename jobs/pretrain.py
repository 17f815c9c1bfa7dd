"""Pretrain a model from scratch on text shards, with Ray Train.

    python -m jobs.pretrain --config jobs/configs/pretrain/smoke.yaml --dry-run
    python -m jobs.pretrain --config X.yaml --set train.steps=20

Reads a PretrainRun. Writes checkpoints and the model below storage/name and records an MLflow run.
The same command goes on from the newest checkpoint. --dry-run also says what the run will take.
Exit status: 0 trained; 2 the config is wrong (nothing was started); 130 stopped; 1 anything else.
"""

from collections.abc import Sequence

from jobs.cli import interruptible, read_run
from jobs.training import run_training, show_plan
from jobs.training_inputs import pretrain_origin
from nsa_platform.config.runs import PretrainRun


def main(argv: Sequence[str] | None = None) -> None:
    run, dry_run = read_run(PretrainRun, __doc__ or "", argv)
    with interruptible():
        origin = pretrain_origin(run)
        show_plan(run, origin)
        if not dry_run:
            run_training("pretrain", run, origin)


if __name__ == "__main__":
    main()
