"""What a run will take, from its configuration alone: parameters, FLOPs, steps, memory."""

from dataclasses import dataclass
from itertools import cycle, islice
from typing import Literal

from nsa_platform.config.data import LoaderConfig
from nsa_platform.config.model import ModelConfig, NsaAttentionConfig
from nsa_platform.config.train import ClusterConfig, TrainConfig
from nsa_platform.model.cost import ParameterCount, count_parameters, dense_equivalent
from nsa_platform.train.adapters import count_trainable, training_flops
from nsa_platform.train.parallel import resolve_parallel

# float32 weight, gradient and the two moments of AdamW; the moments; a frozen weight.
STATE_BYTES, OPTIMIZER_BYTES, FROZEN_BYTES = 16, 8, 4

# Values of width D that a layer keeps for its backward pass beside the feed-forward's, about:
# norms, queries, keys and values of three branches, their outputs, the residual stream.
KEPT_PER_LAYER = 14

# float32 logits of one chunk, their gradient and the softmax.
LOGITS_BYTES = 3 * (256 << 20)


@dataclass(frozen=True, slots=True)
class Estimate:
    """What a run will take."""

    parameters: ParameterCount
    trainable: int
    """Parameters that are trained."""
    steps: int
    tokens: int
    """Of the whole run."""
    flops_per_step: float
    """Forward and backward as executed, all workers together."""
    dense_flops_per_step: float
    """The same shape with full attention."""
    microbatches: int
    """Of one worker in one step."""
    state_bytes: int
    """Weights, gradients and optimizer of one worker."""
    optimizer_bytes: int
    """The optimizer's part of them."""
    activation_bytes: int
    """Roughly what one worker keeps for the backward pass, logits included; workers of the tensor
    axis count as if each had its own tokens."""
    parallel: Literal["replicate", "shard"]
    mesh: str
    """Degrees of the mesh that are not 1; empty if there are none."""


def estimate(
    model: ModelConfig, data: LoaderConfig, train: TrainConfig, cluster: ClusterConfig
) -> Estimate:
    """Work it out; nothing is built or read."""
    parameters = count_parameters(model)
    lora, length = train.lora, data.context_length
    trainable = parameters.total if lora is None else count_trainable(model, lora)
    flops = training_flops(model, lora, length)
    dense = training_flops(dense_equivalent(model), lora, length)
    parallel = resolve_parallel(train, on_gpu=cluster.use_gpu)
    mesh = train.mesh
    copies = mesh.data_parallel_replicate_degree
    holders = cluster.num_workers // copies if parallel == "shard" else 1
    state = trainable * STATE_BYTES + (parameters.total - trainable) * FROZEN_BYTES
    rows = train.tokens_per_step // data.context_length
    tokens_at_once = data.context_length * train.sequences_per_microbatch // mesh.row_workers
    dealt = mesh.data_workers(cluster.num_workers)
    return Estimate(
        parameters=parameters,
        trainable=trainable,
        steps=train.steps,
        tokens=train.steps * train.tokens_per_step,
        flops_per_step=flops * train.tokens_per_step,
        dense_flops_per_step=dense * train.tokens_per_step,
        microbatches=rows // (dealt * train.sequences_per_microbatch),
        state_bytes=-(-state // holders),
        optimizer_bytes=-(-trainable * OPTIMIZER_BYTES // holders),
        activation_bytes=_activation_bytes(model, train, tokens_at_once),
        parallel=parallel,
        mesh=mesh.describe(cluster.num_workers),
    )


def _activation_bytes(model: ModelConfig, train: TrainConfig, tokens: int) -> int:
    element = 2 if train.dtype == "bfloat16" else 4
    ffn = model.ffn_width
    if model.moe is not None:
        experts = model.moe.experts_per_token + model.moe.shared_experts
        ffn = max(ffn, experts * model.moe.expert_width)
    layer = KEPT_PER_LAYER * model.width + 4 * ffn
    attention = model.attention
    results = attention.query_heads * attention.value_width
    # Three branches and their sum; the two that are not computed again; none.
    outputs = {"selective": 4, "branches": 2, "full": 0}
    if not isinstance(attention, NsaAttentionConfig):
        outputs = {mode: min(count, 1) for mode, count in outputs.items()}
    by_mode = {
        mode: (1 if mode == "full" else 2) * model.width + count * results
        for mode, count in outputs.items()
    } | {"none": layer}
    modes = train.activation_checkpointing
    kept = sum(by_mode[mode] for mode in islice(cycle(modes), model.layers))
    if set(modes) != {"none"}:
        kept += layer  # the one that is computed again
    logits = min(LOGITS_BYTES, 3 * 4 * tokens * model.vocab_size)
    return tokens * kept * element + logits
