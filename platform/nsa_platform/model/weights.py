"""An exported model: a folder with config.json, model.safetensors and the tokenizer's files.

    config.json             model_type "nsa", sizes under their usual names, and under
                            "nsa_platform" the ModelConfig itself, which alone is read back
    model.safetensors       every parameter under its name in Transformer.state_dict()
    generation_config.json  max_length
    tokenizer files         as they came, chat template included

The folder appears as a whole: it is written beside its place and then renamed. A folder that
transformers has written from such a model (save_pretrained) is read as well.
"""

import hashlib
import json
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any
from uuid import uuid4

import torch
from safetensors.torch import save_file
from torch import Tensor

from nsa_platform.config.base import ConfigError
from nsa_platform.config.model import ModelConfig
from nsa_platform.model.identity import IDENTITY_KEY, identity_of
from nsa_platform.model.partition import WHOLE, Axis
from nsa_platform.model.tensor_files import WEIGHTS_FILE, TensorFileError, TensorFiles, weight_paths
from nsa_platform.model.tensor_parallel import cut_of, rank_model
from nsa_platform.model.transformer import Transformer

CONFIG_FILE = "config.json"
MODEL_TYPE = "nsa"
CONFIG_KEY = "nsa_platform"
FINGERPRINT_KEY = "tokenizer_fingerprint"
"""Of the tokenizer that the model was trained with; absent if the export did not say."""
PREFIX = "model."
"""Stands before every name in weights that transformers has written (NsaForCausalLM)."""

DIGEST_CHUNK = 1 << 16
DIGEST_CHUNKS = 256


class ExportError(ValueError):
    """A folder is not an exported model, or weights do not fit a config."""


def export_model(
    folder: str | Path,
    config: ModelConfig,
    state_dict: Mapping[str, Tensor],
    *,
    tokenizer_dir: str | Path | None = None,
    tokenizer_fingerprint: str | None = None,
) -> Path:
    """Write an exported model; an earlier export in the same place is replaced as a whole.

    Args:
        state_dict: full (not sharded) tensors, one for each parameter of Transformer(config).
        tokenizer_dir: its files are copied beside the weights.
        tokenizer_fingerprint: kept in config.json, so that a loader can tell a foreign tokenizer.

    Raises:
        ExportError: a tensor is missing, unknown or of the wrong shape, or tokenizer_dir is not
            a folder.
    """
    _check_tensors({name: tuple(t.shape) for name, t in state_dict.items()}, config, "state_dict")
    source = None if tokenizer_dir is None else Path(tokenizer_dir)
    if source is not None and not source.is_dir():
        raise ExportError(f"tokenizer_dir={source} is not a folder")

    target = Path(folder)
    draft = target.with_name(f".{target.name}.{uuid4().hex}")
    draft.mkdir(parents=True)
    try:
        if source is not None:
            shutil.copytree(source, draft, dirs_exist_ok=True)
        tensors = {name: t.detach().cpu().contiguous() for name, t in state_dict.items()}
        save_file(tensors, draft / WEIGHTS_FILE, metadata={"format": "pt"})
        # Written for its owner alone otherwise, unlike the files beside it.
        (draft / WEIGHTS_FILE).chmod((draft / WEIGHTS_FILE).stat().st_mode | 0o044)
        dtype = next(iter(tensors.values())).dtype
        fingerprint = {FINGERPRINT_KEY: tokenizer_fingerprint} if tokenizer_fingerprint else {}
        tree = hf_config(config, dtype)
        identity = {IDENTITY_KEY: identity_of(tree[CONFIG_KEY])}
        _write_json(draft / CONFIG_FILE, tree | fingerprint | identity)
        _write_json(draft / "generation_config.json", {"max_length": config.max_context})
        _replace(draft, target)
    except BaseException:
        shutil.rmtree(draft, ignore_errors=True)
        raise
    return target


def load_config(folder: str | Path) -> ModelConfig:
    """The ModelConfig of an exported model.

    Raises:
        ExportError: config.json is missing, is not JSON, or was not written by export_model.
    """
    path = Path(folder) / CONFIG_FILE
    if not path.is_file():
        raise ExportError(
            f"{folder}: has no {CONFIG_FILE}; an exported model is a folder with {CONFIG_FILE}, "
            f"{WEIGHTS_FILE} and the tokenizer's files"
        )
    try:
        tree = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise ExportError(f"{path}: cannot be read ({error.strerror})") from None
    except ValueError as error:
        raise ExportError(f"{path}: is not JSON: {error}") from None
    if not isinstance(tree, dict) or not isinstance(tree.get(CONFIG_KEY), dict):
        kind = tree.get("model_type") if isinstance(tree, dict) else None
        raise ExportError(
            f"{path}: has no {CONFIG_KEY!r} entry (model_type={kind!r}); "
            f"only models exported by this platform can be loaded"
        )
    try:
        return ModelConfig.parse(tree[CONFIG_KEY], source=f"{path}: {CONFIG_KEY}")
    except ConfigError as error:
        raise ExportError(str(error)) from None


def weights_digest(folder: str | Path) -> str:
    """Twelve hex digits that tell exported models apart, without reading all of a large one.

    Raises:
        ExportError: config.json or the weights cannot be read.
    """
    digest = hashlib.sha256()
    try:
        digest.update((Path(folder) / CONFIG_FILE).read_bytes())
        for path in weight_paths(folder):
            with path.open("rb") as file:
                size = file.seek(0, 2)
                digest.update(str(size).encode())
                step = max(DIGEST_CHUNK, size // DIGEST_CHUNKS)
                for start in range(0, size, step):
                    file.seek(start)
                    digest.update(file.read(DIGEST_CHUNK))
    except OSError as error:
        raise ExportError(f"{error.filename}: cannot be read ({error.strerror})") from None
    except TensorFileError as error:
        raise ExportError(str(error)) from None
    return digest.hexdigest()[:12]


def check_weights(folder: str | Path, config: ModelConfig) -> None:
    """Find what is wrong with the weights without reading them.

    Raises:
        ExportError: a file is missing, broken or foreign, or the tensors do not fit the config.
    """
    open_weights(folder, config)


def load_model(
    folder: str | Path,
    config: ModelConfig | None = None,
    *,
    device: torch.device | str = "cpu",
    dtype: torch.dtype = torch.float32,
    tensor: Axis = WHOLE.tensor,
) -> Transformer:
    """The exported model on a device, weights cast to dtype.

    Args:
        config: what to make of the weights; None: the exported model's own.
        tensor: the ranks that compute the model together; this one reads its share alone.

    Raises:
        ExportError: a file is missing, broken or foreign, or the tensors do not fit the config.
        ValueError: the model cannot be dealt to so many ranks.
    """
    config = config or load_config(folder)
    files, stored = open_weights(folder, config)
    model = rank_model(config, tensor)
    state = {}
    for name, origin in stored.items():
        cut = None if tensor.size == 1 else cut_of(name, files.shapes[origin], config)
        value = (
            files.tensor(origin) if cut is None else files.parts(origin, cut.dim, cut.own(tensor))
        )
        state[name] = value.to(device, dtype)
    model.load_state_dict(state, assign=True)
    return model.requires_grad_(True).eval()


def hf_config(config: ModelConfig, dtype: torch.dtype) -> dict[str, Any]:
    """config.json: the names that transformers' users look for, and the ModelConfig itself."""
    return {
        "model_type": MODEL_TYPE,
        "architectures": ["NsaForCausalLM"],
        "vocab_size": config.vocab_size,
        "hidden_size": config.width,
        "intermediate_size": config.ffn_width,
        "num_hidden_layers": config.layers,
        "num_attention_heads": config.attention.query_heads,
        "num_key_value_heads": config.attention.kv_heads,
        "head_dim": config.attention.key_width,
        "max_position_embeddings": config.max_context,
        "rms_norm_eps": config.norm_eps,
        "tie_word_embeddings": config.tie_embeddings,
        "dtype": str(dtype).removeprefix("torch."),
        CONFIG_KEY: config.model_dump(mode="json"),
    }


def open_weights(folder: str | Path, config: ModelConfig) -> tuple[TensorFiles, dict[str, str]]:
    """The files, and the stored name of each of the model's tensors.

    Raises:
        ExportError: a file is missing, broken or foreign, or the tensors do not fit the config.
    """
    try:
        files = TensorFiles(folder)
    except TensorFileError as error:
        raise ExportError(str(error)) from None
    stored = {name.removeprefix(PREFIX): name for name in files.shapes}
    shapes = {name: files.shapes[origin] for name, origin in stored.items()}
    _check_tensors(shapes, config, str(files.paths[0]))
    return files, stored


def _check_tensors(shapes: Mapping[str, tuple[int, ...]], config: ModelConfig, source: str) -> None:
    with torch.device("meta"):
        model = Transformer(config)
    wanted = {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()}
    problems = [f"{name} is missing" for name in wanted if name not in shapes]
    problems += [f"{name} is unknown" for name in shapes if name not in wanted]
    problems += [
        f"{name} has shape {shapes[name]} instead of {shape}"
        for name, shape in wanted.items()
        if name in shapes and shapes[name] != shape
    ]
    if problems:
        more = f" and {len(problems) - 5} more" if len(problems) > 5 else ""
        raise ExportError(f"{source}: does not fit the config: {'; '.join(problems[:5])}{more}")


def _write_json(path: Path, tree: dict[str, Any]) -> None:
    path.write_text(json.dumps(tree, indent=2) + "\n", encoding="utf-8")


def _replace(draft: Path, target: Path) -> None:
    """Put draft in target's place. A crash leaves the old folder, or the new one, or neither."""
    if not target.exists():
        draft.rename(target)
        return
    old = target.with_name(f".{target.name}.{uuid4().hex}.old")
    target.rename(old)
    draft.rename(target)
    shutil.rmtree(old)
