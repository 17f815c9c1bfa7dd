"""The finished model as a folder that evaluation, serving and fine-tuning read."""

import tempfile
from collections.abc import Callable
from pathlib import Path

from torch import Tensor
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict

from nsa_platform import storage
from nsa_platform.config.model import ModelConfig
from nsa_platform.data.tokenizer import Tokenizer
from nsa_platform.model.transformer import Transformer
from nsa_platform.model.weights import CONFIG_FILE, export_model
from nsa_platform.retry import retried
from nsa_platform.train.adapters import merged
from nsa_platform.train.parallel import World


def gather_weights(model: Transformer) -> dict[str, Tensor]:
    """Full weights on the CPU: on the first worker, nothing on the others. All workers call it."""
    options = StateDictOptions(full_state_dict=True, cpu_offload=True)
    state = get_model_state_dict(model, options=options)
    return {name: value for name, value in state.items() if isinstance(value, Tensor)}


def upload_config_last(folder: Path, target: str) -> None:
    """Copy an exported model; the copy is complete when its config.json is there."""
    storage.delete_tree(storage.join(target, CONFIG_FILE))
    names = [entry.name for entry in storage.walk(str(folder))]
    for name in sorted(names, key=lambda name: name == CONFIG_FILE):
        storage.upload_file(folder / name, storage.join(target, name))


def export(
    model: Transformer,
    target: str,
    *,
    tokenizer: Tokenizer,
    world: World,
    say: Callable[[str], None],
) -> None:
    """Write the model with its tokenizer to `target`, local or s3://. All workers call it.

    Adapters are merged into the weights they belong to.

    Raises:
        OSError: it could not be written; on the first worker.
    """
    weights = gather_weights(model)
    if world.is_first:
        weights = merged(model, weights)
        publish(model.config, weights, target, tokenizer=tokenizer, say=say)


def publish(
    config: ModelConfig,
    weights: dict[str, Tensor],
    target: str,
    *,
    tokenizer: Tokenizer,
    say: Callable[[str], None],
) -> None:
    """Write full weights with a tokenizer to `target`, local or s3://.

    A remote folder is complete when its config.json is there: that is uploaded last.

    Raises:
        OSError: it could not be written.
    """
    with tempfile.TemporaryDirectory(prefix="export-") as temporary:
        beside = Path(temporary) / "tokenizer"
        tokenizer.save(beside)
        remote = storage.is_remote(target)
        folder = Path(temporary) / "model" if remote else Path(target)
        folder.parent.mkdir(parents=True, exist_ok=True)
        export_model(
            folder,
            config,
            weights,
            tokenizer_dir=beside,
            tokenizer_fingerprint=tokenizer.fingerprint,
        )
        if remote:
            what = f"upload of the model to {target}"
            retried(lambda: upload_config_last(folder, target), what, say=say)
