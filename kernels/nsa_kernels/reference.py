"""Every op in plain torch, as the paper writes it: slow, clear, and the judge of all others.

Same names, arguments and results as the public ops (without `backend`), masks and sums written out,
gradients by autograd. Computes in float32, or in float64 when given float64. Letters and the
numbering of the equations are those of kernels/README.md; every index counts from 0.
"""

import torch
from torch import Tensor

from nsa_kernels.checks import accumulation_dtype
from nsa_kernels.shapes import NsaConfig, num_compressed_blocks


def _lengths(cu_seqlens: Tensor | None, num_tokens: int) -> list[int]:
    return [num_tokens] if cu_seqlens is None else cu_seqlens.diff().tolist()


def _numbered(lengths: list[int], device: torch.device) -> tuple[Tensor, Tensor]:
    """For packed items, the sequence that each belongs to and its number within it."""
    sequence = [b for b, length in enumerate(lengths) for _ in range(length)]
    number = [i for length in lengths for i in range(length)]
    return torch.tensor(sequence, device=device).long(), torch.tensor(number, device=device).long()


def _attend(
    q: Tensor, k: Tensor, v: Tensor, visible: Tensor, scale: float | None
) -> tuple[Tensor, Tensor]:
    """Softmax attention (Eq. 1-2) under an explicit mask.

    Args:
        q: [T, H, K].
        k: [S, G, K].
        v: [S, G, V].
        visible: bool [T, S] or [T, G, S]; a query that sees nothing gets 0 and lse -inf.
    """
    dtype = accumulation_dtype(q.dtype)
    heads, groups = q.shape[1], k.shape[1]
    keys = k.to(dtype).repeat_interleave(heads // groups, dim=1)
    values = v.to(dtype).repeat_interleave(heads // groups, dim=1)
    if visible.dim() == 2:
        visible = visible[:, None].expand(-1, groups, -1)
    visible = visible.repeat_interleave(heads // groups, dim=1)  # [T, H, S]
    logits = torch.einsum("thk,shk->ths", q.to(dtype), keys)
    logits = logits * (q.shape[2] ** -0.5 if scale is None else scale)
    logits = logits.masked_fill(~visible, -torch.inf)
    sees_any = visible.any(-1)
    lse = logits.masked_fill(~sees_any[..., None], 0.0).logsumexp(-1)
    lse = lse.masked_fill(~sees_any, -torch.inf)
    weights = (logits - lse.masked_fill(~sees_any, 0.0)[..., None]).exp()
    return torch.einsum("ths,shv->thv", weights, values).to(q.dtype), lse


def full_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    cu_seqlens: Tensor | None = None,
    scale: float | None = None,
) -> Tensor:
    """Eq. 1-2: every token of the sequence up to the query's own."""
    sequence, t = _numbered(_lengths(cu_seqlens, q.shape[0]), q.device)
    visible = (sequence[:, None] == sequence) & (t <= t[:, None])
    return _attend(q, k, v, visible, scale)[0]


def sliding_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    config: NsaConfig,
    cu_seqlens: Tensor | None = None,
    scale: float | None = None,
) -> tuple[Tensor, Tensor]:
    """Section 3.3.3: positions s with t - w < s <= t."""
    sequence, t = _numbered(_lengths(cu_seqlens, q.shape[0]), q.device)
    in_window = (t <= t[:, None]) & (t > t[:, None] - config.window_size)
    return _attend(q, k, v, (sequence[:, None] == sequence) & in_window, scale)


def _visible_compressed(
    cu_seqlens: Tensor | None, num_tokens: int, config: NsaConfig, device: torch.device
) -> Tensor:
    """bool [T, C]: compressed block i is complete at t iff its last token i*d + l - 1 <= t."""
    lengths = _lengths(cu_seqlens, num_tokens)
    sequence, t = _numbered(lengths, device)
    counts = [num_compressed_blocks(length, config) for length in lengths]
    block_sequence, i = _numbered(counts, device)
    last_token = i * config.compression_stride + config.compression_block_size - 1
    return (sequence[:, None] == block_sequence) & (last_token <= t[:, None])


def compressed_attention(
    q: Tensor,
    k_cmp: Tensor,
    v_cmp: Tensor,
    *,
    config: NsaConfig,
    cu_seqlens: Tensor | None = None,
    scale: float | None = None,
) -> tuple[Tensor, Tensor]:
    """Eq. 7: every compressed block that is complete."""
    visible = _visible_compressed(cu_seqlens, q.shape[0], config, q.device)
    blocks = visible.shape[1]
    return _attend(q, k_cmp[:blocks], v_cmp[:blocks], visible, scale)


def overlap_tokens(i: int, j: int, config: NsaConfig) -> int:
    """Tokens that compressed block i = [i*d, i*d + l) shares with block j = [j*l', (j+1)*l')."""
    start = max(i * config.compression_stride, j * config.selection_block_size)
    stop = min(
        i * config.compression_stride + config.compression_block_size,
        (j + 1) * config.selection_block_size,
    )
    return max(0, stop - start)


def block_importance(
    q: Tensor,
    k_cmp: Tensor,
    lse: Tensor,
    *,
    config: NsaConfig,
    scale: float | None = None,
) -> Tensor:
    """Eq. 8-10 for one sequence: how much each group cares for each selection block.

    The sums run in a fixed order, so that equal weights give bit-equal importance.

    Returns:
        [T, G, blocks].
    """
    dtype = accumulation_dtype(q.dtype)
    num_tokens, heads, _ = q.shape
    groups = k_cmp.shape[1]
    num_compressed = num_compressed_blocks(num_tokens, config)
    visible = _visible_compressed(None, num_tokens, config, q.device)
    keys = k_cmp[:num_compressed].to(dtype).repeat_interleave(heads // groups, dim=1)
    logits = torch.einsum("thk,chk->thc", q.to(dtype), keys)
    logits = logits * (q.shape[2] ** -0.5 if scale is None else scale)
    # Eq. 8: the compressed branch's own softmax, so its lse is the normaliser.
    weights = (logits - lse.masked_fill(lse == -torch.inf, 0.0)[..., None]).exp()
    weights = weights.masked_fill(~visible[:, None], 0.0).unflatten(1, (groups, heads // groups))
    # Eq. 10: summed over the heads of the group.
    per_group = sum(weights.unbind(2), torch.zeros_like(weights[:, :, 0]))
    num_blocks = -(-num_tokens // config.selection_block_size)
    importance = per_group.new_zeros(num_tokens, groups, num_blocks)
    for j in range(num_blocks):
        for i in range(num_compressed):
            # Eq. 9, stated as overlap.
            strides = overlap_tokens(i, j, config) // config.compression_stride
            if strides:
                importance[:, :, j] += strides * per_group[:, :, i]
    return importance


def _choose(importance: Tensor, config: NsaConfig) -> Tensor:
    """Eq. 11 for one sequence: int32 [T, G, n] from importance [T, G, blocks]."""
    num_tokens, groups, _ = importance.shape
    n = config.num_selected_blocks
    chosen = torch.full((num_tokens, groups, n), -1, dtype=torch.int32, device=importance.device)
    for t in range(num_tokens):
        candidates = t // config.selection_block_size + 1
        forced = {j for j in range(candidates) if j < config.num_initial_blocks}
        forced |= set(range(max(0, candidates - config.num_local_blocks), candidates))
        for g in range(groups):
            scores = importance[t, g, :candidates].float().tolist()
            ranked = sorted(range(candidates), key=lambda j: (j not in forced, -scores[j], j))
            picked = sorted(ranked[:n])
            chosen[t, g, : len(picked)] = torch.tensor(picked, dtype=torch.int32)
    return chosen


@torch.no_grad()
def select_blocks(
    q: Tensor,
    k_cmp: Tensor,
    lse: Tensor,
    *,
    config: NsaConfig,
    cu_seqlens: Tensor | None = None,
    scale: float | None = None,
) -> Tensor:
    """Eq. 8-11: forced blocks first, then by importance in float32, then the lower block."""
    start, first_block, chosen = 0, 0, []
    for length in _lengths(cu_seqlens, q.shape[0]):
        rows = slice(start, start + length)
        num_compressed = num_compressed_blocks(length, config)
        keys = k_cmp[first_block : first_block + num_compressed]
        importance = block_importance(q[rows], keys, lse[rows], config=config, scale=scale)
        chosen.append(_choose(importance, config))
        start, first_block = start + length, first_block + num_compressed
    return torch.cat(chosen)


def selected_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    block_indices: Tensor,
    *,
    config: NsaConfig,
    cu_seqlens: Tensor | None = None,
    scale: float | None = None,
) -> tuple[Tensor, Tensor]:
    """Eq. 12: position s is seen by t iff s <= t and s // l' is among the blocks of t."""
    sequence, t = _numbered(_lengths(cu_seqlens, q.shape[0]), q.device)
    causal = (sequence[:, None] == sequence) & (t <= t[:, None])  # [T, S]
    block = t // config.selection_block_size
    chosen = (block_indices.unsqueeze(-1) == block).any(2)  # [T, G, S]
    return _attend(q, k, v, causal[:, None] & chosen, scale)


def nsa_attention(
    q: Tensor,
    k_cmp: Tensor,
    v_cmp: Tensor,
    k_slc: Tensor,
    v_slc: Tensor,
    k_win: Tensor,
    v_win: Tensor,
    gates: Tensor,
    *,
    config: NsaConfig,
    cu_seqlens: Tensor | None = None,
    scale: float | None = None,
) -> Tensor:
    """Eq. 5: the gated sum of the three branches."""
    dtype = accumulation_dtype(q.dtype)
    out_cmp, lse = compressed_attention(
        q, k_cmp, v_cmp, config=config, cu_seqlens=cu_seqlens, scale=scale
    )
    blocks = select_blocks(q, k_cmp, lse, config=config, cu_seqlens=cu_seqlens, scale=scale)
    out_slc, _ = selected_attention(
        q, k_slc, v_slc, blocks, config=config, cu_seqlens=cu_seqlens, scale=scale
    )
    out_win, _ = sliding_attention(
        q, k_win, v_win, config=config, cu_seqlens=cu_seqlens, scale=scale
    )
    gate_cmp, gate_slc, gate_win = gates.to(dtype).unsqueeze(-1).unbind(2)
    mixed = gate_cmp * out_cmp.to(dtype) + gate_slc * out_slc.to(dtype)
    return (mixed + gate_win * out_win.to(dtype)).to(q.dtype)


def _unpage(pages: Tensor, table_row: Tensor, num_rows: int) -> Tensor:
    """The first num_rows logical rows of a sequence; rows of absent pages are zero."""
    page_rows = pages.shape[1]
    rows = pages.new_zeros(num_rows, *pages.shape[2:])
    for row in range(num_rows):
        physical = int(table_row[row // page_rows])
        if physical >= 0:
            rows[row] = pages[physical, row % page_rows]
    return rows


def nsa_paged_attention(
    q: Tensor,
    k_cmp: Tensor,
    v_cmp: Tensor,
    k_slc: Tensor,
    v_slc: Tensor,
    k_win: Tensor,
    v_win: Tensor,
    gates: Tensor,
    *,
    page_table: Tensor,
    window_page_table: Tensor,
    cu_seqlens: Tensor | None = None,
    context_lens: Tensor,
    config: NsaConfig,
    scale: float | None = None,
) -> Tensor:
    """The last rows of nsa_attention over each whole context, its past queries set to zero."""
    start, out = 0, []
    for b, length in enumerate(_lengths(cu_seqlens, q.shape[0])):
        context = int(context_lens[b])
        blocks = num_compressed_blocks(context, config)
        rows, past = slice(start, start + length), (0, 0, 0, 0, context - length, 0)
        whole = nsa_attention(
            torch.nn.functional.pad(q[rows], past),
            _unpage(k_cmp, page_table[b], blocks),
            _unpage(v_cmp, page_table[b], blocks),
            _unpage(k_slc, page_table[b], context),
            _unpage(v_slc, page_table[b], context),
            _unpage(k_win, window_page_table[b], context),
            _unpage(v_win, window_page_table[b], context),
            torch.nn.functional.pad(gates[rows], past),
            config=config,
            scale=scale,
        )
        out.append(whole[context - length :])
        start += length
    return torch.cat(out)


def full_paged_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    page_table: Tensor,
    cu_seqlens: Tensor | None = None,
    context_lens: Tensor,
    scale: float | None = None,
) -> Tensor:
    """The last rows of full_attention over each whole context, its past queries set to zero."""
    start, out = 0, []
    for b, length in enumerate(_lengths(cu_seqlens, q.shape[0])):
        context = int(context_lens[b])
        whole = full_attention(
            torch.nn.functional.pad(q[start : start + length], (0, 0, 0, 0, context - length, 0)),
            _unpage(k, page_table[b], context),
            _unpage(v, page_table[b], context),
            scale=scale,
        )
        out.append(whole[context - length :])
        start += length
    return torch.cat(out)
