"""What jobs.evaluate does: open model, data and run, measure, record."""

import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import ray
import torch
from ray.util.queue import Queue

from jobs.cluster import connect, this_node
from jobs.evaluation_answers import Answers, check_sizes
from jobs.evaluation_inputs import (
    check_text,
    counted,
    filler_of,
    num_trials,
    open_loader,
    score_text,
)
from jobs.model_tags import model_tags
from jobs.policies import measure_policies, warn_of_budget
from jobs.run_report import REPORT, evaluation_report
from jobs.task_bars import Bars, DistantBars, TaskBars, watch
from jobs.training_inputs import make_private_folder, private_folder
from nsa_platform import storage
from nsa_platform.config.evaluate import BitsPerByteConfig, NeedleConfig
from nsa_platform.config.model import ModelConfig
from nsa_platform.config.runs import EvaluateRun
from nsa_platform.config.tasks import Generated, MqarTask
from nsa_platform.data.tokenizer import Tokenizer
from nsa_platform.evaluate.baselines.comparison import PolicyResult
from nsa_platform.evaluate.baselines.report import (
    baselines_summary,
    record_baselines,
    record_policy,
)
from nsa_platform.evaluate.bits_per_byte import BitsPerByte, first_batches
from nsa_platform.evaluate.needle import NeedleGrid, check_room, needle_grid
from nsa_platform.evaluate.ngram import Ngrams
from nsa_platform.evaluate.prompt import Write
from nsa_platform.evaluate.report import MODEL, record_bits_per_byte, record_needles, summary
from nsa_platform.evaluate.scores import ModelScorer
from nsa_platform.evaluate.tasks.report import record_overview, record_task, task_summary
from nsa_platform.evaluate.tasks.results import TaskResult
from nsa_platform.evaluate.tasks.suite import check_tasks, open_task, run_task
from nsa_platform.model.transformer import Transformer
from nsa_platform.model.weights import check_weights, load_config, load_model
from nsa_platform.tracking import (
    RunHandle,
    Tracker,
    attach_run,
    fetch_model,
    is_model_reference,
    open_run,
    source_run,
)
from nsa_platform.train.metrics import device_name

ANSWER_ROOM = 16
"""Tokens beyond a prompt for each number that is asked for."""


def evaluate(run: EvaluateRun, *, run_id: str | None = None, step: int = 0) -> dict[str, Any]:
    """Measure the run's checkpoint and record it in MLflow; returns all results as plain values.

    Args:
        run_id: record into this MLflow run, which goes on as it was; None: into a new run.
        step: of the recorded points.

    Raises:
        ValueError: the model, the data and the configuration do not fit each other.
        OSError: a checkpoint, shard or model version cannot be reached.
    """
    check_tasks(run.tasks)
    folder = _checkpoint(run)
    model = _look(run, folder)
    warn_of_budget(run)
    if not run.use_gpu:
        return _recorded(run, folder, model, run_id, step, measure)
    with connect():
        if not ray.cluster_resources().get("GPU"):
            raise ValueError("use_gpu=true, but the Ray cluster has no GPU")
        return _recorded(run, folder, model, run_id, step, measure_on_gpu)


def _recorded(
    run: EvaluateRun,
    folder: str,
    model: ModelConfig,
    run_id: str | None,
    step: int,
    work: Callable[[EvaluateRun, str, RunHandle, int, TaskBars], dict[str, Any]],
) -> dict[str, Any]:
    """Do the work between the begin and the end of an MLflow run."""
    handle = _open(run, run_id, model)
    own, began = run_id is None, time.monotonic()
    try:
        with TaskBars() as bars:
            results = work(run, folder, handle, step, bars)
    except BaseException as error:
        status = "KILLED" if isinstance(error, KeyboardInterrupt) else "FAILED"
        Tracker(handle).finish(status if own else None)
        raise
    report = evaluation_report(run, results, seconds=time.monotonic() - began)
    (private_folder(run) / REPORT).write_text(report, encoding="utf-8")
    tracker = Tracker(handle)
    tracker.log_text(report, REPORT if own else f"evaluation/{REPORT}")
    tracker.finish("FINISHED" if own else None)
    return results


def measure_on_gpu(
    run: EvaluateRun, folder: str, handle: RunHandle, step: int, bars: TaskBars
) -> dict[str, Any]:
    """`measure` on a machine of the cluster that has a free GPU."""
    free, there = (
        each().get("GPU", 0) for each in (ray.available_resources, ray.cluster_resources)
    )
    bars.line(f"waiting for a worker with a free GPU: {free:g} of {there:g} are free now")
    queue = Queue(actor_options={"num_cpus": 0, "scheduling_strategy": this_node()})
    try:
        work = ray.remote(num_cpus=1, num_gpus=1)(measure).remote(
            run, folder, handle, step, DistantBars(queue)
        )
        return watch(work, queue, bars)
    finally:
        queue.shutdown(force=True)


def measure(
    run: EvaluateRun, folder: str, handle: RunHandle, step: int, bars: Bars
) -> dict[str, Any]:
    """Measure the exported model in `folder` on this machine and record it."""
    # A worker's machine may lack what the driver's has.
    check_tasks(run.tasks)
    device, dtype = ("cuda", torch.bfloat16) if run.use_gpu else ("cpu", torch.float32)
    place = storage.fetch(folder, storage.default_cache("files"))
    model, tokenizer = load_model(place, device=device, dtype=dtype), Tokenizer(place)
    tracker = Tracker(handle)
    try:
        bits, grid, tasks = _own(run, model, tokenizer, tracker, step, bars)
        policies = {}
        if run.baselines is not None:
            policies = measure_policies(
                run,
                run.baselines,
                model,
                tokenizer,
                bars,
                done=partial(record_policy, tracker, step=step),
            )
            own = PolicyResult(bits[MODEL] if bits is not None else None, grid, tasks)
            record_baselines(tracker, policies, own=own)
        results = {**summary(bits, grid), "device": device_name(model.embedding.weight.device)}
        if policies:
            results["baselines"] = baselines_summary(policies)
        if tasks:
            results["tasks"] = {result.name: task_summary(result) for result in tasks}
        tracker.log_dict(results, "evaluation/results.json")
    finally:
        tracker.finish(None, report=False)
    return {**results, "run_id": tracker.run_id, "tracking_uri": handle.uri}


def _own(
    run: EvaluateRun,
    model: Transformer,
    tokenizer: Tokenizer,
    tracker: Tracker,
    step: int,
    bars: Bars,
) -> tuple[dict[str, BitsPerByte] | None, NeedleGrid | None, list[TaskResult]]:
    """The model itself, recorded. Its engine's memory is free afterwards."""
    bits = grid = None
    if run.bits_per_byte is not None:
        bits = _bits_per_byte(run, run.bits_per_byte, model, tokenizer, tracker, bars)
        record_bits_per_byte(tracker, bits, step)
    answers = Answers(model, tokenizer, run.engine, longest=_longest_written(run))
    if run.needle is not None:
        grid = _needles(run, run.needle, model, tokenizer, answers.write, bars)
        record_needles(tracker, grid, step)
    return bits, grid, _tasks(run, model, tokenizer, answers.write, tracker, step, bars)


def _checkpoint(run: EvaluateRun) -> str:
    """Folder of the exported model; one from the registry is downloaded."""
    if is_model_reference(run.checkpoint):
        return str(fetch_model(run.checkpoint, run.tracking.uri, storage.default_cache("models")))
    return run.checkpoint


def _look(run: EvaluateRun, folder: str) -> ModelConfig:
    """Find what does not fit before a run is opened: model, weights, data, lengths, engine."""
    place = storage.fetch(folder, storage.default_cache("files"))
    config, tokenizer = load_config(place), Tokenizer(place)
    _check_lengths(run, config.max_context)
    if longest := _longest_written(run):
        check_sizes(run.engine, config, longest=longest)
    if run.baselines is not None and config.attention.kind != "full":
        raise ValueError(
            "baselines: policies need a model with attention.kind=full, "
            f"{run.checkpoint} has {config.attention.kind}"
        )
    check_weights(place, config)
    check_text(run, tokenizer)
    if run.needle is not None:
        check_room(tokenizer, run.needle)
    for task in run.tasks:
        open_task(task, tokenizer)
    return config


def _open(run: EvaluateRun, run_id: str | None, model: ModelConfig) -> RunHandle:
    queue_dir = make_private_folder(run) / "tracking-queue"
    if run_id is not None:
        return attach_run(run.tracking, name=run.name, run_id=run_id, queue_dir=queue_dir)
    context = run.bits_per_byte.context_length if run.bits_per_byte else model.max_context
    tags = {"nsa.checkpoint": run.checkpoint, **model_tags(model, context)}
    if is_model_reference(run.checkpoint):
        source = source_run(run.checkpoint, run.tracking.uri)
        tags |= {"nsa.source_run": source} if source else {}
        if source and run.tracking.parent is None:
            tags["mlflow.parentRunId"] = source
    return open_run(
        run.tracking,
        job="evaluate",
        name=run.name,
        params=run.model_dump(mode="json"),
        tags=tags,
        yaml_text=run.to_yaml(),
        queue_dir=queue_dir,
        continues=False,
    )


def _check_lengths(run: EvaluateRun, max_context: int) -> None:
    if run.bits_per_byte is not None and run.bits_per_byte.context_length > max_context:
        raise ValueError(
            f"bits_per_byte.context_length={run.bits_per_byte.context_length} must not exceed the "
            f"model's max_context={max_context}"
        )
    if run.needle is not None:
        longest, room = max(run.needle.lengths), _answer_room(run.needle)
        if longest + room > max_context:
            raise ValueError(
                f"needle.lengths: {longest} and {room} tokens for the answer "
                f"must not exceed the model's max_context={max_context}"
            )
    for number, task in enumerate(run.tasks):
        if task.longest > max_context:
            raise ValueError(
                f"tasks.{number}: {task.kind}: {task.longest_of} are {task.longest} tokens, must "
                f"not exceed the model's max_context={max_context}"
            )


def _longest_written(run: EvaluateRun) -> int:
    """Tokens of the longest prompt that the model writes on from, and of its answer; 0: there is
    none, what is asked is only scored."""
    lengths = [task.longest for task in run.tasks if not isinstance(task, MqarTask)]
    if run.needle is not None:
        lengths.append(max(run.needle.lengths) + _answer_room(run.needle))
    return max(lengths, default=0)


def _answer_room(needle: NeedleConfig) -> int:
    return ANSWER_ROOM * needle.queries * needle.values


def _bits_per_byte(
    run: EvaluateRun,
    config: BitsPerByteConfig,
    model: Transformer,
    tokenizer: Tokenizer,
    tracker: Tracker,
    bars: Bars,
) -> dict[str, BitsPerByte]:
    loader = open_loader(run.data, "validation", tokenizer, config.context_length)
    tracker.log_dataset(
        loader.shards.manifest.to_dict(),
        Path(run.data).name,
        "evaluation",
        source=loader.shards.folder,
    )
    train = open_loader(run.data, "train", tokenizer, config.context_length)
    wanted = min(config.baseline_tokens, train.shards.manifest.tokens)
    task = bars.add_task("unigram and bigram", total=wanted)
    ngrams = Ngrams(
        counted(
            first_batches(train, tokens=wanted, batch_rows=1),
            lambda tokens: bars.advance(task, tokens),
        ),
        model.config.vocab_size,
    )
    scorers = {MODEL: ModelScorer(model).nats, "bigram": ngrams.bigram, "unigram": ngrams.unigram}
    return score_text(run, config, scorers, tokenizer, bars, title="bits per byte")


def _needles(
    run: EvaluateRun,
    config: NeedleConfig,
    model: Transformer,
    tokenizer: Tokenizer,
    write: Write,
    bars: Bars,
) -> NeedleGrid:
    task = bars.add_task("needles", total=num_trials(config))
    return needle_grid(
        write,
        ModelScorer(model).answer,
        tokenizer,
        config,
        filler=filler_of(run, config, tokenizer),
        advance=lambda: bars.advance(task),
    )


def _tasks(
    run: EvaluateRun,
    model: Transformer,
    tokenizer: Tokenizer,
    write: Write,
    tracker: Tracker,
    step: int,
    bars: Bars,
) -> list[TaskResult]:
    results = []
    for config in run.tasks:
        task = open_task(config, tokenizer)
        bar = bars.add_task(task.name, total=task.size)
        result = run_task(
            task,
            tokenizer,
            write=write,
            score=ModelScorer(model).answer,
            advance=lambda bar=bar: bars.advance(bar),
        )
        record_task(tracker, result, step)
        results.append(result)
    made = zip(run.tasks, results, strict=True)
    record_overview(tracker, [result for task, result in made if isinstance(task, Generated)])
    return results
