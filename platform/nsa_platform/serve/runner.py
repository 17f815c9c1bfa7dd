"""One forward pass for the chunks of a step: the only place where the engine meets the model."""

from collections.abc import Sequence

import torch
from torch import Tensor

from nsa_platform.model.inputs import PagedInputs
from nsa_platform.model.transformer import Transformer
from nsa_platform.serve.decode_graphs import DecodeGraphs
from nsa_platform.serve.kv_cache import KvCache
from nsa_platform.serve.prompt_scores import PromptScores
from nsa_platform.serve.scheduler import Step
from nsa_platform.serve.transfer import on_device


class ModelRunner:
    """Puts the tokens of a step through the model, on the cache's device."""

    def __init__(self, model: Transformer, cache: KvCache) -> None:
        self.model = model
        self.cache = cache
        self.prompt_scores = PromptScores(model.logits)
        self.graphs: DecodeGraphs | None = None
        """If given, steps of decodes alone run through them."""

    @torch.no_grad()
    def run(self, step: Step) -> Tensor | None:
        """Scores of the next token [S, vocab] of the S chunks that are their request's last, in
        the order of the step; None if there are none."""
        ids: list[int] = []
        last_rows: list[int] = []
        for chunk in step.chunks:
            end = chunk.request.pages.num_tokens
            ids += chunk.request.tokens(end - chunk.num_tokens, end)
            if chunk.is_last:
                last_rows.append(len(ids) - 1)
        inputs = self.cache.inputs(
            [chunk.request.pages for chunk in step.chunks],
            [chunk.num_tokens for chunk in step.chunks],
        )
        if all(chunk.is_decode for chunk in step.chunks):
            return self.decode(ids, inputs)
        hidden = self.forward(ids, inputs)
        self.prompt_scores.add(hidden, step)
        return self.scores(hidden, last_rows) if last_rows else None

    @torch.no_grad()
    def decode(self, ids: Sequence[int], inputs: PagedInputs) -> Tensor:
        """Scores of the next token [B, vocab] for B sequences with one new token each. They stay as
        they are until the next step."""
        scores = None
        if self.graphs is not None:
            scores = self.graphs.run(on_device(ids, torch.int64, self.cache.device), inputs)
        if scores is None:
            scores = self.model.logits(self.forward(ids, inputs))
        return scores

    @torch.no_grad()
    def forward(self, ids: Sequence[int], inputs: PagedInputs) -> Tensor:
        """Hidden states [T, width] of new tokens, whose places are written."""
        return self.model(on_device(ids, torch.int64, self.cache.device), inputs).hidden

    @torch.no_grad()
    def scores(self, hidden: Tensor, rows: Sequence[int]) -> Tensor:
        """Scores of the next token [S, vocab] at S rows of hidden states."""
        return self.model.logits(hidden[on_device(rows, torch.int64, self.cache.device)])
