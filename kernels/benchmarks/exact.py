"""Single rows of the whole op in float64, at lengths where nothing else could say what is right."""

import torch
from torch import Tensor

from benchmarks.workloads import Tensors
from nsa_kernels import NsaConfig


def exact_row(tensors: Tensors, t: int, config: NsaConfig) -> Tensor:
    """nsa_attention's row t of one sequence, float64 [H, V], with a choice of blocks of its own."""
    size, stride = config.compression_block_size, config.compression_stride
    block_size = config.selection_block_size
    q, gates = tensors.q[t].double(), tensors.gates[t].double()
    groups = tensors.k_slc.shape[1]
    q = q.unflatten(0, (groups, -1))  # [G, R, K]

    visible = max(0, (t + 1 - size) // stride + 1)
    out_cmp, p = _attend(q, tensors.k_cmp[:visible], tensors.v_cmp[:visible])
    candidates = t // block_size + 1
    importance = torch.zeros(groups, candidates, dtype=torch.float64, device=q.device)
    starts = torch.arange(visible, device=q.device) * stride
    for offset in range(0, size, stride):
        importance.index_add_(1, (starts + offset) // block_size, p.sum(1))
    importance = importance.float()
    importance[:, : config.num_initial_blocks] = torch.inf
    importance[:, max(0, candidates - config.num_local_blocks) :] = torch.inf
    # A stable sort gives ties to the lower block.
    ranked = importance.sort(dim=-1, descending=True, stable=True).indices
    chosen = ranked[:, : config.num_selected_blocks]

    in_block = torch.arange(block_size, device=q.device)
    out_slc = []
    for group in range(groups):
        tokens = (chosen[group, :, None] * block_size + in_block).flatten()
        tokens = tokens[tokens <= t]
        k, v = (x[tokens, group, None] for x in (tensors.k_slc, tensors.v_slc))
        out_slc.append(_attend(q[group, None], k, v)[0])
    window = slice(max(0, t + 1 - config.window_size), t + 1)
    out_win, _ = _attend(q, tensors.k_win[window], tensors.v_win[window])
    gate_cmp, gate_slc, gate_win = gates[..., None].unbind(1)
    return gate_cmp * out_cmp + gate_slc * torch.cat(out_slc) + gate_win * out_win


def _attend(q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
    """q [G, R, K] over k [S, G, K] and v [S, G, V]: out [G * R, V], probabilities [G, R, S]."""
    scores = torch.einsum("grk,sgk->grs", q, k.double()) * q.shape[-1] ** -0.5
    p = scores.softmax(-1)
    return torch.einsum("grs,sgv->grv", p, v.double()).flatten(0, 1), p


def spot_error(out: Tensor, tensors: Tensors, config: NsaConfig, rows: list[int]) -> float:
    """Relative L2 error of some rows of the whole op's output."""
    exact = torch.stack([exact_row(tensors, t, config) for t in rows])
    return float((out[rows].double() - exact).norm() / exact.norm())
