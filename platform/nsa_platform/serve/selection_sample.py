"""A look now and then at what the branches do while serving: gates, and how far back blocks lie."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from nsa_platform.model.inputs import Observed
from nsa_platform.serve.scheduler import Step
from nsa_platform.serve.stats import SelectionSample
from nsa_platform.serve.transfer import Incoming

EVERY = 256
"""Steps of decodes from one look to the next. Such a step runs without CUDA graphs."""


@dataclass(frozen=True, slots=True)
class _Look:
    gate_means: Incoming
    """[layers, 3]"""
    selected: Incoming
    """[layers, G, n], of one token."""
    position: int
    """Of that token."""


class SelectionSampler:
    """Says which steps are looked at, and keeps what was seen last."""

    def __init__(self, block_size: int | None, *, every: int = EVERY) -> None:
        """block_size: tokens of a selection block; None for full attention: nothing to see."""
        self._block_size = block_size
        self._every = every
        self._num_steps = self._num_looks = 0
        self._look: _Look | None = None
        self._sample: SelectionSample | None = None

    def is_due(self, step: Step) -> bool:
        """Whether this step is to be observed; to be asked once for each."""
        if self._block_size is None or not all(chunk.is_decode for chunk in step.chunks):
            return False
        self._num_steps += 1
        return self._num_steps % self._every == 0

    def add(self, observed: Observed, step: Step) -> None:
        """Take what was observed of a step; of its tokens the last one stands for all."""
        self._num_looks += 1
        self._look = _Look(
            Incoming(torch.stack(observed.gate_means)),
            Incoming(torch.stack([blocks[-1] for blocks in observed.selected])),
            step.chunks[-1].request.pages.num_tokens - 1,
        )

    def last(self) -> SelectionSample | None:
        """What was seen last and is there; None if nothing was. Waits for nothing."""
        look = self._look
        if look is not None and look.selected.has_come:
            self._look, self._sample = None, self._read(look)
        return self._sample

    def _read(self, look: _Look) -> SelectionSample:
        assert self._block_size is not None
        layers: Sequence[Sequence[Sequence[int]]] = look.selected.tolist()
        blocks = [block for layer in layers for group in layer for block in group if block >= 0]
        return SelectionSample(
            number=self._num_looks,
            gate_means=tuple(tuple(means) for means in look.gate_means.tolist()),
            ages=tuple(look.position - block * self._block_size for block in blocks),
        )
