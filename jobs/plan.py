"""Plan: what a replica can serve of a model. Nothing is started, no GPU is needed.

    python -m jobs.plan --config jobs/configs/pretrain/nsa_1b.yaml --gpu H100 --context 131072
    python -m jobs.plan --config deployments/configs/quickstart.yaml --gpu H100 --context 1024
    python -m jobs.plan --config ... --gpu H100 --context 1048576 --tensor-parallel-size 2

Reads the model of a training run's YAML, or the model, which must be there, and the engine's sizes
of a deployment's.
Speeds are bounds by the GPU's memory and arithmetic, not promises.

Exit status: 0 a sequence of the context fits; 1 none does; 2 the configuration or a flag is wrong.
"""

import argparse
import sys
from collections.abc import Sequence
from dataclasses import fields
from pathlib import Path

from rich.console import Console
from rich.table import Table

from deployments.config import ModelLoadingConfig
from deployments.config_file import ServeFile
from deployments.loading import find_model
from jobs.cli import EXIT_BAD_CONFIG, fail
from nsa_platform import storage
from nsa_platform.config.base import ConfigError, read_yaml
from nsa_platform.config.model import ModelConfig
from nsa_platform.config.serve import EngineConfig
from nsa_platform.model.weights import CONFIG_FILE, ExportError, load_config
from nsa_platform.serve.planning import GPUS, ServingPlan, plan_serving
from nsa_platform.tracking import is_model_reference

EXIT_DOES_NOT_FIT = 1


def main(argv: Sequence[str] | None = None) -> int:
    """Print what fits and how fast it could be."""
    parser = _parser()
    options = parser.parse_args(argv)
    if options.context < 1:
        parser.error(f"--context must be at least 1, got {options.context}")
    try:
        model, engine = read_sizes(options.config, options.overrides)
        num_ranks = options.tensor_parallel_size
        if num_ranks is None:
            num_ranks = engine.tensor_parallel_size
        plan = plan_serving(
            model, GPUS[options.gpu], engine, context=options.context, num_ranks=num_ranks
        )
    except (ConfigError, ExportError, ValueError, OSError) as error:
        fail(str(error), status=EXIT_BAD_CONFIG)
    console = Console(highlight=False)
    gpus = f"{num_ranks} x {options.gpu}" if num_ranks > 1 else f"one {options.gpu}"
    console.print(_table(plan, f"{model.name}, {options.context:,} tokens, {gpus}"))
    if num_ranks > 1:
        console.print("Memory is that of each GPU; all of them serve the same sequences.")
    if options.context > model.max_context:
        console.print(
            f"The model is meant for {model.max_context:,} tokens: serve it with "
            "engine_kwargs.hf_overrides {max_context, yarn}.",
            markup=False,
        )
    if not plan.num_sequences:
        console.print("No sequence of this length fits.", markup=False)
    return 0 if plan.num_sequences else EXIT_DOES_NOT_FIT


def read_sizes(path: Path, overrides: Sequence[str]) -> tuple[ModelConfig, EngineConfig]:
    """The model and the engine that a file of jobs/configs or of deployments/configs describes.

    Raises:
        ConfigError: the file is wrong, or describes no model.
        ExportError: a deployment's model is not there.
        ValueError, OSError: it lies elsewhere, and cannot be fetched.
    """
    tree = read_yaml(path)
    if "applications" in tree:
        config = ServeFile.read(path, overrides).serving_args(Path.cwd()).llm_configs[0]
        engine = config.engine_kwargs
        return engine.hf_overrides.of(_model_of(config.model_loading_config)), engine
    if not isinstance(tree.get("model"), dict):
        raise ConfigError(f"{path}: has neither `applications` nor a `model` with sizes")
    if overrides:
        raise ConfigError("--set: patches deployments' files only")
    return ModelConfig.parse(tree["model"], source=f"{path}: model"), EngineConfig()


def _model_of(loading: ModelLoadingConfig) -> ModelConfig:
    source = loading.model_source
    if is_model_reference(source):
        print(f"fetching {source}", file=sys.stderr)
        return load_config(find_model(loading))
    if storage.is_remote(source):
        # Of what may be gigabytes a page is read.
        file = storage.fetch(storage.join(source, CONFIG_FILE), storage.default_cache("files"))
        return load_config(file.parent)
    return load_config(source)


def _table(plan: ServingPlan, title: str) -> Table:
    table = Table(title=title, title_justify="left", show_header=False, box=None)
    gib = float(1 << 30)
    table.add_row("weights", f"{plan.weight_bytes / gib:.2f} GiB")
    table.add_row("left for the cache", f"{plan.budget_bytes / gib:.2f} GiB")
    table.add_row("cache of one sequence", f"{plan.sequence.total / gib:.3f} GiB")
    for branch in fields(plan.sequence):
        size = getattr(plan.sequence, branch.name)
        table.add_row(f"  {branch.name}", f"{size / gib:.3f} GiB ({size:,} bytes)")
    table.add_row("memory of the host", f"{plan.host_bytes / gib:.1f} GiB")
    table.add_row("sequences that fit", f"{plan.num_fitting:,}")
    table.add_row("sequences at once (max_num_seqs)", f"{plan.num_sequences:,}")
    table.add_row("time to first token, at least", f"{plan.ttft_s:.3f} s")
    table.add_row("tokens/s of one sequence, at most", f"{plan.tokens_per_s:,.0f}")
    table.add_row("tokens/s of all, at most", f"{plan.full_tokens_per_s:,.0f}")
    return table


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("--config", type=Path, required=True, metavar="X.yaml", help="a run or a deployment")
    add("--gpu", choices=sorted(GPUS), required=True, help="whose memory and speed count")
    add("--context", type=int, required=True, help="tokens of a sequence, prompt and output")
    add(
        "--tensor-parallel-size",
        type=int,
        metavar="N",
        help="GPUs that compute the model together; by default as the deployment says, or one",
    )
    add(
        "--set",
        action="append",
        default=[],
        metavar="a.0.b=value",
        dest="overrides",
        help="patch one key of a deployment's file; may be given again",
    )
    return parser


if __name__ == "__main__":
    raise SystemExit(main())
