"""The likeliest continuation of a few prompts, by whole forward passes, on all workers at once.

For a look at a model in training: nothing is cached, each token is a pass over everything so far,
and a model that workers share stays shared.
"""

import dataclasses
from collections.abc import Callable, Collection, Sequence

import torch
from torch import Tensor

from nsa_platform.model.exchange import joined
from nsa_platform.model.inputs import PackedInputs
from nsa_platform.model.partition import WHOLE, Partition
from nsa_platform.model.transformer import Transformer


def _as_they_are(tokens: Tensor) -> Tensor:
    return tokens


@torch.no_grad()
def continue_greedily(
    model: Transformer,
    prompts: Sequence[Sequence[int]],
    *,
    max_new_tokens: int,
    stop_ids: Collection[int],
    device: torch.device | str = "cpu",
    partition: Partition = WHOLE,
    agreed: Callable[[Tensor], Tensor] = _as_they_are,
) -> list[list[int]]:
    """New ids of each prompt up to a stop id, which is left out, or max_new_tokens of them.

    Where workers share the model, all of them call it with the same prompts.

    Args:
        prompts: ids, at least one each.
        partition: how workers share a pass.
        agreed: the same ids int64 [prompts] on every worker, of what each has picked: who stops
            earlier than the others would leave them waiting.
    """
    rows, begins = [list(prompt) for prompt in prompts], [len(prompt) for prompt in prompts]
    running = list(range(len(rows)))
    for _ in range(max_new_tokens):
        if not running:
            break
        picked = agreed(_next_ids(model, [rows[i] for i in running], device, partition)).tolist()
        goes_on = []
        for i, token in zip(running, picked, strict=True):
            if token not in stop_ids:
                rows[i].append(token)
                goes_on.append(i)
        running = goes_on
    return [row[begin:] for row, begin in zip(rows, begins, strict=True)]


def _next_ids(
    model: Transformer, rows: list[list[int]], device: torch.device | str, partition: Partition
) -> Tensor:
    """int64 [rows], the likeliest id after each."""
    lengths = [len(row) for row in rows]
    ends = torch.tensor(lengths, device=device).cumsum(0)
    # Workers have as many tokens each: a sequence of its own fills up.
    blank = -sum(lengths) % (partition.context.size * partition.tensor.size)
    inputs = PackedInputs.from_lengths([*lengths, blank] if blank else lengths, device=device)
    ids = torch.tensor([token for row in rows for token in row] + [0] * blank, device=device)
    own = partition.context.own(len(ids))
    inputs = dataclasses.replace(inputs, positions=inputs.positions[own], partition=partition)
    # Each pass has another length, for which compiled layers would be made anew.
    with torch.compiler.set_stance("force_eager"):
        hidden = model(ids[own], inputs).hidden
    return model.logits(joined(hidden, partition.context)[ends - 1]).argmax(-1)
