"""Tables that compare policies, for the console and for report.md."""

from collections.abc import Mapping, Sequence
from typing import Any

Table = tuple[Sequence[str], Sequence[Sequence[str]]]
"""Heads of the columns, and rows."""

NEEDLES = {
    "needle_exact": "numbers exact (95 %)",
    "needle_tokens": "tokens of the numbers (95 %)",
}
NOTHING = "-"


def policy_tables(policies: Mapping[str, Any]) -> list[Table]:
    """Text and needles, a row for each policy; tasks, a row for each cell and policy. There is no
    table, and no column, of what was not measured.

    policies: results by name, as baselines_summary gives them.
    """
    tables: list[Table] = []
    if any("bits_per_byte" in each or "needle_exact" in each for each in policies.values()):
        head = ("policy", "bits per byte", *NEEDLES.values(), "keys per query (text)")
        tables.append(_measured(head, [(name, *_row(each)) for name, each in policies.items()]))
    cells = dict.fromkeys(
        key for each in policies.values() for key in each["intervals"] if key not in NEEDLES
    )
    if cells:
        head = ("task", "cell", "policy", "score", "95 % interval")
        rows = [
            (*key.split("/", 1), name, *_score(each, key))
            for key in cells
            for name, each in policies.items()
        ]
        tables.append((head, rows))
    return tables


def _measured(head: Sequence[str], rows: Sequence[Sequence[str]]) -> Table:
    """The columns in which there is something."""
    columns = [at for at in range(len(head)) if any(row[at] != NOTHING for row in rows)]
    return [head[at] for at in columns], [[row[at] for at in columns] for row in rows]


def _row(policy: Mapping[str, Any]) -> list[str]:
    bits = policy.get("bits_per_byte")
    keys = [each["count"]["keys_per_query"] for each in policy["reads"] if each["task"] == "text"]
    return [
        NOTHING if bits is None else f"{bits:.3f}",
        *(_share(policy, key) for key in NEEDLES),
        f"{keys[0]:.1f}" if keys else NOTHING,
    ]


def _share(policy: Mapping[str, Any], key: str) -> str:
    if key not in policy:
        return NOTHING
    low, high = policy["intervals"][key]
    return f"{policy[key]:.0%} ({low * 100:.0f} to {high * 100:.0f})"


def _score(policy: Mapping[str, Any], key: str) -> tuple[str, str]:
    low, high = policy["intervals"][key]
    return f"{policy[key]:.3f}", f"{low:.3f} to {high:.3f}"
