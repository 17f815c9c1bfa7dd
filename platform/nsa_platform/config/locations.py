"""Fields that name a place, and how a relative place becomes an absolute one."""

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, TypeVar

from pydantic import AfterValidator, BaseModel

SQLITE = "sqlite:///"
MODEL = "models:/"


@dataclass(frozen=True)
class _Place:
    """Marks a field whose value is a path or an address."""


def _file_or_object(location: str) -> str:
    scheme, separator, rest = location.partition("://")
    if not location.strip() or (separator and (scheme != "s3" or not rest.strip("/"))):
        raise ValueError("must be a local path or s3://bucket/key")
    return location


def _file_object_or_model(location: str) -> str:
    if not location.startswith(MODEL):
        return _file_or_object(location)
    if not location.removeprefix(MODEL).strip("/@"):
        raise ValueError("must look like models:/name@alias or models:/name/version")
    return location


Location = Annotated[str, _Place(), AfterValidator(_file_or_object)]
"""A local path or s3://bucket/key."""

ModelLocation = Annotated[str, _Place(), AfterValidator(_file_object_or_model)]
"""A local path, s3://bucket/key or models:/name@alias."""

ServiceLocation = Annotated[str, _Place()]
"""sqlite:///path or a server's address; the field that has it says which."""

Model = TypeVar("Model", bound=BaseModel)


def absolute(location: str, root: Path) -> str:
    """A relative local path (also behind sqlite:///) seen from `root`; any address unchanged."""
    if location.startswith(SQLITE):
        return SQLITE + str(root / location.removeprefix(SQLITE))
    if "://" in location or location.startswith(MODEL):
        return location
    return str(root / Path(location).expanduser())


def is_local(location: str) -> bool:
    """Whether the place is on a file system of the machine that looks, not behind an address."""
    return location.startswith(SQLITE) or not ("://" in location or location.startswith(MODEL))


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
        elif isinstance(value, tuple) and any(isinstance(each, BaseModel) for each in value):
            for index, each in enumerate(value):
                found |= locations(each, f"{prefix}{name}.{index}.")
        elif value is not None and _marked(field.metadata, field.annotation):
            found[f"{prefix}{name}"] = value if isinstance(value, tuple) else (value,)
    return found


def _resolve(value: Any, metadata: list[Any], annotation: Any, root: Path) -> Any:
    if isinstance(value, BaseModel):
        return resolve_locations(value, root)
    if isinstance(value, tuple) and any(isinstance(each, BaseModel) for each in value):
        return tuple(resolve_locations(each, root) for each in value)
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
