"""What a training run will take, printed before it starts: sizes, FLOPs, memory, its stages."""

from rich.console import Console
from rich.table import Table

from jobs.training_inputs import Origin
from nsa_platform.config.runs import PretrainRun, SftRun
from nsa_platform.config.stages import Stage
from nsa_platform.train.estimate import Estimate, estimate

# The table's; a terminal may be narrower, a file has no width.
WIDTH = 120


def show_plan(run: PretrainRun | SftRun, origin: Origin) -> None:
    """Print what the run will take; nothing is started."""
    stages = run.in_stages()
    plans = [
        estimate(stage.model_of(origin.model), stage.data, stage.train, run.cluster)
        for stage in stages
    ]
    first = plans[0]
    parameters = _si(first.parameters.total)
    if first.parameters.active != first.parameters.total:
        parameters += f", {_si(first.parameters.active)} active"
    lora, share = run.train.lora, first.trainable / first.parameters.total
    rows = {
        "parameters": f"{parameters}, {_si(first.parameters.embedding)} of them embeddings",
        "trainable": "all of them"
        if lora is None
        else f"{_si(first.trainable)} ({share:.2%}): LoRA of rank {lora.rank}",
    }
    rows |= _totals(run, stages, plans) if len(stages) > 1 else _sizes(run, first)
    for name, value in rows.items():
        print(f"{name:<18} {value}")
    if len(stages) > 1:
        Console(highlight=False, width=WIDTH).print(_table(stages, plans))


def _sizes(run: PretrainRun | SftRun, plan: Estimate) -> dict[str, str]:
    """Of a run without stages."""
    sparse, dense = plan.flops_per_step, plan.dense_flops_per_step
    rows = {
        "steps": f"{plan.steps:,} of {_si(run.train.tokens_per_step)} tokens",
        "tokens": f"{_si(plan.tokens)} in rows of {run.data.context_length:,}",
        "FLOPs per step": f"{_si(sparse)} as executed, {_si(dense)} with full attention",
        "workers": f"{_workers(run)}, {plan.parallel}, each {plan.microbatches} microbatches "
        f"of {run.train.sequences_per_microbatch} rows in a step",
        "memory per worker": f"{_state(plan)}, about {_si(plan.activation_bytes)}B activations",
    }
    return rows | ({"mesh": plan.mesh} if plan.mesh else {})


def _totals(
    run: PretrainRun | SftRun, stages: tuple[Stage, ...], plans: list[Estimate]
) -> dict[str, str]:
    """Of all stages together."""
    steps, flops = stages[-1].last_step, [plan.flops_per_step for plan in plans]
    taken = [stage.last_step - stage.first_step for stage in stages]
    total = sum(count * each for count, each in zip(taken, flops, strict=True))
    return {
        "steps": f"{steps:,} of {_si(run.train.tokens_per_step)} tokens in {len(stages)} stages",
        "tokens": _si(steps * run.train.tokens_per_step),
        "FLOPs": f"{_si(total)} as executed",
        "workers": _workers(run),
        "memory per worker": f"{_state(plans[0])}, and activations",
    }


def _table(stages: tuple[Stage, ...], plans: list[Estimate]) -> Table:
    """A row for each stage."""
    table = Table(box=None, pad_edge=False)
    for name in ("stage", "to step", "context", "tokens", "peak lr", "rows at once"):
        table.add_column(name, justify="right")
    for name in ("FLOPs/step", "full attention", "activations", "workers share"):
        table.add_column(name, justify="right")
    for stage, plan in zip(stages, plans, strict=True):
        steps = stage.last_step - stage.first_step
        yarn = f" yarn {stage.yarn.factor:g}x" if stage.yarn else ""
        table.add_row(
            str(stage.number + 1),
            f"{stage.last_step:,}",
            f"{stage.data.context_length:,}{yarn}",
            _si(steps * stage.train.tokens_per_step),
            f"{stage.train.optimizer.learning_rate:g}",
            f"{stage.train.sequences_per_microbatch} x {plan.microbatches}",
            _si(plan.flops_per_step),
            _si(plan.dense_flops_per_step),
            f"{_si(plan.activation_bytes)}B",
            f"{plan.parallel} {plan.mesh}".strip(),
        )
    return table


def _state(plan: Estimate) -> str:
    return (
        f"{_si(plan.state_bytes)}B weights, gradients and optimizer (alone "
        f"{_si(plan.optimizer_bytes)}B)"
    )


def _workers(run: PretrainRun | SftRun) -> str:
    cluster = run.cluster
    device = "GPU" if cluster.use_gpu else f"{cluster.cpus_per_worker} CPU"
    return f"{cluster.num_workers} x {device}"


def _si(number: float) -> str:
    """Three digits and a unit."""
    for limit, unit in ((1e15, "P"), (1e12, "T"), (1e9, "G"), (1e6, "M"), (1e3, "k")):
        if number >= limit:
            return f"{number / limit:.3g}{unit}"
    return f"{number:.3g}"
