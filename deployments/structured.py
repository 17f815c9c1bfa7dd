"""What an answer must be: OpenAI's response_format and vLLM's structured_outputs, as grammars."""

import json
from typing import Annotated, Any, Literal, Self

from pydantic import Field, model_validator

from deployments.fields import Body, Text
from nsa_platform.serve.request import Grammar

MAX_GRAMMAR = 65_536
"""Characters of a schema, an expression or a grammar."""

Expression = Annotated[Text, Field(min_length=1, max_length=MAX_GRAMMAR)]
AnyObject = {"type": "object"}


class TextFormat(Body):
    """Anything."""

    type: Literal["text"]


class JsonObjectFormat(Body):
    """A JSON object."""

    type: Literal["json_object"]


class JsonSchema(Body):
    """A schema with its name."""

    name: Annotated[Text, Field(min_length=1, max_length=64)]
    """Accepted for compatibility; nothing is done with it."""
    description: Text | None = None
    """Accepted for compatibility; nothing is done with it."""
    schema_: Annotated[dict[str, Any], Field(alias="schema")]
    """JSON Schema; references go to its own $defs."""
    strict: bool | None = None
    """Whatever it says, the answer fits the schema."""


class JsonSchemaFormat(Body):
    """JSON that fits a schema."""

    type: Literal["json_schema"]
    json_schema: JsonSchema


class RegexFormat(Body):
    """Text that matches an expression as a whole."""

    type: Literal["regex"]
    regex: Expression


ResponseFormat = Annotated[
    TextFormat | JsonObjectFormat | JsonSchemaFormat | RegexFormat, Field(discriminator="type")
]


class StructuredOutputs(Body):
    """What vLLM calls structured outputs; exactly one of its fields is given."""

    json_: Annotated[dict[str, Any] | Expression | None, Field(alias="json")] = None
    """A JSON schema, as an object or as text."""
    json_object: Literal[True] | None = None
    """Any JSON object."""
    regex: Expression | None = None
    """A regular expression without look-around."""
    choice: Annotated[list[Expression], Field(min_length=1, max_length=1024)] | None = None
    """One of these texts."""
    grammar: Expression | None = None
    """A context-free grammar in Lark's notation; its rule `start` is the whole."""

    @model_validator(mode="after")
    def _exactly_one(self) -> Self:
        given = [name for name in type(self).model_fields if getattr(self, name) is not None]
        if len(given) != 1:
            names = ", ".join(name.rstrip("_") for name in type(self).model_fields)
            raise ValueError(f"give exactly one of {names}, got {len(given)}")
        return self


def grammar_of(
    response_format: ResponseFormat | None, structured: StructuredOutputs | None
) -> Grammar | None:
    """What the output is bound to; None: nothing.

    Raises:
        ValueError: the schema is too long.
    """
    if structured is not None:
        return _structured(structured)
    match response_format:
        case JsonObjectFormat():
            return _schema(AnyObject)
        case JsonSchemaFormat():
            return _schema(response_format.json_schema.schema_)
        case RegexFormat():
            return Grammar("regex", response_format.regex)
        case _:
            return None


def _structured(asked: StructuredOutputs) -> Grammar:
    if isinstance(asked.json_, str):
        return Grammar("json_schema", asked.json_)
    if asked.json_ is not None:
        return _schema(asked.json_)
    if asked.regex is not None:
        return Grammar("regex", asked.regex)
    if asked.choice is not None:
        return Grammar("lark", "start: " + " | ".join(json.dumps(text) for text in asked.choice))
    if asked.grammar is not None:
        return Grammar("lark", asked.grammar)
    return _schema(AnyObject)


def _schema(schema: dict[str, Any]) -> Grammar:
    text = json.dumps(schema)
    if len(text) > MAX_GRAMMAR:
        raise ValueError(f"the schema has {len(text)} characters, at most {MAX_GRAMMAR} are read")
    return Grammar("json_schema", text)
