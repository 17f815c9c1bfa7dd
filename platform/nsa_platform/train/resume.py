"""May this run go on from that checkpoint: what must be the same, what may change and is said."""

import re
from collections.abc import Mapping, Sequence
from fnmatch import fnmatch
from typing import Any

from nsa_platform.data.packing import RULES

# Sections of a run that a checkpoint remembers.
SECTIONS = ("model", "data", "train", "cluster")

# Weights have the model's shape, with the same adapters, and come from one start, and the loader's
# row number means a row of exactly this data in exactly this order.
FIXED = ("model", "data", "data_digest", "start", "train.lora")

# Changes that have no say in what is computed; they come before FIXED.
SILENT = (
    *("model.name", "data.path", "data.mixture.*.path"),
    *("data.cache_dir", "data.cache_gib"),
)

# Of the stages before, what they computed and where they ended.
_EARLIER = re.compile(r"^earlier\.\d+\.")
FIXED_EARLIER = (*FIXED, "train.steps")


class ResumeError(ValueError):
    """The checkpoints belong to another run; the message names the differences."""


def describe_run(
    run: Mapping[str, Any],
    *,
    data_digest: str,
    start: str | None = None,
    earlier: Sequence[Mapping[str, Any]] = (),
) -> dict[str, Any]:
    """What a checkpoint keeps of a run's configuration, to be compared when it is resumed.

    Args:
        start: digest of the weights that a new run begins with; None: from scratch.
        earlier: what was described of the stages before this one.
    """
    described = {name: run[name] for name in SECTIONS}
    described |= {"data_digest": data_digest, "start": start}
    described["packing_rule"] = RULES[run["data"]["packing"]]
    alone = [{k: v for k, v in each.items() if k != "earlier"} for each in earlier]
    return described | ({"earlier": alone} if alone else {})


def check_resumable(saved: Mapping[str, Any], current: Mapping[str, Any]) -> list[str]:
    """Compare two results of describe_run; returns one line for each change that is allowed.

    Raises:
        ResumeError: the model, the data or the weights of the start are others.
    """
    old, new = _flat(saved), _flat(current)
    changes = {
        key: f"{key} was {old.get(key)!r}, is {new.get(key)!r}"
        for key in sorted(old.keys() | new.keys())
        if old.get(key) != new.get(key) and not _is_silent(key)
    }
    broken = [line for key, line in changes.items() if _is_fixed(key)]
    if broken:
        raise ResumeError(
            f"the checkpoints belong to another run: {'; '.join(broken)}. Choose another name, or "
            "move the checkpoints away to start again"
        )
    return list(changes.values())


def _is_silent(key: str) -> bool:
    name = _EARLIER.sub("", key)
    if any(fnmatch(name, pattern) for pattern in SILENT):
        return True
    # How a stage went that is over; the present one says the same of what still holds.
    return name != key and not _is_fixed(key)


def _is_fixed(key: str) -> bool:
    name = _EARLIER.sub("", key)
    names = FIXED if name == key else FIXED_EARLIER
    return any(name == fixed or name.startswith(f"{fixed}.") for fixed in names)


def _flat(tree: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for name, value in tree.items():
        if isinstance(value, Mapping):
            flat |= _flat(value, f"{prefix}{name}.")
        elif isinstance(value, list | tuple) and any(isinstance(each, Mapping) for each in value):
            flat |= _flat(
                {str(index): each for index, each in enumerate(value)}, f"{prefix}{name}."
            )
        else:
            # JSON knows no tuples.
            flat[f"{prefix}{name}"] = list(value) if isinstance(value, tuple) else value
    return flat
