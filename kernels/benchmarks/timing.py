"""The median time of a call on the GPU, with the L2 cache flushed between calls."""

from collections.abc import Callable
from typing import Any

import triton


def median_ms(run: Callable[[], Any], rep_ms: int = 100) -> float:
    """Milliseconds of the GPU's time; the call is repeated for about rep_ms."""
    median: Any = triton.testing.do_bench(run, rep=rep_ms, return_mode="median")
    return float(median)
