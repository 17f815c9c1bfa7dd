"""What workers that share a forward pass send each other, differentiable and traceable.

A function's gradient is its adjoint over all workers: a sum's is a sum, what was joined is summed
and cut, what was exchanged goes back.
"""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from nsa_platform.model.partition import Axis

_messages = torch.ops._c10d_functional


def _reduce(x: Tensor, group: str, operation: str = "sum") -> Tensor:
    return _messages.wait_tensor(_messages.all_reduce(x.contiguous(), operation, group))


def _join(x: Tensor, axis: Axis) -> Tensor:
    joined = _messages.all_gather_into_tensor(x.contiguous(), axis.size, axis.group)
    return _messages.wait_tensor(joined)


class _Sum(torch.autograd.Function):
    @staticmethod
    def forward(x: Tensor, group: str) -> Tensor:
        return _reduce(x, group)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Tensor, str], output: Tensor) -> None:
        ctx.group = inputs[1]

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        return _reduce(grad, ctx.group), None


class _Join(torch.autograd.Function):
    @staticmethod
    def forward(x: Tensor, size: int, group: str) -> Tensor:
        return _join(x, Axis(size=size, group=group))

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Tensor, int, str], output: Tensor) -> None:
        ctx.size, ctx.group = inputs[1:]

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None]:
        cut = _messages.reduce_scatter_tensor(grad.contiguous(), "sum", ctx.size, ctx.group)
        return _messages.wait_tensor(cut), None, None


class _Exchange(torch.autograd.Function):
    @staticmethod
    def forward(x: Tensor, received: list[int], sent: list[int], group: str) -> Tensor:
        moved = _messages.all_to_all_single(x.contiguous(), received, sent, group)
        return _messages.wait_tensor(moved)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        ctx.received, ctx.sent, ctx.group = inputs[1:]

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None, None]:
        back = _messages.all_to_all_single(grad.contiguous(), ctx.sent, ctx.received, ctx.group)
        return _messages.wait_tensor(back), None, None, None


def summed(x: Tensor, axis: Axis) -> Tensor:
    """The sum of x over the workers of the axis, on each of them."""
    return x if axis.size == 1 else _Sum.apply(x, axis.group)  # pyright: ignore[reportReturnType]


def joined(x: Tensor, axis: Axis) -> Tensor:
    """x [N, ...] of each worker, one after the other: [size * N, ...] on each of them."""
    if axis.size == 1:
        return x
    return _Join.apply(x, axis.size, axis.group)  # pyright: ignore[reportReturnType]


def exchanged(
    x: Tensor, axis: Axis, *, received: list[int] | None = None, sent: list[int] | None = None
) -> Tensor:
    """Rows of x go to the workers in order, and what came from them is returned in their order.

    Args:
        received, sent: rows that come from and go to each worker; None: as many each.
    """
    if axis.size == 1:
        return x
    even = [x.shape[0] // axis.size] * axis.size
    return _Exchange.apply(  # pyright: ignore[reportReturnType]
        x, even if received is None else received, even if sent is None else sent, axis.group
    )


def to_heads(tensors: Sequence[Tensor], axis: Axis) -> list[Tensor]:
    """From a part of the tokens with all heads to all tokens with a part of the heads.

    Args:
        tensors: [T / size, X, W] each; where X is less than size, size / X workers get the same.

    Returns:
        [T, X / size, W] (or [T, 1, W]) each, after one exchange.
    """
    if axis.size == 1:
        return list(tensors)
    # A tensor that stands at several places travels once.
    unique: list[Tensor] = []
    places = []
    for tensor in tensors:
        place = next((i for i, other in enumerate(unique) if other is tensor), len(unique))
        places.append(place)
        if place == len(unique):
            unique.append(tensor)
    parts = [
        tensor.repeat_interleave(max(1, axis.size // tensor.shape[1]), 1).unflatten(
            1, (axis.size, -1)
        )
        for tensor in unique
    ]  # [T / size, size, X / size, W]
    by_worker = torch.cat([part.flatten(2) for part in parts], 2).transpose(0, 1).flatten(0, 1)
    widths = [part.shape[2] * part.shape[3] for part in parts]
    split = exchanged(by_worker, axis).split(widths, dim=1)
    whole = [rows.unflatten(1, part.shape[2:]) for rows, part in zip(split, parts, strict=True)]
    return [whole[place] for place in places]


def to_tokens(x: Tensor, axis: Axis) -> Tensor:
    """From all tokens with a part of the heads [T, X, W] back to [T / size, X * size, W]."""
    if axis.size == 1:
        return x
    by_worker = exchanged(x.flatten(1), axis).unflatten(0, (axis.size, -1))
    return by_worker.transpose(0, 1).flatten(1).unflatten(1, (-1, x.shape[2]))


@torch.no_grad()
def heads_of_kin(x: Tensor, kin: Axis) -> Tensor:
    """All heads [T, size * X, W] of those of whom each worker has [T, X, W]. No gradient."""
    if kin.size == 1:
        return x
    return _join(x, kin).unflatten(0, (kin.size, -1)).transpose(0, 1).flatten(1, 2)


@torch.no_grad()
def total(x: Tensor, axis: Axis) -> Tensor:
    """Sum of x over the workers of the axis. No gradient."""
    return x if axis.size == 1 else _reduce(x, axis.group)


@torch.no_grad()
def largest(x: Tensor, axis: Axis) -> Tensor:
    """Largest x, element by element, over the workers of the axis. No gradient."""
    return x if axis.size == 1 else _reduce(x, axis.group, "max")
