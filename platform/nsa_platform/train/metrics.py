"""Numbers about the training itself: where the time goes, tokens per second, MFU, memory."""

import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch

# Dense bfloat16 matrix peak in FLOP/s as the makers state it, by a part of the device's name.
# The first entry that occurs in the name counts.
PEAK_FLOPS = (
    ("H100 PCIe", 756e12),
    ("H100 NVL", 835e12),
    ("H100", 989e12),
    ("H200", 989e12),
    ("A100", 312e12),
)


def peak_flops(device: torch.device) -> float | None:
    """Dense bfloat16 peak of the device in FLOP/s, or None where it is not known."""
    if device.type != "cuda":
        return None
    name = torch.cuda.get_device_name(device)
    return next((peak for part, peak in PEAK_FLOPS if part in name), None)


class StepClock:
    """Mean seconds of a step since the last reading; what is done in a pause does not count."""

    def __init__(self) -> None:
        self._restart()

    def _restart(self) -> None:
        self._begun = time.perf_counter()
        self._steps = 0
        self._data_s = 0.0

    def tick(self) -> None:
        """One more step is done."""
        self._steps += 1

    @contextmanager
    def data(self) -> Iterator[None]:
        """The block waits for data."""
        begun = time.perf_counter()
        yield
        self._data_s += time.perf_counter() - begun

    @contextmanager
    def pause(self) -> Iterator[None]:
        """The block is not part of a step."""
        begun = time.perf_counter()
        yield
        self._begun += time.perf_counter() - begun

    def read(self) -> tuple[float, float]:
        """Mean seconds of a step, and of its wait for data, since the last reading.

        Wait for the device before reading: a GPU's step is done later than it is issued.
        """
        steps = max(1, self._steps)
        step_s = max(time.perf_counter() - self._begun, 1e-9) / steps
        data_s = self._data_s / steps
        self._restart()
        return step_s, data_s


@dataclass(frozen=True, slots=True)
class Throughput:
    """What one worker's share of the work costs, for MFU."""

    tokens_per_step: int
    """Tokens of one optimizer step over all workers."""
    flops_per_token: float
    """FLOPs of forward and backward of one token, as executed."""
    peak: float | None
    """Peak FLOP/s of all workers' devices together; None where it is not known."""

    def metrics(self, clock: StepClock) -> dict[str, float]:
        """train/step_s, train/data_s, train/tokens_per_s and, where the peak is known, train/mfu.

        Reads the clock: the numbers are means since the last call.
        """
        step_s, data_s = clock.read()
        result = {
            "train/step_s": step_s,
            "train/data_s": data_s,
            "train/tokens_per_s": self.tokens_per_step / step_s,
        }
        if self.peak:
            flops = self.tokens_per_step * self.flops_per_token
            result["train/mfu"] = flops / step_s / self.peak
        return result


def memory_metrics(device: torch.device) -> dict[str, float]:
    """Peak of allocated GPU memory since the start of the process; nothing on a CPU."""
    if device.type != "cuda":
        return {}
    return {"memory/max_allocated_gib": torch.cuda.max_memory_allocated(device) / 2**30}
