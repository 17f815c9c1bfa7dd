"""How workers share a forward pass: which of them has which tokens, heads, hidden units, experts.

Every worker calls the model at the same time. What it computes is a part of a sum over workers, and
so is its gradient: the gradients of all workers, whatever they share, add up to that of the whole.
Where workers compute the same (the tensor axis has the same tokens), each counts as a part: its
loss is divided by their number.
"""

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Axis:
    """This worker among those that share one kind of work."""

    rank: int = 0
    size: int = 1
    group: str = ""
    """Name of the process group of the workers that share."""

    def own(self, total: int) -> slice:
        """This worker's part of `total` things, which size divides."""
        return slice(total // self.size * self.rank, total // self.size * (self.rank + 1))


@dataclass(frozen=True, slots=True)
class Partition:
    """The axes that a model's forward pass knows."""

    context: Axis = Axis()
    """Shares the tokens of packed rows, in order: worker r has the r-th part of them."""
    kin: Axis = Axis()
    """Workers of the context axis that share one key/value head, where there are fewer of those
    than workers."""
    tensor: Axis = Axis()
    """Shares heads by group, and hidden units; all of its workers have the same tokens."""
    expert: Axis = Axis()
    """Shares routed experts."""

    def own_groups(self, groups: int) -> slice:
        """Which of a layer's key/value heads this worker's attention reads."""
        own = groups // self.tensor.size
        first = own * self.tensor.rank + own * self.context.rank // self.context.size
        return slice(first, first + max(1, own // self.context.size))


WHOLE = Partition()
"""One worker has everything."""
