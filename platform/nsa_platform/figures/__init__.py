"""Figures, drawn without a display: of training runs, evaluations and servers.

Every function takes plain numbers and returns a matplotlib Figure; nothing here keeps state.
"""

from nsa_platform.figures.canvas import png
from nsa_platform.figures.evaluation import bars, needle_map, scores
from nsa_platform.figures.mechanism import attention_held, block_attention, quality_by_blocks
from nsa_platform.figures.serving import decode_arithmetic, decode_speeds, latencies, scaling
from nsa_platform.figures.sweep import compared_losses, compared_positions
from nsa_platform.figures.training import (
    Health,
    Points,
    efficiency,
    expert_load,
    gate_means,
    loss_by_position,
    loss_curve,
    selected_distance,
    selection_entropy,
    throughput,
)

__all__ = [
    "Health",
    "Points",
    "attention_held",
    "bars",
    "block_attention",
    "compared_losses",
    "compared_positions",
    "decode_arithmetic",
    "decode_speeds",
    "efficiency",
    "expert_load",
    "gate_means",
    "latencies",
    "loss_by_position",
    "loss_curve",
    "needle_map",
    "png",
    "quality_by_blocks",
    "scaling",
    "scores",
    "selected_distance",
    "selection_entropy",
    "throughput",
]
