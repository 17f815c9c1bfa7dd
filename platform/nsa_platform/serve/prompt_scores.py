"""Log probabilities of the tokens of prompts, gathered over the chunks of their prefill."""

from collections.abc import Callable

import torch
from torch import Tensor

from nsa_platform.serve.request import Request, TokenLogprob
from nsa_platform.serve.scheduler import Chunk, Step

ROWS = 256
"""Positions whose scores over the vocabulary are held at once."""


class PromptScores:
    """Keeps what was computed of a prompt until its first token is sampled."""

    def __init__(self, logits: Callable[[Tensor], Tensor]) -> None:
        """logits: scores [T, vocab] of hidden states [T, width]."""
        self._logits = logits
        self._gathered: dict[str, list[TokenLogprob]] = {}

    @property
    def known_ids(self) -> frozenset[str]:
        """Requests for which something is kept."""
        return frozenset(self._gathered)

    def add(self, hidden: Tensor, step: Step) -> None:
        """Take what a step's hidden states [T, width] say of prompts that asked for it."""
        end = 0
        for chunk in step.chunks:
            start, end = end, end + chunk.num_tokens
            if _is_wanted(chunk.request):
                self._add(hidden[start:end], chunk)

    def take(self, request: Request) -> tuple[TokenLogprob, ...] | None:
        """Entries of the prompt's tokens from the second on; None if they were not asked for."""
        if request.params.prompt_logprobs is None:
            return None
        return tuple(self._gathered.pop(request.request_id, ()))

    def forget(self, request: Request) -> None:
        """Drop what is kept for a request that has ended."""
        self._gathered.pop(request.request_id, None)

    def _add(self, hidden: Tensor, chunk: Chunk) -> None:
        request = chunk.request
        # A preempted request comes again from its beginning.
        first = request.pages.num_tokens - chunk.num_tokens
        gathered = self._gathered.setdefault(request.request_id, [])
        del gathered[first:]
        # The state at a position scores the token at the next one.
        targets = request.prompt_ids[first + 1 : first + chunk.num_tokens + 1]
        for start in range(0, len(targets), ROWS):
            ids = torch.tensor(targets[start : start + ROWS], device=hidden.device)
            scores = self._logits(hidden[start : start + len(ids)])
            gathered += token_logprobs(scores, ids, num_top=request.params.prompt_logprobs or 0)


def token_logprobs(scores: Tensor, ids: Tensor, *, num_top: int) -> list[TokenLogprob]:
    """What scores [B, vocab] say of one id each, int64 [B]. Waits for the device."""
    logs = scores.float().log_softmax(-1)
    chosen = logs.gather(1, ids[:, None])
    ranks = (logs > chosen).sum(-1) + 1
    values, tokens = logs.topk(min(num_top, logs.shape[-1]), dim=-1)
    columns = zip(
        ids.tolist(),
        chosen[:, 0].tolist(),
        ranks.tolist(),
        tokens.tolist(),
        values.tolist(),
        strict=True,
    )
    return [
        TokenLogprob(token, logprob, rank, tuple(zip(best, top, strict=True)))
        for token, logprob, rank, best, top in columns
    ]


def _is_wanted(request: Request) -> bool:
    return request.params.prompt_logprobs is not None and not request.output_ids
