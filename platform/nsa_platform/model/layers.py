"""SwiGLU, the dense feed-forward of a layer."""

from torch import Tensor, nn


class SwiGlu(nn.Module):
    """down(silu(gate(x)) * up(x)), with gate and up as one projection."""

    def __init__(self, width: int, hidden_width: int) -> None:
        super().__init__()
        self.gate_up = nn.Linear(width, 2 * hidden_width, bias=False)
        self.down = nn.Linear(hidden_width, width, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        """x [T, D] -> [T, D]."""
        gate, up = self.gate_up(x).chunk(2, dim=-1)
        return self.down(nn.functional.silu(gate) * up)
