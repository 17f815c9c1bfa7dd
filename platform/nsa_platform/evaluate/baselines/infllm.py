"""InfLLM: first tokens, a local window, and memory blocks looked up by chunk (arXiv 2402.04617)."""

import torch
from torch import Tensor

from nsa_platform.config.model import ModelConfig
from nsa_platform.evaluate.baselines.policy import Phase, Piece, Policy, grouped_scores, largest
from nsa_platform.model.rotary import rotation_of


class InfLlm(Policy):
    """`initial` first tokens, `local` last ones, and `top` memory blocks of `block` tokens.

    A chunk of queries (`chunk` tokens of a prompt, one decoded token) chooses together. Blocks are
    cut from the tokens after the initial ones; a block is memory once it has left the window of
    the chunk's first query. Its key is, for each query head, the mean of the `representatives`
    unrotated keys that drew most attention of that head while they were local; of equals the
    earlier. The chunk's mean query scores the blocks, summed over all heads; of equal blocks the
    earlier. Tokens that are neither initial, local nor in a memory block are read too; with `room`
    they come off the blocks: together they are no more than so many tokens a query, as a mean over
    the queries of a chunk. The published program counts blocks alone.

    What is not local stands at one distance, `local`: its keys are not rotated, the query is
    rotated to position `local`. The off-loading of blocks to the host changes no result and is
    left out.

    Source: github.com/thunlp/InfLLM, inf_llm/attention/context_manager.py; there 128 initial and
    4096 local tokens, 16 blocks of 128, 4 representatives, chunks of 512.
    """

    sparse_in = ("prefill", "decode")

    def __init__(
        self,
        config: ModelConfig,
        *,
        initial: int,
        local: int,
        block: int,
        top: int,
        representatives: int,
        chunk: int,
        room: int | None = None,
    ) -> None:
        super().__init__(config)
        assert chunk <= local, "a chunk reads its own tokens as local ones"
        self.initial, self.local, self.block, self.top = initial, local, block, top
        self.representatives, self.chunk = min(representatives, block), chunk
        self.room = room
        self._local_sums: dict[int, Tensor] = {}
        """[H, S] of each layer: attention that each token drew while it was local."""
        self._block_keys: dict[int, Tensor] = {}
        """[blocks, H, K] of each layer."""

    def piece_length(self, phase: Phase, num_keys: int) -> int:
        return 1 if phase == "decode" else self.chunk

    def scores(self, piece: Piece) -> Tensor:
        far = grouped_scores(self._far_query(piece), piece.kept.k_raw, self.scale)
        return torch.where(piece.distance < self.local, super().scores(piece), far)

    def allowed(self, piece: Piece, scores: Tensor) -> Tensor:
        blocks = self._memory(piece)
        after = piece.keys - self.initial
        in_memory = (after >= 0) & (after < len(blocks) * self.block)
        chosen = torch.zeros_like(in_memory)
        if len(blocks):
            query = self._far_query(piece).to(blocks.dtype).mean(0)  # [H, K]
            best = largest((blocks * query).sum((1, 2)), self._top(piece, len(blocks)))  # [blocks]
            chosen[in_memory] = best.repeat_interleave(self.block)
        return (piece.distance < self.local) | ~in_memory | chosen

    def observe(self, piece: Piece, weights: Tensor) -> None:
        drawn = weights.masked_fill(piece.distance >= self.local, 0.0).sum(0)  # [H, S]
        known = self._local_sums.get(piece.layer, drawn[:, :0])
        drawn[:, : known.shape[1]] += known
        self._local_sums[piece.layer] = drawn

    def index_bytes(self, piece: Piece) -> int:
        """The blocks' keys of all heads, once for the chunk."""
        blocks = self._block_keys.get(piece.layer)
        if blocks is None:
            return 0
        return blocks.numel() * piece.kept.k.element_size()

    def _top(self, piece: Piece, blocks: int) -> int:
        """Memory blocks that a chunk may read, of so many."""
        if self.room is None:
            return self.top
        begin, queries = int(piece.positions[0]), len(piece.positions)
        end_of_memory = self.initial + blocks * self.block
        left_over = sum(
            max(0, place + 1 - self.local - end_of_memory)
            for place in range(begin, begin + queries)
        )
        return min(self.top, (self.room * queries - left_over) // (queries * self.block))

    def _far_query(self, piece: Piece) -> Tensor:
        place = torch.full_like(piece.positions, self.local)
        return rotation_of(place, self.config, dtype=piece.q.dtype).apply(piece.q_raw)

    def _memory(self, piece: Piece) -> Tensor:
        """Keys [blocks, H, K] of the blocks before the window of the piece's first query."""
        groups = piece.kept.k.shape[1]
        heads = piece.q.shape[1]
        exact = torch.promote_types(piece.q.dtype, torch.float32)
        keys = self._block_keys.get(piece.layer)
        if keys is None:
            keys = torch.empty(0, heads, piece.q.shape[2], dtype=exact, device=piece.q.device)
        begin = int(piece.positions[0])
        wanted = max(0, begin - self.local - self.initial) // self.block
        for index in range(len(keys), wanted):
            first = self.initial + index * self.block
            rows = slice(first, first + self.block)
            drawn = self._local_sums[piece.layer][:, rows]  # [H, block]
            best = largest(drawn, self.representatives).to(exact)
            raw = piece.kept.k_raw[rows].to(exact).repeat_interleave(heads // groups, dim=1)
            mean = torch.einsum("hb,bhk->hk", best, raw) / self.representatives
            keys = torch.cat([keys, mean[None]])
        self._block_keys[piece.layer] = keys
        return keys
