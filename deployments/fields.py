"""What the fields of all requests share: strictness, text that can be written, named refusals."""

import difflib
from collections.abc import Mapping
from typing import Annotated, Any

from pydantic import (
    AfterValidator,
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    model_validator,
)
from pydantic_core import PydanticCustomError

MAX_CHOICES = 128
MAX_STOPS = 16
MAX_LOGPROBS = 20
MAX_ALLOWED = 4096
INT64 = 2**63 - 1


def _refuse(value: object) -> object:
    if value is not None:
        raise PydanticCustomError("unsupported", "is not supported by this server; leave it out")
    return value


def _writable(text: str) -> str:
    try:
        text.encode()
    except UnicodeEncodeError:
        raise PydanticCustomError(
            "not_unicode", "holds half of a surrogate pair, which is no Unicode text"
        ) from None
    return text


def conflict(name: str, reason: str) -> PydanticCustomError:
    """To raise where fields do not go together, of which `name` is the one to change."""
    return PydanticCustomError("conflict", "{reason}", {"name": name, "reason": reason})


Unsupported = Annotated[None, BeforeValidator(_refuse)]
"""A field of OpenAI's that would change the answer, and that this server does not know."""

Text = Annotated[str, AfterValidator(_writable)]
TokenId = Annotated[int, Field(ge=0, le=2**31 - 1)]
Penalty = Annotated[float, Field(ge=-2, le=2)]


class Body(BaseModel):
    """Base of all requests: no coercion, no NaN, no field that nobody reads."""

    model_config = ConfigDict(
        strict=True, extra="forbid", allow_inf_nan=False, use_attribute_docstrings=True
    )

    @model_validator(mode="before")
    @classmethod
    def _known_fields(cls, tree: Any) -> Any:
        known = [field.alias or name for name, field in cls.model_fields.items()]
        for name in tree if isinstance(tree, Mapping) else ():
            if name not in known:
                near = difflib.get_close_matches(str(name), known, n=1, cutoff=0.6)
                hint = f"; did you mean {near[0]!r}?" if near else ""
                raise PydanticCustomError(
                    "unknown_field",
                    "unknown field {field}{hint}",
                    {"field": repr(name)[:200], "hint": hint, "name": str(name)[:200]},
                )
        return tree
