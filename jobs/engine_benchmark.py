"""Measure the engine by itself, without a server: random weights, long contexts, NSA beside full.

    python -m jobs.engine_benchmark --config jobs/configs/pretrain/nsa_1b.yaml
    python -m jobs.engine_benchmark --config ... --contexts 65536 131072 --batch-sizes 16
    python -m jobs.engine_benchmark --config ... --contention --long-len 262144
    python -m jobs.engine_benchmark --draw results/engine_nsa_1b_h100.json

Takes the model's sizes from a pretraining run and the very same with full attention, draws weights
on the device, and runs the engine of jobs and deployments on them. For each context and batch size:
tokens per second and time of a decode step, how much of it the GPU is idle, pages and bytes of the
cache; for each context the time of a prompt to its first token.

Contexts of 128k and more cost minutes to prefill. With --fill random, the default, the cache is
filled with normal noise instead and the requests find their prompts in the prefix cache: decoding
runs as ever, on keys that say nothing. --fill prefill computes them. A batch that does not fit is
made smaller, for all kinds alike, and the record says so.

--contention instead asks how long prompts of --short-len tokens wait for their first token while
one of --long-len is prefilled, and how long they wait alone.

Every figure is printed and written to --output as soon as it is there.

Exit status: 0 measured; 1 the engine failed at some point; 2 a flag or the configuration is wrong.
"""

import argparse
import json
import platform
import subprocess
import sys
from collections.abc import Mapping, Sequence
from datetime import UTC, datetime
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy
import torch
from rich.console import Console

from jobs import engine_measures as measures
from jobs.cli import EXIT_BAD_CONFIG, fail, interruptible
from nsa_platform import figures
from nsa_platform.config.base import ConfigError, patch
from nsa_platform.config.model import ModelConfig
from nsa_platform.config.runs import PretrainRun
from nsa_platform.config.serve import EngineConfig
from nsa_platform.data.tokenizer import Tokenizer, TokenizerError
from nsa_platform.model.cost import dense_equivalent
from nsa_platform.model.transformer import Transformer
from nsa_platform.serve.engine import Engine

KINDS = ("nsa", "full")
CONTEXTS = (4096, 8192, 16384, 32768, 65536, 131072, 262144, 524288)
BATCH_SIZES = (1, 16)
MAX_STEP_TOKENS = 8192
SHORT_SEQUENCES = 16
"""Places for short prompts beside the long one."""


def main(argv: Sequence[str] | None = None) -> int:
    """Measure, print, write; or draw what is written."""
    options = _parser().parse_args(argv)
    if options.draw is not None:
        return _draw(options.draw)
    device = torch.device(options.device)
    try:
        config = _model_config(options)
        tokenizer = measures.text_tokenizer(config.vocab_size)
        engine_config = _engine_config(options)
        options.output.parent.mkdir(parents=True, exist_ok=True)
    except (ConfigError, TokenizerError, ValueError, OSError) as error:
        fail(str(error), status=EXIT_BAD_CONFIG)
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    configs = {"nsa": config, "full": dense_equivalent(config)}
    models = {
        kind: measures.random_model(configs[kind], device=device, dtype=dtype)
        for kind in options.kinds
    }
    record = _Record(options.output, _stamp(options, config, device))
    with interruptible(f"interrupted; what was measured is in {options.output}"):
        measure = _contention if options.contention else _speeds
        measure(models, tokenizer, engine_config, options, record)
    print(options.output)
    return int(record.has_failed)


class _Record:
    """The file of the figures, written anew with each."""

    def __init__(self, path: Path, about: dict[str, Any]) -> None:
        self.path = path
        self.has_failed = False
        self._tree = about | {"points": []}
        self._console = Console(highlight=False, soft_wrap=True)

    def add(self, **point: Any) -> None:
        """Print and keep a figure."""
        rounded = {k: round(v, 4) if isinstance(v, float) else v for k, v in point.items()}
        self._tree["points"].append(rounded)
        draft = self.path.with_suffix(".tmp")
        draft.write_text(json.dumps(self._tree, indent=1) + "\n", encoding="utf-8")
        draft.rename(self.path)
        words = (f"{name}={value}" for name, value in rounded.items() if value is not None)
        self._console.print(" ".join(words), markup=False)

    def add_failure(self, error: RuntimeError, **point: Any) -> None:
        """Keep that there is no figure. Too little memory is a figure of its own kind."""
        is_memory = isinstance(error, torch.OutOfMemoryError)
        self.has_failed |= not is_memory
        reason = "out of memory" if is_memory else " ".join(str(error).split())[:500]
        self.add(**point, error=reason)


def _speeds(
    models: dict[str, Transformer],
    tokenizer: Tokenizer,
    config: EngineConfig,
    options: argparse.Namespace,
    record: _Record,
) -> None:
    """Decoding and prefill of each kind at each context, the kinds side by side."""
    device = torch.device(options.device)
    for context in options.contexts:
        stretched = {kind: _stretch(model, context) for kind, model in models.items()}
        most = config.model_copy(update={"max_num_seqs": max(options.batch_sizes)})
        fitting = measures.fitting_batch(
            [model.config for model in stretched.values()], most, context=context, device=device
        )
        asked = {min(size, fitting): size for size in sorted(options.batch_sizes)}
        for kind, model in stretched.items():
            about = {"kind": kind, "context": context}
            if not fitting:
                record.add(**about, measure="decode", error="does not fit")
                continue
            sized = measures.sized_for(
                config, model.config, batch_size=max(asked), context=context
            ).model_copy(update={"cudagraph_capture_sizes": tuple(asked)})
            try:
                with measures.started_engine(model, tokenizer, sized) as engine:
                    _measure_engine(engine, asked, about, options, record)
            except RuntimeError as error:
                record.add_failure(error, **about)


def _measure_engine(
    engine: Engine,
    asked: Mapping[int, int],
    about: dict[str, Any],
    options: argparse.Namespace,
    record: _Record,
) -> None:
    """asked: what was asked for, by the batch size that fits."""
    measures.fill_cache(engine)
    context = engine.max_model_len
    for size, wanted in asked.items():
        speed = measures.decode_speed(
            engine,
            batch_size=size,
            context=context,
            num_steps=options.steps,
            is_computed=options.fill == "prefill",
        )
        about_batch = {"batch_size": size, "asked_batch_size": wanted, "fill": options.fill}
        record.add(**about, measure="decode", **about_batch, **speed)
    if context <= options.max_prefill_len:
        record.add(**about, measure="prefill", **measures.prefill_speed(engine, length=context - 1))


def _contention(
    models: dict[str, Transformer],
    tokenizer: Tokenizer,
    config: EngineConfig,
    options: argparse.Namespace,
    record: _Record,
) -> None:
    """Waits of short prompts alone and beside a long one."""
    for kind, model in models.items():
        stretched = _stretch(model, options.long_len + 1)
        sized = config.model_copy(
            update={
                "max_model_len": options.long_len + 1,
                "max_num_seqs": SHORT_SEQUENCES + 1,
                "num_kv_tokens": options.long_len + 2 * SHORT_SEQUENCES * options.short_len,
            }
        )
        about = {"kind": kind, "measure": "contention", "context": options.long_len}
        try:
            with measures.started_engine(stretched, tokenizer, sized) as engine:
                waits_s = {
                    name: measures.arrival_waits(
                        engine,
                        number=options.arrivals,
                        length=options.short_len,
                        rate=options.rate,
                        long_length=long_length,
                    )
                    for name, long_length in (
                        ("warm", options.long_len),
                        ("idle", None),
                        ("busy", options.long_len),
                    )
                }
        except RuntimeError as error:
            record.add_failure(error, **about)
            continue
        times = {
            f"p{percent}_{name}_ttft_ms": 1e3 * float(numpy.percentile(waits_s[name], percent))
            for name in ("idle", "busy")
            for percent in (50, 99)
        }
        ratio = times["p99_busy_ttft_ms"] / times["p99_idle_ttft_ms"]
        record.add(**about, short_len=options.short_len, rate=options.rate,
                   arrivals=options.arrivals, **times, p99_ratio=ratio)  # fmt: skip


def _stretch(model: Transformer, context: int) -> Transformer:
    """The model, said to be meant for such contexts: no weight depends on it."""
    model.config = model.config.model_copy(update={"max_context": context})
    return model


def _model_config(options: argparse.Namespace) -> ModelConfig:
    if options.config is None:
        raise ConfigError("--config: a run with the model's sizes is needed")
    config = PretrainRun.load(options.config, options.overrides).model
    if config is None:
        raise ConfigError(f"{options.config}: has no model with sizes")
    if config.attention.kind != "nsa":
        raise ConfigError(
            f"{options.config}: model.attention.kind must be nsa, got {config.attention.kind}; its "
            "twin with full attention is made here"
        )
    if options.rate <= 0:
        raise ConfigError(f"--rate: must be positive, got {options.rate}")
    least = options.steps + measures.OTHER_STEPS
    if min(options.contexts) <= least:
        raise ConfigError(
            f"--contexts: must exceed {least} tokens, those that are generated, "
            f"got {min(options.contexts)}"
        )
    return config


def _engine_config(options: argparse.Namespace) -> EngineConfig:
    """What is the same for all engines; flags of the engine win."""
    tree: dict[str, Any] = {"max_num_batched_tokens": MAX_STEP_TOKENS}
    if not options.contention:
        tree["max_step_ms"] = None  # steps of full size: nothing waits for them
    return EngineConfig.parse(patch(tree, options.engine, flag="--engine"), source="--engine")


def _stamp(
    options: argparse.Namespace, config: ModelConfig, device: torch.device
) -> dict[str, Any]:
    """What the record says about where it comes from."""
    commit = options.commit
    if commit is None:
        git = ["git", "-C", str(Path(__file__).parent), "rev-parse", "--short=12", "HEAD"]
        done = subprocess.run(git, capture_output=True, text=True, check=False)
        commit = done.stdout.strip() if done.returncode == 0 else "unknown"
    return {
        "name": options.output.stem,
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else "CPU",
        "versions": {
            "torch": torch.__version__,
            "triton": version("triton"),
            "python": platform.python_version(),
        },
        "commit": commit,
        "date": datetime.now(UTC).date().isoformat(),
        "command": " ".join(["python -m jobs.engine_benchmark", *sys.argv[1:]]),
        "model": config.model_dump(mode="json"),
        "fill": options.fill,
    }


def _draw(path: Path) -> int:
    """The picture of a record, beside it."""
    try:
        record = json.loads(path.read_text(encoding="utf-8"))
        points = [p for p in record["points"] if "tokens_per_s" in p and p["measure"] == "decode"]
    except OSError as error:
        fail(f"--draw: {error}", status=EXIT_BAD_CONFIG)
    except (ValueError, KeyError, TypeError):
        fail(f"{path}: is no record of this benchmark", status=EXIT_BAD_CONFIG)
    if not points:
        fail(f"{path}: holds no decode speeds", status=EXIT_BAD_CONFIG)
    speeds: dict[tuple[str, int], dict[int, float]] = {}
    for point in points:
        line = speeds.setdefault((point["kind"], point["asked_batch_size"]), {})
        line[point["context"]] = point["tokens_per_s"]
    title = f"{record['model']['name']}, decoding on one {record['device']}"
    picture = path.with_suffix(".png")
    figures.decode_speeds(speeds, title=title).savefig(picture, dpi=110)
    print(picture)
    return 0


def _positive(text: str) -> int:
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"must be a whole number from 1 on, got {text!r}")
    return int(text)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    place = "cuda" if torch.cuda.is_available() else "cpu"
    add("--config", type=Path, metavar="X.yaml", help="a pretraining run: its model's sizes count")
    add("--set", action="append", default=[], metavar="a.b=value", dest="overrides",
        help="patch one key of that file; may be given again")  # fmt: skip
    add("--engine", action="append", default=[], metavar="key=value",
        help="a key of engine_kwargs; may be given again")  # fmt: skip
    add("--kinds", nargs="+", choices=KINDS, default=list(KINDS), help="of attention")
    add(
        "--contexts",
        nargs="+",
        type=_positive,
        default=list(CONTEXTS),
        help="tokens, the last included",
    )
    add(
        "--batch-sizes",
        nargs="+",
        type=_positive,
        default=list(BATCH_SIZES),
        help="sequences at once",
    )
    add("--steps", type=_positive, default=32, help="measured steps of decoding")
    add("--fill", choices=("random", "prefill"), default="random", help="what contexts hold")
    add("--max-prefill-len", type=int, default=131072, help="longest prompt to prefill; 0: none")
    add("--contention", action="store_true", help="waits beside a long prompt instead of speeds")
    add("--long-len", type=_positive, default=262144, help="tokens of the long prompt")
    add("--short-len", type=_positive, default=1024, help="tokens of the prompts that wait")
    add("--arrivals", type=_positive, default=100, help="prompts that wait")
    add("--rate", type=float, default=4.0, help="of them a second, at random")
    add("--device", choices=("cuda", "cpu"), default=place)
    add("--output", type=Path, default=Path("runs/engine_benchmark.json"), help="the record")
    add("--commit", help="what to call this version where git cannot tell")
    add("--draw", type=Path, metavar="RECORD", help="only draw what is recorded, beside it")
    return parser


if __name__ == "__main__":
    raise SystemExit(main())
