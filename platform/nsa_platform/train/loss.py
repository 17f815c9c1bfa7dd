"""Next-token cross-entropy in chunks, so that tokens x vocabulary never stands in memory.

The logits of a chunk exist once: their loss and the gradients of the hidden states and of the
output weights are worked out together in the forward pass, in place, and nothing is computed again.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from nsa_platform.model.exchange import largest, total
from nsa_platform.model.partition import WHOLE, Axis

IGNORED = -100
"""Target of a position that has no loss."""

# Logits of one chunk take 256 MB in float32.
LOGITS_PER_CHUNK = 1 << 26

Head = Callable[[Tensor], Tensor]


def chunk_tokens(vocab_size: int) -> int:
    """Tokens whose logits are computed at once."""
    return max(1, LOGITS_PER_CHUNK // vocab_size)


def cross_entropy_sum(
    hidden: Tensor, targets: Tensor, weight: Tensor, *, chunk: int, axis: Axis = WHOLE.tensor
) -> Tensor:
    """Sum of -log p(target) in nats over all positions with a target, as a float32 scalar.

    The sum, not the mean: the caller divides by the number of targets of the whole step, so that
    the result does not depend on how the step is cut into microbatches and workers.

    Args:
        hidden: [T, D] output of the last layer.
        targets: int64 [T], -100 where there is no target.
        weight: [vocab, D], the output head's.
        chunk: rows of `hidden` whose logits exist at once.
        axis: workers with the same hidden states that share the vocabulary. All get the same sum,
            and each a part of the gradients.
    """
    own = axis.own(weight.shape[0])
    part = weight if axis.size == 1 else weight[own]
    loss = _CrossEntropySum.apply(
        hidden, part, targets, own.start, chunk, axis, torch.is_grad_enabled()
    )
    assert isinstance(loss, Tensor)
    return loss


class _CrossEntropySum(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        hidden: Tensor,
        weight: Tensor,
        targets: Tensor,
        first_id: int,
        chunk: int,
        axis: Axis,
        needs_gradients: bool,
    ) -> Tensor:
        exact = torch.promote_types(hidden.dtype, torch.float32)
        loss = torch.zeros((), dtype=exact, device=hidden.device)
        dhidden = torch.empty_like(hidden) if needs_gradients else None
        # A frozen output head needs none.
        dweight = (
            torch.zeros(weight.shape, dtype=exact, device=weight.device)
            if needs_gradients and ctx.needs_input_grad[1]
            else None
        )
        for start in range(0, hidden.shape[0], chunk):
            rows, goals = hidden[start : start + chunk], targets[start : start + chunk]
            part, dlogits = _chunk(rows, goals, weight, first_id, axis)
            loss += part
            if dhidden is not None:
                torch.mm(dlogits, weight, out=dhidden[start : start + chunk])
            if dweight is not None:
                dweight += dlogits.T @ rows
        if dhidden is not None:
            ctx.save_for_backward(dhidden, dweight)
            # The loss of each worker of the axis is a part; what it adds up from, all of them.
            ctx.times, ctx.dtype = axis.size, weight.dtype
        return loss

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        dhidden, dweight = ctx.saved_tensors
        grad = grad * ctx.times
        dweight = None if dweight is None else (dweight * grad).to(ctx.dtype)
        return dhidden * grad.to(dhidden.dtype), dweight, *[None] * 5


def _chunk(
    rows: Tensor, goals: Tensor, weight: Tensor, first_id: int, axis: Axis
) -> tuple[Tensor, Tensor]:
    """Loss of rows [N, D] in float32 at least, and its gradient by their logits [N, own ids]."""
    logits = rows @ weight.T
    exact = logits.to(torch.promote_types(logits.dtype, torch.float32))
    top = largest(exact.amax(1), axis)
    exact.sub_(top[:, None])
    has_goal = goals != IGNORED
    place = goals - first_id
    is_here = has_goal & (place >= 0) & (place < exact.shape[1])
    place = torch.where(is_here, place, 0)[:, None]
    picked = torch.where(is_here, exact.gather(1, place).squeeze(1), 0.0)
    exact.exp_()
    partition_sum = total(exact.sum(1), axis)
    losses = torch.where(has_goal, partition_sum.log() - total(picked, axis), 0.0)
    exact.mul_((has_goal / partition_sum)[:, None])
    exact.scatter_add_(1, place, -is_here.to(exact.dtype)[:, None])
    return losses.sum(), exact.to(rows.dtype)


def token_losses(hidden: Tensor, targets: Tensor, head: Head, *, chunk: int) -> Tensor:
    """-log p(target) in nats of each position, float32 [T]; 0 where there is no target.

    Args:
        head: hidden rows to logits [.., vocab].
    """
    parts = zip(hidden.split(chunk), targets.split(chunk), strict=True)
    return torch.cat(
        [
            functional.cross_entropy(
                head(part).float(), goals, ignore_index=IGNORED, reduction="none"
            )
            for part, goals in parts
        ]
    )
