"""How evenly tokens come to the experts of each layer, as metrics and as a figure.

Loads are shares of the mean: 1 everywhere is even, an expert at 0 is idle.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from torch import Tensor

from nsa_platform import figures
from nsa_platform.config.model import MoeConfig

if TYPE_CHECKING:
    from matplotlib.figure import Figure


def relative_load(load: Tensor, moe: MoeConfig) -> dict[int, list[float]]:
    """Layer -> load of each of its experts over their mean; waits for the device.

    Args:
        load: int64 [layers with experts, experts], tokens that chose each.
    """
    rows = load.double() / load.double().mean(1, keepdim=True).clamp(min=1.0)
    return {moe.dense_layers + i: row for i, row in enumerate(rows.tolist())}


def balance_metrics(load: Tensor, moe: MoeConfig) -> dict[str, float]:
    """moe/load_max/<layer> and moe/load_min/<layer>: the fullest and the emptiest expert."""
    metrics: dict[str, float] = {}
    for layer, row in relative_load(load, moe).items():
        metrics[f"moe/load_max/{layer}"] = max(row)
        metrics[f"moe/load_min/{layer}"] = min(row)
    return metrics


def expert_metrics(load: Tensor, moe: MoeConfig) -> dict[str, float]:
    """moe/load/<layer>/<expert> of every expert."""
    return {
        f"moe/load/{layer}/{expert}": value
        for layer, row in relative_load(load, moe).items()
        for expert, value in enumerate(row)
    }


def expert_figures(load: Tensor, moe: MoeConfig) -> dict[str, Figure]:
    """Figures by artifact path."""
    return {"figures/expert_load.png": figures.expert_load(relative_load(load, moe))}
