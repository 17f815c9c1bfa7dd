"""Argument checks that the public ops share: what came, what is allowed, which argument."""

import itertools
import math

import torch
from torch import Tensor

from nsa_kernels.shapes import NsaConfig, compressed_cu_seqlens

DTYPES = (torch.bfloat16, torch.float16, torch.float32, torch.float64)
_TRITON_DTYPES = DTYPES[:3]
_TRITON_WIDTHS = range(16, 257, 16)
_TRITON_HEADS_PER_GROUP = 64


def accumulation_dtype(dtype: torch.dtype) -> torch.dtype:
    """The dtype of sums, softmax and lse: float64 for float64 inputs, else float32."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def expect(is_met: bool, message: str) -> None:
    if not is_met:
        raise ValueError(message)


def check_shape(name: str, tensor: Tensor, letters: str, sizes: tuple[int | None, ...]) -> None:
    """Compare a tensor's shape with `sizes`; None stands for any size of that axis.

    Args:
        letters: the shape in the legend's letters, for the message, e.g. "[T, H, K]".
    """
    expect(
        isinstance(tensor, Tensor), f"{name} must be a torch.Tensor, got {type(tensor).__name__}"
    )
    fits = tensor.dim() == len(sizes) and all(
        want is None or got == want for got, want in zip(tensor.shape, sizes, strict=True)
    )
    if not fits:
        wanted = ", ".join("any" if size is None else str(size) for size in sizes)
        raise ValueError(f"{name} must have shape {letters} = [{wanted}], got {list(tensor.shape)}")


def check_config(config: NsaConfig) -> None:
    """The sizes are an NsaConfig, which has checked them."""
    expect(
        isinstance(config, NsaConfig), f"config must be an NsaConfig, got {type(config).__name__}"
    )


def check_query(q: Tensor) -> None:
    """q is [T, H, K] of a supported dtype."""
    check_shape("q", q, "[T, H, K]", (None, None, None))
    expect(q.shape[1] > 0 and q.shape[2] > 0, f"q must have heads and width: {list(q.shape)}")
    check_dtype("q", q)


def check_dtype(name: str, tensor: Tensor) -> None:
    """The tensor's dtype is one that is computed with."""
    allowed = ", ".join(str(dtype).removeprefix("torch.") for dtype in DTYPES)
    expect(tensor.dtype in DTYPES, f"{name} has dtype {tensor.dtype}; allowed are {allowed}")


def check_like_query(name: str, tensor: Tensor, q: Tensor) -> None:
    """The tensor shares q's dtype and device."""
    expect(
        tensor.dtype == q.dtype,
        f"{name} has dtype {tensor.dtype}, q has {q.dtype}: they must be the same",
    )
    expect_device(name, tensor, q)


def expect_device(name: str, tensor: Tensor, q: Tensor) -> None:
    expect(tensor.device == q.device, f"{name} is on {tensor.device}, q is on {q.device}")


def check_keys(
    q: Tensor, k: Tensor, v: Tensor, *, names: tuple[str, str] = ("k", "v"), rows: int | None = None
) -> None:
    """k [rows, G, K] and v [rows, G, V] fit q [T, H, K], and G divides H.

    Args:
        rows: how many keys there must be; None for any number, equal for k and v.
    """
    check_shape(names[0], k, "[keys, G, K]", (rows, None, q.shape[2]))
    check_shape(names[1], v, "[keys, G, V]", (k.shape[0], k.shape[1], None))
    check_like_query(names[0], k, q)
    check_like_query(names[1], v, q)
    check_groups(names[0], k.shape[1], q)


def check_groups(name: str, groups: int, q: Tensor) -> None:
    """The key/value heads divide the query heads."""
    expect(
        groups > 0 and q.shape[1] % groups == 0,
        f"{name} has G={groups} key/value heads, which must divide the H={q.shape[1]} heads of q",
    )


def check_lse(lse: Tensor, q: Tensor) -> None:
    """lse [T, H] is what compressed_attention returned for this q."""
    check_shape("lse", lse, "[T, H]", (q.shape[0], q.shape[1]))
    wanted = accumulation_dtype(q.dtype)
    expect(lse.dtype == wanted, f"lse has dtype {lse.dtype}; for q of {q.dtype} it is {wanted}")
    expect_device("lse", lse, q)


def check_gates(gates: Tensor, q: Tensor) -> None:
    """gates [T, H, 3], in q's dtype or in float32."""
    check_shape("gates", gates, "[T, H, 3]", (q.shape[0], q.shape[1], 3))
    allowed = dict.fromkeys((str(q.dtype), "torch.float32"))
    expect(
        str(gates.dtype) in allowed,
        f"gates have dtype {gates.dtype}; for q of {q.dtype} allowed: {', '.join(allowed)}",
    )
    expect_device("gates", gates, q)


def check_gate_values(gates: Tensor) -> None:
    """Check the values of gates where reading them costs no device sync (on the CPU).

    Raises:
        ValueError: one is negative or no number.
    """
    if gates.device.type != "cpu" or not gates.numel():
        return
    least = float(gates.min())
    expect(least >= 0.0, f"gates must not be negative, as sigmoids are not; found {least:.3g}")


def check_int32(name: str, tensor: Tensor, q: Tensor) -> None:
    """An index tensor: int32, on q's device."""
    expect(tensor.dtype == torch.int32, f"{name} must be int32, got {tensor.dtype}")
    expect_device(name, tensor, q)


def check_block_indices(block_indices: Tensor, q: Tensor, groups: int, config: NsaConfig) -> None:
    """block_indices int32 [T, G, n]."""
    sizes = (q.shape[0], groups, config.num_selected_blocks)
    check_shape("block_indices", block_indices, "[T, G, n]", sizes)
    check_int32("block_indices", block_indices, q)


def packed_offsets(cu_seqlens: Tensor | None, q: Tensor) -> Tensor:
    """cu_seqlens, checked as far as shapes go; None is one sequence of all T tokens.

    Built on the device without a host copy, so that it can be captured in a CUDA graph.
    """
    if cu_seqlens is None:
        return torch.arange(2, dtype=torch.int32, device=q.device) * q.shape[0]
    check_shape("cu_seqlens", cu_seqlens, "[B+1]", (None,))
    expect(cu_seqlens.shape[0] >= 2, "cu_seqlens must have B+1 >= 2 entries")
    check_int32("cu_seqlens", cu_seqlens, q)
    return cu_seqlens.contiguous()


def check_offsets(cu_seqlens: Tensor, num_tokens: int) -> None:
    """Check the values of cu_seqlens where reading them costs no device sync (on the CPU).

    Raises:
        ValueError: they do not start at 0, do not end at num_tokens, or decrease.
    """
    if cu_seqlens.device.type != "cpu":
        return
    values = cu_seqlens.tolist()
    rising = all(a <= b for a, b in itertools.pairwise(values))
    expect(
        values[0] == 0 and values[-1] == num_tokens and rising,
        f"cu_seqlens must start with 0, never decrease and end with T={num_tokens}, got {values}",
    )


def check_block_values(block_indices: Tensor, cu_seqlens: Tensor, config: NsaConfig) -> None:
    """Check the values of block_indices where reading them costs no device sync (on the CPU).

    Raises:
        ValueError: one is neither -1 nor a block of its query's sequence.
    """
    if block_indices.device.type != "cpu" or not block_indices.numel():
        return
    lengths = cu_seqlens.diff().long()
    blocks = (lengths + config.selection_block_size - 1) // config.selection_block_size
    bound = torch.repeat_interleave(blocks, lengths)[:, None, None]
    wrong = (block_indices < -1) | (block_indices >= bound)
    if wrong.any():
        token, group, _ = wrong.nonzero()[0].tolist()
        got = block_indices[token, group].tolist()
        raise ValueError(
            f"block_indices[{token}, {group}] = {got}: allowed are -1 and the blocks "
            f"0 to {int(bound[token]) - 1} of the query's sequence"
        )


def check_compressed_rows(k_cmp: Tensor, cu_seqlens: Tensor, config: NsaConfig) -> None:
    """k_cmp holds a row for every complete compressed block (values read on the CPU only)."""
    if cu_seqlens.device.type != "cpu":
        return
    blocks = int(compressed_cu_seqlens(cu_seqlens, config)[-1])
    expect(
        k_cmp.shape[0] >= blocks,
        f"k_cmp has {k_cmp.shape[0]} rows; these sequences have {blocks} compressed blocks",
    )


def resolve_scale(scale: float | None, q: Tensor) -> float:
    """The factor on q.k: 1/sqrt(K) unless given."""
    if scale is None:
        return q.shape[2] ** -0.5
    expect(
        isinstance(scale, int | float) and math.isfinite(scale) and scale > 0,
        f"scale={scale!r} must be a positive finite number",
    )
    return float(scale)


def check_limits(backend: str, q: Tensor, value_width: int, groups: int) -> None:
    """What the Triton kernels take; the torch backend takes everything."""
    if backend != "triton":
        return
    expect(
        q.dtype in _TRITON_DTYPES,
        f"the triton backend takes bfloat16, float16 and float32, q has {q.dtype}; "
        f"backend='torch' takes float64",
    )
    for letter, width in (("K", q.shape[2]), ("V", value_width)):
        expect(
            width in _TRITON_WIDTHS,
            f"the triton backend takes widths that are multiples of 16 up to 256, "
            f"got {letter}={width}",
        )
    expect(
        q.shape[1] // groups <= _TRITON_HEADS_PER_GROUP,
        f"the triton backend takes up to {_TRITON_HEADS_PER_GROUP} query heads per group, "
        f"got R={q.shape[1] // groups}",
    )


def output_gradients(
    dout: Tensor | None, dlse: Tensor | None, out: Tensor, lse: Tensor
) -> tuple[Tensor, Tensor]:
    """Contiguous gradients of an op's outputs; an output that nobody used has a zero gradient."""
    dout = torch.zeros_like(out) if dout is None else dout.contiguous()
    dlse = torch.zeros_like(lse) if dlse is None else dlse.contiguous()
    return dout, dlse


def check_branch(
    names: tuple[str, str], k: Tensor, v: Tensor, k_cmp: Tensor, v_cmp: Tensor
) -> None:
    """Every branch of the whole op has the same G and V."""
    expect(
        k.shape[1] == k_cmp.shape[1],
        f"{names[0]} has G={k.shape[1]} heads, k_cmp has {k_cmp.shape[1]}",
    )
    expect(
        v.shape[2] == v_cmp.shape[2],
        f"{names[1]} has width V={v.shape[2]}, v_cmp has {v_cmp.shape[2]}",
    )
