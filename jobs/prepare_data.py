"""Prepare data: raw text or chats to a tokenizer and Arrow shards, as Ray tasks.

    python -m jobs.prepare_data --config jobs/configs/prepare_data/quickstart_text.yaml --dry-run
    python -m jobs.prepare_data --config X.yaml --set 'corpus.inputs=[s3://bucket/raw]'
    python -m jobs.prepare_data --config X.yaml --set deduplicate.near_similarity=0.8

Writes tokenizer/, train/ and validation/ under `output`; what that holds is whole, or is not there.
Started again after a kill it goes on with the parts that are not yet done; started again when
nothing has changed it does nothing, with other settings or inputs it replaces what is there and
says so.

Exit status: 0 prepared; 2 the configuration or an input is wrong (nothing was started); 1 anything
else.
"""

from collections.abc import Sequence

from rich.console import Console

from jobs.cli import EXIT_BAD_CONFIG, fail, interruptible, read_run, warn
from jobs.preparation import print_report, run_plan
from nsa_platform.config.runs import PrepareDataRun
from nsa_platform.data.corpus import CorpusError
from nsa_platform.data.plan import Plan
from nsa_platform.data.preparation import default_cache_dir
from nsa_platform.data.tokenizer import TokenizerError
from nsa_platform.storage import StorageError


def main(argv: Sequence[str] | None = None) -> None:
    """Run the job; ends the process with an exit status if it fails."""
    run, dry_run = read_run(PrepareDataRun, __doc__ or "", argv)
    if dry_run:
        return
    with interruptible():
        try:
            plan = Plan(run, default_cache_dir())
        except (CorpusError, TokenizerError) as error:
            fail(str(error), status=EXIT_BAD_CONFIG)
        except StorageError as error:
            fail(str(error))
        try:
            if plan.replaces():
                warn(f"{run.output}: what other settings or inputs made there is replaced")
            done = run_plan(plan)
        except (CorpusError, TokenizerError, StorageError) as error:
            fail(str(error))
        print_report(done, run, Console())


if __name__ == "__main__":
    main()
