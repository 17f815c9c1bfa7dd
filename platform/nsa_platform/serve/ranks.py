"""The ranks that compute one model together: how they meet, and how the first tells its steps.

The first rank schedules, samples and answers; the others have the same pages and compute their
share of what it computes. A step is told once: its shape in a small message between hosts, its
tokens and page tables from device to device. Within a step only layers send each other sums.
"""

from dataclasses import dataclass
from datetime import timedelta
from enum import IntEnum
from itertools import accumulate
from typing import Self

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed import TCPStore  # pyright: ignore[reportPrivateImportUsage]

from nsa_platform.model.cache import LayerCache
from nsa_platform.model.exchange import heads_of_kin, total
from nsa_platform.model.inputs import Observed, PagedInputs
from nsa_platform.model.partition import Axis

MEETING_TIMEOUT = timedelta(minutes=10)
"""For all ranks to be there, and for one message between devices."""
IDLE_TIMEOUT = timedelta(days=365)
"""Between two steps: a server may be without work for as long as it likes."""


def open_meeting(host: str) -> TCPStore:
    """Where ranks find each other, on a free port of the first one's host; that one holds it."""
    return TCPStore(host, 0, is_master=True, wait_for_workers=False)


def find_meeting(host: str, port: int) -> TCPStore:
    """The same for all other ranks."""
    return TCPStore(host, port, is_master=False, timeout=MEETING_TIMEOUT)


class StepKind(IntEnum):
    """What the first rank tells the others to do."""

    END = 0
    FORWARD = 1
    OBSERVED = 2
    """A forward pass of which is kept what the layers do."""
    DECODE = 3
    """One token for each sequence, through a captured shape if there is one."""


@dataclass(frozen=True, slots=True)
class Told:
    """A step, as it came from the first rank."""

    kind: StepKind
    ids: Tensor
    inputs: PagedInputs


@dataclass(frozen=True, slots=True)
class Ranks:
    """This rank among those of one model."""

    axis: Axis
    device: torch.device
    hosts: dist.ProcessGroup

    @classmethod
    def meet(cls, store: TCPStore, *, rank: int, size: int, device: torch.device | str) -> Self:
        """Wait until all ranks are there. A process belongs to one group at a time.

        Raises:
            RuntimeError: they do not come within MEETING_TIMEOUT.
        """
        device = torch.device(device)
        backend = "cpu:gloo,cuda:nccl" if device.type == "cuda" else "gloo"
        dist.init_process_group(
            backend, store=store, rank=rank, world_size=size, timeout=MEETING_TIMEOUT
        )
        hosts = dist.new_group(backend="gloo", timeout=IDLE_TIMEOUT)
        whole = dist.group.WORLD
        assert isinstance(whole, dist.ProcessGroup) and isinstance(hosts, dist.ProcessGroup)
        return cls(Axis(rank, size, whole.group_name), device, hosts)

    def part(self) -> None:
        """Leave: whoever waits for this rank gets an error at once."""
        dist.destroy_process_group()

    def least(self, value: int) -> int:
        """The least value of all ranks."""
        values = torch.tensor(value)
        dist.all_reduce(values, dist.ReduceOp.MIN, group=self.hosts)
        return int(values)

    def tell(self, kind: StepKind, ids: Tensor, inputs: PagedInputs) -> None:
        """Have the other ranks compute a step, int64 ids [T]; for the first rank."""
        parts = _parts(ids, inputs)
        shape = (len(ids), *inputs.page_table.shape, int(inputs.window_page_table is not None))
        dist.broadcast(torch.tensor((kind, *shape)), src=0, group=self.hosts)
        dist.broadcast(torch.cat([part.flatten().int() for part in parts]), src=0)

    def end(self) -> None:
        """Let the other ranks go; for the first rank."""
        dist.broadcast(torch.tensor((StepKind.END, 0, 0, 0, 0)), src=0, group=self.hosts)

    def receive(self, caches: list[LayerCache]) -> Told | None:
        """Wait for the next step of the first rank; None: there will be none."""
        header = torch.zeros(5, dtype=torch.int64)
        dist.broadcast(header, src=0, group=self.hosts)
        kind, num_tokens, num_sequences, num_pages, has_window = header.tolist()
        if kind == StepKind.END:
            return None
        table = (num_sequences, num_pages)
        shapes = [(num_tokens,), (num_tokens,), (num_sequences + 1,), (num_sequences,)]
        shapes += [(num_sequences,), table, *[table] * has_window]
        counts = [torch.Size(shape).numel() for shape in shapes]
        packed = torch.empty(sum(counts), dtype=torch.int32, device=self.device)
        dist.broadcast(packed, src=0)
        # Each at an address of its own: kernels are compiled for aligned ones.
        ids, positions, cu_seqlens, context_lens, shared_lens, *tables = (
            packed[end - count : end].clone().view(shape)
            for end, count, shape in zip(accumulate(counts), counts, shapes, strict=True)
        )
        inputs = PagedInputs(
            positions=positions,
            cu_seqlens=cu_seqlens,
            context_lens=context_lens,
            page_table=tables[0],
            window_page_table=tables[1] if has_window else None,
            shared_lens=shared_lens,
            caches=caches,
            observed=Observed() if kind == StepKind.OBSERVED else None,
        )
        return Told(StepKind(kind), ids.long(), inputs)

    def whole(self, observed: Observed) -> None:
        """Put together what the ranks have observed, each of its own heads; every rank calls it."""
        observed.selected[:] = [heads_of_kin(blocks, self.axis) for blocks in observed.selected]
        observed.gate_means[:] = [
            total(means, self.axis) / self.axis.size for means in observed.gate_means
        ]


def _parts(ids: Tensor, inputs: PagedInputs) -> list[Tensor]:
    """All that is told of a step, in the order in which `receive` takes it."""
    window = inputs.window_page_table
    return [
        ids,
        inputs.positions,
        inputs.cu_seqlens,
        inputs.context_lens,
        inputs.shared_lens,
        inputs.page_table,
        *([] if window is None else [window]),
    ]
