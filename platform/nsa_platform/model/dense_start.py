"""A model of this platform with full attention as the start of one with NSA.

Everything comes over under its own name; keys and values go to every branch, phi starts as the
mean, and the gates start where the configuration puts them.
"""

import json
from pathlib import Path

from nsa_platform import storage
from nsa_platform.config.convert import FullConversion, NsaConversion
from nsa_platform.config.model import FullAttentionConfig, Heads, ModelConfig
from nsa_platform.model.conversion import (
    ConversionError,
    Foreign,
    Part,
    copies_of_keys,
    parse_config,
)
from nsa_platform.model.tensor_files import TensorFiles
from nsa_platform.model.weights import CONFIG_FILE, MODEL_TYPE, load_config, open_weights


def is_own(folder: str | Path) -> bool:
    """Whether a folder, local or s3://, is an exported model of this platform."""
    place = storage.join(str(folder), CONFIG_FILE)
    try:
        tree = json.loads(storage.read_text(place))
    except (storage.MissingFileError, ValueError):
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
    tree = dense.model_dump() | {"attention": heads | attention.model_dump()}
    config = parse_config(tree, folder, name=name, max_context=max_context)
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
