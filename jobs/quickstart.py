"""The whole road on one machine: data, pretraining, SFT, evaluation, registry, a served answer.

    python -m jobs.quickstart                 (make quickstart)
    python -m jobs.quickstart --folder DIR    writes below DIR/runs instead of ./runs

Its text is the standard library of the Python that runs it, its chats are questions about that
library's documentation strings. Run again, it reuses what is finished. Ctrl-C stops everything.

Exit status: 0 answered; 130 interrupted; 1 anything else.
"""

import argparse
import json
import socket
import sysconfig
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any, TypeVar

from rich.console import Console

from deployments.config_file import ServeFile
from deployments.serve import MIN_CPUS, served
from jobs.answer import stream_answer
from jobs.cli import fail, interruptible
from jobs.cluster import connect
from jobs.docstring_chats import write_chats
from jobs.evaluate import print_results
from jobs.evaluation import evaluate
from jobs.preparation import print_report, run_preparation
from jobs.run_report import REPORT
from jobs.training import run_training
from jobs.training_inputs import find_origin, private_folder
from nsa_platform.config.base import Strict
from nsa_platform.config.locations import resolve_locations
from nsa_platform.config.runs import EvaluateRun, PrepareDataRun, PretrainRun, SftRun
from nsa_platform.tracking import Tracker, fetch_model, open_parent

CONFIGS = Path(__file__).resolve().parent / "configs"
QUESTION = "What does textwrap.dedent do?"
ANSWER_TOKENS = 96
WORKERS = 2
SERVE_FILE = Path(__file__).resolve().parents[1] / "deployments" / "configs" / "quickstart.yaml"
NEXT = """\
  make serve             the model stays up: OpenAI's API and a chat page on http://127.0.0.1:8000
  make mlflow            curves, figures, dataset and model version of experiment 'quickstart'
  make test              every test that needs no GPU
  jobs/README.md         the run book: your own text, a cluster, a GPU
"""

Run = TypeVar("Run", bound=Strict)


def main(argv: Sequence[str] | None = None) -> None:
    """Travel the road; ends the process with an exit status if something fails."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--folder", default=".", help="everything is written below FOLDER/runs")
    folder = Path(parser.parse_args(argv).folder).resolve()
    console = Console(highlight=False, soft_wrap=True)
    started = time.monotonic()
    with interruptible():
        try:
            travel(folder, console)
        except (ValueError, OSError, RuntimeError) as error:
            fail(str(error))
    minutes, seconds = divmod(round(time.monotonic() - started), 60)
    console.print(f"[bold]Done[/] in {minutes} min {seconds} s. Next:\n{NEXT}")


def travel(folder: Path, console: Console) -> None:
    """All stages in order, on one local Ray cluster."""
    stdlib = sysconfig.get_path("stdlib")
    text = _load(PrepareDataRun, "quickstart_text", folder, [f'corpus.inputs=["{stdlib}"]'])
    chat = _load(PrepareDataRun, "quickstart_chat", folder)
    pretrain = _load(PretrainRun, "quickstart", folder)
    sft = _load(SftRun, "quickstart", folder)
    measured = _load(EvaluateRun, "quickstart", folder)
    with connect(num_cpus=WORKERS):
        _stage(console, 1, "Text", f"{stdlib} -> tokenizer and Arrow shards")
        print_report(run_preparation(text), text, console)
        origin = find_origin(pretrain)
        _stage(console, 2, "Pretrain", f"{WORKERS} Ray Train workers, {origin.model.name}")
        run_training("pretrain", pretrain, origin)
        _stage(console, 3, "Chats", "questions and answers from documentation strings")
        write_chats(Path(stdlib), Path(chat.corpus.inputs[0]))
        print_report(run_preparation(chat), chat, console)
        _stage(console, 4, "SFT", "the same loop, loss on the assistant's tokens")
        run_training("sft", sft, find_origin(sft))
    _stage(console, 5, "Evaluate", "held-out bits per byte, needle in a haystack")
    print_results(_evaluate_once(measured, folder / "runs" / "quickstart"))
    _report(folder, [pretrain.name, sft.name], measured)
    _stage(console, 6, "Serve", f"{measured.checkpoint} on Ray Serve, asked by the openai client")
    _serve_and_ask(measured, console)


def _report(folder: Path, trained: Sequence[str], measured: EvaluateRun) -> None:
    """One report of all stages, in their folder and at the run below which they stand."""
    road = folder / "runs" / "quickstart"
    stages = [*(road / name for name in trained), private_folder(measured)]
    reports = [stage / REPORT for stage in stages if (stage / REPORT).exists()]
    text = "\n".join(report.read_text(encoding="utf-8") for report in reports)
    (road / REPORT).write_text(text, encoding="utf-8")
    tracker = Tracker(open_parent(measured.tracking, queue_dir=road / "tracking-queue"))
    tracker.log_text(text, REPORT)
    tracker.finish("FINISHED")


def _serve_and_ask(measured: EvaluateRun, console: Console) -> None:
    """Deploy the champion on a free port, stream its answer over HTTP, stop it again."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    source = "applications.0.args.llm_configs.0.model_loading_config"
    file = ServeFile.read(
        SERVE_FILE,
        [
            f"http_options.port={port}",
            f"{source}.model_source={measured.checkpoint}",
            f"{source}.tracking_uri={measured.tracking.uri}",
        ],
    )
    model = file.serving_args(Path.cwd()).llm_configs[0].model_id
    with connect(num_cpus=MIN_CPUS), served(file) as address:
        console.print(f"{address}/v1/chat/completions, model {model}")
        console.print(f"[bold]Q[/] {QUESTION}\n[bold]A[/] ", end="")
        for piece in stream_answer(address, model, QUESTION, max_tokens=ANSWER_TOKENS):
            console.print(piece, end="", markup=False)
        console.print("\n")


def _load(root: type[Run], name: str, folder: Path, overrides: Sequence[str] = ()) -> Run:
    job = {PrepareDataRun: "prepare_data", PretrainRun: "pretrain", SftRun: "sft"}
    path = CONFIGS / job.get(root, "evaluate") / f"{name}.yaml"
    return resolve_locations(root.load(path, overrides), folder)


def _stage(console: Console, number: int, name: str, what: str) -> None:
    console.print(f"\n[bold cyan]{number}/6 {name}[/]  {what}")


def _evaluate_once(run: EvaluateRun, folder: Path) -> dict[str, Any]:
    """The champion's results: measured now, or kept from when the same version was measured."""
    version = str(fetch_model(run.checkpoint, run.tracking.uri, folder.parent / "models").name)
    kept = folder / f"evaluation-{version}-{run.fingerprint()}.json"
    if kept.exists():
        return json.loads(kept.read_text(encoding="utf-8"))
    results = evaluate(run)
    partial = kept.with_suffix(".partial")
    partial.write_text(json.dumps(results), encoding="utf-8")
    partial.replace(kept)
    return results


if __name__ == "__main__":
    main()
