"""Every key of a configuration with type, default and help, as text for --help."""

from typing import Any, get_args, get_origin

from pydantic import BaseModel
from pydantic_core import PydanticUndefined


def describe(root: type[BaseModel], prefix: str = "") -> str:
    """One line for each key below `root`, dotted as --set takes it."""
    return "\n".join(_lines(root, prefix))


def _lines(model: type[BaseModel], prefix: str) -> list[str]:
    lines: list[str] = []
    for name, field in model.model_fields.items():
        key = f"{prefix}{name}"
        below = _models(field.annotation)
        if below:
            lines.extend(line for part in below for line in _lines(part, f"{key}."))
            continue
        default = "required" if field.default is PydanticUndefined else repr(field.default)
        help_text = " ".join((field.description or "").split())
        lines.append(f"  {key} ({_type(field.annotation)}, {default})  {help_text}".rstrip())
    return list(dict.fromkeys(lines))


def _models(annotation: Any) -> list[type[BaseModel]]:
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return [annotation]
    return [model for arg in get_args(annotation) for model in _models(arg)]


def _type(annotation: Any) -> str:
    if isinstance(annotation, type) and get_origin(annotation) is None:
        return annotation.__name__
    args = [_type(arg) if not isinstance(arg, str) else repr(arg) for arg in get_args(annotation)]
    known = [arg for arg in args if arg not in ("Ge", "Gt", "Le", "Lt", "MinLen", "FieldInfo")]
    return " | ".join(known) if known else str(annotation)
