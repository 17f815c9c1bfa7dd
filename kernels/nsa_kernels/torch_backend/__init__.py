"""Every op in vectorised torch: any device, any width, any dtype, explicit backward."""

from nsa_kernels.torch_backend.few_rows import project
from nsa_kernels.torch_backend.mixing import mix_backward, mix_forward
from nsa_kernels.torch_backend.paged import full_paged_attention, paged_attention
from nsa_kernels.torch_backend.paged_places import place_new_tokens
from nsa_kernels.torch_backend.paged_writes import fold_and_write, rotate_and_write
from nsa_kernels.torch_backend.selected import selected_backward, selected_forward
from nsa_kernels.torch_backend.selection import select_blocks
from nsa_kernels.torch_backend.span import (
    compressed_backward,
    compressed_forward,
    full_backward,
    full_forward,
    sliding_backward,
    sliding_forward,
)
from nsa_kernels.torch_backend.whole import nsa_backward, nsa_forward

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
