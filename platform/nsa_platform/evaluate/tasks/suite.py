"""The harness: open a task by its configuration, put its samples to a model, score the answers.

A model is three callables, so that any policy of attention can stand behind them: `generate`
(greedy), `score` (teacher forcing) and `draw` (sampling). See `evaluate.needle` for the first two.
"""

from collections.abc import Callable
from dataclasses import replace

from nsa_platform.config.tasks import (
    AimeTask,
    LongBenchTask,
    LongBenchV2Task,
    MqarTask,
    NiahTask,
    QaTask,
    TaskConfig,
    VariableTrackingTask,
    WordsTask,
)
from nsa_platform.data.tokenizer import Tokenizer
from nsa_platform.evaluate.needle import Generate, ScoreAnswer
from nsa_platform.evaluate.tasks.aime import aime
from nsa_platform.evaluate.tasks.counted_words import counted_words
from nsa_platform.evaluate.tasks.documents_qa import documents_qa
from nsa_platform.evaluate.tasks.longbench import longbench
from nsa_platform.evaluate.tasks.longbench_v2 import longbench_v2
from nsa_platform.evaluate.tasks.mqar import mqar
from nsa_platform.evaluate.tasks.niah import niah
from nsa_platform.evaluate.tasks.results import Row, TaskResult
from nsa_platform.evaluate.tasks.task import (
    Decoding,
    ForcedSample,
    ReasonedSample,
    Sample,
    Task,
    WrittenSample,
)
from nsa_platform.evaluate.tasks.variables import variable_tracking

Draw = Callable[[list[int], int, Decoding], list[int]]
"""Prompt ids, a number of tokens and how to draw them, to the ids that the model writes."""


def open_task(config: TaskConfig, tokenizer: Tokenizer) -> Task:
    """The task that a configuration describes; files are read and the first sample is made.

    Raises:
        ValueError: a length is too short, or a file is not what it should be.
        OSError: a file cannot be read.
    """
    match config:
        case NiahTask():
            task = niah(config, tokenizer)
        case VariableTrackingTask():
            task = variable_tracking(config, tokenizer)
        case WordsTask():
            task = counted_words(config, tokenizer)
        case QaTask():
            task = documents_qa(config, tokenizer)
        case MqarTask():
            task = mqar(config, tokenizer)
        case LongBenchTask():
            task = longbench(config, tokenizer)
        case LongBenchV2Task():
            task = longbench_v2(config, tokenizer)
        case AimeTask():
            task = aime(config, tokenizer)
    # The shortest length comes first, so that what does not fit is known now.
    next(task.samples(), None)
    return task


def run_task(
    task: Task,
    tokenizer: Tokenizer,
    *,
    generate: Generate,
    score: ScoreAnswer,
    draw: Draw,
    advance: Callable[[], None] = lambda: None,
) -> TaskResult:
    """Put every sample to the model; `advance` is called after each."""
    rows = []
    for sample in task.samples():
        rows.append(_answered(sample, tokenizer, generate, score, draw))
        advance()
    return TaskResult(task.name, rows)


def _answered(
    sample: Sample, tokenizer: Tokenizer, generate: Generate, score: ScoreAnswer, draw: Draw
) -> Row:
    if isinstance(sample, ForcedSample):
        hits = score(sample.prompt, sample.answer).hits
        counted = [hits[place] for place in sample.counted]
        share = sum(counted) / len(counted)
        size = len(sample.prompt) + len(sample.answer)
        return Row(sample.cells, sample.unit, size, (), "", len(counted), share)
    ids = _write(sample, generate, draw)
    written = tokenizer.decode(ids)
    if isinstance(sample, ReasonedSample):
        row = _answered(sample.conclude(written), tokenizer, generate, score, draw)
        return replace(
            row,
            prompt_tokens=len(sample.prompt),
            written=f"{written}\n\n{row.written}",
            new_tokens=len(ids) + row.new_tokens,
        )
    return Row(
        sample.cells,
        sample.unit,
        len(sample.prompt),
        sample.references,
        written,
        len(ids),
        sample.score(written),
    )


def _write(sample: WrittenSample | ReasonedSample, generate: Generate, draw: Draw) -> list[int]:
    if sample.decoding.temperature > 0:
        return draw(sample.prompt, sample.max_new_tokens, sample.decoding)
    return generate(sample.prompt, sample.max_new_tokens)
