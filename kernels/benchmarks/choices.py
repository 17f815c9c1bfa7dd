"""Which blocks the queries of a benchmark read: at random, or shared by neighbours as when trained.

A choice is int32 [T, G, n] of one sequence, ascending, -1 last, with the forced blocks in it: what
`selected_attention` takes. Free blocks are those of the n that are not forced.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from nsa_kernels import NsaConfig


@dataclass(frozen=True, slots=True)
class Sharing:
    """How the free blocks of neighbouring tokens hang together; overlap.py measures the result.

    Each of a query's free places has a home block. At every token the place keeps what it shows
    with probability `keep`; otherwise it goes home with probability `home`, or else to another
    block. Homes move about once each `home_life` tokens.
    """

    keep: float
    home: float
    home_life: int = 64
    nearness: float = 1.0
    """1: blocks are drawn evenly from the past. Above: the nearer ones more often, at a share
    u ** nearness of the way back for an even u."""


def uniform_blocks(
    tokens: int, groups: int, config: NsaConfig, device: str, rows_at_once: int = 4096
) -> Tensor:
    """Free blocks evenly at random, anew for each token: the hardest case.

    Neighbouring queries share only the forced blocks.
    """
    num_blocks = -(-tokens // config.selection_block_size)
    block = torch.arange(num_blocks, device=device)
    chosen = min(config.num_selected_blocks, num_blocks)
    result = torch.full(
        (tokens, groups, config.num_selected_blocks), -1, dtype=torch.int32, device=device
    )
    for first in range(0, tokens, rows_at_once):
        rows = torch.arange(first, min(first + rows_at_once, tokens), device=device)
        own = (rows // config.selection_block_size)[:, None, None]
        noise = torch.rand(len(rows), groups, num_blocks, device=device)
        is_forced = (block < config.num_initial_blocks) | (block > own - config.num_local_blocks)
        noise = noise.masked_fill(is_forced, 2.0).masked_fill(block > own, -1.0)
        value, index = noise.topk(chosen, dim=-1)
        index = index.masked_fill(value < 0, num_blocks).sort(-1).values
        result[first : first + len(rows), :, :chosen] = index.masked_fill(index == num_blocks, -1)
    return result


def shared_blocks(
    tokens: int, groups: int, config: NsaConfig, sharing: Sharing, device: str
) -> Tensor:
    """Free blocks that stay, leave and come back over neighbouring tokens as `sharing` says.

    All tokens at once: place p of a query draws only from blocks p, p + places, p + 2 places ... of
    those that are free to choose, so that no two places ever show the same one, and what it shows
    was drawn at its last change, when the past was no longer than now.
    """
    n, initial, local = (
        config.num_selected_blocks,
        config.num_initial_blocks,
        config.num_local_blocks,
    )
    places = n - initial - local
    own = torch.arange(tokens, device=device) // config.selection_block_size
    # Tokens with n blocks or fewer in their past read them all.
    everything = torch.arange(n, device=device).expand(tokens, groups, n)
    everything = everything.masked_fill(everything > own[:, None, None], -1)
    first = n * config.selection_block_size
    if first >= tokens:
        return everything.int().contiguous()

    free = _free_places(own[first:], groups, places, initial, local, sharing)
    own = own[first:, None, None].expand(-1, groups, -1)
    forced = [
        torch.arange(initial, device=device).expand(*own.shape[:2], initial),
        own - torch.arange(local, device=device),
    ]
    chosen = torch.cat([*forced, free], dim=-1).sort(-1).values
    return torch.cat([everything[:first], chosen]).int()


def _free_places(
    own: Tensor, groups: int, places: int, initial: int, local: int, sharing: Sharing
) -> Tensor:
    """int64 [T, G, places]: the free block of each place, all of them past the initial ones."""
    shape, device = (len(own), groups, places), own.device
    place = torch.arange(places, device=device)
    candidates = (own + 1 - initial - local)[:, None, None]
    # How many of the candidates are this place's.
    count = (candidates - place + places - 1) // places if places else candidates[..., :0]

    def draw() -> Tensor:
        back = torch.rand(shape, device=device) ** sharing.nearness
        return initial + place + places * (count - 1 - (back * count).long().clamp(max=count - 1))

    def happens(probability: float) -> Tensor:
        return torch.rand(shape, device=device) < probability

    def last(is_change: Tensor) -> Tensor:
        """Token of the last change at or before each token; the first token is one."""
        token = torch.arange(len(own), device=device)[:, None, None]
        return torch.where(is_change, token, 0).cummax(0).values

    home = draw().gather(0, last(happens(1 / sharing.home_life)))
    changed = last(happens(1 - sharing.keep))
    is_home = happens(sharing.home).gather(0, changed)
    return torch.where(is_home, home, draw().gather(0, changed))
