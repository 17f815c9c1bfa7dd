"""The gated sum of the branches in Triton, forward and backward."""

import pytest
import torch

from nsa_kernels.triton_backend import mix_backward, mix_forward
from tests.kernels.cases import assert_close


def check(
    tokens: int, heads: int, width: int, dtype: torch.dtype, gate_dtype: torch.dtype, device: str
) -> None:
    generator = torch.Generator().manual_seed(0)

    def draw(*sizes: int) -> torch.Tensor:
        return torch.randn(*sizes, generator=generator, dtype=torch.float64)

    branches = [draw(tokens, heads, width).to(dtype).to(device) for _ in range(3)]
    gates = draw(tokens, heads, 3).sigmoid().to(gate_dtype).to(device)
    dout = draw(tokens, heads, width).to(dtype).to(device)
    exact = [t.double().cpu().requires_grad_(True) for t in (*branches, gates)]
    mixed = sum(exact[i] * exact[3][..., i : i + 1] for i in range(3))
    assert isinstance(mixed, torch.Tensor)
    out_cmp, out_slc, out_win = branches
    assert_close(mix_forward(out_cmp, out_slc, out_win, gates), mixed, "out")
    # Rows without a key, and closed gates.
    lse_cmp, lse_slc, lse_win = draw(3, tokens, heads).float().to(device)
    lse_cmp[::5] = float("-inf")
    lses = (lse_cmp, lse_slc, lse_win)
    gates[::3] = 0.0
    dgates, gated, deltas = mix_backward(dout, (out_cmp, out_slc, out_win), lses, gates)
    wanted = torch.autograd.grad(mixed, exact, dout.double().cpu())
    assert_close(dgates, wanted[3], "dgates")
    for branch in range(3):
        exact_lse = lses[branch].double().cpu() - gates[..., branch].double().cpu().log()
        exact_lse[exact_lse.isnan()] = float("inf")
        assert_close(gated[branch], exact_lse, f"lse of branch {branch}")
        delta = (dout.double().cpu() * exact[branch].detach()).sum(-1)
        assert_close(deltas[branch], delta, f"delta of branch {branch}")


@pytest.mark.parametrize("shape", [(1, 1, 16), (47, 3, 48), (33, 4, 128), (0, 4, 64)])
def test_interpreted(shape: tuple[int, int, int]) -> None:
    if torch.cuda.is_available():
        pytest.skip("kernels imported for the GPU do not run in the interpreter")
    check(*shape, torch.float32, torch.float32, "cpu")


@pytest.mark.gpu
@pytest.mark.parametrize("gate_dtype", [torch.float32, None], ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("shape", [(1, 1, 64), (1001, 6, 192), (2048, 64, 128), (300, 4, 256)])
def test_compiled(
    shape: tuple[int, int, int], dtype: torch.dtype, gate_dtype: torch.dtype | None, device: str
) -> None:
    check(*shape, dtype, gate_dtype or dtype, device)
