"""The Triton kernels behind every op: plain tensors in, plain tensors out, no autograd."""

from nsa_kernels.triton_backend.few_rows import project
from nsa_kernels.triton_backend.importance import select_blocks
from nsa_kernels.triton_backend.mixing import mix_backward, mix_forward
from nsa_kernels.triton_backend.paged import full_paged_attention, paged_attention
from nsa_kernels.triton_backend.paged_append import rotate_and_write
from nsa_kernels.triton_backend.paged_fold import fold_and_write
from nsa_kernels.triton_backend.paged_places import place_new_tokens
from nsa_kernels.triton_backend.selected_backward import selected_backward
from nsa_kernels.triton_backend.selected_forward import selected_forward
from nsa_kernels.triton_backend.span_backward import (
    compressed_backward,
    full_backward,
    sliding_backward,
)
from nsa_kernels.triton_backend.span_forward import (
    compressed_forward,
    full_forward,
    sliding_forward,
)
from nsa_kernels.triton_backend.whole import nsa_backward, nsa_forward

__all__ = [
    "compressed_backward",
    "compressed_forward",
    "fold_and_write",
    "full_backward",
    "full_forward",
    "full_paged_attention",
    "mix_backward",
    "mix_forward",
    "nsa_backward",
    "nsa_forward",
    "paged_attention",
    "place_new_tokens",
    "project",
    "rotate_and_write",
    "select_blocks",
    "selected_backward",
    "selected_forward",
    "sliding_backward",
    "sliding_forward",
]
