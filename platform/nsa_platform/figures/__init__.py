"""Figures, drawn without a display: of training runs, evaluations and servers.

Every function takes plain numbers and returns a matplotlib Figure; nothing here keeps state.
matplotlib is imported when the first figure is drawn: most processes draw none.
"""

from functools import cache
from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from nsa_platform.figures.canvas import png
    from nsa_platform.figures.evaluation import bars, needle_map, needle_maps, scores
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
    "needle_maps",
    "png",
    "quality_by_blocks",
    "scaling",
    "scores",
    "selected_distance",
    "selection_entropy",
    "throughput",
]

_HOMES = ("canvas", "evaluation", "mechanism", "serving", "sweep", "training")


@cache
def _load() -> dict[str, Any]:
    homes = [vars(import_module(f"{__name__}.{home}")) for home in _HOMES]
    return {name: next(home[name] for home in homes if name in home) for name in __all__}


def __getattr__(name: str) -> Any:
    if name not in __all__:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return _load()[name]
