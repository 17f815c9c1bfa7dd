"""Where new tokens are in paged caches, and where what they leave there goes: worked out once for
all layers of a step, without a word from the device to the host."""

import torch
from torch import Tensor

from nsa_kernels import checks
from nsa_kernels.dispatch import Backend, backend_module, resolve_backend
from nsa_kernels.new_tokens import NewPlaces, NewTokens
from nsa_kernels.shapes import NsaConfig


@torch.no_grad()
def place_new_tokens(
    tokens: NewTokens,
    frequencies: Tensor,
    *,
    page_size: int,
    config: NsaConfig | None,
    is_rotated: bool = True,
    dtype: torch.dtype = torch.float32,
    backend: Backend | None = None,
) -> NewPlaces:
    """Rows and angles of a step.

    Args:
        frequencies: fp64 [K / 2], radians per token of each pair of channels. Angles are fp64, so
            that they are exact at a million tokens.
        page_size: tokens of a page.
        config: the sizes of NSA; None for full attention, which has no window and no blocks.
        is_rotated: whether compressed keys are rotated to their blocks' starts.
        dtype: of cosines and sines, float32 or float64.
        backend: "triton" or "torch"; None leaves it to the device (see dispatch.py).

    Raises:
        ValueError: shapes do not fit together, or the backend cannot run.
    """
    _check_tokens(tokens, has_window=config is not None)
    checks.check_shape("frequencies", frequencies, "[K / 2]", (None,))
    if frequencies.dtype != torch.float64:
        raise ValueError(f"frequencies must be float64, got {frequencies.dtype}")
    if not isinstance(page_size, int) or page_size < 1:
        raise ValueError(f"page_size={page_size} must be a positive whole number")
    if config is not None:
        checks.check_config(config)
        block = config.selection_block_size
        if page_size % block:
            raise ValueError(
                f"page_size={page_size} must be a multiple of selection_block_size={block}"
            )
    if dtype not in (torch.float32, torch.float64):
        raise ValueError(f"dtype must be float32 or float64, got {dtype}")
    chosen = resolve_backend(tokens.positions, backend)
    if chosen == "triton" and dtype != torch.float32:
        raise ValueError(f"the triton backend gives angles in float32, not in {dtype}")
    run = backend_module(chosen).place_new_tokens
    return run(tokens, frequencies, page_size, config, is_rotated, dtype)


def _check_tokens(tokens: NewTokens, *, has_window: bool) -> None:
    checks.check_shape("positions", tokens.positions, "[T]", (None,))
    checks.check_shape("context_lens", tokens.context_lens, "[B]", (None,))
    count = len(tokens.context_lens)
    checks.check_shape("cu_seqlens", tokens.cu_seqlens, "[B + 1]", (count + 1,))
    checks.check_shape("shared_lens", tokens.shared_lens, "[B]", (count,))
    checks.check_shape("page_table", tokens.page_table, "[B, M]", (count, None))
    if has_window != (tokens.window_page_table is not None):
        raise ValueError("window_page_table is needed with a config of NSA, and only there")
    if tokens.window_page_table is not None:
        shape = (count, tokens.page_table.shape[1])
        checks.check_shape("window_page_table", tokens.window_page_table, "[B, M]", shape)
    for name in NewTokens.__slots__:
        tensor = getattr(tokens, name)
        if tensor is None:
            continue
        if tensor.dtype != torch.int32:
            raise ValueError(f"{name} must be int32, got {tensor.dtype}")
        if tensor.device != tokens.positions.device:
            raise ValueError(
                f"{name} is on {tensor.device}, positions are on {tokens.positions.device}"
            )
