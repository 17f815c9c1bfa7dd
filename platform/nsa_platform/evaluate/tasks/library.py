"""What only some scores need of other packages, imported when the first of them is computed.

A machine without these packages measures everything else; `PACKAGES` of the scores says which need
them, so that what is missing is told before anything begins.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from jieba import cut
    from rapidfuzz.fuzz import ratio
    from rouge import Rouge

__all__ = ["Rouge", "cut", "ratio"]

_HOMES = {"Rouge": "rouge", "cut": "jieba", "ratio": "rapidfuzz.fuzz"}


def __getattr__(name: str) -> Any:
    if name not in __all__:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(_HOMES[name]), name)
