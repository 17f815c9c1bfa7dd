"""Small values between host and device, without waiting for what else the device is at."""

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor


def on_device(
    values: Sequence[Any] | np.ndarray, dtype: torch.dtype, device: torch.device
) -> Tensor:
    """A tensor of these values. A copy from ordinary memory would wait for the device's work."""
    tensor = torch.as_tensor(values, dtype=dtype)
    if device.type == "cuda":
        tensor = tensor.pin_memory()
    return tensor.to(device, non_blocking=True, copy=True)


class Incoming:
    """Values on their way from the device to the host."""

    def __init__(self, tensor: Tensor) -> None:
        """Begin to fetch them: what the device is given afterwards is not waited for."""
        self._tensor, self._event = tensor, None
        if tensor.is_cuda:
            self._tensor = torch.empty(tensor.shape, dtype=tensor.dtype, pin_memory=True)
            self._tensor.copy_(tensor, non_blocking=True)
            self._event = torch.cuda.Event()
            self._event.record(torch.cuda.current_stream(tensor.device))

    @property
    def has_come(self) -> bool:
        """Whether they are there."""
        return self._event is None or self._event.query()

    def tolist(self) -> list[Any]:
        """The values, once they are there."""
        if self._event is not None:
            self._event.synchronize()
        return self._tensor.tolist()
