"""Inputs, configurations and tolerances that the kernels' tests share.

Values are drawn on the CPU in float64 and rounded to the wanted dtype once, so that every backend,
device and the float64 reference (Inputs.double) see the same numbers.
"""

from dataclasses import dataclass, fields, replace
from itertools import accumulate
from typing import Literal, Self

import torch
from torch import Tensor

from nsa_kernels.shapes import NsaConfig, num_compressed_blocks

PAPER = NsaConfig()
SMALL = NsaConfig(
    compression_block_size=8,
    compression_stride=4,
    selection_block_size=16,
    num_selected_blocks=4,
    num_initial_blocks=1,
    num_local_blocks=2,
    window_size=24,
)
EQUAL_BLOCKS = NsaConfig(
    compression_block_size=16,
    compression_stride=16,
    selection_block_size=16,
    num_selected_blocks=3,
    num_initial_blocks=0,
    num_local_blocks=1,
    window_size=7,
)
DENSE_STRIDE = NsaConfig(
    compression_block_size=16,
    compression_stride=4,
    selection_block_size=16,
    num_selected_blocks=3,
    num_initial_blocks=1,
    num_local_blocks=1,
    window_size=33,
)
CONFIGS = {"small": SMALL, "equal_blocks": EQUAL_BLOCKS, "dense_stride": DENSE_STRIDE}


@dataclass(frozen=True)
class Target:
    """A backend and the device it runs on."""

    backend: Literal["torch", "triton"]
    device: str

    @property
    def is_interpreted(self) -> bool:
        """Triton without a GPU: a tile operation takes a millisecond or two."""
        return self.backend == "triton" and self.device == "cpu"


@dataclass
class Inputs:
    """Every tensor that nsa_attention takes, for one packed batch."""

    q: Tensor
    k_cmp: Tensor
    v_cmp: Tensor
    k_slc: Tensor
    v_slc: Tensor
    k_win: Tensor
    v_win: Tensor
    gates: Tensor
    cu_seqlens: Tensor
    config: NsaConfig

    @property
    def tensors(self) -> tuple[Tensor, ...]:
        """The differentiable inputs of nsa_attention, in its order."""
        return (
            self.q, self.k_cmp, self.v_cmp, self.k_slc,
            self.v_slc, self.k_win, self.v_win, self.gates,
        )  # fmt: skip

    def double(self) -> Self:
        """The same values in float64 on the CPU: what the reference is asked about."""
        cast = {
            f.name: value.detach().cpu().double()
            for f in fields(self)
            if isinstance(value := getattr(self, f.name), Tensor) and value.is_floating_point()
        }
        return replace(self, **cast, cu_seqlens=self.cu_seqlens.cpu())

    def require_grad(self) -> Self:
        """Ask for gradients of every differentiable input; returns self."""
        for tensor in self.tensors:
            tensor.requires_grad_(True)
        return self


def offsets(lengths: list[int], device: str = "cpu") -> Tensor:
    """cu_seqlens (int32) of sequences of these lengths."""
    return torch.tensor([0, *accumulate(lengths)], dtype=torch.int32, device=device)


def make_inputs(
    lengths: list[int],
    *,
    config: NsaConfig = SMALL,
    groups: int = 2,
    heads_per_group: int = 2,
    key_width: int = 16,
    value_width: int = 16,
    dtype: torch.dtype = torch.float32,
    device: str = "cpu",
    seed: int = 0,
    spare_blocks: int = 0,
) -> Inputs:
    """Normal values; compressed keys are drawn, not computed: no op cares where they came from.

    spare_blocks adds rows behind the last compressed block, filled with NaN: no op may read them.
    """
    generator = torch.Generator().manual_seed(seed)
    tokens = sum(lengths)
    blocks = sum(num_compressed_blocks(length, config) for length in lengths)
    heads = groups * heads_per_group

    def draw(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator, dtype=torch.float64)

    def place(value: Tensor) -> Tensor:
        return value.to(dtype).to(device)

    spare = torch.full((spare_blocks, groups, 1), float("nan"), dtype=torch.float64)
    return Inputs(
        q=place(draw(tokens, heads, key_width)),
        k_cmp=place(torch.cat([draw(blocks, groups, key_width), spare.expand(-1, -1, key_width)])),
        v_cmp=place(
            torch.cat([draw(blocks, groups, value_width), spare.expand(-1, -1, value_width)])
        ),
        k_slc=place(draw(tokens, groups, key_width)),
        v_slc=place(draw(tokens, groups, value_width)),
        k_win=place(draw(tokens, groups, key_width)),
        v_win=place(draw(tokens, groups, value_width)),
        gates=place(draw(tokens, heads, 3).sigmoid()),
        cu_seqlens=offsets(lengths, device),
        config=config,
    )


# Relative to the largest entry of the reference: fp32 kernels differ from fp64 by summation order
# and exp; 16-bit outputs carry one rounding of the result and of the probabilities fed to the dots.
TOLERANCE = {
    torch.float64: 1e-10,
    torch.float32: 2e-5,
    torch.float16: 4e-3,
    torch.bfloat16: 3e-2,
}


def assert_close(actual: Tensor, expected: Tensor, name: str, *, slack: float = 1.0) -> None:
    """Compare with float64 truth within TOLERANCE of actual's dtype; infinities must agree."""
    assert actual.shape == expected.shape, f"{name}: {actual.shape} != {expected.shape}"
    got, want = actual.detach().cpu().double(), expected.detach().cpu().double()
    assert not got.isnan().any(), f"{name}: NaN"
    infinite = want.isinf()
    assert torch.equal(got.isinf(), infinite), f"{name}: infinities differ"
    assert torch.equal(got[infinite], want[infinite]), f"{name}: infinities differ in sign"
    if got[~infinite].numel() == 0:
        return
    scale = max(want[~infinite].abs().max().item(), 1.0)
    error = (got - want)[~infinite].abs().max().item() / scale
    allowed = TOLERANCE[actual.dtype] * slack
    assert error <= allowed, f"{name}: error {error:.3g} exceeds {allowed:.3g}"
