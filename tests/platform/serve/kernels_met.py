"""Prints how many kernels of paged attention a warm-up meets, and which more steps at random meet.

    python -m tests.platform.serve.kernels_met

Without a GPU: steps go through the op on CPU tensors, and each launch ends where Triton would
compile, with the key by which it looks for what is compiled already. A process of its own, because
kernels that are imported for the interpreter have no such keys. Prints JSON.
"""

import json
import random
from collections.abc import Sequence
from itertools import accumulate
from typing import Any, cast

import torch
import triton
from torch import Tensor
from triton import knobs
from triton.runtime.jit import JITFunction

from nsa_kernels import NsaConfig, triton_backend
from nsa_kernels.triton_backend import tiles
from nsa_platform.serve.decode_graphs import capture_lengths, capture_sizes
from nsa_platform.serve.kv_cache import compiled_width
from nsa_platform.serve.scheduler import Limits
from nsa_platform.serve.trial_steps import Chunks, warm_up_steps
from tests.kernels.triton.compile_ahead import TARGETS, NoDevice

MAX_MODEL_LEN = 32768
LIMITS = Limits(max_step_tokens=2048, max_num_seqs=24)
PAGE, GROUPS, HEADS, WIDTH = 64, 2, 16, 128
CONFIG = NsaConfig()


def make(*sizes: int, dtype: torch.dtype = torch.bfloat16) -> Tensor:
    return torch.zeros(*sizes, dtype=dtype)


CACHES = [make(8, rows, GROUPS, WIDTH) for rows in (4, 4, PAGE, PAGE, PAGE, PAGE)]


def record_keys() -> set[str]:
    """Let no launch compile; returns the keys of all launches from now on."""
    keys: set[str] = set()
    launch = JITFunction.run

    def note(**launched: Any) -> bool:
        keys.add(f"{launched['fn'].name} {launched['compile']['key']}")
        return True

    def never_launch(self: JITFunction, *args: Any, grid: Any, warmup: bool, **kwargs: Any) -> None:
        launch(self, *args, grid=grid, warmup=True, **kwargs)

    JITFunction.run = never_launch
    knobs.runtime.jit_cache_hook = note
    tiles.has_copy_engine = lambda _: True
    triton.runtime.driver.set_active(cast(Any, NoDevice(TARGETS["sm_90"])))
    return keys


def step(chunks: Chunks, *, num_pages: int | None = None) -> None:
    """Attention of one layer in a step of chunks (new tokens, context with them)."""
    counts = [count for count, _ in chunks]
    longest = max(context for _, context in chunks)
    width = compiled_width(num_pages or -(-longest // PAGE))
    table = make(len(chunks), width, dtype=torch.int32)
    run: Any = triton_backend.paged_attention
    run(
        make(sum(counts), GROUPS * HEADS, WIDTH), *CACHES, make(sum(counts), GROUPS * HEADS, 3),
        table, table, torch.tensor([0, *accumulate(counts)], dtype=torch.int32),
        torch.tensor([context for _, context in chunks], dtype=torch.int32), CONFIG, WIDTH**-0.5,
    )  # fmt: skip


def random_steps(number: int) -> Sequence[Chunks]:
    """Decodes with contexts of all lengths, beside up to three chunks of prompts."""
    dice = random.Random(0)

    def size(most: int) -> int:
        return int(most ** dice.random())

    steps = []
    for _ in range(number):
        chunks = [(1, size(MAX_MODEL_LEN)) for _ in range(dice.randrange(LIMITS.max_num_seqs - 3))]
        for _ in range(dice.randint(1, 3)):
            count = size(LIMITS.max_step_tokens // 3 - LIMITS.max_num_seqs)
            chunks.append((count, min(MAX_MODEL_LEN, count + size(MAX_MODEL_LEN))))
        steps.append(chunks)
    return steps


def main() -> None:
    keys = record_keys()
    for chunks in warm_up_steps(LIMITS, MAX_MODEL_LEN, room=10**9):
        step(chunks)
    for sequences in capture_sizes(LIMITS.max_num_seqs):
        for num_pages in capture_lengths(-(-MAX_MODEL_LEN // PAGE)):
            step([(1, 1)] * sequences, num_pages=num_pages)
    met = set(keys)
    for chunks in random_steps(150):
        step(chunks)
    print(json.dumps({"met": len(met), "new": sorted(keys - met)}))


if __name__ == "__main__":
    main()
