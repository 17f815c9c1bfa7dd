"""Triton's interpreter without a search that it repeats at every call of every function.

Before it runs a function of a kernel it replaces the language's builtins, and looks through all
members of the language to find them: a third of its time and more.
"""

from functools import cache
from inspect import getmembers
from typing import Any

from triton.language.core import is_builtin
from triton.runtime import interpreter


def install() -> None:
    """For this process. The same functions are replaced by the same."""
    interpreter._patch_builtin = _patch_builtin


@cache
def _builtins_of(package: Any) -> tuple[str, ...]:
    """Names of the builtins of a module or class, which is first seen before any is replaced."""
    return tuple(name for name, member in getmembers(package) if is_builtin(member))


def _patch_builtin(package: Any, builder: Any, scope: Any) -> None:
    for name in _builtins_of(package):
        member = getattr(package, name)
        if is_builtin(member):
            interpreter._patch_attr(package, name, member, builder, scope)
