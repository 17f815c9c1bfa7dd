"""Rotary position embedding, and YaRN's rescaling of it for longer contexts.

Channel c is paired with channel c + K/2. No tables are kept: the angles come from the positions
of the tokens at hand, in fp64, so that they are exact at a million tokens and so that a model
holds no buffers that a meta device would lose.
"""

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from nsa_platform.config.model import ModelConfig, YarnConfig


@dataclass(frozen=True, slots=True)
class Rotation:
    """Cosines and sines of the angles of some positions."""

    cos: Tensor
    """fp32 (fp64 for an fp64 model) [T, K / 2]"""
    sin: Tensor
    """fp32 (fp64 for an fp64 model) [T, K / 2]"""

    def apply(self, x: Tensor) -> Tensor:
        """Rotate x [T, heads, K]; the result has x's dtype."""
        cos, sin = self.cos[:, None], self.sin[:, None]
        first, second = x.to(cos.dtype).chunk(2, dim=-1)
        turned = torch.cat((first * cos - second * sin, second * cos + first * sin), dim=-1)
        return turned.to(x.dtype)


def rotation_of(positions: Tensor, config: ModelConfig, *, dtype: torch.dtype) -> Rotation:
    """The rotation of integer positions [T] for queries and keys of this model.

    dtype is the model's compute type; the cosines are fp32 for everything below fp64.
    """
    frequencies = inverse_frequencies(config, device=positions.device)
    angles = positions.double()[:, None] * frequencies
    kept = torch.promote_types(dtype, torch.float32)
    return Rotation(angles.cos().to(kept), angles.sin().to(kept))


def inverse_frequencies(config: ModelConfig, *, device: torch.device) -> Tensor:
    """Radians per token of each channel pair, fp64 [K / 2]."""
    width = config.attention.key_width
    exponents = torch.arange(0, width, 2, dtype=torch.float64, device=device) / width
    frequencies = config.rope_base**-exponents
    return frequencies if config.yarn is None else _stretch(frequencies, config.yarn)


def _stretch(frequencies: Tensor, yarn: YarnConfig) -> Tensor:
    """YaRN's "NTK by parts": fast pairs stay, slow pairs are interpolated, between is a ramp.

    Source: arXiv 2309.00071, section 3.2, the ramp gamma over r = L / wavelength.
    """
    turns = yarn.original_context * frequencies / (2 * math.pi)
    stays = ((turns - yarn.beta_slow) / (yarn.beta_fast - yarn.beta_slow)).clamp(0, 1)
    return frequencies * (stays + (1 - stays) / yarn.factor)


def attention_scale(config: ModelConfig) -> float:
    """Factor of the attention logits: 1 / sqrt(K), and YaRN's temperature when it is on.

    Source: arXiv 2309.00071, section 3.3: sqrt(1/t) = 0.1 ln(s) + 1 on queries and on keys.
    """
    scale = config.attention.key_width**-0.5
    if config.yarn is not None:
        scale *= (0.1 * math.log(config.yarn.factor) + 1) ** 2
    return scale
