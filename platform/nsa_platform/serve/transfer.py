"""Small values from the host to the device without waiting for what the device is at."""

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor


def on_device(
    values: Sequence[Any] | np.ndarray, dtype: torch.dtype, device: torch.device
) -> Tensor:
    """A tensor of these values. A copy from ordinary memory would wait for the device's work."""
    tensor = torch.tensor(values, dtype=dtype, pin_memory=device.type == "cuda")
    return tensor.to(device, non_blocking=True)
