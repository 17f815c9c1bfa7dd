"""Generate: continue every prompt of JSONL or Arrow files with a model, as Ray workers.

    python -m jobs.generate --config jobs/configs/generate/smoke.yaml --dry-run
    python -m jobs.generate --config X.yaml --set checkpoint=models:/nsa@champion

Writes results.jsonl under `output`, a line for each row of the input, in the same order; it is
whole, or is not there. A row that cannot be served (its prompt is empty or too long) says why in
its `error`. Started again after a kill it goes on with the parts that are not yet done; started
again when nothing has changed it does nothing. The results are the same for any number of workers.

Exit status: 0 generated; 2 the configuration or an input is wrong (nothing was started); 1 anything
else.
"""

from collections.abc import Sequence

from rich.console import Console

from jobs.cli import EXIT_BAD_CONFIG, fail, interruptible, read_run
from jobs.generation import RESULTS, Generated, GenerationPlan
from jobs.generation_workers import WorkerLost, run_generation
from nsa_platform import storage
from nsa_platform.config.generate import GenerateRun


def main(argv: Sequence[str] | None = None) -> None:
    """Run the job; ends the process with an exit status if it fails."""
    run, dry_run = read_run(GenerateRun, __doc__ or "", argv)
    if dry_run:
        return
    with interruptible():
        try:
            plan = GenerationPlan(run)
        except (ValueError, storage.MissingFileError) as error:
            fail(str(error), status=EXIT_BAD_CONFIG)
        except OSError as error:
            fail(str(error))
        try:
            done = run_generation(plan)
        except (ValueError, OSError, WorkerLost) as error:
            fail(str(error))
        print_report(done, run.output, Console())


def print_report(done: Generated, output: str, console: Console) -> None:
    """Say what was made and what was refused."""
    lines = [f"generated {storage.join(output, RESULTS)}"]
    if done.reused_parts == done.parts:
        lines[0] += " (nothing had changed)"
    elif done.reused_parts:
        lines[0] += f" ({done.reused_parts} of {done.parts} parts were done by an earlier try)"
    ends = ", ".join(f"{count:,} {reason}" for reason, count in done.finished.items())
    lines += [
        f"  rows    {done.rows:,}: {ends}",
        f"  tokens  {done.prompt_tokens:,} of prompts, {done.completion_tokens:,} generated",
    ]
    console.print("\n".join(lines), highlight=False, soft_wrap=True, markup=False)


if __name__ == "__main__":
    main()
