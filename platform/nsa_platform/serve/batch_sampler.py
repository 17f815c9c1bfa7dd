"""Sampling for the requests of a step: their bias and penalties, one choice each, logprobs."""

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from nsa_platform.serve.constraints import Constraints, is_constrained
from nsa_platform.serve.grammar import Grammars
from nsa_platform.serve.prompt_scores import token_logprobs
from nsa_platform.serve.request import Request, SamplingParams, TokenLogprob
from nsa_platform.serve.sampler import choose_tokens, uniform
from nsa_platform.serve.transfer import Incoming, on_device


@dataclass(frozen=True, slots=True)
class Sampled:
    """The next token of one request."""

    token_id: int | None
    """None: no token may follow."""
    logprob: TokenLogprob | None
    """If asked for."""


@dataclass(frozen=True, slots=True)
class Choices:
    """Tokens that the device is choosing."""

    ids: Tensor
    """int64 [B]"""
    incoming: Incoming
    """The same, on their way."""
    logits: Tensor
    stuck: frozenset[int]
    """Rows where no token may follow."""
    requests: tuple[Request, ...]

    def collect(self) -> list[Sampled]:
        """The tokens, in the order of the requests. Waits for the device."""
        tokens = self.incoming.tolist()
        logprobs = _logprobs(self.logits, self.ids, self.requests)
        return [
            Sampled(None, None) if row in self.stuck else Sampled(token, logprobs.get(row))
            for row, token in enumerate(tokens)
        ]


@dataclass(slots=True)
class _Seen:
    """What penalties need to know of a request's tokens, on the device."""

    is_known: Tensor
    """bool [vocab]: in the prompt or in the output."""
    counts: Tensor
    """float [vocab]: how often in the output."""
    num_counted: int = 0
    """Tokens of the output that are in counts."""


class BatchSampler:
    """Chooses the next tokens of any requests. A row is treated by its own request alone."""

    def __init__(self, grammars: Grammars) -> None:
        self._seen: dict[str, _Seen] = {}
        self._constraints = Constraints(grammars)

    @property
    def known_ids(self) -> frozenset[str]:
        """Requests for which something is kept."""
        return frozenset(self._seen) | self._constraints.known_ids

    def sample(self, logits: Tensor, requests: Sequence[Request]) -> list[Sampled]:
        """The next token of each request for scores [B, vocab]. Waits for the device."""
        return self.choose(logits, requests).collect()

    def choose(
        self, logits: Tensor, requests: Sequence[Request], *, num_unknown: int = 0
    ) -> Choices:
        """Let the device choose the next token of each request for scores [B, vocab]. Waits for it
        only where a grammar or a list of tokens bars some.

        num_unknown: tokens of each output that the device has chosen and the host does not know
        yet; above 0 for requests alone of which needs_output says no.
        """
        logits = logits.float()
        edited = self._edited(logits, requests, num_unknown)
        scores, stuck = self._constrained(edited, requests)
        ids = choose_tokens(
            scores,
            [request.params for request in requests],
            [uniform(r.seed, len(r.output_ids) + num_unknown) for r in requests],
        )
        return Choices(ids, Incoming(ids), logits, stuck, tuple(requests))

    def forget(self, request: Request) -> None:
        """Drop what is kept for a request that has ended."""
        self._seen.pop(request.request_id, None)
        self._constraints.forget(request)

    def _constrained(
        self, scores: Tensor, requests: Sequence[Request]
    ) -> tuple[Tensor, frozenset[int]]:
        """Scores without what may not follow, and the rows where nothing may, left as they were."""
        rows = [row for row, request in enumerate(requests) if is_constrained(request.params)]
        if not rows:
            return scores, frozenset()
        barred = scores[rows]
        self._constraints.bar(barred, [requests[row] for row in rows])
        is_open = (barred > -torch.inf).any(-1).tolist()
        left = [row for row, any_left in zip(rows, is_open, strict=True) if any_left]
        scores = scores.clone()
        scores[left] = barred[torch.tensor(is_open, device=scores.device)]
        return scores, frozenset(rows) - frozenset(left)

    def _edited(self, logits: Tensor, requests: Sequence[Request], num_unknown: int) -> Tensor:
        """Scores after penalties, bias and the ban on stopping early; the input stays as it is."""
        penalised = [row for row, request in enumerate(requests) if _has_penalty(request.params)]
        changes: list[tuple[int, int, float]] = []
        for row, request in enumerate(requests):
            changes += [(row, token, bias) for token, bias in request.params.logit_bias.items()]
            if len(request.output_ids) + num_unknown < request.params.min_tokens:
                changes += [(row, token, -torch.inf) for token in request.stop_ids]
        if not penalised and not changes:
            return logits
        scores = logits.clone()
        device = logits.device
        if penalised:
            places = on_device(penalised, torch.int64, device)
            scores[places] = self._penalise(scores[places], [requests[r] for r in penalised])
        if changes:
            rows, tokens, values = zip(*changes, strict=True)
            places = on_device(rows, torch.int64, device), on_device(tokens, torch.int64, device)
            biases = on_device(values, torch.float32, device)
            scores.index_put_(places, biases, accumulate=True)
        return scores

    def _penalise(self, scores: Tensor, requests: Sequence[Request]) -> Tensor:
        seen = [self._update(request, scores) for request in requests]
        is_known = torch.stack([one.is_known for one in seen])
        counts = torch.stack([one.counts for one in seen])
        settings = [
            (p.repetition_penalty, p.frequency_penalty, p.presence_penalty)
            for p in (request.params for request in requests)
        ]
        columns = on_device(settings, scores.dtype, scores.device)
        repetition, frequency, presence = columns.split(1, dim=1)  # [B, 1]
        repeated = torch.where(scores > 0, scores / repetition, scores * repetition)
        scores = torch.where(is_known, repeated, scores)
        return scores - frequency * counts - presence * (counts > 0)

    def _update(self, request: Request, scores: Tensor) -> _Seen:
        vocab, device = scores.shape[-1], scores.device
        seen = self._seen.get(request.request_id)
        if seen is None:
            is_known = torch.zeros(vocab, dtype=torch.bool, device=device)
            is_known.index_fill_(0, on_device(request.prompt_ids, torch.int64, device), True)
            seen = _Seen(is_known, torch.zeros(vocab, device=device))
            self._seen[request.request_id] = seen
        new = request.output_ids[seen.num_counted :]
        if new:
            ids = on_device(new, torch.int64, device)
            seen.is_known.index_fill_(0, ids, True)
            seen.counts.index_add_(0, ids, torch.ones(len(new), device=device))
            seen.num_counted += len(new)
        return seen


def needs_output(params: SamplingParams) -> bool:
    """Whether the choice of a token, or what is told of it, waits for the tokens before it to be
    known to the host."""
    is_told = params.logprobs is not None or params.selected_blocks
    return is_told or _has_penalty(params) or is_constrained(params)


def _has_penalty(params: SamplingParams) -> bool:
    return (
        params.repetition_penalty != 1.0
        or params.presence_penalty != 0.0
        or params.frequency_penalty != 0.0
    )


def _logprobs(logits: Tensor, ids: Tensor, requests: Sequence[Request]) -> dict[int, TokenLogprob]:
    """By row, for those that asked; of the scores as the model gave them."""
    wanted = {
        row: request.params.logprobs
        for row, request in enumerate(requests)
        if request.params.logprobs is not None
    }
    if not wanted:
        return {}
    rows = list(wanted)
    entries = token_logprobs(logits[rows], ids[rows], num_top=max(wanted.values()))
    return {
        row: replace(entry, top=entry.top[: wanted[row]])
        for row, entry in zip(rows, entries, strict=True)
    }
