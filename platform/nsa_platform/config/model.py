"""What a model is: its sizes, its attention in the paper's words, its feed-forward.

Every field that arXiv 2502.11089 leaves open says so, and says what the paper says.
"""

from typing import Annotated, Literal, Self

from pydantic import Field, PositiveFloat, PositiveInt, model_validator

from nsa_platform.config.base import Strict


class Heads(Strict):
    """Query heads share key/value heads in equal groups (GQA); one key/value head is a group."""

    query_heads: PositiveInt
    """H. Query heads of a layer."""
    kv_heads: PositiveInt
    """G. Key/value heads (groups) of a layer; divides query_heads."""
    key_width: PositiveInt = 128
    """K. Width of a query and of a key. Triton kernels take multiples of 16 up to 256."""
    value_width: PositiveInt = 128
    """V. Width of a value. Triton kernels take multiples of 16 up to 256."""
    qkv_bias: bool = False
    """Biases of the query, key and value projections, as Qwen2 has them."""
    qk_norm: bool = False
    """RMSNorm over the channels of each query and key head before rotation, as Qwen3 has it. The
    keys of all branches share one."""

    @model_validator(mode="after")
    def _heads_divide(self) -> Self:
        if self.query_heads % self.kv_heads:
            raise ValueError(f"kv_heads={self.kv_heads} must divide query_heads={self.query_heads}")
        if self.key_width % 2:
            raise ValueError(f"key_width={self.key_width} must be even: rotary pairs its channels")
        return self

    @property
    def rotary_width(self) -> int:
        """Channels of a query and of a key that turn with the position: all."""
        return self.key_width


Branch = Literal["compressed", "selected", "sliding"]
BRANCHES: tuple[Branch, ...] = ("compressed", "selected", "sliding")
"""In the order of the gates."""


class NsaChoices(Strict):
    """What a layer of Native Sparse Attention leaves open beside its heads."""

    kind: Literal["nsa"] = "nsa"
    compression_block_size: PositiveInt = 32
    """l. Tokens folded into one compressed key."""
    compression_stride: PositiveInt = 16
    """d. Step between the starts of compression blocks."""
    selection_block_size: PositiveInt = 64
    """l'. Tokens of a selection block."""
    num_selected_blocks: PositiveInt = 16
    """n. Selection blocks that a query reads, forced ones included."""
    selection_top_p: Annotated[float, Field(gt=0, le=1)] | None = None
    """Adaptive n, which the paper does not have: a query reads the forced blocks, and of its n the
    most important until they hold this share of the importance of all blocks. null: all n. Trained
    and scored here, not served; it costs another look at the compressed keys of those n."""
    num_initial_blocks: Annotated[int, Field(ge=0)] = 1
    """First blocks that are always among the n."""
    num_local_blocks: PositiveInt = 2
    """Last visible blocks that are always among the n; the query's own is one of them."""
    window_size: PositiveInt = 512
    """w. The sliding branch sees the last w tokens, the query's own included."""
    branch_kv: Literal["separate", "shared"] = "separate"
    """Keys and values per branch. The paper: separate (section 3.3.3); public code shares them."""
    compression: Literal["mean", "linear", "mlp"] = "mlp"
    """phi. The paper: a learnable MLP with intra-block position encoding (Eq. 7). Each key/value
    head has its own, one for keys and one for values. linear starts as the mean; mlp is the mean
    and a two-layer correction that starts at zero."""
    compressed_rotary: Literal["block_start", "before", "none"] = "block_start"
    """Rotary positions of compressed keys; the paper is silent. block_start: compress unrotated
    keys, rotate the result at its block's start. before: compress rotated keys. none: neither; the
    one query that all branches share stays rotated."""
    branches: Annotated[tuple[Branch, ...], Field(min_length=1)] = BRANCHES
    """Branches that enter the output. Fewer than three make an ablation: the gate of a branch left
    out is held at 0, its weights stay and get no gradient, its work is done all the same. Blocks
    are always selected by scores of the compressed keys; without the output of the compressed
    branch nothing trains these keys or phi, so that selected alone needs branch_kv=shared, which
    trains the keys as selected ones, and compression=mean, which has no weights."""
    gates: Literal["sigmoid", "none"] = "sigmoid"
    """none: the branches are added up as they are, without gates: an ablation."""
    gate_bias: tuple[float, float, float] = (0.0, 0.0, 0.0)
    """Initial bias of the gates in the order cmp, slc, win. The paper gives no initialisation."""

    @model_validator(mode="after")
    def _blocks_fit(self) -> Self:
        l, d, b = self.compression_block_size, self.compression_stride, self.selection_block_size
        if l % d:
            raise ValueError(
                f"compression_stride={d} must divide compression_block_size={l} (d | l, Eq. 9)"
            )
        if b % d:
            raise ValueError(
                f"compression_stride={d} must divide selection_block_size={b} (d | l', Eq. 9)"
            )
        if l > b:
            raise ValueError(
                f"compression_block_size={l} must not exceed "
                f"selection_block_size={b} (l <= l', Eq. 9)"
            )
        forced = self.num_initial_blocks + self.num_local_blocks
        if forced > self.num_selected_blocks:
            raise ValueError(
                f"num_initial_blocks + num_local_blocks = {forced} must fit into "
                f"num_selected_blocks={self.num_selected_blocks}"
            )
        return self

    @model_validator(mode="after")
    def _branches_can_learn(self) -> Self:
        if len(set(self.branches)) < len(self.branches):
            raise ValueError(f"branches={list(self.branches)} must name each branch once")
        scores_learn = "compressed" in self.branches or "selected" not in self.branches
        is_free = self.branch_kv == "shared" and self.compression == "mean"
        if not scores_learn and not is_free:
            raise ValueError(
                f"branches={list(self.branches)} selects by compressed keys that nothing trains: "
                "it needs branch_kv=shared and compression=mean, got "
                f"branch_kv={self.branch_kv} and compression={self.compression}"
            )
        return self


class NsaAttentionConfig(NsaChoices, Heads):
    """Native Sparse Attention: compressed, selected and sliding branches, mixed by gates."""


class FullAttentionConfig(Heads):
    """Causal full attention: MHA, GQA or MQA by kv_heads."""

    kind: Literal["full"] = "full"
    gated: bool = False
    """Give each head the same sigmoid output gate that NSA has: the honest control."""


class MobaAttentionConfig(Heads):
    """Mixture of Block Attention (arXiv 2502.13189): top-k blocks by their mean keys, no
    compressed and no sliding branch. Trained and evaluated here, not served."""

    kind: Literal["moba"] = "moba"
    selection_block_size: PositiveInt = 512
    """Tokens of a block; the published size at a context of 8k."""
    num_selected_blocks: PositiveInt = 3
    """Blocks that a query reads, its own included, which is always one of them; the published
    number at a context of 8k. Each query head chooses for itself."""
    gated: bool = False
    """Give each head the same sigmoid output gate that NSA has."""


class MlaAttentionConfig(Strict):
    """Multi-head Latent Attention (arXiv 2405.04434, section 2.1): causal attention over all
    tokens, whose keys and values are projections of one narrow latent. A cache keeps that and one
    rotated key. Queries are projected directly, as in DeepSeek-V2-Lite."""

    kind: Literal["mla"] = "mla"
    query_heads: PositiveInt
    """H. Query heads of a layer; each has keys and values of its own."""
    kv_lora_rank: PositiveInt = 512
    """Width of a token's latent."""
    key_width: PositiveInt = 192
    """K. Width of a query and of a key, the rotated channels included."""
    rotary_width: PositiveInt = 64
    """Channels of a query and of a key that turn with the position. All heads share one rotated
    key, which a cache keeps beside the latent. Decoding on a GPU takes kv_lora_rank + rotary_width
    of up to 256, a multiple of 16."""
    value_width: PositiveInt = 128
    """V. Width of a value."""

    @model_validator(mode="after")
    def _widths_fit(self) -> Self:
        if self.rotary_width % 2:
            raise ValueError(
                f"rotary_width={self.rotary_width} must be even: rotary pairs its channels"
            )
        if self.rotary_width >= self.key_width:
            raise ValueError(
                f"rotary_width={self.rotary_width} must be less than key_width={self.key_width}: "
                "the rest comes from the latent"
            )
        return self

    @property
    def kv_heads(self) -> int:
        """G. Heads of keys and values once they are projected from the latent."""
        return self.query_heads

    @property
    def cached_width(self) -> int:
        """Channels that a cache keeps of a token."""
        return self.kv_lora_rank + self.rotary_width


AttentionConfig = Annotated[
    NsaAttentionConfig | FullAttentionConfig | MlaAttentionConfig | MobaAttentionConfig,
    Field(discriminator="kind"),
]


class MoeConfig(Strict):
    """DeepSeekMoE feed-forward: shared experts see every token, routed ones their top-k."""

    routed_experts: PositiveInt
    shared_experts: Annotated[int, Field(ge=0)] = 2
    experts_per_token: PositiveInt = 6
    """Routed experts that each token goes to."""
    expert_width: PositiveInt
    """Hidden width of one expert's SwiGLU. The paper gives none; with its other sizes 1472 makes
    27B parameters, of which a token meets 2.7B of feed-forward (5.3B in all)."""
    dense_layers: Annotated[int, Field(ge=0)] = 1
    """First layers that keep a dense feed-forward (the paper: one, for stability)."""
    balance_loss: Annotated[float, Field(ge=0)] = 0.001
    """Weight of the expert load-balance loss (arXiv 2401.06066, 3.3). The paper gives none."""
    bias_update_rate: Annotated[float, Field(ge=0)] = 0.0
    """Balance without a loss (arXiv 2408.15664, there 0.001): each expert has a bias that counts in
    the choice alone, and moves by this much after each step, up if fewer tokens than the mean came,
    down if more. 0: no bias. The NSA paper does not say how it balances."""

    @model_validator(mode="after")
    def _enough_experts(self) -> Self:
        if self.experts_per_token > self.routed_experts:
            raise ValueError(
                f"experts_per_token={self.experts_per_token} must not exceed "
                f"routed_experts={self.routed_experts}"
            )
        return self


class YarnConfig(Strict):
    """YaRN rescaling of rotary frequencies for a longer context (arXiv 2309.00071)."""

    factor: Annotated[float, Field(ge=1)]
    """How many times longer than original_context."""
    original_context: PositiveInt
    """Tokens of the context before extension."""
    beta_fast: PositiveFloat = 32.0
    """Channel pairs that turn more often than this within original_context stay as they are."""
    beta_slow: PositiveFloat = 1.0
    """Channel pairs that turn less often than this are interpolated by factor."""
    attention_factor: PositiveFloat | None = None
    """Factor on queries and on keys; null: the paper's 0.1 ln(factor) + 1. With 1 this is the
    rescaling of Llama 3.1, whose low and high frequency factors are beta_slow and beta_fast."""

    @model_validator(mode="after")
    def _ramp_rises(self) -> Self:
        if self.beta_fast <= self.beta_slow:
            raise ValueError(f"beta_fast={self.beta_fast} must exceed beta_slow={self.beta_slow}")
        return self


class ModelConfig(Strict):
    """The whole model. An exported checkpoint's config.json holds exactly this."""

    name: str = "nsa"
    vocab_size: PositiveInt
    layers: PositiveInt
    width: PositiveInt
    """D. Width of the residual stream."""
    ffn_width: PositiveInt
    """Hidden width of the dense SwiGLU."""
    max_context: PositiveInt
    """Longest sequence in tokens that the model is meant for."""
    attention: AttentionConfig
    moe: MoeConfig | None = None
    """Mixture of experts in all but the first dense_layers layers; null for dense."""
    rope_base: PositiveFloat = 10000.0
    yarn: YarnConfig | None = None
    norm_eps: PositiveFloat = 1.0e-6
    tie_embeddings: bool = True
