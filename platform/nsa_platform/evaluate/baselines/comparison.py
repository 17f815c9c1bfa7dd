"""Policies beside the model itself: the same text, needles and tasks, and what each one reads."""

from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass, field

from nsa_platform.config.evaluate import BaselineName, BaselinesConfig, NeedleConfig
from nsa_platform.config.model import ModelConfig
from nsa_platform.data.tokenizer import Tokenizer
from nsa_platform.evaluate.baselines.budget import Budget, equal_budget, split_budget
from nsa_platform.evaluate.baselines.pattern_search import Found, Searched
from nsa_platform.evaluate.baselines.policy import Phase, Policy
from nsa_platform.evaluate.baselines.reader import PolicyReader, Start
from nsa_platform.evaluate.baselines.reads import ReadCount
from nsa_platform.evaluate.baselines.systems import published, within
from nsa_platform.evaluate.bits_per_byte import BitsPerByte
from nsa_platform.evaluate.needle import NeedleGrid, needle_grid
from nsa_platform.evaluate.prompt import Write, one_by_one
from nsa_platform.evaluate.tasks.results import TaskResult
from nsa_platform.model.transformer import Transformer


@dataclass(frozen=True, slots=True)
class TaskReads:
    """What a policy read in one phase of one task at one length; phases without a query are left
    out."""

    task: str
    """text, needle, or a task's name."""
    length: int | None
    """Tokens of the context; None: those of a task that has no lengths."""
    phase: Phase
    count: ReadCount


@dataclass(slots=True)
class PolicyResult:
    """What one policy made of the tasks."""

    bits: BitsPerByte | None = None
    grid: NeedleGrid | None = None
    tasks: list[TaskResult] = field(default_factory=list)
    reads: list[TaskReads] = field(default_factory=list)
    patterns: Sequence[Sequence[Found]] = ()
    """What MInference's search has found for the heads of each layer."""


def budget_of(config: BaselinesConfig, context: int) -> Budget | None:
    """The budget of a context of so many tokens; None: published sizes."""
    if config.budget == "published":
        return None
    if config.tokens is not None:
        return split_budget(config.tokens)
    return equal_budget(config.nsa, context)


def start_of(
    name: BaselineName,
    model: ModelConfig,
    config: BaselinesConfig,
    searched: Searched | None = None,
) -> Start:
    """How a policy begins on a context, with the sizes that the configuration asks for.

    searched: MInference's patterns; None: the same one for every head.
    """

    def start(prompt_tokens: int, follow: int) -> Policy:
        budget = budget_of(config, prompt_tokens + follow)
        if name == "minference" and searched is not None:
            return searched.policy(model, budget)
        if budget is None:
            return published(name, model, prompt_tokens=prompt_tokens)
        return within(name, model, budget)

    return start


def reader_of(
    name: BaselineName,
    model: Transformer,
    config: BaselinesConfig,
    stop_ids: Collection[int] = (),
    searched: Searched | None = None,
) -> PolicyReader:
    """A reader for a policy; it has read nothing."""
    return PolicyReader(
        model,
        start_of(name, model.config, config, searched),
        decoded_tail=config.decoded_tail,
        stop_ids=stop_ids,
    )


def reads_of(reader: PolicyReader, task: str, length: int | None) -> list[TaskReads]:
    """What a reader has read so far, as that of one task."""
    found = []
    for phase, reads in reader.reads.items():
        count = reads.summary()
        if count.queries:
            found.append(TaskReads(task, length, phase, count))
    return found


def _greedy(reader: PolicyReader) -> Write:
    return one_by_one(lambda prompt: reader.generate(prompt.ids, prompt.max_new_tokens))


def policy_needles(
    make_reader: Callable[[], PolicyReader],
    tokenizer: Tokenizer,
    config: NeedleConfig,
    *,
    filler: Sequence[int],
    advance: Callable[[], None] = lambda: None,
) -> tuple[NeedleGrid, list[TaskReads]]:
    """One policy on the needles that the model itself gets, and its reads at each length.

    Raises:
        ValueError: as needle_grid.
    """
    whole, reads = NeedleGrid(config.lengths, config.depths), []
    for length in config.lengths:
        reader = make_reader()
        grid = needle_grid(
            _greedy(reader),
            reader.answer,
            tokenizer,
            config.model_copy(update={"lengths": (length,)}),
            filler=filler,
            advance=advance,
        )
        whole.trials.extend(grid.trials)
        reads += reads_of(reader, "needle", length)
    return whole, reads
