"""A model that reads through a policy: scores text and answers, and generates."""

from collections.abc import Callable, Collection
from copy import deepcopy
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional

from nsa_platform.data.loader import Batch
from nsa_platform.data.packing import IGNORED
from nsa_platform.evaluate.baselines.policy import Phase, Policy
from nsa_platform.evaluate.baselines.reads import Reads
from nsa_platform.evaluate.scores import LOGITS_PER_CHUNK, AnswerScore
from nsa_platform.model.inputs import PolicyInputs
from nsa_platform.model.transformer import Transformer

Start = Callable[[int, int], Policy]
"""The tokens of a prompt, and those that may follow it, to a policy that has seen nothing."""


def _likeliest(logits: Tensor) -> int:
    return int(logits.argmax())


class _Begun(NamedTuple):
    """A prompt that has been read, as far as any answer to it."""

    prompt: list[int]
    follow: int
    policy: Policy
    hidden: Tensor
    """[rows, width], of at least the prompt's last token."""


class PolicyReader:
    """One policy on one model with full attention; every sequence gets a policy of its own.

    The last `decoded_tail` tokens of a prompt are decoded, not prefilled: a method whose prefill is
    dense would otherwise have read the question, and with it the answer's place, by full attention.
    The last prompt is remembered, so that writing an answer to it and scoring one that is no longer
    read it once.
    """

    def __init__(
        self,
        model: Transformer,
        start: Start,
        *,
        decoded_tail: int,
        stop_ids: Collection[int] = (),
    ) -> None:
        self.model, self.start = model, start
        self.decoded_tail, self.stop_ids = decoded_tail, frozenset(stop_ids)
        self.device = model.embedding.weight.device
        self.reads: dict[Phase, Reads] = {"prefill": Reads(), "decode": Reads()}
        self._last: _Begun | None = None

    @torch.no_grad()
    def nats(self, batch: Batch, *, context: int) -> np.ndarray:
        """-log p of each target of a batch, float64 [T]; 0 where there is none.

        Each sequence is read in the phase in which the policy is sparse: decoded from its first
        token, or prefilled where decoding is dense. context: tokens for which the policy is sized.
        """
        batch = batch.to(self.device)
        lengths = batch.cu_seqlens.diff().tolist()
        losses = []
        for ids, goals in zip(batch.ids.split(lengths), batch.targets.split(lengths), strict=True):
            policy = self.start(context, 0)
            phase: Phase = "prefill" if "decode" not in policy.sparse_in else "decode"
            hidden = self._forward(policy, ids, phase)
            losses.append(self._losses(hidden, goals))
            self._count(policy)
        return torch.cat(losses).double().cpu().numpy()

    @torch.no_grad()
    def answer(self, prompt: list[int], answer: list[int]) -> AnswerScore:
        """Score an answer that follows a prompt, its earlier tokens given and decoded."""
        policy, hidden = self._read_prompt(prompt, len(answer))
        given = torch.tensor(answer[:-1], dtype=torch.int64, device=self.device)
        after = self._forward(policy, given, "decode") if len(given) else hidden[:0]
        logits = self.model.logits(torch.cat([hidden[-1:], after])).float()
        goals = torch.tensor(answer, device=self.device)
        losses = functional.cross_entropy(logits, goals, reduction="none")
        hits = logits.argmax(-1) == goals
        self._count(policy)
        return AnswerScore(tuple(losses.double().tolist()), tuple(hits.tolist()))

    @torch.no_grad()
    def generate(
        self, prompt: list[int], count: int, *, pick: Callable[[Tensor], int] = _likeliest
    ) -> list[int]:
        """Up to `count` ids after a prompt, until a stop id (left out).

        pick: the scores [vocab] of the next token to its id; the default is greedy.
        """
        policy, hidden = self._read_prompt(prompt, count)
        written: list[int] = []
        while True:
            token = pick(self.model.logits(hidden[-1]))
            if token in self.stop_ids:
                break
            written.append(token)
            if len(written) == count:
                break
            hidden = self._forward(policy, torch.tensor([token], device=self.device), "decode")
        self._count(policy)
        return written

    def _read_prompt(self, prompt: list[int], follow: int) -> tuple[Policy, Tensor]:
        """A policy that has seen the prompt, and the hidden states of at least its last token."""
        last = self._last
        if last is None or last.prompt != prompt or last.follow < follow:
            last = self._last = self._begin(prompt, follow)
        return deepcopy(last.policy), last.hidden

    def _begin(self, prompt: list[int], follow: int) -> _Begun:
        policy = self.start(len(prompt), follow)
        ids = torch.tensor(prompt, device=self.device)
        body = max(0, len(ids) - self.decoded_tail)
        if body:
            self._forward(policy, ids[:body], "prefill")
        hidden = self._forward(policy, ids[body:], "decode")
        self._count(policy)
        return _Begun(list(prompt), follow, policy, hidden)

    def _forward(self, policy: Policy, ids: Tensor, phase: Phase) -> Tensor:
        attend = policy.prefill if phase == "prefill" else policy.decode
        return self.model(ids, PolicyInputs(attend)).hidden

    def _losses(self, hidden: Tensor, goals: Tensor) -> Tensor:
        chunk = max(1, LOGITS_PER_CHUNK // self.model.config.vocab_size)
        return torch.cat(
            [
                functional.cross_entropy(
                    self.model.logits(part).float(), of_part, ignore_index=IGNORED, reduction="none"
                )
                for part, of_part in zip(hidden.split(chunk), goals.split(chunk), strict=True)
            ]
        )

    def _count(self, policy: Policy) -> None:
        """Take over what a policy has counted, once."""
        for phase, reads in policy.reads.items():
            self.reads[phase].merge(reads)
            policy.reads[phase] = Reads()
