"""Strict YAML: frozen models, unknown keys are errors that name the nearest valid key."""

import difflib
import hashlib
import json
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any, ClassVar, Self, TypeVar, get_args

import yaml
from pydantic import BaseModel, ConfigDict, ValidationError, model_validator


class ConfigError(ValueError):
    """A configuration is wrong. The message names the key, what came and what is allowed."""


V = TypeVar("V", bound=tuple[Any, ...])


def each_once(values: V) -> V:
    """For fields whose values are measured each: one that stands twice would count twice."""
    if len(set(values)) < len(values):
        raise ValueError("must hold each value once")
    return values


class Strict(BaseModel):
    """Base of everything that comes from a YAML file."""

    model_config = ConfigDict(
        frozen=True,
        extra="forbid",
        use_attribute_docstrings=True,
        validate_default=True,
        allow_inf_nan=False,
    )
    fixed: ClassVar[tuple[str, ...]] = ()
    """Inherited fields that must stay at their default here; --help leaves them out."""

    @model_validator(mode="before")
    @classmethod
    def _true_is_no_number(cls, tree: Any) -> Any:
        # YAML reads a bare `yes` or `on` as true, which would pass for 1.
        for name, value in tree.items() if isinstance(tree, dict) else ():
            field = cls.model_fields.get(name)
            allowed = (field.annotation, *get_args(field.annotation)) if field else (bool,)
            if isinstance(value, bool) and bool not in allowed:
                raise ValueError(f"{name} must not be true or false, got {value}")
        return tree

    @classmethod
    def parse(cls, tree: dict[str, Any], *, source: str = "config") -> Self:
        """Validate a plain tree. Raises ConfigError with one line for each problem."""
        try:
            return cls.model_validate(tree)
        except ValidationError as error:
            found = error.errors()
            problems = [_explain(cls, each) for each in found if not _is_echo(each, found)]
            raise ConfigError("\n".join(f"{source}: {line}" for line in problems)) from None

    @classmethod
    def load(cls, path: str | Path, overrides: Sequence[str] = ()) -> Self:
        """Read a YAML file, patch it with `a.b=value` and `a.0.b=value` overrides, validate.

        Raises:
            ConfigError: the file is missing or not YAML, an override is malformed, or the result
                does not validate. Nothing has been started when it is raised.
        """
        return cls.parse(patch(read_yaml(path), overrides), source=str(path))

    def to_yaml(self) -> str:
        """The resolved configuration, as a YAML text that loads back to an equal object."""
        return yaml.safe_dump(self.model_dump(mode="json"), sort_keys=False, allow_unicode=True)

    def fingerprint(self) -> str:
        """Twelve hex digits that are equal exactly when the resolved configurations are."""
        text = json.dumps(self.model_dump(mode="json"), sort_keys=True)
        return hashlib.sha256(text.encode()).hexdigest()[:12]


class _UniqueKeys(yaml.SafeLoader):
    """YAML in which a key that stands twice is an error; the last one would silently win."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        seen: set[Any] = set()
        for key_node, _ in node.value:
            key = self.construct_object(key_node, deep=True)
            if key in seen:
                raise yaml.MarkedYAMLError(
                    problem=f"key {key!r} stands twice", problem_mark=key_node.start_mark
                )
            seen.add(key)
        return super().construct_mapping(node, deep)


def yaml_problem(error: yaml.YAMLError | UnicodeDecodeError) -> str:
    """What is wrong, and where, in one line."""
    if isinstance(error, yaml.MarkedYAMLError) and error.problem_mark is not None:
        mark = error.problem_mark
        return f"{error.problem} (line {mark.line + 1}, column {mark.column + 1})"
    return " ".join(str(error).split())


def read_yaml(path: str | Path) -> dict[str, Any]:
    """Read a YAML mapping. Raises ConfigError if there is none to read."""
    try:
        tree = yaml.load(Path(path).read_text(encoding="utf-8"), Loader=_UniqueKeys)
    except OSError as error:
        raise ConfigError(f"{path}: cannot be read ({error.strerror})") from None
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise ConfigError(f"{path}: is not YAML: {yaml_problem(error)}") from None
    if not isinstance(tree, dict):
        raise ConfigError(f"{path}: must hold a mapping of keys, got {type(tree).__name__}")
    return tree


def patch(tree: dict[str, Any], overrides: Sequence[str], *, flag: str = "--set") -> dict[str, Any]:
    """A plain tree with `a.b=value` overrides, which came by a flag of this name. Into a list a key
    is a place, from 0: `a.0.b=value`.

    Raises:
        ConfigError: an override is malformed.
    """
    for override in overrides:
        key, equals, text = override.partition("=")
        if not equals or not all(key.split(".")):
            raise ConfigError(f"{flag} {override}: must look like a.b=value or a.0.b=value")
        try:
            value = yaml.safe_load(text)
        except yaml.YAMLError as error:
            raise ConfigError(
                f"{flag} {override}: the value is not YAML: {yaml_problem(error)}"
            ) from None
        node: Any = tree
        *parents, last = key.split(".")
        for parent in parents:
            if isinstance(node, list):
                node = node[_place(parent, node, f"{flag} {override}")]
            else:
                node = node.setdefault(parent, {})
            if not isinstance(node, dict | list):
                raise ConfigError(
                    f"{flag} {override}: {parent} is a value and has no keys below it"
                )
        if isinstance(node, list):
            node[_place(last, node, f"{flag} {override}")] = value
        else:
            node[last] = value
    return tree


def _place(text: str, items: list[Any], flag: str) -> int:
    if not (text.isascii() and text.isdigit()) or int(text) >= len(items):
        raise ConfigError(f"{flag}: {text!r} must be a place in a list of {len(items)}, from 0")
    return int(text)


def plain_message(message: str) -> str:
    """What pydantic says is allowed, in the words of YAML: `must be a list`."""
    message = message.removeprefix("Value error, ")
    message = re.sub(r"^(Input|String|Value|List|Tuple|Dictionary) should ", "must ", message)
    message = re.sub(r" after validation, not \d+$", "", message)
    message = re.sub(r"a valid (tuple|list)\b", "a list", message)
    return re.sub(r"a valid dictionary( or instance of \w+)?", "a mapping of keys", message)


def _explain(root: type[BaseModel], problem: Any) -> str:
    path = problem["loc"]
    location = [part for index, part in enumerate(path) if not _is_union_tag(index, path)]
    key = ".".join(str(part) for part in location)
    if problem["type"] == "extra_forbidden":
        valid = sorted(_valid_names(root, problem["loc"][:-1]))
        near = difflib.get_close_matches(str(location[-1]), valid, n=1, cutoff=0.5)
        hint = f"; did you mean {near[0]!r}?" if near else ""
        return f"{key}: unknown key{hint} (valid: {', '.join(valid)})"
    if problem["type"] == "union_tag_invalid":
        return _unknown_tag(key, problem["ctx"])
    message = plain_message(problem["msg"])
    if not location:
        return message
    if problem["type"] == "missing":
        return f"{key}: is required"
    got = problem.get("input")
    shown = "" if isinstance(got, dict) else f", got {got!r}"
    return f"{key}: {message}{shown}"


def _is_echo(problem: Any, found: Sequence[Any]) -> bool:
    """A list counts as too short when what it holds is wrong, and that is told already."""
    place = problem["loc"]
    return problem["type"] == "too_short" and any(
        len(other["loc"]) > len(place) and other["loc"][: len(place)] == place for other in found
    )


def _unknown_tag(key: str, context: Any) -> str:
    """A tagged union of several kinds was given another one."""
    name = context["discriminator"].strip("'")
    valid = [each.strip("'") for each in context["expected_tags"].split(", ")]
    near = difflib.get_close_matches(str(context["tag"]), valid, n=1, cutoff=0.5)
    hint = f"; did you mean {near[0]!r}?" if near else ""
    return f"{key}.{name}: unknown {name} {context['tag']!r}{hint} (valid: {', '.join(valid)})"


def _is_union_tag(index: int, path: Sequence[str | int]) -> bool:
    """Pydantic puts the chosen variant of a tagged union into the path; users never wrote it."""
    before = path[max(0, index - 2) : index]
    if before and before[-1] == "attention":
        return path[index] in ("nsa", "full", "mla", "moba")
    return len(before) == 2 and before[0] == "tasks" and isinstance(before[1], int)


def _valid_names(root: type[BaseModel], location: Sequence[str | int]) -> set[str]:
    """Field names of the model that stands at `location` below `root`."""
    candidates: list[type[BaseModel]] = [root]
    for part in location:
        below = [
            _models_in(c.model_fields[part].annotation)
            for c in candidates
            if isinstance(part, str) and part in c.model_fields
        ]
        if below:
            candidates = [model for models in below for model in models]
        elif isinstance(part, str):
            tagged = [c for c in candidates if part in _tags(c)]
            candidates = tagged or candidates
    return {name for model in candidates for name in model.model_fields}


def _models_in(annotation: Any) -> list[type[BaseModel]]:
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return [annotation]
    return [model for arg in get_args(annotation) for model in _models_in(arg)]


def _tags(model: type[BaseModel]) -> tuple[Any, ...]:
    kind = model.model_fields.get("kind")
    return get_args(kind.annotation) if kind else ()
