"""Learning rate of each step: warm-up, then half a cosine, or stable with a linear end (WSD)."""

import math
from dataclasses import dataclass

from nsa_platform.config.train import OptimizerConfig


@dataclass(frozen=True, slots=True)
class Schedule:
    """A schedule that reaches over some steps of a run."""

    config: OptimizerConfig
    start: int
    """Steps of the run that are done when it begins."""
    end: int
    """The same when it ends."""

    def rate(self, step: int) -> float:
        """Learning rate of the run's optimizer step `step`, counted from 0."""
        return learning_rate(step - self.start, config=self.config, steps=self.end - self.start)


def learning_rate(step: int, *, config: OptimizerConfig, steps: int) -> float:
    """Learning rate of optimizer step `step`, counted from 0, in a run of `steps`.

    The warm-up rises linearly and reaches the peak with its last step. The last step of the run
    has exactly `learning_rate * min_lr_factor`, if there is a step that decays.

    Source:
        cosine: arXiv 1608.03983 without restarts; wsd: arXiv 2404.06395, section 4, with a
        linear end.
    """
    if step < config.warmup_steps:
        return config.learning_rate * (step + 1) / config.warmup_steps
    if config.schedule == "cosine":
        factor = _cosine(step, start=config.warmup_steps, steps=steps, end=config.min_lr_factor)
    else:
        factor = _stable_decay(step, config=config, steps=steps)
    return config.learning_rate * factor


def _cosine(step: int, *, start: int, steps: int, end: float) -> float:
    done = _progress(step, start=start, steps=steps)
    return end + (1.0 - end) * 0.5 * (1.0 + math.cos(math.pi * done))


def _stable_decay(step: int, *, config: OptimizerConfig, steps: int) -> float:
    decay_steps = round(config.decay_fraction * steps)
    start = max(config.warmup_steps, steps - decay_steps)
    if step < start:
        return 1.0
    # The first decaying step already lies below the peak, so progress counts from start - 1.
    done = _progress(step, start=start - 1, steps=steps)
    return 1.0 + (config.min_lr_factor - 1.0) * done


def _progress(step: int, *, start: int, steps: int) -> float:
    """0 at `start`, 1 at the last step of the run and after it."""
    span = steps - 1 - start
    return 1.0 if span <= 0 else min(1.0, (step - start) / span)
