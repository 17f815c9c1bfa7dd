"""Multi-head Latent Attention: keys and values are projections of one narrow latent.

Source: arXiv 2405.04434 (DeepSeek-V2), section 2.1. In whole sequences every head attends to its
own keys and values (PackedStep). A cache keeps the latent and the rotated key that the heads share,
and nothing else: there the projections move to the query and to the output (PagedStep), so that all
heads read one key, and one value, which is the first part of that key.
"""

from typing import NamedTuple

import torch
from torch import Tensor, nn

from nsa_kernels import full_attention, full_paged_attention, project
from nsa_platform.config.model import MlaAttentionConfig, ModelConfig
from nsa_platform.model.cache import LatentLayerCache, LayerCache
from nsa_platform.model.exchange import to_heads, to_tokens
from nsa_platform.model.layers import added, from_own_inputs, own_outputs, projection, rms_norm
from nsa_platform.model.rotary import Rotation, attention_scale
from nsa_platform.model.step import PackedStep, PagedStep, Step


class _Arranged(NamedTuple):
    """What attention begins with."""

    q: Tensor
    """[T, heads, K - rotary_width], the channels of queries that do not turn."""
    q_turned: Tensor
    """[T, heads, rotary_width], rotated."""
    latent: Tensor
    """[T, rank], normed."""
    k_turned: Tensor
    """[T, 1, rotary_width], the rotated key that all heads share."""


class MlaAttention(nn.Module):
    """Causal attention over all earlier tokens, through a latent of kv_lora_rank channels."""

    def __init__(self, config: ModelConfig, attention: MlaAttentionConfig) -> None:
        super().__init__()
        self.config = attention
        self.scale = attention_scale(config)
        heads, plain = attention.query_heads, attention.key_width - attention.rotary_width
        self.widths = [heads * plain, heads * attention.value_width]
        """Outputs of key_value: the keys' channels that do not turn, and the values."""
        self.query = nn.Linear(config.width, heads * attention.key_width, bias=False)
        self.latent = nn.Linear(config.width, attention.cached_width, bias=False)
        self.latent_norm = nn.RMSNorm(attention.kv_lora_rank, config.norm_eps)
        self.key_value = nn.Linear(attention.kv_lora_rank, sum(self.widths), bias=False)
        self.output = nn.Linear(heads * attention.value_width, config.width, bias=False)

    def forward(self, x: Tensor, step: Step) -> Tensor:
        """x [T, D], already normed -> [T, D], for whole sequences."""
        assert isinstance(step, PackedStep)
        tensor = step.partition.tensor
        q = own_outputs(self.query, x, [self.config.query_heads * self.config.key_width], tensor)
        # Every worker of the tensor axis has the whole latent, and its own heads' part of the rest.
        out = self._attend_packed(*self._arranged(q, self.latent(x), step.rotation), step)
        return from_own_inputs(self.output, out.flatten(1), tensor)

    def added_to(self, x: Tensor, norm: nn.RMSNorm, step: PagedStep, cache: LayerCache) -> Tensor:
        """x + attention(norm(x)), x [T, D], for new tokens; what they leave goes to the cache."""
        assert isinstance(cache, LatentLayerCache)
        layers = [projection(self.query), projection(self.latent)]
        q, latent = project(x, layers, norm=rms_norm(norm), tallies=step.tallies)
        out = self._attend_paged(*self._arranged(q, latent, step.rotation), step, cache)
        return added(self.output, out.flatten(1), x, step.tallies)

    def _arranged(self, q: Tensor, latent: Tensor, rotation: Rotation) -> _Arranged:
        """The parts of the projections q [T, heads * K] and latent [T, rank + rotary_width]."""
        config = self.config
        plain, turning = config.key_width - config.rotary_width, config.rotary_width
        q, q_turning = q.unflatten(1, (-1, config.key_width)).split([plain, turning], dim=2)
        latent, k_turning = latent.split([config.kv_lora_rank, turning], dim=1)
        return _Arranged(
            q,
            rotation.apply(q_turning),
            self.latent_norm(latent),
            rotation.apply(k_turning[:, None]),
        )

    def _attend_packed(
        self, q: Tensor, q_turned: Tensor, latent: Tensor, k_turned: Tensor, step: PackedStep
    ) -> Tensor:
        """Out [T, own heads, V]."""
        heads, (tensor, context) = q.shape[1], (step.partition.tensor, step.partition.context)
        k, v = own_outputs(self.key_value, latent, self.widths, tensor).split(
            [width // tensor.size for width in self.widths], dim=1
        )
        k = torch.cat([k.unflatten(1, (heads, -1)), k_turned.expand(-1, heads, -1)], dim=2)
        rows = (torch.cat([q, q_turned], dim=2), k, v.unflatten(1, (heads, -1)))
        q, k, v = to_heads(rows, context)
        out = full_attention(q, k, v, cu_seqlens=step.cu_seqlens, scale=self.scale)
        return to_tokens(out, context)

    def _attend_paged(
        self,
        q: Tensor,
        q_turned: Tensor,
        latent: Tensor,
        k_turned: Tensor,
        step: PagedStep,
        cache: LatentLayerCache,
    ) -> Tensor:
        """The same out of new tokens on top of the cache, to which they are written."""
        rank = self.config.kv_lora_rank
        k_up, v_up = (
            part.unflatten(0, (self.config.query_heads, -1))
            for part in self.key_value.weight.split(self.widths)
        )  # [H, channels, rank]
        rows = torch.cat([latent[:, None], k_turned], dim=2)
        cache.latent.view(-1, 1, rows.shape[2]).index_copy_(0, step.token_rows, rows)
        q = torch.cat([torch.einsum("thc,hcr->thr", q, k_up), q_turned], dim=2)
        # The cache stands for the values too: what it has beyond the latent is dropped.
        out = full_paged_attention(
            q,
            cache.latent,
            cache.latent,
            page_table=step.page_table,
            cu_seqlens=step.cu_seqlens,
            context_lens=step.context_lens,
            scale=self.scale,
        )
        return torch.einsum("thr,hvr->thv", out[..., :rank], v_up)
