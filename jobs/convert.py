"""Convert a checkpoint with full attention to a model with NSA: of transformers, or our own.

    python -m jobs.convert --config jobs/configs/convert/nsa.yaml --set checkpoint=path --dry-run
    python -m jobs.convert --config X.yaml --set attention.branch_kv=shared

With attention.kind=nsa every branch starts with the checkpoint's keys and values, phi as the mean
and the gates, by default, biased to the window: continue with jobs.pretrain (`checkpoint:`) on data
that was prepared with the checkpoint's tokenizer. With attention.kind=full the model is the same
function. Checkpoints of transformers are Llama-, Mistral- or Qwen-shaped; one of this platform's is
an exported model with full attention. The result opens in transformers after
nsa_platform.model.hf.register().

Exit status: 0 converted; 2 the configuration or the checkpoint is wrong (nothing was written);
130 stopped; 1 anything else.
"""

from collections.abc import Sequence
from math import prod
from pathlib import Path

from jobs.cli import EXIT_BAD_CONFIG, fail, interruptible, read_run, warn
from jobs.places import check_output
from nsa_platform import storage
from nsa_platform.config.convert import ConvertRun
from nsa_platform.data.tokenizer import Tokenizer
from nsa_platform.model.conversion import Foreign, convert_weights, open_checkpoint
from nsa_platform.model.cost import count_parameters
from nsa_platform.model.dense_start import is_own, open_dense
from nsa_platform.train.export import publish


def main(argv: Sequence[str] | None = None) -> None:
    """Run the job; ends the process with an exit status if it fails."""
    run, dry_run = read_run(ConvertRun, __doc__ or "", argv)
    with interruptible("interrupted; nothing was written"):
        try:
            _check_output(run)
            foreign, tokenizer = _open(run)
        except ValueError as error:
            fail(str(error), status=EXIT_BAD_CONFIG)
        except OSError as error:
            fail(str(error))
        _show(foreign)
        if dry_run:
            return
        weights = convert_weights(foreign, seed=run.seed)
        try:
            publish(foreign.config, weights, run.output, tokenizer=tokenizer, say=print)
        except OSError as error:
            fail(f"output={run.output}: cannot be written ({error.strerror or error})")
        print(f"{'model':<12} {run.output}")


def _open(run: ConvertRun) -> tuple[Foreign, Tokenizer]:
    """The checkpoint and its tokenizer.

    Raises:
        ValueError: there is none, or it cannot become the model that is asked for.
        OSError: the store that it lies in cannot be reached.
    """
    wanted = "must be a folder with config.json, safetensors and tokenizer.json"
    try:
        folder = storage.fetch(
            run.checkpoint, run.cache_dir or storage.default_cache("checkpoints")
        )
        if not folder.is_dir():
            raise ValueError(f"checkpoint={run.checkpoint}: is a file, {wanted}")
        open_any = open_dense if is_own(folder) else open_checkpoint
        foreign = open_any(folder, run.attention, name=run.name, max_context=run.max_context)
        return foreign, _tokenizer(folder, foreign)
    except OSError as error:
        if storage.is_remote(run.checkpoint) and not isinstance(error, FileNotFoundError):
            raise
        reason = error.strerror or error
        raise ValueError(f"checkpoint={run.checkpoint}: {reason}; {wanted}") from None


def _tokenizer(folder: Path, foreign: Foreign) -> Tokenizer:
    """The checkpoint's own tokenizer; raises ValueError if its ids do not fit the embedding."""
    tokenizer = Tokenizer(folder)
    rows = foreign.config.vocab_size
    if tokenizer.vocab_size > rows:
        raise ValueError(
            f"{folder}: the tokenizer has {tokenizer.vocab_size} ids, the embedding {rows} rows"
        )
    return tokenizer


def _check_output(run: ConvertRun) -> None:
    """Raises ValueError unless the output can be made, and is new, empty or another model of
    ours."""
    if run.output == run.checkpoint:
        raise ValueError(f"output={run.output}: is the checkpoint itself; give another folder")
    check_output(run.output, replaced=True)
    names = storage.list_names(run.output)
    if names and not is_own(run.output):
        raise ValueError(
            f"output={run.output}: holds {names[0]} and no model of this platform; "
            "give another folder"
        )
    if names:
        warn(f"output={run.output}: the model that is there is replaced")


def _show(foreign: Foreign) -> None:
    """What comes over and what is new."""
    config = foreign.config
    total = count_parameters(config).total
    kept = sum(prod(shape) for shape in foreign.files.shapes.values())
    attention = config.attention
    print(f"{'attention':<12} {attention.kind}, {attention.query_heads} query heads, ", end="")
    print(f"{attention.kv_heads} key/value heads of {attention.key_width}")
    print(f"{'parameters':<12} {total:,} from the checkpoint's {kept:,}")
    print(f"{'context':<12} {config.max_context:,} tokens")


if __name__ == "__main__":
    main()
