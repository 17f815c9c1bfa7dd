"""One forward pass for the chunks of a step: the only place where the engine meets the model."""

from collections.abc import Sequence

import torch
from torch import Tensor

from nsa_platform.config.model import NsaAttentionConfig
from nsa_platform.model.inputs import PagedInputs
from nsa_platform.model.transformer import Transformer
from nsa_platform.serve.block_reads import BlockReads
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
        attention = model.config.attention
        is_sparse = isinstance(attention, NsaAttentionConfig)
        self.block_reads = BlockReads(attention.selection_block_size if is_sparse else None)
        self.graphs: DecodeGraphs | None = None
        """If given, steps of decodes alone run through them."""

    @torch.no_grad()
    def run(self, step: Step, unknown_ids: Tensor | None = None) -> Tensor | None:
        """Scores of the next token [S, vocab] of the S chunks that are their request's last, in
        the order of the step; None if there are none.

        unknown_ids: the step's tokens, int64 [T] on the device, where the host does not know them
        yet.
        """
        selected = [] if self.block_reads.is_wanted(step) else None
        inputs = self.cache.inputs(
            [chunk.request.pages for chunk in step.chunks],
            [chunk.num_tokens for chunk in step.chunks],
            selected=selected,
        )
        if unknown_ids is not None:
            return self.decode(unknown_ids, inputs)
        ids: list[int] = []
        last_rows: list[int] = []
        for chunk in step.chunks:
            end = chunk.request.pages.num_tokens
            ids += chunk.request.tokens(end - chunk.num_tokens, end)
            if chunk.is_last:
                last_rows.append(len(ids) - 1)
        known_ids = on_device(ids, torch.int64, self.cache.device)
        if selected is None and all(chunk.is_decode for chunk in step.chunks):
            return self.decode(known_ids, inputs)
        hidden = self.forward(known_ids, inputs)
        self.prompt_scores.add(hidden, step)
        if selected is not None:
            self.block_reads.add(selected, step)
        return self.scores(hidden, last_rows) if last_rows else None

    @torch.no_grad()
    def decode(self, ids: Tensor, inputs: PagedInputs) -> Tensor:
        """Scores of the next token [B, vocab] for B sequences with one new token each, int64 ids
        [B]. They stay as they are until the next step."""
        scores = None if self.graphs is None else self.graphs.run(ids, inputs)
        if scores is None:
            scores = self.model.logits(self.forward(ids, inputs))
        return scores

    @torch.no_grad()
    def forward(self, ids: Tensor, inputs: PagedInputs) -> Tensor:
        """Hidden states [T, width] of new tokens, int64 ids [T], whose places are written."""
        return self.model(ids, inputs).hidden

    @torch.no_grad()
    def scores(self, hidden: Tensor, rows: Sequence[int]) -> Tensor:
        """Scores of the next token [S, vocab] at S rows of hidden states."""
        return self.model.logits(hidden[on_device(rows, torch.int64, self.cache.device)])
