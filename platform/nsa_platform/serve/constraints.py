"""Which tokens a request may not choose next: its grammar's, its own lists', or none of them."""

from collections.abc import Sequence

import numpy as np
import torch
from llguidance import LLMatcher
from torch import Tensor

from nsa_platform.serve.grammar import Grammars
from nsa_platform.serve.request import Request, SamplingParams


class Constraints:
    """Follows the outputs of requests, and bars what may not follow them."""

    def __init__(self, grammars: Grammars) -> None:
        self._grammars = grammars
        self._matchers: dict[str, tuple[LLMatcher, int]] = {}
        """By request id: the matcher, and how many output tokens it has seen."""

    @property
    def known_ids(self) -> frozenset[str]:
        """Requests for which something is kept."""
        return frozenset(self._matchers)

    def bar(self, scores: Tensor, requests: Sequence[Request]) -> None:
        """Set the scores [B, vocab] of barred tokens to -inf, in place."""
        rows: list[int] = []
        masks: list[np.ndarray] = []
        for row, request in enumerate(requests):
            params = request.params
            if params.grammar is not None:
                rows.append(row)
                masks.append(self._mask(request, scores.shape[-1]))
            if params.allowed_token_ids:
                _keep_only(scores[row], params.allowed_token_ids)
            for token in _ends_of_bad_words(request):
                scores[row, token] = -torch.inf
        if rows:
            may_follow = torch.from_numpy(np.stack(masks)).to(scores.device)
            scores[rows] = scores[rows].masked_fill(~may_follow, -torch.inf)

    def forget(self, request: Request) -> None:
        """Drop what is kept for a request that has ended."""
        self._matchers.pop(request.request_id, None)

    def _mask(self, request: Request, vocab: int) -> np.ndarray:
        """bool [vocab]: what the grammar lets follow; nothing once the output has left it."""
        grammar = request.params.grammar
        assert grammar is not None
        kept = self._matchers.get(request.request_id)
        matcher, num_seen = (self._grammars.matcher(grammar), 0) if kept is None else kept
        matcher.consume_tokens(request.output_ids[num_seen:])
        self._matchers[request.request_id] = matcher, len(request.output_ids)
        if matcher.is_error():
            return np.zeros(vocab, dtype=bool)
        packed = np.frombuffer(matcher.compute_bitmask(), dtype=np.uint8)
        return np.unpackbits(packed, count=vocab, bitorder="little").astype(bool)


def is_constrained(params: SamplingParams) -> bool:
    """Whether anything is barred by more than a bias."""
    return params.grammar is not None or bool(params.allowed_token_ids or params.bad_words)


def _keep_only(scores: Tensor, ids: Sequence[int]) -> None:
    """All scores [vocab] but those of `ids` become -inf."""
    places = torch.tensor(ids, device=scores.device)
    kept = scores[places]
    scores.fill_(-torch.inf)
    scores[places] = kept


def _ends_of_bad_words(request: Request) -> list[int]:
    """Last tokens of the sequences that the output has come to all of but the last."""
    output = request.output_ids
    return [
        last
        for *begun, last in request.params.bad_words
        if not begun or output[-len(begun) :] == begun
    ]
