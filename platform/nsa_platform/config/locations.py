"""Fields that name a place, and how a relative place becomes an absolute one."""

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, TypeVar

from pydantic import BaseModel

SQLITE = "sqlite:///"


@dataclass(frozen=True)
class _Place:
    """Marks a field whose value is a path or an address."""


Location = Annotated[str, _Place()]
"""A local path, s3://bucket/key, models:/name@alias, sqlite:///path or a server's address."""

Model = TypeVar("Model", bound=BaseModel)


def absolute(location: str, root: Path) -> str:
    """A relative local path (also behind sqlite:///) seen from `root`; any address unchanged."""
    if location.startswith(SQLITE):
        return SQLITE + str(root / location.removeprefix(SQLITE))
    if "://" in location or location.startswith("models:/"):
        return location
    return str(root / Path(location).expanduser())


def is_local(location: str) -> bool:
    """Whether the place is on a file system of the machine that looks, not behind an address."""
    return location.startswith(SQLITE) or not ("://" in location or location.startswith("models:/"))


def resolve_locations(config: Model, root: Path) -> Model:
    """The same configuration with every relative place made absolute.

    A job's driver, its Ray workers and a resumed run have different working directories; resolved
    once, a place means the same for all of them.
    """
    return config.model_copy(
        update={
            name: _resolve(value, field.metadata, field.annotation, root)
            for (name, value), field in zip(config, type(config).model_fields.values(), strict=True)
        }
    )


def locations(config: BaseModel, prefix: str = "") -> dict[str, tuple[str, ...]]:
    """Every place that the configuration names, by dotted key."""
    found: dict[str, tuple[str, ...]] = {}
    for (name, value), field in zip(config, type(config).model_fields.values(), strict=True):
        if isinstance(value, BaseModel):
            found |= locations(value, f"{prefix}{name}.")
        elif value is not None and _marked(field.metadata, field.annotation):
            found[f"{prefix}{name}"] = value if isinstance(value, tuple) else (value,)
    return found


def _resolve(value: Any, metadata: list[Any], annotation: Any, root: Path) -> Any:
    if isinstance(value, BaseModel):
        return resolve_locations(value, root)
    if value is None or not _marked(metadata, annotation):
        return value
    if isinstance(value, tuple):
        return tuple(absolute(each, root) for each in value)
    return absolute(value, root)


def _marked(metadata: list[Any], annotation: Any) -> bool:
    inner = [*metadata, *getattr(annotation, "__metadata__", ())]
    if any(isinstance(mark, _Place) for mark in inner):
        return True
    return any(_marked([], argument) for argument in getattr(annotation, "__args__", ()))
