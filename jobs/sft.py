"""Fine-tune an exported model on chats: the loop of pretraining with a loss on answers alone.

    python -m jobs.sft --config jobs/configs/sft/smoke.yaml --dry-run
    python -m jobs.sft --config X.yaml --set checkpoint=models:/nsa@champion

Reads an SftRun. Writes checkpoints and the model below storage/name and records an MLflow run.
The same command goes on from the newest checkpoint. --dry-run also says what the run will take.
Exit status: 0 trained; 2 the config is wrong (nothing was started); 130 stopped; 1 anything else.
"""

from collections.abc import Sequence

from jobs.cli import fail, interruptible, read_run
from jobs.training import run_training
from jobs.training_inputs import find_origin
from jobs.training_plan import show_plan
from nsa_platform.config.runs import SftRun


def main(argv: Sequence[str] | None = None) -> None:
    run, dry_run = read_run(SftRun, __doc__ or "", argv)
    with interruptible():
        try:
            origin = find_origin(run)
        except (ValueError, OSError, RuntimeError) as error:
            fail(str(error))
        show_plan(run, origin)
        if not dry_run:
            run_training("sft", run, origin)


if __name__ == "__main__":
    main()
