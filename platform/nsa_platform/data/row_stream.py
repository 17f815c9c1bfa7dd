"""The rows of one shard set, epoch after epoch, in the order in which they are dealt."""

from collections import OrderedDict
from dataclasses import dataclass

from nsa_platform.config.data import LoaderConfig
from nsa_platform.data.packing import DocumentOrder, Packer, Row, SplitPacker, WholePacker
from nsa_platform.data.row_order import RowOrder
from nsa_platform.data.shards import ShardSet


@dataclass(frozen=True, slots=True)
class Place:
    """A row of an epoch, both from 0."""

    epoch: int = 0
    row: int = 0


class RowStream:
    """Rows of packed documents; any row can be read, the next one is a matter of counting.

    Raises:
        ValueError: the split is empty, or `place` is not in it.
        ShardError: a shard is missing or is not what the manifest says (also from row).
    """

    def __init__(self, shards: ShardSet, config: LoaderConfig, place: Place) -> None:
        if not shards.manifest.tokens:
            raise ValueError(f"{shards.folder}: holds no tokens; there is nothing to load")
        self.shards = shards
        self._config = config
        self._packers: OrderedDict[int, Packer] = OrderedDict()
        self._orders: dict[int, RowOrder] = {}
        rows = self._packer(place.epoch).num_rows
        if not 0 <= place.row < rows:
            raise ValueError(
                f"loader state row={place.row} must be below {rows}, the rows of epoch "
                f"{place.epoch} of {shards.folder}: the state belongs to other data"
            )
        self.place = place
        """Of the next row."""

    @property
    def packer(self) -> Packer:
        """The rows of the epoch in which the next row lies."""
        return self._packer(self.place.epoch)

    def advance(self) -> Place:
        """The place of the next row, which is dealt with that."""
        place = self.place
        is_last = place.row + 1 == self.packer.num_rows
        self.place = Place(place.epoch + 1) if is_last else Place(place.epoch, place.row + 1)
        return place

    def row(self, place: Place) -> Row:
        """The row at a place."""
        packer = self._packer(place.epoch)
        if place.epoch not in self._orders:
            self._orders = {
                place.epoch: RowOrder(
                    packer.num_rows,
                    window=self._config.shuffle_rows,
                    seed=self._config.seed,
                    epoch=place.epoch,
                )
            }
        return packer.row(self._orders[place.epoch][place.row])

    def _packer(self, epoch: int) -> Packer:
        if epoch not in self._packers:
            order = DocumentOrder(self.shards, seed=self._config.seed, epoch=epoch)
            make = SplitPacker if self._config.packing == "split" else WholePacker
            self._packers[epoch] = make(
                order,
                context_length=self._config.context_length,
                pad_id=self.shards.manifest.tokenizer.pad_id,
            )
            if len(self._packers) > 2:
                self._packers.popitem(last=False)
        return self._packers[epoch]
