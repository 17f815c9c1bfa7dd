"""Generation for one prompt at a time: prefill in chunks, then token by token, all paged."""

from collections.abc import Collection, Iterator, Sequence

import torch
from torch import Tensor

from nsa_platform.model.transformer import Transformer
from nsa_platform.serve.kv_cache import KvCache
from nsa_platform.serve.pages import SequencePages
from nsa_platform.serve.sampler import Sampler, Sampling


class Generator:
    """Streams continuations of a prompt from a model, on the model's device, in its dtype."""

    def __init__(
        self, model: Transformer, *, prefill_chunk: int = 2048, blocks_per_page: int = 1
    ) -> None:
        """prefill_chunk: prompt tokens of one forward pass. blocks_per_page: m of the page size."""
        if prefill_chunk < 1:
            raise ValueError(f"prefill_chunk={prefill_chunk} must be positive")
        self.model = model
        self.prefill_chunk = prefill_chunk
        self.blocks_per_page = blocks_per_page

    def stream(
        self,
        prompt_ids: Sequence[int],
        max_new_tokens: int,
        *,
        stop_ids: Collection[int] = (),
        sampling: Sampling | None = None,
    ) -> Iterator[int]:
        """Yield new ids one by one, until a stop id (not yielded) or max_new_tokens.

        Arguments are checked here, before the first id is asked for.

        Raises:
            ValueError: the prompt is empty or holds ids outside the vocabulary, max_new_tokens is
                not positive, or both together exceed the model's max_context.
        """
        config = self.model.config
        if not prompt_ids:
            raise ValueError("prompt_ids is empty: at least one token is needed")
        lowest, highest = min(prompt_ids), max(prompt_ids)
        if lowest < 0 or highest >= config.vocab_size:
            raise ValueError(
                f"prompt_ids must lie in [0, {config.vocab_size}), got {lowest} to {highest}"
            )
        if max_new_tokens < 1:
            raise ValueError(f"max_new_tokens={max_new_tokens} must be positive")
        total = len(prompt_ids) + max_new_tokens
        if total > config.max_context:
            raise ValueError(
                f"{len(prompt_ids)} prompt tokens + max_new_tokens={max_new_tokens} = {total} "
                f"exceed the model's max_context={config.max_context}"
            )
        return self._run(
            list(prompt_ids), max_new_tokens, frozenset(stop_ids), Sampler(sampling or Sampling())
        )

    def _run(
        self, prompt: list[int], max_new_tokens: int, stop_ids: frozenset[int], sampler: Sampler
    ) -> Iterator[int]:
        weight = self.model.embedding.weight
        cache = KvCache(
            self.model.config,
            num_tokens=len(prompt) + max_new_tokens,
            max_new_tokens=min(self.prefill_chunk, len(prompt)),
            blocks_per_page=self.blocks_per_page,
            device=weight.device,
            dtype=weight.dtype,
        )
        sequence = SequencePages()
        pending = prompt
        for _ in range(max_new_tokens):
            token = sampler.pick(self._advance(cache, sequence, pending))
            if token in stop_ids:
                return
            yield token
            pending = [token]

    @torch.no_grad()
    def _advance(self, cache: KvCache, sequence: SequencePages, ids: list[int]) -> Tensor:
        """Put the next tokens of a sequence through the model; scores [vocab] after the last."""
        hidden = self.model.embedding.weight[:0]
        for chunk in torch.tensor(ids, device=cache.device).split(self.prefill_chunk):
            hidden = self.model(chunk, cache.extend([sequence], [len(chunk)])).hidden
        return self.model.logits(hidden[-1])
