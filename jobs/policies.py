"""What jobs.evaluate does with baselines: every policy gets what the model itself gets."""

from collections.abc import Callable, Iterator
from functools import partial

from jobs.cli import warn
from jobs.evaluation_inputs import filler_of, num_trials, pattern_sample, score_text
from jobs.task_bars import Bars
from nsa_platform.config.evaluate import BaselinesConfig
from nsa_platform.config.runs import EvaluateRun
from nsa_platform.config.tasks import Generated, TaskConfig
from nsa_platform.data.tokenizer import Tokenizer
from nsa_platform.evaluate.baselines.comparison import (
    PolicyResult,
    budget_of,
    policy_needles,
    reader_of,
    reads_of,
)
from nsa_platform.evaluate.baselines.pattern_search import Searched, search_patterns
from nsa_platform.evaluate.baselines.reader import PolicyReader
from nsa_platform.evaluate.prompt import Prompt, Write, one_by_one
from nsa_platform.evaluate.tasks.results import TaskResult
from nsa_platform.evaluate.tasks.suite import open_task, run_task
from nsa_platform.model.transformer import Transformer
from nsa_platform.serve.sampler import Sampler, Sampling


def budget_warning(run: EvaluateRun) -> str | None:
    """Where the budget is so large that policies tell nothing apart; None: nowhere."""
    config = run.baselines
    if config is None:
        return None
    contexts = {n for task in run.tasks if isinstance(task, Generated) for n in task.lengths}
    if run.bits_per_byte is not None:
        contexts.add(run.bits_per_byte.context_length)
    if run.needle is not None:
        contexts.update(run.needle.lengths)
    budgets = {context: budget_of(config, context) for context in sorted(contexts)}
    whole = [f"{at:,}" for at, budget in budgets.items() if budget and budget.total >= at]
    if not whole:
        return None
    return (
        f"baselines: at {' and '.join(whole)} tokens the budget is the whole context, and every "
        f"policy reads everything"
    )


def warn_of_budget(run: EvaluateRun) -> None:
    """Say on standard error where the budget is so large."""
    if line := budget_warning(run):
        warn(line)


def measure_policies(
    run: EvaluateRun,
    config: BaselinesConfig,
    model: Transformer,
    tokenizer: Tokenizer,
    bars: Bars,
    *,
    done: Callable[[str, PolicyResult], None],
) -> dict[str, PolicyResult]:
    """Every policy on the run's text, needles and tasks, by name.

    done: called with each policy when it is measured.
    """
    results = {name: PolicyResult() for name in config.systems}
    searched = _searched(run, config, model, tokenizer, bars)
    if searched is not None:
        results["minference"].patterns = searched.heads
    make = {
        name: partial(reader_of, name, model, config, tokenizer.stop_ids(), searched)
        for name in config.systems
    }
    if run.bits_per_byte is not None:
        length = run.bits_per_byte.context_length
        readers = {name: make[name]() for name in config.systems}
        found = score_text(
            run,
            run.bits_per_byte,
            {name: partial(reader.nats, context=length) for name, reader in readers.items()},
            tokenizer,
            bars,
            title="policies: text",
        )
        for name, reader in readers.items():
            results[name].bits = found[name]
            results[name].reads += reads_of(reader, "text", length)
    for name, result in results.items():
        _needles(run, result, make[name], tokenizer, bars, title=f"{name}: needles")
        _tasks(run, result, make[name], tokenizer, bars, title=name)
        done(name, result)
    return {str(name): result for name, result in results.items()}


def _searched(
    run: EvaluateRun,
    config: BaselinesConfig,
    model: Transformer,
    tokenizer: Tokenizer,
    bars: Bars,
) -> Searched | None:
    """MInference's patterns, if it is asked for and they are to be searched."""
    if config.minference is None or "minference" not in config.systems:
        return None
    sample = pattern_sample(run, config.minference, tokenizer, model.config.max_context)
    heads = model.config.layers * model.config.attention.query_heads
    bar = bars.add_task("minference: heads' patterns", total=heads)
    return search_patterns(
        model,
        sample,
        config.minference,
        budget_of(config, len(sample)),
        advance=lambda: bars.advance(bar),
    )


def _needles(
    run: EvaluateRun,
    result: PolicyResult,
    make: Callable[[], PolicyReader],
    tokenizer: Tokenizer,
    bars: Bars,
    *,
    title: str,
) -> None:
    """The run's needles for one policy, if it has any."""
    if run.needle is None:
        return
    bar = bars.add_task(title, total=num_trials(run.needle))
    result.grid, reads = policy_needles(
        make,
        tokenizer,
        run.needle,
        filler=filler_of(run, run.needle, tokenizer),
        advance=lambda: bars.advance(bar),
    )
    result.reads += reads


def _tasks(
    run: EvaluateRun,
    result: PolicyResult,
    make: Callable[[], PolicyReader],
    tokenizer: Tokenizer,
    bars: Bars,
    *,
    title: str,
) -> None:
    """The run's tasks for one policy; a reader for each length counts what is read there."""
    for config in run.tasks:
        parts = {length: open_task(part, tokenizer) for length, part in by_length(config)}
        total = sum(task.size for task in parts.values())
        bar = bars.add_task(f"{title}: {config.kind}", total=total)
        whole = TaskResult(config.kind, [])
        for length, task in parts.items():
            reader = make()
            found = run_task(
                task,
                tokenizer,
                write=_write_of(reader),
                score=reader.answer,
                advance=lambda bar=bar: bars.advance(bar),
            )
            whole.rows.extend(found.rows)
            result.reads += reads_of(reader, task.name, length)
        result.tasks.append(whole)


def by_length(config: TaskConfig) -> Iterator[tuple[int | None, TaskConfig]]:
    """A task's lengths, each with the task of this length alone, in the order in which the whole
    task has their samples; None and the task itself where it has no lengths."""
    if not isinstance(config, Generated):
        yield None, config
        return
    for length in sorted(config.lengths):
        yield length, config.model_copy(update={"lengths": (length,)})


def _write_of(reader: PolicyReader) -> Write:
    """Answers of a policy, drawn as is asked."""

    def answer(prompt: Prompt) -> list[int]:
        how = prompt.decoding
        sampler = Sampler(Sampling(how.temperature, how.top_p, seed=how.seed))
        return reader.generate(prompt.ids, prompt.max_new_tokens, pick=sampler.pick)

    return one_by_one(answer)
