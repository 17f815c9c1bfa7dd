"""The median time of a call on the GPU, with the L2 cache flushed between calls."""

from collections.abc import Callable
from typing import Any

import torch
import triton


def median_ms(run: Callable[[], Any], rep_ms: int = 100) -> float:
    """Milliseconds of the GPU's time; the call is repeated for about rep_ms."""
    median: Any = triton.testing.do_bench(run, rep=rep_ms, return_mode="median")
    return float(median)


def once_ms(run: Callable[[], Any]) -> float:
    """Milliseconds of one call: for calls that take seconds, of kernels that ran before."""
    begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    begin.record()
    run()
    end.record()
    end.synchronize()
    return begin.elapsed_time(end)
