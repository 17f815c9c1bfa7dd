"""Every key of a configuration with type, default and help, as text for --help."""

from typing import Annotated, Any, Literal, get_args, get_origin

from pydantic_core import PydanticUndefined

from nsa_platform.config.base import Strict


def describe(root: type[Strict], prefix: str = "") -> str:
    """One line for each key below `root`, dotted as --set takes it."""
    return "\n".join(_lines(root, prefix))


def _lines(model: type[Strict], prefix: str) -> list[str]:
    lines: list[str] = []
    for name, field in model.model_fields.items():
        if name in model.fixed:
            continue
        key = f"{prefix}{name}"
        below = _models(field.annotation)
        if below:
            inside = f"{key}.0." if _is_list(field.annotation) else f"{key}."
            lines.extend(line for part in below for line in _lines(part, inside))
            continue
        default = "required" if field.default is PydanticUndefined else repr(field.default)
        help_text = " ".join((field.description or "").split())
        lines.append(f"  {key} ({_type(field.annotation)}, {default})  {help_text}".rstrip())
    return list(dict.fromkeys(lines))


def _models(annotation: Any) -> list[type[Strict]]:
    if isinstance(annotation, type) and issubclass(annotation, Strict):
        return [annotation]
    return [model for arg in get_args(annotation) for model in _models(arg)]


def _is_list(annotation: Any) -> bool:
    """Whether its models stand in a list."""
    return get_origin(annotation) in (tuple, list) or any(map(_is_list, get_args(annotation)))


def _type(annotation: Any) -> str:
    if annotation is type(None):
        return "null"
    if get_origin(annotation) is Annotated:
        return _type(get_args(annotation)[0])
    if isinstance(annotation, type) and get_origin(annotation) is None:
        return annotation.__name__
    if get_origin(annotation) is Literal:
        return " | ".join(map(repr, get_args(annotation)))
    args = list(dict.fromkeys(_type(arg) for arg in get_args(annotation) if arg is not Ellipsis))
    if get_origin(annotation) in (tuple, list, dict):
        return f"{'list' if get_origin(annotation) is not dict else 'dict'} of {', '.join(args)}"
    return " | ".join(args) if args else str(annotation)
