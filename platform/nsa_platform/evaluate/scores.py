"""How a model scores given tokens: -log p of every target, and of an answer to a prompt."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional

from nsa_platform.data.loader import Batch
from nsa_platform.data.packing import IGNORED
from nsa_platform.model.inputs import PackedInputs
from nsa_platform.model.transformer import Transformer

Score = Callable[[Batch], np.ndarray]
"""A batch to nats of each position's target, float64 [T]; 0 where there is no target."""

# Logits of one chunk take 256 MB in float32.
LOGITS_PER_CHUNK = 1 << 26


@dataclass(frozen=True, slots=True)
class AnswerScore:
    """How a model takes to an answer whose earlier tokens it is always given (teacher forcing)."""

    nats: tuple[float, ...]
    """-log p of each token of the answer."""
    hits: tuple[bool, ...]
    """Whether the token was the most likely one."""


class ModelScorer:
    """Scores by a Transformer, on its device and in its dtype; sums stand in float64."""

    def __init__(self, model: Transformer) -> None:
        self.model = model
        self.device = model.embedding.weight.device

    @torch.no_grad()
    def nats(self, batch: Batch) -> np.ndarray:
        """-log p of each target of a batch, float64 [T]."""
        batch = batch.to(self.device)
        inputs = PackedInputs(batch.positions, batch.cu_seqlens)
        hidden = self.model(batch.ids, inputs).hidden
        chunk = self._rows_per_chunk()
        losses = [
            functional.cross_entropy(
                self.model.logits(part).float(), goals, ignore_index=IGNORED, reduction="none"
            )
            for part, goals in zip(hidden.split(chunk), batch.targets.split(chunk), strict=True)
        ]
        return torch.cat(losses).double().cpu().numpy()

    def answer(self, prompt: list[int], answer: list[int]) -> AnswerScore:
        """Score an answer that follows a prompt; one forward pass without a cache."""
        return self.answers([(prompt, answer)])[0]

    @torch.no_grad()
    def answers(self, pairs: Sequence[tuple[list[int], list[int]]]) -> list[AnswerScore]:
        """Score answers that follow prompts, packed into one forward pass without a cache."""
        whole = [[*prompt, *answer] for prompt, answer in pairs]
        ids = torch.tensor([token for each in whole for token in each[:-1]], device=self.device)
        inputs = PackedInputs.from_lengths([len(each) - 1 for each in whole], device=self.device)
        hidden = self.model(ids, inputs).hidden.split([len(each) - 1 for each in whole])
        return [
            self._answer(part[len(prompt) - 1 :], answer)
            for part, (prompt, answer) in zip(hidden, pairs, strict=True)
        ]

    def _answer(self, hidden: Tensor, answer: list[int]) -> AnswerScore:
        goals = torch.tensor(answer, device=self.device)
        chunk = self._rows_per_chunk()
        nats: list[float] = []
        hits: list[bool] = []
        for part, right in zip(hidden.split(chunk), goals.split(chunk), strict=True):
            logits = self.model.logits(part).float()
            losses = functional.cross_entropy(logits, right, reduction="none")
            nats += losses.double().tolist()
            hits += (logits.argmax(-1) == right).tolist()
        return AnswerScore(tuple(nats), tuple(hits))

    def _rows_per_chunk(self) -> int:
        return max(1, LOGITS_PER_CHUNK // self.model.config.vocab_size)
