"""A model of this platform with full attention as the start of one with NSA.

Everything comes over under its own name; keys and values go to every branch, phi starts as the
mean, and the gates start where the configuration puts them.
"""

import json
from pathlib import Path

from nsa_platform.config.base import ConfigError
from nsa_platform.config.convert import FullConversion, NsaConversion
from nsa_platform.config.model import FullAttentionConfig, Heads, ModelConfig
from nsa_platform.model.conversion import ConversionError, Foreign, Part, copies_of_keys
from nsa_platform.model.tensor_files import TensorFiles
from nsa_platform.model.weights import CONFIG_FILE, MODEL_TYPE, load_config, open_weights


def is_own(folder: Path) -> bool:
    """Whether a folder is an exported model of this platform."""
    try:
        tree = json.loads((folder / CONFIG_FILE).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return False
    return isinstance(tree, dict) and tree.get("model_type") == MODEL_TYPE


def open_dense(
    folder: Path,
    attention: NsaConversion | FullConversion,
    *,
    name: str,
    max_context: int | None = None,
) -> Foreign:
    """Read an exported model and check that it can become one with this attention.

    Raises:
        ConversionError: it has another attention than full, or a gate, or the sizes do not fit.
        ExportError: the folder is no whole export.
    """
    dense = load_config(folder)
    if not isinstance(dense.attention, FullAttentionConfig):
        raise ConversionError(
            f"{folder}: attention.kind={dense.attention.kind!r} must be 'full': only full "
            "attention can be converted"
        )
    if dense.attention.gated:
        raise ConversionError(
            f"{folder}: attention.gated=true must be false: NSA's gates weigh its branches"
        )
    heads = dense.attention.model_dump(include=set(Heads.model_fields))
    tree = dense.model_dump() | {"name": name, "attention": heads | attention.model_dump()}
    if max_context is not None:
        tree["max_context"] = max_context
    try:
        config = ModelConfig.parse(tree, source=str(folder))
    except ConfigError as error:
        raise ConversionError(str(error)) from None
    files, stored = open_weights(folder, dense)
    return Foreign(
        config,
        files,
        {name: _parts(name, origin, files, config) for name, origin in stored.items()},
    )


def _parts(name: str, origin: str, files: TensorFiles, config: ModelConfig) -> tuple[Part, ...]:
    """What goes into a parameter: the whole tensor; of keys and values, which lie in one, the keys
    of all branches and then the values."""
    if ".attention.key_value." not in name:
        return (Part(origin),)
    keys = config.attention.kv_heads * config.attention.key_width
    copies = copies_of_keys(config)
    assert files.shapes[origin][0] > keys
    return (Part(origin, end=keys),) * copies + (Part(origin, begin=keys),) * copies
