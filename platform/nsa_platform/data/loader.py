"""The loader: batches as a pure function of shards, seed, epoch and row; its state: a few integers.

Row order does not know how many workers there are. A step takes the next rows of the epoch, and of
these worker r of n takes rows r, r + n, r + 2n, ... Whoever resumes, with any number of workers,
sees exactly the rows that an uninterrupted run would have seen. Where a step's rows do not come out
even, the last microbatch of some workers is smaller, or blank: all have the same number of them.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from nsa_platform.config.data import LoaderConfig
from nsa_platform.data.mixture import Mixture
from nsa_platform.data.packing import IGNORED, Packer, Row
from nsa_platform.data.row_stream import Place, RowStream
from nsa_platform.data.shards import ShardSet


@dataclass(frozen=True, slots=True)
class Batch:
    """Rows packed end to end; every row starts a new document piece."""

    ids: torch.Tensor
    """int64 [T]."""
    targets: torch.Tensor
    """int64 [T]: the next token of the same document, -100 where there is none or it is masked."""
    positions: torch.Tensor
    """int32 [T]: count from 0 in each piece."""
    cu_seqlens: torch.Tensor
    """int32 [B + 1]: where pieces begin, then T."""
    num_targets: int
    """Positions that count for the loss."""
    is_blank: bool = False
    """Whether no row of the data is in it: it stands where other workers have one more."""

    def to(self, device: torch.device | str) -> "Batch":
        """The batch on a device."""
        tensors = (self.ids, self.targets, self.positions, self.cu_seqlens)
        moved = [tensor.to(device, non_blocking=True) for tensor in tensors]
        return Batch(*moved, num_targets=self.num_targets, is_blank=self.is_blank)

    def pinned(self) -> "Batch":
        """The batch where a GPU can fetch it while it computes."""
        tensors = (self.ids, self.targets, self.positions, self.cu_seqlens)
        moved = [tensor.pin_memory() for tensor in tensors]
        return Batch(*moved, num_targets=self.num_targets, is_blank=self.is_blank)


@dataclass(frozen=True, slots=True)
class LoaderState:
    """Where the next step begins: row `row` of epoch `epoch`."""

    epoch: int = 0
    row: int = 0
    more: tuple[Place, ...] = ()
    """Of a mixture: the places in its further sources."""
    dealt: tuple[int, ...] = ()
    """Of a mixture: rows that each source has given."""

    def to_dict(self) -> dict[str, Any]:
        """Plain integers for a checkpoint."""
        tree: dict[str, Any] = {"epoch": self.epoch, "row": self.row}
        if self.more:
            tree["more"] = [[place.epoch, place.row] for place in self.more]
            tree["dealt"] = list(self.dealt)
        return tree

    @classmethod
    def from_dict(cls, tree: Mapping[str, Any]) -> "LoaderState":
        """What to_dict gave. Raises ValueError for anything else."""
        more, dealt = tree.get("more", []), tree.get("dealt", [])
        counts = [tree.get("epoch"), tree.get("row"), *dealt, *(n for pair in more for n in pair)]
        is_whole = set(tree) in ({"epoch", "row"}, {"epoch", "row", "more", "dealt"})
        if not is_whole or any(not isinstance(count, int) or count < 0 for count in counts):
            raise ValueError(f"loader state must hold epoch and row from 0, got {dict(tree)}")
        places = tuple(Place(epoch, row) for epoch, row in more)
        return cls(tree["epoch"], tree["row"], places, tuple(dealt))


class Loader:
    """Endless steps over the epochs of a split, or over a mixture of several.

    Args:
        more: further shard sets, one for each of config.mixture; none: config.path's rows alone.
        rank, world_size: this worker and how many there are.
        rows_per_microbatch: rows of one Batch; it groups rows and changes none.
        state: where to go on; None: at the beginning.

    Raises:
        ValueError: a split is empty, or the numbers do not fit.
        ShardError: a shard is missing or is not what the manifest says (also from next_step).
    """

    def __init__(
        self,
        shards: ShardSet,
        config: LoaderConfig,
        *,
        more: Sequence[ShardSet] = (),
        rank: int = 0,
        world_size: int = 1,
        rows_per_microbatch: int = 1,
        state: LoaderState | None = None,
    ) -> None:
        if not 0 <= rank < world_size:
            raise ValueError(f"rank={rank} must be in [0, world_size={world_size})")
        if rows_per_microbatch < 1:
            raise ValueError(f"rows_per_microbatch={rows_per_microbatch} must be at least 1")
        if state is None:
            dealt = (0,) * (len(more) + 1) if more else ()
            state = LoaderState(more=(Place(),) * len(more), dealt=dealt)
        if len(state.more) != len(more):
            raise ValueError(
                f"loader state is of {len(state.more) + 1} sources, the data has {len(more) + 1}"
            )
        self.shards = shards
        self.config = config
        self._rank = rank
        self._world_size = world_size
        self._rows_per_microbatch = rows_per_microbatch
        places = [Place(state.epoch, state.row), *state.more]
        self._streams = [
            RowStream(each, config, place)
            for each, place in zip([shards, *more], places, strict=True)
        ]
        weights = [config.weight, *(source.weight for source in config.mixture)]
        self._mixture = Mixture(weights, state.dealt) if more else None

    @property
    def rows_per_epoch(self) -> int:
        """Rows of the epoch of config.path in which the next step begins."""
        return self.packer.num_rows

    @property
    def packer(self) -> Packer:
        """The current epoch's rows of config.path, with counts of what was cut and padded."""
        return self._streams[0].packer

    def state(self) -> LoaderState:
        """Where the next step begins; the same on all workers."""
        first, *more = (stream.place for stream in self._streams)
        dealt = tuple(self._mixture.dealt) if self._mixture else ()
        return LoaderState(first.epoch, first.row, tuple(more), dealt)

    def next_step(self, rows_per_step: int) -> list[Batch]:
        """This worker's microbatches of the next `rows_per_step` rows of all workers."""
        if rows_per_step < 1:
            raise ValueError(f"rows_per_step={rows_per_step} must be at least 1")
        rows: list[Row] = []
        for index in range(rows_per_step):
            stream = self._streams[self._mixture.next() if self._mixture else 0]
            place = stream.advance()
            if index % self._world_size == self._rank:
                rows.append(stream.row(place))
        size = self._rows_per_microbatch
        batches = [collate(rows[i : i + size]) for i in range(0, len(rows), size)]
        wanted = -(-rows_per_step // (size * self._world_size))
        length, pad_id = self.config.context_length, self.shards.manifest.tokenizer.pad_id
        return batches + [blank(length, pad_id)] * (wanted - len(batches))


def blank(length: int, pad_id: int) -> Batch:
    """A row that holds nothing and counts for nothing."""
    return Batch(
        ids=torch.full((length,), pad_id),
        targets=torch.full((length,), IGNORED),
        positions=torch.arange(length, dtype=torch.int32),
        cu_seqlens=torch.tensor([0, length], dtype=torch.int32),
        num_targets=0,
        is_blank=True,
    )


def collate(rows: list[Row]) -> Batch:
    """Put packed rows of equal length end to end."""
    length = len(rows[0].ids)
    total = length * len(rows)
    starts = np.concatenate([row.starts + index * length for index, row in enumerate(rows)])
    cu_seqlens = np.append(starts, total).astype(np.int32)
    targets = np.concatenate([row.targets for row in rows])
    positions = np.arange(total, dtype=np.int32) - np.repeat(starts, np.diff(cu_seqlens))
    return Batch(
        ids=torch.from_numpy(np.concatenate([row.ids for row in rows])),
        targets=torch.from_numpy(targets),
        positions=torch.from_numpy(positions.astype(np.int32)),
        cu_seqlens=torch.from_numpy(cu_seqlens),
        num_targets=int((targets != IGNORED).sum()),
    )
