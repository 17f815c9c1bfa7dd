"""LoRA: which weights a run adapts by low-rank matrices, and which it trains in full besides."""

from typing import Annotated, Literal

from pydantic import Field, PositiveFloat, PositiveInt

from nsa_platform.config.base import Strict
from nsa_platform.config.model import (
    FullAttentionConfig,
    MobaAttentionConfig,
    ModelConfig,
    NsaAttentionConfig,
)

Target = Literal["query", "key_value", "output", "gate_up", "down"]
TARGETS: tuple[Target, ...] = ("query", "key_value", "output", "gate_up", "down")
Saved = Literal["gate", "compression", "norm", "embedding"]


class LoraConfig(Strict):
    """Low-rank adapters beside frozen weights: W x + (alpha / rank) B A x (arXiv 2106.09685).

    B starts at zero, so that step 0 is the model that the run starts from. The finished model has
    the adapters merged into its weights; they are kept alone as well. Names are those of PEFT where
    it has them.
    """

    rank: PositiveInt = 8
    """r. Rows of each A. A weight that holds several projections (keys and values of every branch;
    gate and up of SwiGLU) has an adapter of this rank for each of them."""
    alpha: PositiveFloat = 16.0
    """The adapters' product counts alpha / rank times."""
    dropout: Annotated[float, Field(ge=0, lt=1)] = 0.0
    """Share of an adapter's inputs that a training step leaves out."""
    target_modules: Annotated[tuple[Target, ...], Field(min_length=1)] = TARGETS
    """Weights that get adapters, in all layers. query, key_value and output are attention's (for
    mla, key_value makes keys and values of the latent); gate_up and down those of SwiGLU, in dense
    layers and shared experts. Routers and routed experts stay frozen, and so do the biases that
    steer their choice."""
    modules_to_save: tuple[Saved, ...] = ()
    """Weights that are trained in full and kept with the adapters. gate: attention's gates.
    compression: phi. norm: all norms. embedding: the embedding, and the output head where it has
    weights of its own."""

    def model_problems(self, model: ModelConfig) -> list[str]:
        """What this asks for and the model does not have; empty if nothing."""
        attention, problems = model.attention, []
        if self.rank >= model.width:
            problems.append(f"rank={self.rank} must be less than model.width={model.width}")
        for name in ("target_modules", "modules_to_save"):
            words = getattr(self, name)
            if len(set(words)) < len(words):
                problems.append(f"{name}={list(words)} must name each once")
        is_nsa = isinstance(attention, NsaAttentionConfig)
        is_full = isinstance(attention, FullAttentionConfig | MobaAttentionConfig)
        has_gate = attention.gates == "sigmoid" if is_nsa else is_full and attention.gated
        if "gate" in self.modules_to_save and not has_gate:
            problems.append("modules_to_save: the model's attention has no gate")
        if "compression" in self.modules_to_save and not (
            is_nsa and attention.compression != "mean"
        ):
            problems.append("modules_to_save: the model's compression has no weights")
        moe = model.moe
        is_routed = moe is not None and not moe.shared_experts and moe.dense_layers == 0
        if is_routed and {"gate_up", "down"} & set(self.target_modules):
            problems.append(
                "target_modules: gate_up and down are those of dense layers and shared experts, "
                "of which the model has none"
            )
        return problems
