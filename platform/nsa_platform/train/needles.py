"""Needles in a haystack during training: whether the model finds numbers in long texts.

A number counts as found if each of its tokens is the likeliest one after the right ones before it:
then greedy decoding writes it. That takes one forward pass for each haystack and no cache.
"""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import islice
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor

from nsa_platform import figures
from nsa_platform.config.train import NeedleCurveConfig
from nsa_platform.data.haystack import ANSWER, Haystack, haystack
from nsa_platform.data.loader import Batch
from nsa_platform.data.shards import ShardSet
from nsa_platform.data.tokenizer import Tokenizer
from nsa_platform.model.transformer import Transformer
from nsa_platform.train.loss import IGNORED
from nsa_platform.train.mesh import Mesh
from nsa_platform.train.parallel import World, release_gathered

if TYPE_CHECKING:
    from matplotlib.figure import Figure

FIGURE = "figures/needle.png"

# No tokenizer makes more tokens of a number than it has bytes.
ANSWER_TOKENS = len(ANSWER.format(number=99_999))


@dataclass(frozen=True, slots=True)
class NeedlesFound:
    """What came of the haystacks: shares from 0 to 1."""

    lengths: tuple[int, ...]
    depths: tuple[float, ...]
    exact: Sequence[Sequence[float]]
    """Numbers that were found whole; one row for each depth, one column for each length."""
    tokens: float
    """Tokens of all numbers that were the likeliest ones."""

    def metrics(self) -> dict[str, float]:
        """valid/needle_exact, valid/needle_exact_at/<length> and valid/needle_tokens."""
        by_length = np.mean(self.exact, axis=0).tolist()
        at = zip(self.lengths, by_length, strict=True)
        return {
            "valid/needle_exact": float(np.mean(self.exact)),
            "valid/needle_tokens": self.tokens,
            **{f"valid/needle_exact_at/{length}": share for length, share in at},
        }

    def figure(self) -> Figure:
        """The shares of whole numbers over length and depth."""
        return figures.needle_map(
            self.lengths,
            self.depths,
            self.exact,
            label="numbers found",
            title="Needle in a haystack",
        )


def lengths_within(config: NeedleCurveConfig, context_length: int) -> tuple[int, ...]:
    """The lengths that rows of a stage can hold; later stages may hold more."""
    return tuple(length for length in config.lengths if length <= context_length)


def haystacks(
    tokenizer: Tokenizer, config: NeedleCurveConfig, lengths: Sequence[int], filler: Sequence[int]
) -> list[Haystack]:
    """The same ones each time, length by length, depth by depth; a haystack and its answer fill
    the length at most.

    Raises:
        ValueError: a length has no room for needle, question and answer, or there is no filler.
    """
    result = []
    for length in lengths:
        for depth in config.depths:
            for sample in range(config.samples):
                dice = random.Random(f"{length}/{depth}/{sample}")
                try:
                    room = length - ANSWER_TOKENS
                    hay = haystack(tokenizer, filler, length=room, depth=depth, dice=dice)
                except ValueError as error:
                    raise ValueError(f"train.needle.lengths={length}: {error}") from error
                result.append(hay)
    return result


def held_out_filler(shards: ShardSet, tokenizer: Tokenizer, tokens: int) -> list[int]:
    """The first `tokens` held-out ids, fewer if there are not so many, without those that end or
    fill up."""
    special = (tokenizer.eos_id, tokenizer.pad_id)
    parts = (shards.open(index).ids for index in range(len(shards)))
    ids = (int(token) for part in parts for token in part)
    return list(islice((token for token in ids if token not in special), tokens))


class Needles:
    """The same haystacks at each validation, whatever the number of workers."""

    def __init__(
        self,
        haystacks: Sequence[Haystack],
        config: NeedleCurveConfig,
        lengths: tuple[int, ...],
        *,
        world: World,
        mesh: Mesh,
    ) -> None:
        """Look for these, which haystacks() made of the lengths."""
        self._haystacks, self._config, self._lengths = haystacks, config, lengths
        self._world, self._mesh = world, mesh

    def find(self, model: Transformer) -> NeedlesFound:
        """Look for all of them. Every worker calls it; all get the same."""
        model.eval()
        # Tokens that were right, and all of them, of each answer. Workers with the same tokens add
        # the same to both, and only quotients count.
        counts = torch.zeros(len(self._haystacks), 2, dtype=torch.int64, device=self._world.device)
        dealt = self._mesh.data_size
        # Workers that share the model make as many passes as each other.
        for first in range(0, len(self._haystacks), dealt):
            index = first + self._mesh.data_rank
            is_own = index < len(self._haystacks)
            right = self._look(model, self._haystacks[index if is_own else first])
            if is_own:
                counts[index] += right
        release_gathered(model)
        model.train()
        right, total = self._world.sum(counts).cpu().unbind(1)
        cells = (len(self._lengths), len(self._config.depths), self._config.samples)
        return NeedlesFound(
            self._lengths,
            self._config.depths,
            exact=(right == total).double().view(cells).mean(2).T.tolist(),
            tokens=int(right.sum()) / int(total.sum()),
        )

    @torch.no_grad()
    def _look(self, model: Transformer, hay: Haystack) -> Tensor:
        """int64 [2]: tokens of the answer that were the likeliest, and tokens of it, as far as
        this worker has them."""
        batch = self._batch(hay).to(self._world.device)
        ids, targets = self._mesh.own_tokens(batch.ids), self._mesh.own_tokens(batch.targets)
        # Haystacks have other lengths than rows, for which compiled layers would be made anew.
        with torch.compiler.set_stance("force_eager"):
            hidden = model(ids, self._mesh.inputs(batch)).hidden
        asked = targets != IGNORED
        hits = model.logits(hidden[asked]).argmax(-1) == targets[asked]
        return torch.stack([hits.sum(), asked.sum()])

    def _batch(self, hay: Haystack) -> Batch:
        """A haystack and its answer as a row. Workers have as many tokens each: a document of its
        own fills up."""
        ids = torch.tensor([*hay.prompt, *hay.answer])
        used, unit = len(ids), self._mesh.config.row_workers
        blank = -used % unit
        targets = torch.full((used + blank,), IGNORED)
        targets[len(hay.prompt) - 1 : used - 1] = ids[len(hay.prompt) :]
        ends = [0, used, used + blank] if blank else [0, used]
        return Batch(
            torch.cat([ids, ids.new_zeros(blank)]),
            targets,
            torch.cat([torch.arange(used), torch.arange(blank)]).int(),
            torch.tensor(ends, dtype=torch.int32),
            num_targets=len(hay.answer),
        )


def open_needles(
    shards: ShardSet,
    tokenizer: Tokenizer,
    config: NeedleCurveConfig,
    *,
    context_length: int,
    world: World,
    mesh: Mesh,
) -> Needles | None:
    """Needles in held-out text as long as these rows can hold; None: there are none.

    Raises:
        ValueError: a length has no room for needle, question and answer.
    """
    lengths = lengths_within(config, context_length)
    if not lengths:
        return None
    filler = held_out_filler(shards, tokenizer, 2 * max(lengths))
    made = haystacks(tokenizer, config, lengths, filler)
    return Needles(made, config, lengths, world=world, mesh=mesh)
