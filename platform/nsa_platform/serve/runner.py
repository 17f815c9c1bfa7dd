"""One forward pass for the chunks of a step: the only place where the engine meets the model."""

from collections.abc import Sequence
from itertools import accumulate

import torch
from torch import Tensor

from nsa_platform.config.model import NsaAttentionConfig
from nsa_platform.model.inputs import Observed, PagedInputs
from nsa_platform.model.transformer import Transformer
from nsa_platform.serve.block_reads import BlockReads
from nsa_platform.serve.decode_graphs import DecodeGraphs
from nsa_platform.serve.kv_cache import KvCache
from nsa_platform.serve.prompt_scores import PromptScores
from nsa_platform.serve.ranks import Ranks, StepKind
from nsa_platform.serve.scheduler import Step
from nsa_platform.serve.selection_sample import SelectionSampler
from nsa_platform.serve.transfer import on_device


class ModelRunner:
    """Puts the tokens of a step through the model, on the cache's device.

    Where several ranks compute the model, each has a runner; all but the first follow().
    """

    def __init__(self, model: Transformer, cache: KvCache, ranks: Ranks | None = None) -> None:
        self.model = model
        self.cache = cache
        self.ranks = ranks
        self.prompt_scores = PromptScores(model.logits)
        attention = model.config.attention
        is_sparse = isinstance(attention, NsaAttentionConfig)
        block_size = attention.selection_block_size if is_sparse else None
        self.block_reads = BlockReads(block_size)
        self.selection = SelectionSampler(block_size)
        self.graphs: DecodeGraphs | None = None
        """If given, steps of decodes alone run through them."""

    @torch.no_grad()
    def run(self, step: Step, unknown_ids: Tensor | None = None) -> Tensor | None:
        """Scores of the next token [S, vocab] of the S chunks that are their request's last, in
        the order of the step; None if there are none.

        unknown_ids: the step's tokens, int64 [T] on the device, where the host does not know them
        yet.
        """
        is_sampled, is_read = self.selection.is_due(step), self.block_reads.is_wanted(step)
        observed = Observed() if is_sampled or is_read else None
        inputs = self.cache.inputs(
            [chunk.request.pages for chunk in step.chunks],
            [chunk.num_tokens for chunk in step.chunks],
            observed=observed,
        )
        ids = self._ids(step) if unknown_ids is None else unknown_ids
        if observed is None and all(chunk.is_decode for chunk in step.chunks):
            return self.decode(ids, inputs)
        hidden = self.forward(ids, inputs)
        self.prompt_scores.add(hidden, step)
        if observed is not None and is_sampled:
            self.selection.add(observed, step)
        if observed is not None and is_read:
            self.block_reads.add(observed.selected, step)
        ends = accumulate(chunk.num_tokens for chunk in step.chunks)
        last_rows = [end - 1 for end, c in zip(ends, step.chunks, strict=True) if c.is_last]
        return self.scores(hidden, last_rows) if last_rows else None

    def wait(self) -> None:
        """Until the device has done all that it was given."""
        if self.cache.device.type == "cuda":
            torch.cuda.current_stream(self.cache.device).synchronize()

    def _ids(self, step: Step) -> Tensor:
        """The step's tokens, int64 [T]."""
        ids: list[int] = []
        for chunk in step.chunks:
            end = chunk.request.pages.num_tokens
            ids += chunk.request.tokens(end - chunk.num_tokens, end)
        return on_device(ids, torch.int64, self.cache.device)

    @torch.no_grad()
    def decode(self, ids: Tensor, inputs: PagedInputs) -> Tensor:
        """Scores of the next token [B, vocab] for B sequences with one new token each, int64 ids
        [B]. They stay as they are until the next step."""
        if self.ranks is not None:
            self.ranks.tell(StepKind.DECODE, ids, inputs)
        return self._decode(ids, inputs)

    @torch.no_grad()
    def forward(self, ids: Tensor, inputs: PagedInputs) -> Tensor:
        """Hidden states [T, width] of new tokens, int64 ids [T], whose places are written."""
        if self.ranks is not None:
            kind = StepKind.FORWARD if inputs.observed is None else StepKind.OBSERVED
            self.ranks.tell(kind, ids, inputs)
        return self._forward(ids, inputs)

    @torch.no_grad()
    def follow(self) -> None:
        """Compute what the first rank computes until it ends; for all ranks but the first."""
        assert self.ranks is not None
        while (told := self.ranks.receive(self.cache.layers)) is not None:
            if told.kind is StepKind.DECODE:
                self._decode(told.ids, told.inputs)
            else:
                self._forward(told.ids, told.inputs)

    def _decode(self, ids: Tensor, inputs: PagedInputs) -> Tensor:
        scores = None if self.graphs is None else self.graphs.run(ids, inputs)
        return self.model.logits(self._forward(ids, inputs)) if scores is None else scores

    def _forward(self, ids: Tensor, inputs: PagedInputs) -> Tensor:
        hidden = self.model(ids, inputs).hidden
        if self.ranks is not None and inputs.observed is not None:
            self.ranks.whole(inputs.observed)
        return hidden

    @torch.no_grad()
    def scores(self, hidden: Tensor, rows: Sequence[int]) -> Tensor:
        """Scores of the next token [S, vocab] at S rows of hidden states."""
        return self.model.logits(hidden[on_device(rows, torch.int64, self.cache.device)])
