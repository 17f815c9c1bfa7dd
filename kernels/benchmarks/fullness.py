"""How full the op's kernels keep the multiprocessors: a section of RESULTS.md, from the records of
occupancy.py."""

import re
from dataclasses import dataclass
from typing import Any

Record = dict[str, Any]

OTHERS = "all others"
LEAST_SHARE = 0.01
"""Of the time: what takes less is one of the others, as are all kernels of torch."""


@dataclass(frozen=True, slots=True)
class Kernel:
    """One kernel of a pass, or all small ones together."""

    name: str
    share: float
    """Of the pass's time."""
    occupancy: float
    """Share of the warps that a multiprocessor can hold."""
    registers: int
    """Of a thread."""
    shared_bytes: int
    """Of a block."""


@dataclass(frozen=True, slots=True)
class Pass:
    """Forward or backward of one workload."""

    workload: str
    direction: str
    ms: float
    """Of all kernels."""
    occupancy: float
    products: float
    """Share of the time that the least products would take at the rate of one large one."""
    kernels: list[Kernel]
    """The longest first, the others last."""

    @property
    def name(self) -> str:
        return f"{self.workload} {self.direction}"


def passes_of(records: list[Record]) -> list[Pass]:
    """Forward and backward passes in the order in which they ran."""
    values = {record["name"]: record["value"] for record in records}
    passes = dict.fromkeys(
        tuple(record["name"].split("/")[:2]) for record in records if "/occupancy" in record["name"]
    )
    return [
        Pass(
            *found,
            ms=values["/".join((*found, "time"))],
            occupancy=values["/".join((*found, "occupancy"))],
            products=values["/".join((*found, "products"))],
            kernels=_kernels(records, "/".join((*found, "kernel", ""))),
        )
        for found in passes
    ]


def section(records: list[Record]) -> list[str]:
    """Lines of the page; none without records."""
    if not records:
        return []
    stamp = records[0]
    versions = ", ".join(f"{name} {version}" for name, version in stamp["versions"].items())
    lines = [
        "",
        "## How full the multiprocessors are",
        "",
        "Occupancy: warps on a multiprocessor over those that it can hold, by registers, shared",
        "memory and grid of each launch, weighted by time. Products: what the least products take",
        "at the rate of one large one in the same run, over the time of all kernels.",
        f"{stamp['device']}; {versions}; commit {stamp['commit']}; {stamp['date']}; blocks as in a",
        "trained model.",
        "Reproduce: `python kernels/benchmarks/occupancy.py`.",
    ]
    for each in passes_of(records):
        title = (
            f"**{each.name}**: {each.ms:.2f} ms, occupancy {each.occupancy:.0%}, "
            f"products {each.products:.0%}"
        )
        lines += ["", title, "", "| kernel | time | occupancy | registers | shared memory |"]
        lines += ["|---|---|---|---|---|", *map(_row, each.kernels)]
    return lines


def _row(kernel: Kernel) -> str:
    cells = [f"`{kernel.name}`", f"{kernel.share:.0%}", f"{kernel.occupancy:.0%}"]
    if kernel.name == OTHERS:
        cells = [OTHERS, *cells[1:], "", ""]
    else:
        cells += [str(kernel.registers), f"{kernel.shared_bytes / 1024:.0f} KiB"]
    return f"| {' | '.join(cells)} |"


def _kernels(records: list[Record], prefix: str) -> list[Kernel]:
    found = [record for record in records if record["name"].startswith(prefix)]
    total = sum(record["us"] for record in found)
    named, others = [], []
    for record in found:
        name = record["name"].removeprefix(prefix)
        is_ours = re.fullmatch(r"\w+", name) is not None and record["us"] >= LEAST_SHARE * total
        (named if is_ours else others).append((name, record))
    kernels = [
        Kernel(
            name,
            record["us"] / total,
            record["value"],
            record["registers"],
            record["shared_bytes"],
        )
        for name, record in sorted(named, key=lambda each: -each[1]["us"])
    ]
    if us := sum(record["us"] for _, record in others):
        mean = sum(record["us"] * record["value"] for _, record in others) / us
        kernels.append(Kernel(OTHERS, us / total, mean, 0, 0))
    return kernels
