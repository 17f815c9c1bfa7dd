"""What jobs.evaluate does with baselines: every policy gets what the model itself gets."""

from collections.abc import Callable
from functools import partial

from rich.progress import Progress

from jobs.evaluation_inputs import filler_of, num_trials, pattern_sample, score_text
from nsa_platform.config.evaluate import BaselinesConfig
from nsa_platform.config.runs import EvaluateRun
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
from nsa_platform.evaluate.tasks.suite import open_task, run_task
from nsa_platform.model.transformer import Transformer
from nsa_platform.serve.sampler import Sampler, Sampling


def measure_policies(
    run: EvaluateRun,
    config: BaselinesConfig,
    model: Transformer,
    tokenizer: Tokenizer,
    progress: Progress,
) -> dict[str, PolicyResult]:
    """Every policy on the run's text, needles and tasks, by name."""
    results = {name: PolicyResult() for name in config.systems}
    searched = _searched(run, config, model, tokenizer)
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
            progress,
            title="policies: text",
        )
        for name, reader in readers.items():
            results[name].bits = found[name]
            results[name].reads += reads_of(reader, "text", length)
    if run.needle is not None:
        filler = filler_of(run, run.needle, tokenizer)
        total = num_trials(run.needle) * len(config.systems)
        bar = progress.add_task("policies: needles", total=total)
        for name, result in results.items():
            result.grid, reads = policy_needles(
                make[name],
                tokenizer,
                run.needle,
                filler=filler,
                advance=lambda: progress.advance(bar),
            )
            result.reads += reads
    for name, result in results.items():
        _tasks(run, result, make[name], tokenizer, progress)
    return {str(name): result for name, result in results.items()}


def _searched(
    run: EvaluateRun, config: BaselinesConfig, model: Transformer, tokenizer: Tokenizer
) -> Searched | None:
    """MInference's patterns, if it is asked for and they are to be searched."""
    if config.minference is None or "minference" not in config.systems:
        return None
    sample = pattern_sample(run, config.minference, tokenizer, model.config.max_context)
    return search_patterns(model, sample, config.minference, budget_of(config, len(sample)))


def _tasks(
    run: EvaluateRun,
    result: PolicyResult,
    make: Callable[[], PolicyReader],
    tokenizer: Tokenizer,
    progress: Progress,
) -> None:
    """The run's tasks for one policy."""
    for config in run.tasks:
        task, reader = open_task(config, tokenizer), make()
        bar = progress.add_task(f"policies: {task.name}", total=task.size)
        found = run_task(
            task,
            tokenizer,
            write=_write_of(reader),
            score=reader.answer,
            advance=lambda bar=bar: progress.advance(bar),
        )
        result.tasks.append(found)
        result.reads += reads_of(reader, task.name, None)


def _write_of(reader: PolicyReader) -> Write:
    """Answers of a policy, drawn as is asked."""

    def answer(prompt: Prompt) -> list[int]:
        how = prompt.decoding
        sampler = Sampler(Sampling(how.temperature, how.top_p, seed=how.seed))
        return reader.generate(prompt.ids, prompt.max_new_tokens, pick=sampler.pick)

    return one_by_one(answer)
