"""Attention of a layer: NSA with its three branches, or causal full attention.

Training and serving share every projection. They part only where keys and values go: straight to
the op for whole sequences (PackedStep), or through the pages of a cache (PagedStep). Full attention
can also be left to a policy from outside (PolicyStep).
"""

from dataclasses import replace
from typing import NamedTuple

import torch
from torch import Tensor, nn

from nsa_kernels import (
    NewRows,
    compressed_attention,
    fold_and_write,
    full_attention,
    full_paged_attention,
    nsa_attention,
    nsa_paged_attention,
    project,
    rotate_and_write,
    select_blocks,
    selected_attention,
    sliding_attention,
)
from nsa_kernels.branches import Inputs
from nsa_platform.config.model import (
    BRANCHES,
    FullAttentionConfig,
    Heads,
    MobaAttentionConfig,
    ModelConfig,
    NsaAttentionConfig,
)
from nsa_platform.model.adaptive import keep_top_p
from nsa_platform.model.cache import FullLayerCache, LayerCache, NsaLayerCache
from nsa_platform.model.compression import Compression, kernel_config
from nsa_platform.model.exchange import heads_of_kin, to_heads, to_tokens
from nsa_platform.model.layers import added, from_own_inputs, own_outputs, projection, rms_norm
from nsa_platform.model.partition import WHOLE, Axis
from nsa_platform.model.probe import observe_gates, observe_selection
from nsa_platform.model.rotary import Rotation, attention_scale
from nsa_platform.model.step import PackedStep, PagedStep, PolicyStep, Step


class _Raw(NamedTuple):
    """One layer's query, gates, and keys and values before any rotation."""

    q: Tensor
    gates: Tensor
    tail: Tensor | None
    """Keys that phi folds unrotated, [T, G, K]; None where it folds those of a branch."""
    keys: Tensor
    """[T, 1 to 3, G, K], of the branches, that of phi first if it has one of its own."""
    values: list[Tensor]
    """Three of [T, G, V]: phi's, the selected and the sliding branch's."""


class _Projected(NamedTuple):
    """One layer's query, gates, and keys and values; phi has not folded its pair yet."""

    q: Tensor
    gates: Tensor
    k_tail: Tensor
    v_tail: Tensor
    k_slc: Tensor
    v_slc: Tensor
    k_win: Tensor
    v_win: Tensor


def head_norm(attention: Heads, eps: float) -> nn.Module:
    """The norm of each head's query or key [..., K]; none unless the config says so."""
    return nn.RMSNorm(attention.key_width, eps) if attention.qk_norm else nn.Identity()


class NsaAttention(nn.Module):
    """Native Sparse Attention: one query, three branches, three gates for each head (Eq. 5)."""

    def __init__(
        self, config: ModelConfig, attention: NsaAttentionConfig, *, layer_index: int
    ) -> None:
        super().__init__()
        self.config = attention
        self.kernel_config = kernel_config(attention)
        self.scale = attention_scale(config)
        self.layer_index = layer_index
        self.runs_apart = False
        """Run the branches as ops of their own, so that each can be kept or computed again."""
        heads, groups = attention.query_heads, attention.kv_heads
        pair_width = groups * (attention.key_width + attention.value_width)
        branches = 3 if attention.branch_kv == "separate" else 1
        bias = attention.qkv_bias
        self.query = nn.Linear(config.width, heads * attention.key_width, bias=bias)
        self.key_value = nn.Linear(config.width, branches * pair_width, bias=bias)
        self.query_norm = head_norm(attention, config.norm_eps)
        self.key_norm = head_norm(attention, config.norm_eps)
        self.gate = nn.Linear(config.width, heads * 3) if attention.gates == "sigmoid" else None
        self.compress_key = Compression(attention, width=attention.key_width)
        self.compress_value = Compression(attention, width=attention.value_width)
        self.output = nn.Linear(heads * attention.value_width, config.width, bias=False)

    def forward(self, x: Tensor, step: Step) -> Tensor:
        """x [T, D], already normed -> [T, D], for whole sequences."""
        assert isinstance(step, PackedStep)
        tensor = step.partition.tensor
        out = self._attend_packed(self._rotated(self._project(x, tensor), step.rotation), step)
        return from_own_inputs(self.output, out.flatten(1), tensor)

    def added_to(self, x: Tensor, norm: nn.RMSNorm, step: PagedStep, cache: LayerCache) -> Tensor:
        """x + attention(norm(x)), x [T, D], for new tokens; what they leave goes to the cache."""
        assert isinstance(cache, NsaLayerCache)
        layers = [projection(self.query), projection(self.key_value)]
        if self.gate is not None:
            layers.append(replace(projection(self.gate), activation="sigmoid"))
        q, keys_values, *gates = project(x, layers, norm=rms_norm(norm), tallies=step.tallies)
        raw = self._arranged(q, keys_values, gates[0] if gates else None)
        out = self._attend_paged(raw, step, cache)
        return added(self.output, out.flatten(1), x, step.tallies)

    def _project(self, x: Tensor, tensor: Axis) -> _Raw:
        """Projections of the heads that this worker of the tensor axis has."""
        config = self.config
        branches = 3 if config.branch_kv == "separate" else 1
        widths = [
            config.kv_heads * width
            for width in (config.key_width, config.value_width)
            for _ in range(branches)
        ]
        q = own_outputs(self.query, x, [config.query_heads * config.key_width], tensor)
        gates = None
        if self.gate is not None:
            gates = torch.sigmoid(own_outputs(self.gate, x, [config.query_heads * 3], tensor))
        keys_values = own_outputs(self.key_value, x, widths, tensor)
        return self._arranged(q, keys_values, gates)

    def _arranged(self, q: Tensor, keys_values: Tensor, gates: Tensor | None) -> _Raw:
        """Projections [T, heads * width] as heads, with the norms of queries and keys.

        gates: [T, heads * 3] after the sigmoid; None for a layer that has none.
        """
        config = self.config
        branches = 3 if config.branch_kv == "separate" else 1
        pair_width = branches * (config.key_width + config.value_width)
        groups = keys_values.shape[1] // pair_width
        key_width, value_width = groups * config.key_width, groups * config.value_width
        q = self.query_norm(q.unflatten(1, (-1, config.key_width)))
        # Split once: the gradients of all parts then meet in one concatenation.
        num_raw = int(branches == 3 and config.compressed_rotary != "before")
        raw, keys, *values = keys_values.split(
            [num_raw * key_width, (branches - num_raw) * key_width, *[value_width] * branches],
            dim=1,
        )
        keys = self.key_norm(keys.unflatten(1, (branches - num_raw, groups, config.key_width)))
        tail = self.key_norm(raw.unflatten(1, (groups, -1))) if num_raw else None
        values = [v.unflatten(1, (groups, -1)) for v in values] * (3 // branches)
        return _Raw(q, self._mixing_gates(gates, q), tail, keys, values)

    def _rotated(self, raw: _Raw, rotation: Rotation) -> _Projected:
        """Only what a branch reads rotated is rotated, branch by branch, so that the op finds it
        contiguous."""
        keys = raw.keys.transpose(0, 1)
        rotated = rotation.apply(keys).unbind(0)
        if self.config.compressed_rotary == "before":
            k_tail = rotated[0]
        else:
            k_tail = keys[0] if raw.tail is None else raw.tail
        k_slc, k_win = (rotated * 2)[-2:]
        v_tail, v_slc, v_win = raw.values
        q = rotation.apply(raw.q)
        return _Projected(q, raw.gates, k_tail, v_tail, k_slc, v_slc, k_win, v_win)

    def _mixing_gates(self, gates: Tensor | None, q: Tensor) -> Tensor:
        """[T, own heads, 3]: 0 for a branch that is left out, 1 for the others without gates."""
        config = self.config
        gates = q.new_ones(*q.shape[:2], 3) if gates is None else gates.unflatten(1, (-1, 3))
        if len(config.branches) == len(BRANCHES):
            return gates
        kept = [
            gate if branch in config.branches else torch.zeros_like(gate)
            for branch, gate in zip(BRANCHES, gates.unbind(2), strict=True)
        ]
        return torch.stack(kept, dim=2)

    def _place(self, k_cmp: Tensor, rotation: Rotation) -> Tensor:
        """Compressed keys [C, G, K], rotated to their blocks' starts when the config says so."""
        return rotation.apply(k_cmp) if self.config.compressed_rotary == "block_start" else k_cmp

    def _attend_packed(self, projected: _Projected, step: PackedStep) -> Tensor:
        """Out [T, H, V] of this worker's tokens and of the heads of its tensor axis."""
        partition, config = step.partition, self.kernel_config
        assert step.blocks is not None and step.block_rotation is not None
        q, gates, k_tail, v_tail, k_slc, v_slc, k_win, v_win = to_heads(
            projected, partition.context
        )
        own = partition.own_groups(self.config.kv_heads)
        k_cmp = self.compress_key.fold_packed(k_tail, step.blocks, own).to(q.dtype)
        k_cmp = self._place(k_cmp, step.block_rotation)
        v_cmp = self.compress_value.fold_packed(v_tail, step.blocks, own).to(q.dtype)
        if step.probe is not None:
            observe_selection(
                step.probe,
                self.layer_index,
                heads_of_kin(q, partition.kin),
                k_cmp,
                gates=gates,
                positions=step.positions,
                cu_seqlens=step.cu_seqlens,
                config=config,
                scale=self.scale,
                top_p=self.config.selection_top_p,
            )
            if step.probe.watch is not None:
                step.probe.watch(self.layer_index, q, k_cmp, k_slc)
        folded = Inputs(q, k_cmp, v_cmp, k_slc, v_slc, k_win, v_win, gates)
        is_adaptive = self.config.selection_top_p is not None
        if partition.kin.size > 1 or self.runs_apart or is_adaptive:
            out = self._attend_apart(folded, step)
        else:
            out = nsa_attention(
                *folded, config=config, cu_seqlens=step.cu_seqlens, scale=self.scale
            )
        return to_tokens(out, partition.context)

    def _attend_apart(self, inputs: Inputs, step: PackedStep) -> Tensor:
        """The whole op branch by branch, also for some of a group's heads alone: blocks are chosen
        by all of them."""
        q, k_cmp, v_cmp, k_slc, v_slc, k_win, v_win, gates = inputs
        kin = step.partition.kin
        sizes = {"config": self.kernel_config, "cu_seqlens": step.cu_seqlens, "scale": self.scale}
        out_cmp, lse = compressed_attention(q, k_cmp, v_cmp, **sizes)
        all_lse = heads_of_kin(lse[..., None], kin).squeeze(2)
        all_q = heads_of_kin(q, kin)
        blocks = select_blocks(all_q, k_cmp, all_lse, **sizes)
        top_p = self.config.selection_top_p
        if top_p is not None:
            blocks = keep_top_p(
                blocks, all_q, k_cmp, all_lse, top_p=top_p, positions=step.positions, **sizes
            )
        out_slc, _ = selected_attention(q, k_slc, v_slc, blocks, **sizes)
        out_win, _ = sliding_attention(q, k_win, v_win, **sizes)
        exact = torch.promote_types(q.dtype, torch.float32)
        branches = torch.stack([out_cmp, out_slc, out_win], 2).to(exact)  # [T, H, 3, V]
        return (branches * gates.to(exact)[..., None]).sum(2).to(q.dtype)

    def _attend_paged(self, raw: _Raw, step: PagedStep, cache: NsaLayerCache) -> Tensor:
        new, window_rows = step.new_blocks, step.window_rows
        assert new is not None and window_rows is not None and step.window_page_table is not None
        keys = raw.keys.unbind(1)
        v_tail, v_slc, v_win = raw.values
        branches = [
            NewRows((keys * 2)[-2], v_slc, cache.k_slc, cache.v_slc, step.token_rows),
            NewRows(
                keys[0] if raw.tail is None else raw.tail,
                v_tail,
                cache.k_tail,
                cache.v_tail,
                window_rows,
                is_rotated=self.config.compressed_rotary == "before",
            ),
        ]
        window_page_table = step.page_table
        if self.config.branch_kv == "separate":
            window_page_table = step.window_page_table
            branches.append(NewRows(keys[-1], v_win, cache.k_win, cache.v_win, window_rows))
        q = rotate_and_write(raw.q, branches, step.rotation.cos, step.rotation.sin)
        fold_and_write(
            (self.compress_key.phi, self.compress_value.phi),
            (cache.k_tail, cache.v_tail),
            (cache.k_cmp, cache.v_cmp),
            new,
        )
        block_indices = None
        if step.observed is not None:
            shape = (len(q), self.config.kv_heads, self.config.num_selected_blocks)
            block_indices = torch.empty(shape, dtype=torch.int32, device=q.device)
            step.observed.selected.append(block_indices)
            step.observed.gate_means.append(raw.gates.float().mean((0, 1)))
        return nsa_paged_attention(
            q,
            cache.k_cmp,
            cache.v_cmp,
            cache.k_slc,
            cache.v_slc,
            cache.k_win,
            cache.v_win,
            raw.gates,
            page_table=step.page_table,
            window_page_table=window_page_table,
            cu_seqlens=step.cu_seqlens,
            context_lens=step.context_lens,
            config=self.kernel_config,
            scale=self.scale,
            block_indices=block_indices,
        )


class FullAttention(nn.Module):
    """Causal attention over all earlier tokens (MHA, GQA or MQA), gated when the config says so."""

    def __init__(
        self,
        config: ModelConfig,
        attention: FullAttentionConfig | MobaAttentionConfig,
        *,
        layer_index: int,
    ) -> None:
        super().__init__()
        self.config = attention
        self.scale = attention_scale(config)
        self.layer_index = layer_index
        heads, groups = attention.query_heads, attention.kv_heads
        pair_width = groups * (attention.key_width + attention.value_width)
        bias = attention.qkv_bias
        self.query = nn.Linear(config.width, heads * attention.key_width, bias=bias)
        self.key_value = nn.Linear(config.width, pair_width, bias=bias)
        self.query_norm = head_norm(attention, config.norm_eps)
        self.key_norm = head_norm(attention, config.norm_eps)
        self.gate = nn.Linear(config.width, heads) if attention.gated else None
        self.output = nn.Linear(heads * attention.value_width, config.width, bias=False)

    def forward(self, x: Tensor, step: Step) -> Tensor:
        """x [T, D], already normed -> [T, D], for whole sequences or a policy's."""
        config = self.config
        partition = step.partition if isinstance(step, PackedStep) else WHOLE
        tensor = partition.tensor
        widths = [config.kv_heads * width for width in (config.key_width, config.value_width)]
        q, k, v = self._arranged(
            own_outputs(self.query, x, [config.query_heads * config.key_width], tensor),
            own_outputs(self.key_value, x, widths, tensor),
        )
        if isinstance(step, PolicyStep):
            out = step.attend(self.layer_index, q, k, v)
        else:
            assert isinstance(step, PackedStep)
            out = self._attend_packed(q, k, v, step)
        if self.gate is not None:
            gates = torch.sigmoid(own_outputs(self.gate, x, [config.query_heads], tensor))
            if isinstance(step, PackedStep) and step.probe is not None:
                observe_gates(step.probe, self.layer_index, gates[..., None])
            out = out * gates[..., None]
        return from_own_inputs(self.output, out.flatten(1), tensor)

    def added_to(self, x: Tensor, norm: nn.RMSNorm, step: PagedStep, cache: LayerCache) -> Tensor:
        """x + attention(norm(x)), x [T, D], for new tokens; what they leave goes to the cache."""
        assert isinstance(cache, FullLayerCache)
        layers = [projection(self.query), projection(self.key_value)]
        if self.gate is not None:
            layers.append(replace(projection(self.gate), activation="sigmoid"))
        q, keys_values, *gates = project(x, layers, norm=rms_norm(norm), tallies=step.tallies)
        q, k, v = self._arranged(q, keys_values)
        rows = NewRows(k, v, cache.k, cache.v, step.token_rows)
        out = full_paged_attention(
            rotate_and_write(q, [rows], step.rotation.cos, step.rotation.sin),
            cache.k,
            cache.v,
            page_table=step.page_table,
            cu_seqlens=step.cu_seqlens,
            context_lens=step.context_lens,
            scale=self.scale,
        )
        if gates:
            out = out * gates[0][..., None]
        return added(self.output, out.flatten(1), x, step.tallies)

    def _arranged(self, q: Tensor, keys_values: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """q [T, H, K], k [T, G, K] and v [T, G, V] of the projections [T, heads * width]."""
        config = self.config
        groups = keys_values.shape[1] // (config.key_width + config.value_width)
        keys, values = keys_values.split(
            [groups * config.key_width, groups * config.value_width], dim=1
        )
        q = self.query_norm(q.unflatten(1, (-1, config.key_width)))
        k = self.key_norm(keys.unflatten(1, (groups, config.key_width)))
        return q, k, values.unflatten(1, (groups, config.value_width))

    def _attend_packed(self, q: Tensor, k: Tensor, v: Tensor, step: PackedStep) -> Tensor:
        """Out [T, H, V] of queries and keys before rotation."""
        rotation, context = step.rotation, step.partition.context
        q, k, v = to_heads((rotation.apply(q), rotation.apply(k), v), context)
        return to_tokens(self._attend_rotated(q, k, v, step.cu_seqlens), context)

    def _attend_rotated(self, q: Tensor, k: Tensor, v: Tensor, cu_seqlens: Tensor) -> Tensor:
        """Out [T, H, V] of whole sequences."""
        return full_attention(q, k, v, cu_seqlens=cu_seqlens, scale=self.scale)
