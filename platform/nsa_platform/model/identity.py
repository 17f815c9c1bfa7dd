"""What computed a model: a digest of kernels and model code, kept beside the weights.

Which blocks are selected hangs on sums in float32, and so on the order in which kernels add.
Weights that were trained by one set of sources and are served by another may choose differently: a
loader can tell.
"""

import hashlib
import json
from collections.abc import Mapping
from functools import cache
from importlib.resources import files
from importlib.resources.abc import Traversable
from typing import Any

IDENTITY_KEY = "computed_by"
MODEL_SOURCES = (
    "attention.py",
    "compression.py",
    "experts.py",
    "layers.py",
    "moe.py",
    "rotary.py",
    "step.py",
    "transformer.py",
)
"""Files of nsa_platform.model that a forward pass goes through; of nsa_kernels all do."""


@cache
def sources_digest() -> str:
    """Twelve hex digits of the sources that compute a forward pass, as they are installed."""
    digest = hashlib.sha256()
    kernels, model = files("nsa_kernels"), files("nsa_platform.model")
    for source in (*_python_files(kernels), *(model / name for name in MODEL_SOURCES)):
        digest.update(source.name.encode() + b"\0" + source.read_bytes() + b"\0")
    return digest.hexdigest()[:12]


def identity_of(config: Mapping[str, Any]) -> dict[str, str]:
    """What is kept beside the weights of a model with this configuration, a plain tree."""
    return {"sources": sources_digest(), "config": _config_digest(config)}


def differences(recorded: Mapping[str, Any], config: Mapping[str, Any]) -> list[str]:
    """In what the sources here and this configuration differ from what was recorded; empty: in
    nothing, or nothing was recorded."""
    found = []
    for name, now in identity_of(config).items():
        then = recorded.get(name, now)
        if then != now:
            found.append(f"{name}: {then} when the model was exported, {now} here")
    return found


def _config_digest(config: Mapping[str, Any]) -> str:
    return hashlib.sha256(json.dumps(config, sort_keys=True).encode()).hexdigest()[:12]


def _python_files(folder: Traversable) -> list[Traversable]:
    """All .py files below a folder, in one order."""
    found = []
    for entry in sorted(folder.iterdir(), key=lambda entry: entry.name):
        if entry.is_dir():
            found += _python_files(entry)
        elif entry.name.endswith(".py"):
            found.append(entry)
    return found
