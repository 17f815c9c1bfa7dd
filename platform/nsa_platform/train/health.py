"""What a probe saw, as metrics by layer and as figures that a person would look at."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING

from nsa_platform import figures
from nsa_platform.model.probe import LayerHealth

if TYPE_CHECKING:
    from matplotlib.figure import Figure


def health_metrics(health: Mapping[int, LayerHealth]) -> dict[str, float]:
    """nsa/gate_mean/<branch>/<layer>, nsa/selected_distance/<bucket>/<layer>,
    nsa/selected_blocks/<layer> and nsa/selection_entropy/<layer>.

    Bucket 0 is the share of selected blocks that are the query's own, bucket k the share at
    distances of [2^(k-1), 2^k) blocks.
    """
    metrics: dict[str, float] = {}
    for layer, seen in health.items():
        for branch, mean in seen.gate_mean.items():
            metrics[f"nsa/gate_mean/{branch}/{layer}"] = mean
        for bucket, share in enumerate(seen.selected_distance):
            metrics[f"nsa/selected_distance/{bucket}/{layer}"] = share
        if seen.selected_blocks is not None:
            metrics[f"nsa/selected_blocks/{layer}"] = seen.selected_blocks
        if seen.selection_entropy is not None:
            metrics[f"nsa/selection_entropy/{layer}"] = seen.selection_entropy
    return metrics


def health_values(health: Mapping[int, LayerHealth]) -> dict[int, dict[str, float]]:
    """Gate means by branch and `entropy` of each layer: one row of a history."""
    return {
        layer: dict(seen.gate_mean)
        | ({} if seen.selection_entropy is None else {"entropy": seen.selection_entropy})
        for layer, seen in health.items()
    }


def health_figures(
    history: figures.Health, latest: Mapping[int, LayerHealth], *, block_size: int | None
) -> dict[str, Figure]:
    """Figures by artifact path; none without gates, no selection for full attention.

    Args:
        history: (step, layer -> name -> value) of all validations so far.
        block_size: tokens of a selection block; None for full attention.
    """
    if not history or not latest:
        return {}
    drawn = {"figures/gate_means.png": figures.gate_means(history)}
    if any("entropy" in row for _, by_layer in history for row in by_layer.values()):
        drawn["figures/selection_entropy.png"] = figures.selection_entropy(history)
    shares = {layer: seen.selected_distance for layer, seen in latest.items()}
    if block_size is not None and any(shares.values()):
        width = max(len(share) for share in shares.values())
        padded = {layer: [*share, *[0.0] * (width - len(share))] for layer, share in shares.items()}
        drawn["figures/selected_distance.png"] = figures.selected_distance(
            padded, block_size=block_size
        )
    return drawn
