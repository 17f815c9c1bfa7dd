"""Which backend runs an op: decided by the tensor's device and one explicit switch.

The argument `backend` wins over the environment variable NSA_KERNELS_BACKEND; without either, CUDA
and ROCm tensors go to Triton and CPU tensors to torch, or to Triton where TRITON_INTERPRET=1 asks
for its interpreter. A wish that cannot be met raises; nothing falls back.
"""

import os
from types import ModuleType
from typing import Literal, cast

import torch
from torch import Tensor

from nsa_kernels import torch_backend, triton_backend

Backend = Literal["triton", "torch"]

# Triton reads it when a kernel is defined.
_WAS_INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
_BACKENDS: dict[str, ModuleType] = {"triton": triton_backend, "torch": torch_backend}


def resolve_backend(tensor: Tensor, backend: str | None) -> Backend:
    """Name the backend that runs an op on `tensor`.

    Raises:
        ValueError: the wish is unknown, or the tensor's device or dtype cannot meet it.
    """
    source, wish = "backend", backend
    if wish is None:
        source, wish = "NSA_KERNELS_BACKEND", os.environ.get("NSA_KERNELS_BACKEND") or None
    interpreted = _WAS_INTERPRETED and os.environ.get("TRITON_INTERPRET") == "1"
    device = tensor.device.type
    if wish is None:
        wish = "triton" if device == "cuda" or (device == "cpu" and interpreted) else "torch"
    if wish not in _BACKENDS:
        raise ValueError(f"{source}={wish!r} is not one of 'triton', 'torch'")
    if wish == "triton" and device != "cuda" and not (device == "cpu" and interpreted):
        raise ValueError(
            f"{source}='triton' needs tensors on a CUDA or ROCm device, or CPU tensors with "
            f"TRITON_INTERPRET=1 set before nsa_kernels is imported; got one on {tensor.device}"
        )
    if wish == "triton" and device == "cpu" and tensor.dtype == torch.bfloat16:
        raise ValueError(
            "Triton's interpreter multiplies bfloat16 wrongly: it takes float16 and float32, "
            "backend='torch' takes bfloat16 too"
        )
    return cast(Backend, wish)


def backend_module(name: str) -> ModuleType:
    """The package of plain functions (tensors in, tensors out) that implements every op."""
    return _BACKENDS[name]
