"""Single rows of an op in float64, at lengths where nothing else could say what is right."""

import torch
from torch import Tensor

from benchmarks.workloads import Tensors
from nsa_kernels import NsaConfig

# Where the last chosen block and the first that was not are this close, rounding may swap them.
TIE = 1e-4


def whole_row(tensors: Tensors, t: int, config: NsaConfig) -> Tensor | None:
    """nsa_attention's row t of one sequence, float64 [H, V], with a choice of blocks of its own.

    None where that choice is a tie but for rounding.
    """
    size, stride = config.compression_block_size, config.compression_stride
    gates = tensors.gates[t].double()
    q = _grouped_query(tensors, t)
    visible = max(0, (t + 1 - size) // stride + 1)
    out_cmp, p = _attend(q, tensors.k_cmp[:visible], tensors.v_cmp[:visible])

    candidates = t // config.selection_block_size + 1
    importance = torch.zeros(len(q), candidates, dtype=torch.float64, device=q.device)
    starts = torch.arange(visible, device=q.device) * stride
    for offset in range(0, size, stride):
        importance.index_add_(1, (starts + offset) // config.selection_block_size, p.sum(1))
    importance = importance.float()
    importance[:, : config.num_initial_blocks] = torch.inf
    importance[:, max(0, candidates - config.num_local_blocks) :] = torch.inf
    # A stable sort gives ties to the lower block.
    value, ranked = importance.sort(dim=-1, descending=True, stable=True)
    n = config.num_selected_blocks
    if candidates > n and bool((value[:, n] > (1 - TIE) * value[:, n - 1]).any()):
        return None
    out_slc = _selected(q, tensors, ranked[:, :n], t, config)

    window = slice(max(0, t + 1 - config.window_size), t + 1)
    out_win, _ = _attend(q, tensors.k_win[window], tensors.v_win[window])
    gate_cmp, gate_slc, gate_win = gates[..., None].unbind(1)
    return gate_cmp * out_cmp + gate_slc * out_slc + gate_win * out_win


def selected_row(tensors: Tensors, t: int, config: NsaConfig) -> Tensor:
    """selected_attention's row t over the given blocks, float64 [H, V]."""
    return _selected(_grouped_query(tensors, t), tensors, tensors.blocks[t].long(), t, config)


ROWS = {"nsa": whole_row, "selected": selected_row}


def spot_error(op: str, out: Tensor, tensors: Tensors, config: NsaConfig, rows: list[int]) -> float:
    """Relative L2 error of some rows of an op's output; op is nsa or selected."""
    found = {t: row for t in rows if (row := ROWS[op](tensors, t, config)) is not None}
    exact = torch.stack(list(found.values()))
    return float((out[list(found)].double() - exact).norm() / exact.norm())


def _grouped_query(tensors: Tensors, t: int) -> Tensor:
    """q of token t, float64 [G, R, K]."""
    return tensors.q[t].double().unflatten(0, (tensors.k_slc.shape[1], -1))


def _selected(q: Tensor, tensors: Tensors, chosen: Tensor, t: int, config: NsaConfig) -> Tensor:
    """Attention of q [G, R, K] over the blocks chosen [G, n], -1 where there is none: [H, V]."""
    in_block = torch.arange(config.selection_block_size, device=q.device)
    out = []
    for group, blocks in enumerate(chosen):
        tokens = (blocks[blocks >= 0, None] * config.selection_block_size + in_block).flatten()
        tokens = tokens[tokens <= t]
        k, v = (x[tokens, group, None] for x in (tensors.k_slc, tensors.v_slc))
        out.append(_attend(q[group, None], k, v)[0])
    return torch.cat(out)


def _attend(q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
    """q [G, R, K] over k [S, G, K] and v [S, G, V]: out [G * R, V], probabilities [G, R, S]."""
    scores = torch.einsum("grk,sgk->grs", q, k.double()) * q.shape[-1] ** -0.5
    p = scores.softmax(-1)
    return torch.einsum("grs,sgv->grv", p, v.double()).flatten(0, 1), p
