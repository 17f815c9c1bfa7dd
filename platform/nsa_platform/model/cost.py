"""What a model costs: parameters, floating-point operations, cache bytes, from its config alone.

A multiply and an add are two operations. Only matrix products are counted, as is usual; norms,
rotations and softmax are not. "As executed" counts the keys that NSA really reads, averaged over
the positions of the context; "dense-equivalent" is the same shape with full attention: one pair of
keys and values, no gates, no phi.
"""

from dataclasses import dataclass

from nsa_platform.config.model import (
    AttentionConfig,
    FullAttentionConfig,
    Heads,
    MlaAttentionConfig,
    MobaAttentionConfig,
    ModelConfig,
    MoeConfig,
    NsaAttentionConfig,
    NsaChoices,
)


@dataclass(frozen=True, slots=True)
class ParameterCount:
    """Numbers of parameters."""

    total: int
    active: int
    """Parameters that one token meets: of the routed experts only its top-k."""
    embedding: int
    """The embedding, and the output head when it is not tied; part of both counts above."""


@dataclass(frozen=True, slots=True)
class Flops:
    """Floating-point operations per token, averaged over the positions of a context."""

    linear: int
    """Projections, gates, feed-forward (active experts) and logits."""
    compression: float
    """phi, spread over the tokens of a stride."""
    scores: float
    """Importance of the compressed blocks, worked out for the selection. No gradient."""
    attention: float
    """Queries with keys, weights with values: all branches."""

    @property
    def forward(self) -> float:
        return self.linear + self.compression + self.scores + self.attention

    @property
    def training(self) -> float:
        """Forward and backward: three times the forward, but for the scores."""
        return 3 * self.forward - 2 * self.scores

    def adapting(self, adapters: int, *, in_full: int = 0, with_phi: bool = False) -> float:
        """Forward and backward when weights are frozen, which have no gradient of their own and
        only pass on that of their inputs.

        Args:
            adapters: parameters of adapters beside them.
            in_full: parameters that each token meets in a matrix product and that are trained.
            with_phi: whether phi is trained.
        """
        frozen = self.linear - 2 * in_full + (0.0 if with_phi else self.compression)
        return self.training - frozen + 6 * adapters


@dataclass(frozen=True, slots=True)
class KeyCounts:
    """Keys that a query reads, averaged over the positions of a context."""

    compressed: float
    selected: float
    sliding: float

    @property
    def total(self) -> float:
        return self.compressed + self.selected + self.sliding


@dataclass(frozen=True, slots=True)
class CacheBytes:
    """Memory of the cache of one sequence, over all layers."""

    compressed: int
    selected: int
    """For full attention and MLA: everything."""
    sliding: int
    tail: int
    """Inputs of phi for blocks that are not complete."""

    @property
    def total(self) -> int:
        return self.compressed + self.selected + self.sliding + self.tail


def count_parameters(config: ModelConfig) -> ParameterCount:
    """Parameters of the model that this config builds."""
    width, moe = config.width, config.moe
    tables = 1 if config.tie_embeddings else 2
    embedding = tables * config.vocab_size * width
    every_layer = _attention_parameters(config) + _phi_parameters(config.attention) + 2 * width
    total = active = embedding + width + config.layers * every_layer

    dense_layers = config.layers if moe is None else min(moe.dense_layers, config.layers)
    total += dense_layers * 3 * width * config.ffn_width
    active += dense_layers * 3 * width * config.ffn_width
    if moe is not None:
        expert = 3 * width * moe.expert_width
        router = width * moe.routed_experts + _balance_biases(moe)
        moe_layers = config.layers - dense_layers
        total += moe_layers * (router + (moe.routed_experts + moe.shared_experts) * expert)
        active += moe_layers * (router + (moe.experts_per_token + moe.shared_experts) * expert)
    return ParameterCount(total=total, active=active, embedding=embedding)


def flops_per_token(config: ModelConfig, context: int) -> Flops:
    """Operations per token as executed on sequences of `context` tokens."""
    attention = config.attention
    heads = attention.query_heads
    per_key = 2 * heads * (attention.key_width + attention.value_width)
    layers = config.layers
    linear = 2 * _multiplied_parameters(config)
    if isinstance(attention, MobaAttentionConfig):
        keys = key_counts(_as_choices(attention), context)
        # The scores of the mean keys are worked out twice: for their sum, and to choose.
        scores = 2 * layers * 2 * heads * attention.key_width * keys.compressed
        return Flops(
            linear, compression=0.0, scores=scores, attention=layers * per_key * keys.selected
        )
    if not isinstance(attention, NsaAttentionConfig):
        keys = (context + 1) / 2
        return Flops(linear, compression=0.0, scores=0.0, attention=layers * per_key * keys)
    keys = key_counts(attention, context)
    blocks_per_token = _num_blocks(attention, context) / context
    phi = 2 * _phi_products(attention)
    return Flops(
        linear=linear,
        compression=layers * blocks_per_token * phi,
        scores=layers * 2 * heads * attention.key_width * keys.compressed,
        attention=layers * per_key * keys.total,
    )


def dense_equivalent(config: ModelConfig) -> ModelConfig:
    """The same shape with full attention; its flops are the dense-equivalent ones."""
    heads = config.attention
    full = FullAttentionConfig(
        query_heads=heads.query_heads,
        kv_heads=heads.kv_heads,
        key_width=heads.key_width,
        value_width=heads.value_width,
    )
    return config.model_copy(update={"attention": full})


def parameter_matched(config: ModelConfig, *, multiple: int = 8) -> ModelConfig:
    """The same shape with full attention and a feed-forward so wide that the parameters are equal.

    multiple: the width is rounded to a multiple of it, as matrix products like it.

    Raises:
        ValueError: the model has experts, of which no token meets all.
    """
    if config.moe is not None:
        raise ValueError("a parameter-matched model needs a dense feed-forward, this one has moe")
    full = dense_equivalent(config)
    missing = count_parameters(config).total - count_parameters(full).total
    more = missing / (3 * config.layers * config.width)
    width = round((config.ffn_width + more) / multiple) * multiple
    return full.model_copy(update={"ffn_width": width})


def key_counts(attention: NsaChoices, context: int) -> KeyCounts:
    """Average keys per query of each branch over the positions 0 to context - 1.

    A query at t reads the compressed blocks that are complete, of its n selection blocks all
    tokens up to itself, and its window.
    """
    size, stride = attention.compression_block_size, attention.compression_stride
    blocks = _num_blocks(attention, context)
    # Block i is read by the context - (i * d + l - 1) positions from its last token on.
    compressed = blocks * (context - size + 1) - stride * blocks * (blocks - 1) // 2

    block = attention.selection_block_size
    whole, rest = divmod(context, block)
    # Selected blocks before the own one: min(n - 1, own index), each read in full.
    others = attention.num_selected_blocks - 1
    before = _sum_below(whole, others) * block + rest * min(others, whole)
    own = whole * _triangle(block) + _triangle(rest)
    selected = before * block + own

    window = min(attention.window_size, context)
    sliding = _triangle(window) + (context - window) * window
    return KeyCounts(compressed / context, selected / context, sliding / context)


def _as_choices(attention: MobaAttentionConfig) -> NsaChoices:
    """The NSA whose compressed and selected keys are as many as MoBA's mean keys and keys."""
    block = attention.selection_block_size
    return NsaChoices(
        compression_block_size=block,
        compression_stride=block,
        selection_block_size=block,
        num_selected_blocks=attention.num_selected_blocks,
        num_initial_blocks=0,
        num_local_blocks=1,
    )


def window_tokens(attention: NsaAttentionConfig) -> int:
    """Last tokens whose window pages are kept: what the sliding branch or phi may still need."""
    return max(attention.window_size, attention.compression_block_size)


def cached_channels(attention: AttentionConfig) -> int:
    """Channels that one layer's cache keeps of a token that it keeps as it is."""
    if isinstance(attention, MlaAttentionConfig):
        return attention.cached_width
    return attention.kv_heads * (attention.key_width + attention.value_width)


def cache_bytes(
    config: ModelConfig,
    context: int,
    *,
    element_bytes: int = 2,
    kv_bytes: int | None = None,
    page_size: int | None = None,
) -> CacheBytes:
    """Cache of one sequence of `context` tokens between two steps.

    kv_bytes: of a number among the keys and values that attention reads as they are; None:
    element_bytes, which all others take.
    page_size: tokens of a page, of which the sequence takes whole ones; None: not rounded to
    pages, the least that the method needs.
    """
    attention = config.attention
    channels = config.layers * cached_channels(attention)
    row, kept_row = channels * element_bytes, channels * (kv_bytes or element_bytes)
    tokens = context if page_size is None else -(-context // page_size) * page_size
    if not isinstance(attention, NsaAttentionConfig):
        return CacheBytes(compressed=0, selected=tokens * kept_row, sliding=0, tail=0)

    blocks = (
        _num_blocks(attention, context)
        if page_size is None
        else tokens // attention.compression_stride
    )
    window, tail = min(attention.window_size, context), min(window_tokens(attention), context)
    if page_size is None:
        tail = min(attention.compression_block_size, context)
    else:
        first_page = max(0, context - window_tokens(attention)) // page_size
        window = tail = tokens - first_page * page_size
    return CacheBytes(
        compressed=blocks * row,
        selected=tokens * kept_row,
        sliding=0 if attention.branch_kv == "shared" else window * kept_row,
        tail=tail * row,
    )


def _attention_parameters(config: ModelConfig) -> int:
    attention, width = config.attention, config.width
    heads = attention.query_heads
    if isinstance(attention, MlaAttentionConfig):
        plain = attention.key_width - attention.rotary_width
        expanded = attention.kv_lora_rank * heads * (plain + attention.value_width)
        outer = heads * (attention.key_width + attention.value_width) + attention.cached_width
        return width * outer + expanded + _vector_parameters(attention)
    query_and_output = width * heads * (attention.key_width + attention.value_width)
    gates = _gates(attention)
    products = query_and_output + width * _key_value_width(attention) + width * gates
    return products + _vector_parameters(attention)


def _gates(attention: AttentionConfig) -> int:
    """Gates of a token in one layer."""
    if isinstance(attention, NsaAttentionConfig):
        return 3 * attention.query_heads if attention.gates == "sigmoid" else 0
    if isinstance(attention, MlaAttentionConfig):
        return 0
    return attention.query_heads if attention.gated else 0


def _key_value_width(attention: Heads) -> int:
    """Channels of the keys and values of all branches."""
    separate = isinstance(attention, NsaAttentionConfig) and attention.branch_kv == "separate"
    pair = attention.key_width + attention.value_width
    return (3 if separate else 1) * attention.kv_heads * pair


def _vector_parameters(attention: AttentionConfig) -> int:
    """Biases and norms of a layer's attention."""
    if isinstance(attention, MlaAttentionConfig):
        return attention.kv_lora_rank
    heads = attention.query_heads
    biases = _gates(attention)
    if attention.qkv_bias:
        biases += heads * attention.key_width + _key_value_width(attention)
    return biases + 2 * attention.key_width * attention.qk_norm


def _phi_parameters(attention: AttentionConfig) -> int:
    if not isinstance(attention, NsaAttentionConfig) or attention.compression == "mean":
        return 0
    positions = attention.compression_block_size * (attention.key_width + attention.value_width)
    return _phi_products(attention) + attention.kv_heads * positions


def _phi_products(attention: NsaAttentionConfig) -> int:
    """Multiplications to fold one block of keys and one of values, all heads."""
    squares = attention.key_width**2 + attention.value_width**2
    factors = {"mean": 0, "linear": attention.compression_block_size}
    factor = factors.get(attention.compression, attention.compression_block_size + 1)
    return attention.kv_heads * squares * factor


def _multiplied_parameters(config: ModelConfig) -> int:
    """Parameters that stand in a matrix product for each token: no look-up, norms, biases, phi."""
    attention, width = config.attention, config.width
    count = count_parameters(config)
    looked_up = 0 if config.tie_embeddings else config.vocab_size * width
    norms = (2 * config.layers + 1) * width
    beside = config.layers * (_vector_parameters(attention) + _phi_parameters(attention))
    if config.moe is not None:
        moe_layers = config.layers - min(config.moe.dense_layers, config.layers)
        beside += moe_layers * _balance_biases(config.moe)
    return count.active - looked_up - norms - beside


def _balance_biases(moe: MoeConfig) -> int:
    return moe.routed_experts if moe.bias_update_rate else 0


def _num_blocks(attention: NsaChoices, context: int) -> int:
    size, stride = attention.compression_block_size, attention.compression_stride
    return 0 if context < size else (context - size) // stride + 1


def _triangle(n: int) -> int:
    """1 + 2 + ... + n."""
    return n * (n + 1) // 2


def _sum_below(n: int, cap: int) -> int:
    """Sum of min(cap, i) for i in [0, n)."""
    rising = min(n, cap + 1)
    return _triangle(rising - 1) + (n - rising) * cap
