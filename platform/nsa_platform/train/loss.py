"""Next-token cross-entropy in chunks, so that tokens x vocabulary never stands in memory."""

from collections.abc import Callable

import torch
from torch import Tensor
from torch.nn import functional
from torch.utils.checkpoint import checkpoint

IGNORED = -100
"""Target of a position that has no loss."""

# Logits of one chunk take 256 MB in float32.
LOGITS_PER_CHUNK = 1 << 26

Head = Callable[[Tensor], Tensor]


def chunk_tokens(vocab_size: int) -> int:
    """Tokens whose logits are computed at once."""
    return max(1, LOGITS_PER_CHUNK // vocab_size)


def cross_entropy_sum(hidden: Tensor, targets: Tensor, head: Head, *, chunk: int) -> Tensor:
    """Sum of -log p(target) in nats over all positions with a target, as a float32 scalar.

    The sum, not the mean: the caller divides by the number of targets of the whole step, so that
    the result does not depend on how the step is cut into microbatches and workers.

    Args:
        hidden: [T, D] output of the last layer.
        targets: int64 [T], -100 where there is no target.
        head: hidden rows to logits [.., vocab].
        chunk: rows of `hidden` that go through `head` at once; with more than one chunk the
            logits are computed again in the backward pass instead of being kept.
    """
    if hidden.shape[0] <= chunk:
        return _chunk_sum(hidden, targets, head)
    total = torch.zeros((), dtype=torch.float32, device=hidden.device)
    for part, goals in zip(hidden.split(chunk), targets.split(chunk), strict=True):
        total = total + checkpoint(_chunk_sum, part, goals, head, use_reentrant=False)
    return total


def token_losses(hidden: Tensor, targets: Tensor, head: Head, *, chunk: int) -> Tensor:
    """-log p(target) in nats of each position, float32 [T]; 0 where there is no target."""
    parts = zip(hidden.split(chunk), targets.split(chunk), strict=True)
    return torch.cat(
        [
            functional.cross_entropy(
                head(part).float(), goals, ignore_index=IGNORED, reduction="none"
            )
            for part, goals in parts
        ]
    )


def _chunk_sum(hidden: Tensor, targets: Tensor, head: Head) -> Tensor:
    return functional.cross_entropy(
        head(hidden).float(), targets, ignore_index=IGNORED, reduction="sum"
    )
