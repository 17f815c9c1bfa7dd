"""The harness: open a task by its configuration, put its samples to a model, score the answers.

A model is two callables, so that any policy of attention can stand behind them: `write` (many
answers at once, see `evaluate.prompt`) and `score` (teacher forcing, see `evaluate.needle`).
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
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
from nsa_platform.evaluate.needle import ScoreAnswer
from nsa_platform.evaluate.prompt import GROUP_SIZE, Prompt, Write, in_groups
from nsa_platform.evaluate.tasks.aime import aime
from nsa_platform.evaluate.tasks.counted_words import counted_words
from nsa_platform.evaluate.tasks.documents_qa import documents_qa
from nsa_platform.evaluate.tasks.longbench import check_packages, longbench
from nsa_platform.evaluate.tasks.longbench_v2 import longbench_v2
from nsa_platform.evaluate.tasks.mqar import mqar
from nsa_platform.evaluate.tasks.niah import niah
from nsa_platform.evaluate.tasks.results import Row, TaskResult
from nsa_platform.evaluate.tasks.task import (
    ForcedSample,
    ReasonedSample,
    Sample,
    Task,
    WrittenSample,
)
from nsa_platform.evaluate.tasks.variables import variable_tracking


def check_tasks(configs: Sequence[TaskConfig]) -> None:
    """Tell what the tasks lack on this machine; no file is read.

    Raises:
        ValueError: a package that is to score answers is not installed.
    """
    for config in configs:
        if isinstance(config, LongBenchTask):
            check_packages(config)


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
    write: Write,
    score: ScoreAnswer,
    group_size: int = GROUP_SIZE,
    advance: Callable[[], None] = lambda: None,
) -> TaskResult:
    """Put every sample to the model; rows are in the order of samples.

    group_size: samples that are made and asked together.
    advance: called when a sample is done.
    """
    rows = []
    for group in in_groups(task.samples(), group_size):
        rows += _rows(group, tokenizer, write, score, advance)
    return TaskResult(task.name, rows)


def _rows(
    samples: Sequence[Sample],
    tokenizer: Tokenizer,
    write: Write,
    score: ScoreAnswer,
    advance: Callable[[], None],
) -> list[Row]:
    """Rows of samples that are asked together. Thoughts are written first, and then all that the
    model is to say."""
    rows: dict[int, Row] = {}
    reasoned: dict[int, ReasonedSample] = {}
    asked: dict[int, WrittenSample] = {}
    for place, sample in enumerate(samples):
        match sample:
            case ForcedSample():
                rows[place] = _forced(sample, score)
                advance()
            case ReasonedSample():
                reasoned[place] = sample
            case WrittenSample():
                asked[place] = sample
    thoughts = dict(_answers(reasoned, write))
    for place in reasoned:
        asked[place] = reasoned[place].conclude(tokenizer.decode(thoughts[place]))
    for place, ids in _answers(asked, write):
        row = _written(asked[place], ids, tokenizer)
        if place in reasoned:
            row = _after(reasoned[place], thoughts[place], row, tokenizer)
        rows[place] = row
        advance()
    return [rows[place] for place in range(len(samples))]


def _answers(
    samples: Mapping[int, WrittenSample | ReasonedSample], write: Write
) -> Iterator[tuple[int, list[int]]]:
    """Places of samples and what the model writes to them, as it is done."""
    places = list(samples)
    prompts = [
        Prompt(sample.prompt, sample.max_new_tokens, sample.decoding) for sample in samples.values()
    ]
    if prompts:
        yield from ((places[index], ids) for index, ids in write(prompts))


def _forced(sample: ForcedSample, score: ScoreAnswer) -> Row:
    hits = score(sample.prompt, sample.answer).hits
    counted = [hits[place] for place in sample.counted]
    share = sum(counted) / len(counted)
    size = len(sample.prompt) + len(sample.answer)
    return Row(sample.cells, sample.unit, size, (), "", len(counted), share)


def _written(sample: WrittenSample, ids: list[int], tokenizer: Tokenizer) -> Row:
    written = tokenizer.decode(ids)
    return Row(
        sample.cells,
        sample.unit,
        len(sample.prompt),
        sample.references,
        written,
        len(ids),
        sample.score(written),
    )


def _after(sample: ReasonedSample, thought: list[int], row: Row, tokenizer: Tokenizer) -> Row:
    """The row of a conclusion, as that of the sample that was thought about."""
    return replace(
        row,
        prompt_tokens=len(sample.prompt),
        written=f"{tokenizer.decode(thought)}\n\n{row.written}",
        new_tokens=len(thought) + row.new_tokens,
    )
