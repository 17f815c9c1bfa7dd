"""What blocks are worth: text scored by one model that reads more or fewer of them."""

from collections.abc import Iterable
from dataclasses import dataclass
from statistics import fmean

import numpy as np
import torch

from nsa_platform.config.model import ModelConfig, NsaAttentionConfig
from nsa_platform.data.loader import Batch
from nsa_platform.evaluate.bits_per_byte import bits_per_byte
from nsa_platform.evaluate.scores import ModelScorer
from nsa_platform.model.inputs import PackedInputs
from nsa_platform.model.probe import Probe
from nsa_platform.model.transformer import Transformer


@dataclass(frozen=True, slots=True)
class Reading:
    """How a model reads, and what comes of it."""

    num_selected_blocks: int
    """n: blocks that a query reads at most."""
    selection_top_p: float | None
    """None: it reads all n."""
    blocks: float
    """Mean number of blocks that a query did read, over layers, groups and queries."""
    bits_per_byte: float


def reading(model: Transformer, *, num_blocks: int, top_p: float | None) -> Transformer:
    """The same weights, not copied, in a model that reads other numbers of blocks.

    Raises:
        ValueError: the model selects nothing.
        ConfigError: the numbers are out of range.
    """
    attention = model.config.attention
    if not isinstance(attention, NsaAttentionConfig):
        raise ValueError(f"attention.kind must be nsa, got {attention.kind}: nothing is selected")
    tree = model.config.model_dump()
    tree["attention"] |= {"num_selected_blocks": num_blocks, "selection_top_p": top_p}
    with torch.device("meta"):
        other = Transformer(ModelConfig.parse(tree))
    other.load_state_dict(model.state_dict(), assign=True)
    return other.requires_grad_(False).eval()


@torch.no_grad()
def read(
    model: Transformer,
    batches: Iterable[Batch],
    token_bytes: np.ndarray,
    *,
    context_length: int,
    num_blocks: int,
    top_p: float | None,
) -> Reading:
    """Score batches of text with so many blocks and count those that are read.

    Args:
        token_bytes: int [vocab], UTF-8 bytes that each id stands for.

    Raises:
        ValueError: as reading, or the text has nothing to predict.
    """
    other, probe, kept = reading(model, num_blocks=num_blocks, top_p=top_p), Probe(), list(batches)
    scored = bits_per_byte(
        {"model": ModelScorer(other).nats},
        iter(kept),
        token_bytes,
        context_length=context_length,
        buckets=1,
    )["model"].total.bits_per_byte
    if scored is None:
        raise ValueError("the held-out text has no byte to predict")
    for batch in kept:
        on_device = batch.to(other.embedding.weight.device)
        inputs = PackedInputs(on_device.positions, on_device.cu_seqlens, probe=probe)
        other(on_device.ids, inputs)
    means = [seen.selected_blocks for seen in probe.summary().values()]
    blocks = fmean(mean for mean in means if mean is not None)
    return Reading(num_blocks, top_p, blocks, scored)
