"""Compiles, without a GPU, every kernel that the ops would launch; prints what came out as JSON.

    python -m tests.kernels.triton.compile_ahead "sm_90 narrow"

The ops run on CPU tensors; each launch is turned into a compilation for the named target, with the
very arguments, constants and options of the launch, and nothing is executed. A process of its own,
because kernels imported for the interpreter cannot be compiled.
"""

import json
import sys
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from functools import partial
from typing import Any, cast

import torch
import triton
from torch import Tensor
from triton.backends.compiler import GPUTarget
from triton.runtime.jit import JITFunction

from nsa_kernels import (
    NewBlocks,
    NewRows,
    NewTokens,
    NsaConfig,
    Phi,
    Projection,
    RmsNorm,
    new_tallies,
    triton_backend,
)
from nsa_kernels.page_checks import FP8
from nsa_kernels.triton_backend import tiles

TOKENS = 1024
GROUPS = 2
CONFIG = NsaConfig()
TARGETS = {
    "sm_100": GPUTarget("cuda", 100, 32),
    "sm_90": GPUTarget("cuda", 90, 32),
    "sm_80": GPUTarget("cuda", 80, 32),
    "gfx942": GPUTarget("hip", "gfx942", 64),
}


@dataclass(frozen=True)
class Built:
    """One kernel as one launch would have had it."""

    kernel: str
    shape: str
    shared_bytes: int
    uses_tensor_cores: bool
    seconds: float


@dataclass(frozen=True)
class Shape:
    """What one group of ops is compiled for."""

    dtype: torch.dtype
    key_width: int
    value_width: int
    heads_per_group: int
    ops: tuple[str, ...]

    def __str__(self) -> str:
        return f"{self.dtype} K{self.key_width} V{self.value_width} R{self.heads_per_group}"


ONE_SPAN = ("compressed", "selected", "select_blocks", "mixing", "decode")
OTHERS = [
    Shape(torch.bfloat16, 64, 64, 16, (*ONE_SPAN, "prefill")),
    Shape(torch.bfloat16, 64, 64, 4, ("selected",)),
]
PARTS: dict[str, tuple[str, list[Shape]]] = {
    # Together: every launch at the commonest width, and every width in every kind of kernel.
    "sm_90 narrow": (
        "sm_90",
        [
            Shape(torch.bfloat16, 128, 128, 16, ("full", *ONE_SPAN, "prefill", "fp8")),
            Shape(torch.float16, 64, 64, 4, ("sliding", "selected")),
            Shape(torch.float32, 16, 16, 1, ONE_SPAN),
        ],
    ),
    "sm_90 wide": (
        "sm_90",
        [
            Shape(torch.bfloat16, 192, 128, 16, ONE_SPAN),
            Shape(torch.bfloat16, 256, 256, 16, ("full", "selected", "select_blocks", "decode")),
        ],
    ),
    "sm_100": ("sm_100", [*OTHERS, Shape(torch.bfloat16, 64, 64, 16, ("fp8",))]),
    "sm_80": ("sm_80", OTHERS),
    "gfx942": ("gfx942", [*OTHERS, Shape(torch.bfloat16, 64, 64, 16, ("fp8",))]),
}
PRODUCTS = ("tcgen05", "wgmma", "mma.", "mfma")
"""How assembly names the instructions of tensor cores."""
COPY_ENGINES = ("sm_90", "sm_100")
"""Targets that read key tiles through tensor descriptors; the others compile the plain path."""


class NoDevice:
    """Stands in for Triton's GPU driver: names a target, holds no device.

    Triton keeps what it knows of a target by device number, so each target has its own.
    """

    def __init__(self, target: GPUTarget) -> None:
        self.target = target

    def get_current_device(self) -> int:
        return list(TARGETS.values()).index(self.target)

    def get_current_stream(self, device: int) -> int:
        return 0

    def get_current_target(self) -> GPUTarget:
        return self.target


def record_launches() -> list[Built]:
    """Make every later launch compile only; returns the list that they are recorded in."""
    built: list[Built] = []
    seen: set[str] = set()
    launch = JITFunction.run

    def compile_only(self: JITFunction, *args: Any, grid: Any, warmup: bool, **kwargs: Any) -> None:
        start = time.perf_counter()
        compiled: Any = launch(self, *args, grid=grid, warmup=True, **kwargs)
        if compiled.hash not in seen:
            seen.add(compiled.hash)
            assembly = compiled.asm.get("ptx") or compiled.asm.get("amdgcn")
            built.append(
                Built(
                    kernel=compiled.metadata.name,
                    shape="",
                    shared_bytes=compiled.metadata.shared,
                    uses_tensor_cores=any(word in assembly for word in PRODUCTS),
                    seconds=round(time.perf_counter() - start, 2),
                )
            )

    JITFunction.run = compile_only
    return built


def run_op(op: str, shape: Shape) -> None:
    """Launch an op forward and, where it has one, backward."""
    heads = GROUPS * shape.heads_per_group
    cu_seqlens = torch.tensor([0, TOKENS // 4, TOKENS], dtype=torch.int32)

    def make(*sizes: int) -> Tensor:
        return torch.zeros(*sizes, dtype=shape.dtype)

    if op == "mixing":
        out, gates = make(TOKENS, heads, shape.value_width), make(TOKENS, heads, 3)
        lse = torch.zeros(TOKENS, heads)
        triton_backend.mix_forward(out, out, out, gates)
        triton_backend.mix_backward(out, (out, out, out), (lse, lse, lse), gates)
        return
    q, out = make(TOKENS, heads, shape.key_width), make(TOKENS, heads, shape.value_width)
    lse = torch.zeros(TOKENS, heads)
    num_keys = TOKENS // 16 if op in ("compressed", "select_blocks") else TOKENS
    k = make(num_keys, GROUPS, shape.key_width)
    v = make(num_keys, GROUPS, shape.value_width)
    scale = shape.key_width**-0.5
    if op == "select_blocks":
        triton_backend.select_blocks(q, k, lse, cu_seqlens, CONFIG, scale)
    elif op in ("decode", "prefill"):
        run_paged(shape, tokens=2 if op == "decode" else 512)
    elif op == "fp8":
        for tokens in (2, 512):
            run_paged(shape, tokens, cache_dtype=FP8)
    elif op == "full":
        triton_backend.full_forward(q, k, v, cu_seqlens, scale)
        triton_backend.full_backward(out, lse, q, k, v, out, lse, cu_seqlens, scale)
    else:
        blocks = torch.zeros(TOKENS, GROUPS, 16, dtype=torch.int32)
        choice = (blocks,) if op == "selected" else ()
        rest = (*choice, cu_seqlens, CONFIG, scale)
        getattr(triton_backend, f"{op}_forward")(q, k, v, *rest)
        getattr(triton_backend, f"{op}_backward")(out, lse, q, k, v, out, lse, *rest)


def run_paged(shape: Shape, tokens: int, *, cache_dtype: torch.dtype | None = None) -> None:
    """New tokens of two sequences over pages of two selection blocks.

    cache_dtype: of all caches but the compressed ones; None: the shape's.
    """
    pages, page = 64, 2 * CONFIG.selection_block_size
    table = torch.zeros(2, pages, dtype=torch.int32)
    contexts = torch.tensor([4000, 8000], dtype=torch.int32)
    scale = shape.key_width**-0.5

    def make(rows: int, width: int) -> Tensor:
        return torch.zeros(pages, rows, GROUPS, width, dtype=shape.dtype)

    short = page // CONFIG.compression_stride
    caches: Any = [
        make(rows, width)
        for rows in (short, page, page)
        for width in (shape.key_width, shape.value_width)
    ]
    caches[2:] = [cache.to(cache_dtype or shape.dtype) for cache in caches[2:]]
    heads = GROUPS * shape.heads_per_group
    q = torch.zeros(tokens, heads, shape.key_width, dtype=shape.dtype)
    gates = torch.zeros(tokens, heads, 3, dtype=shape.dtype)
    cu_seqlens = torch.tensor([0, 1, tokens], dtype=torch.int32)
    rest = (cu_seqlens, contexts)
    run: Any = triton_backend.paged_attention
    run(q, *caches, gates, table, table, *rest, CONFIG, scale)
    triton_backend.full_paged_attention(q, caches[2], caches[3], table, *rest, scale)
    write_paged(q, caches)
    if tokens == 2:
        project_few(q.flatten(1))
        frequencies = torch.zeros(shape.key_width // 2, dtype=torch.float64)
        places = NewTokens(cu_seqlens[:tokens], cu_seqlens, contexts, table, table, contexts)
        triton_backend.place_new_tokens(places, frequencies, page, CONFIG, True, torch.float32)


def project_few(x: Tensor) -> None:
    """The layers before and behind attention, for a decode step's x [T, D]."""
    width = x.shape[1]
    many, few = x.new_zeros(2 * width, width), x.new_zeros(96, width)
    norm = RmsNorm(x.new_zeros(width), 1e-5)
    layers = [Projection(many), Projection(few), Projection(few, few[:, 0], "sigmoid")]
    for tallies in (None, new_tallies("cpu")):
        triton_backend.project(x, layers, norm, None, tallies)
        triton_backend.project(x, [Projection(many, None, "swiglu")], norm, None, tallies)
        triton_backend.project(x, [Projection(many[:width])], None, x, tallies)


def write_paged(q: Tensor, caches: list[Tensor]) -> None:
    """What the new tokens q leave in the caches of run_paged."""
    k_cmp, v_cmp, k_slc, v_slc, k_win, v_win = caches
    tokens, size = len(q), CONFIG.compression_block_size
    rows = torch.zeros(tokens, dtype=torch.int64)
    angles = torch.zeros(tokens, q.shape[2] // 2)
    keys, values = (c.flatten(0, 1)[:tokens].to(q.dtype) for c in (k_slc, v_slc))
    slc, win = (NewRows(keys, values, *pair, rows) for pair in ((k_slc, v_slc), (k_win, v_win)))
    triton_backend.rotate_and_write(q, [slc, win, win], angles, angles)
    phis = []
    for width in (keys.shape[2], values.shape[2]):
        make = partial(torch.zeros, GROUPS, dtype=q.dtype)
        phis.append(Phi(make(size, width), make(size * width, width), make(width, width)))
    new = NewBlocks(torch.zeros(tokens, size, dtype=torch.int64), rows, angles, angles)
    tails = (k_win.to(q.dtype), v_win.to(q.dtype))
    triton_backend.fold_and_write((phis[0], phis[1]), tails, (k_cmp, v_cmp), new)


def backend_kernels() -> Iterator[str]:
    """Names of all kernels of the Triton backend."""
    for name, module in sys.modules.items():
        if name.startswith("nsa_kernels.triton_backend."):
            for value in vars(module).values():
                if isinstance(value, JITFunction) and value.__name__.endswith("_kernel"):
                    yield value.__name__


def main(parts: list[str]) -> None:
    built = record_launches()
    rows: dict[str, list[dict[str, Any]]] = {part: [] for part in parts}
    for part in parts:
        target, shapes = PARTS[part]
        tiles.has_copy_engine = lambda _, target=target: target in COPY_ENGINES
        triton.runtime.driver.set_active(cast(Any, NoDevice(TARGETS[target])))
        for shape in shapes:
            first = len(built)
            for op in shape.ops:
                run_op(op, shape)
            rows[part] += [{**asdict(one), "shape": str(shape)} for one in built[first:]]
    print(json.dumps({"kernels": sorted(set(backend_kernels())), "built": rows}))


if __name__ == "__main__":
    main(sys.argv[1:])
