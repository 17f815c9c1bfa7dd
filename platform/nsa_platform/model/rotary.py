"""Rotary position embedding, and YaRN's rescaling of it for longer contexts.

Channel c is paired with channel c + K/2. No tables are kept: the angles come from the positions
of the tokens at hand, in fp64, so that they are exact at a million tokens and so that a model
holds no buffers that a meta device would lose.
"""

import math
from dataclasses import dataclass
from typing import Any

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
        """Rotate x [..., T, heads, K]; the result is contiguous and has x's dtype."""
        cos, sin = self.cos[:, None], self.sin[:, None]
        if torch.compiler.is_compiling():
            return _turn(x, cos, sin).contiguous()
        turned = _Turn.apply(x, cos, sin)
        assert isinstance(turned, Tensor)
        return turned


def _turn(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """The formula, which a compiler makes one pass over x of, forward and backward."""
    first, second = x.to(cos.dtype).chunk(2, dim=-1)
    turned = torch.cat((first * cos - second * sin, second * cos + first * sin), dim=-1)
    return turned.to(x.dtype)


class _Turn(torch.autograd.Function):
    """The same without a compiler: four passes over half of x where the formula takes nine.

    The gradient is turned back by the same angles; nothing of x is kept for it.
    """

    @staticmethod
    def forward(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        return _turn_eagerly(x, cos, sin, direction=1)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Tensor, Tensor, Tensor], output: Tensor) -> None:
        ctx.save_for_backward(inputs[1], inputs[2])

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None]:
        return _turn_eagerly(grad, *ctx.saved_tensors, direction=-1), None, None


def _turn_eagerly(x: Tensor, cos: Tensor, sin: Tensor, *, direction: int) -> Tensor:
    """Each half in two operations; the second rounds to x's dtype and writes where it belongs."""
    turned = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    (first, second), half = x.chunk(2, dim=-1), x.shape[-1] // 2
    torch.addcmul(first * cos, second, sin, value=-direction, out=turned[..., :half])
    torch.addcmul(second * cos, first, sin, value=direction, out=turned[..., half:])
    return turned


def rotation_of(positions: Tensor, config: ModelConfig, *, dtype: torch.dtype) -> Rotation:
    """The rotation of integer positions [T] for queries and keys of this model.

    dtype is the model's compute type; the cosines are fp32 for everything below fp64.
    """
    frequencies = inverse_frequencies(config, device=positions.device)
    angles = positions.double()[:, None] * frequencies
    kept = torch.promote_types(dtype, torch.float32)
    return Rotation(angles.cos().to(kept), angles.sin().to(kept))


def inverse_frequencies(config: ModelConfig, *, device: torch.device) -> Tensor:
    """Radians per token of each pair of the channels that turn, fp64 [K / 2] where all do."""
    width = config.attention.rotary_width
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
        scale *= (config.yarn.attention_factor or 0.1 * math.log(config.yarn.factor) + 1) ** 2
    return scale
