"""One forward pass for the chunks of a step: the only place where the engine meets the model."""

from collections.abc import Sequence

import torch
from torch import Tensor

from nsa_platform.model.inputs import PagedInputs
from nsa_platform.model.transformer import Transformer
from nsa_platform.serve.kv_cache import KvCache
from nsa_platform.serve.prompt_scores import PromptScores
from nsa_platform.serve.scheduler import Step


class ModelRunner:
    """Puts the tokens of a step through the model, on the cache's device."""

    def __init__(self, model: Transformer, cache: KvCache) -> None:
        self.model = model
        self.cache = cache
        self.prompt_scores = PromptScores(model.logits)

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
        return self.forward(ids, inputs, last_rows)

    @torch.no_grad()
    def forward(
        self, ids: Sequence[int], inputs: PagedInputs, last_rows: Sequence[int]
    ) -> Tensor | None:
        """Scores [S, vocab] at the S rows among the new tokens; None if there are none."""
        device = self.cache.device
        hidden = self.model(torch.tensor(ids, device=device), inputs).hidden
        self.prompt_scores.add(hidden, step)
        if not last_rows:
            return None
        return self.model.logits(hidden[torch.tensor(last_rows, device=device)])
