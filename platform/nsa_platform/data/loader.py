"""The loader: batches as a pure function of shards, seed, epoch and row; its state is two integers.

Row order does not know how many workers there are. A step takes the next rows of the epoch, and of
these worker r of n takes rows r, r + n, r + 2n, ... Whoever resumes, with any number of workers,
sees exactly the rows that an uninterrupted run would have seen.
"""

from collections import OrderedDict
from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
import torch

from nsa_platform.config.data import LoaderConfig
from nsa_platform.data.packing import (
    IGNORED,
    DocumentOrder,
    Packer,
    Row,
    SplitPacker,
    WholePacker,
)
from nsa_platform.data.row_order import RowOrder
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

    def to(self, device: torch.device | str) -> "Batch":
        """The batch on a device."""
        tensors = (self.ids, self.targets, self.positions, self.cu_seqlens)
        moved = [tensor.to(device, non_blocking=True) for tensor in tensors]
        return Batch(*moved, num_targets=self.num_targets)


@dataclass(frozen=True, slots=True)
class LoaderState:
    """Where the next step begins: row `row` of epoch `epoch`."""

    epoch: int = 0
    row: int = 0

    def to_dict(self) -> dict[str, int]:
        """Plain integers for a checkpoint."""
        return {"epoch": self.epoch, "row": self.row}

    @classmethod
    def from_dict(cls, tree: Mapping[str, int]) -> "LoaderState":
        """What to_dict gave. Raises ValueError for anything else."""
        if set(tree) != {"epoch", "row"} or any(int(value) < 0 for value in tree.values()):
            raise ValueError(f"loader state must hold epoch and row from 0, got {dict(tree)}")
        return cls(int(tree["epoch"]), int(tree["row"]))


class Loader:
    """Endless steps over the epochs of a split.

    Args:
        rank, world_size: this worker and how many there are.
        rows_per_microbatch: rows of one Batch; it groups rows and changes none.
        state: where to go on; None: at the beginning.

    Raises:
        ValueError: the split is empty, or the numbers do not fit.
        ShardError: a shard is missing or is not what the manifest says (also from next_step).
    """

    def __init__(
        self,
        shards: ShardSet,
        config: LoaderConfig,
        *,
        rank: int = 0,
        world_size: int = 1,
        rows_per_microbatch: int = 1,
        state: LoaderState | None = None,
    ) -> None:
        if not 0 <= rank < world_size:
            raise ValueError(f"rank={rank} must be in [0, world_size={world_size})")
        if rows_per_microbatch < 1:
            raise ValueError(f"rows_per_microbatch={rows_per_microbatch} must be at least 1")
        if not shards.manifest.tokens:
            raise ValueError(f"{shards.folder}: holds no tokens; there is nothing to load")
        self.shards = shards
        self.config = config
        self._rank = rank
        self._world_size = world_size
        self._rows_per_microbatch = rows_per_microbatch
        self._packers: OrderedDict[int, Packer] = OrderedDict()
        self._orders: dict[int, RowOrder] = {}
        self._state = LoaderState()
        self._seek(state or LoaderState())

    @property
    def rows_per_epoch(self) -> int:
        """Rows of the epoch in which the next step begins."""
        return self.packer.num_rows

    @property
    def packer(self) -> Packer:
        """The current epoch's rows, with counts of truncated documents and padding."""
        return self._packer(self._state.epoch)

    def state(self) -> LoaderState:
        """Where the next step begins; the same on all workers."""
        return self._state

    def next_step(self, rows_per_step: int) -> list[Batch]:
        """This worker's microbatches of the next `rows_per_step` rows of all workers.

        Raises:
            ValueError: rows_per_step is not a multiple of rows_per_microbatch x world_size.
        """
        unit = self._rows_per_microbatch * self._world_size
        if rows_per_step < 1 or rows_per_step % unit:
            raise ValueError(
                f"rows_per_step={rows_per_step} must be a multiple of rows_per_microbatch="
                f"{self._rows_per_microbatch} x world_size={self._world_size} = {unit}"
            )
        rows: list[Row] = []
        epoch, row = self._state.epoch, self._state.row
        for index in range(rows_per_step):
            if index % self._world_size == self._rank:
                rows.append(self._row(epoch, row))
            row += 1
            if row == self._packer(epoch).num_rows:
                epoch, row = epoch + 1, 0
        self._state = LoaderState(epoch, row)
        size = self._rows_per_microbatch
        return [collate(rows[i : i + size]) for i in range(0, len(rows), size)]

    def _row(self, epoch: int, place: int) -> Row:
        packer = self._packer(epoch)
        if epoch not in self._orders:
            self._orders = {
                epoch: RowOrder(
                    packer.num_rows,
                    window=self.config.shuffle_rows,
                    seed=self.config.seed,
                    epoch=epoch,
                )
            }
        return packer.row(self._orders[epoch][place])

    def _seek(self, state: LoaderState) -> None:
        rows = self._packer(state.epoch).num_rows
        if not 0 <= state.row < rows:
            raise ValueError(
                f"loader state row={state.row} must be below {rows}, the rows of epoch "
                f"{state.epoch} of {self.shards.folder}: the state belongs to other data"
            )
        self._state = state

    def _packer(self, epoch: int) -> Packer:
        if epoch not in self._packers:
            order = DocumentOrder(self.shards, seed=self.config.seed, epoch=epoch)
            make = SplitPacker if self.config.packing == "split" else WholePacker
            self._packers[epoch] = make(
                order,
                context_length=self.config.context_length,
                pad_id=self.shards.manifest.tokenizer.pad_id,
            )
            if len(self._packers) > 2:
                self._packers.popitem(last=False)
        return self._packers[epoch]


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
