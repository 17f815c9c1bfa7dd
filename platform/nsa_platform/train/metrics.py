"""Numbers about the training itself: where the time goes, tokens per second, MFU, memory."""

import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch

from nsa_platform.config.model import ModelConfig
from nsa_platform.config.stages import Stage
from nsa_platform.model.cost import dense_equivalent
from nsa_platform.train.adapters import training_flops
from nsa_platform.train.parallel import World

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


def device_name(device: torch.device) -> str:
    """What people call the device."""
    return torch.cuda.get_device_name(device) if device.type == "cuda" else "CPU"


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
    """What the work costs, for rates and MFU."""

    tokens_per_step: int
    """Tokens of one optimizer step over all workers."""
    flops_per_token: float
    """FLOPs of forward and backward of one token, as executed: the keys that NSA really reads."""
    peak: float | None
    """Peak FLOP/s of all workers' devices together; None where it is not known."""
    dense_flops_per_token: float = 0.0
    """The same of a model of this shape with full attention: dense-equivalent."""
    workers: int = 1

    def metrics(self, clock: StepClock) -> dict[str, float]:
        """Rates since the last call; reads the clock.

        train/step_s, train/data_s and its share train/data_share; train/tokens_per_s of all workers
        and train/tps_per_worker; train/tflops_per_worker as executed and
        train/tflops_per_worker_dense; where the peak is known train/mfu and train/mfu_dense.
        """
        step_s, data_s = clock.read()
        rate = self.tokens_per_step / step_s
        executed, dense = rate * self.flops_per_token, rate * self.dense_flops_per_token
        result = {
            "train/step_s": step_s,
            "train/data_s": data_s,
            "train/data_share": data_s / step_s,
            "train/tokens_per_s": rate,
            "train/tps_per_worker": rate / self.workers,
            "train/tflops_per_worker": executed / self.workers / 1e12,
            "train/tflops_per_worker_dense": dense / self.workers / 1e12,
        }
        if self.peak:
            result["train/mfu"] = executed / self.peak
            result["train/mfu_dense"] = dense / self.peak
        return result


def throughput_of(stage: Stage, model: ModelConfig, world: World) -> Throughput:
    """What the steps of a stage cost; the peak counts where the run computes in bfloat16."""
    peak = peak_flops(world.device) if stage.train.dtype == "bfloat16" else None
    length, lora = stage.data.context_length, stage.train.lora
    return Throughput(
        tokens_per_step=stage.train.tokens_per_step,
        flops_per_token=training_flops(model, lora, length),
        peak=None if peak is None else peak * world.size,
        dense_flops_per_token=training_flops(dense_equivalent(model), lora, length),
        workers=world.size,
    )


def memory_metrics(device: torch.device) -> dict[str, float]:
    """GPU memory since the run began on this worker, and how often there was too little; nothing on
    a CPU."""
    if device.type != "cuda":
        return {}
    counts = torch.cuda.memory_stats(device)
    return {
        "memory/max_allocated_gib": torch.cuda.max_memory_allocated(device) / 2**30,
        "memory/max_reserved_gib": torch.cuda.max_memory_reserved(device) / 2**30,
        "memory/num_alloc_retries": float(counts.get("num_alloc_retries", 0)),
        "memory/num_ooms": float(counts.get("num_ooms", 0)),
    }
