"""An exported model as transformers sees it: AutoConfig and AutoModelForCausalLM after register().

    from nsa_platform.model import hf
    hf.register()
    model = AutoModelForCausalLM.from_pretrained(folder)

Forward only: scores of whole sequences. Generation has its own paged cache, in serve/.
"""

from typing import Any

import torch
from torch import Tensor
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedConfig, PreTrainedModel
from transformers.modeling_outputs import CausalLMOutput

from nsa_platform.config.model import ModelConfig
from nsa_platform.model.inputs import PackedInputs
from nsa_platform.model.transformer import Transformer
from nsa_platform.model.weights import CONFIG_KEY, MODEL_TYPE


class NsaHfConfig(PreTrainedConfig):
    """config.json of an export; `nsa_platform` holds the ModelConfig."""

    model_type = MODEL_TYPE
    nsa_platform: dict[str, Any] | None = None

    def platform_config(self) -> ModelConfig:
        """The platform's own config. Raises ConfigError if the entry is missing or wrong."""
        return ModelConfig.parse(self.nsa_platform or {}, source=f"config.json: {CONFIG_KEY}")


class NsaForCausalLM(PreTrainedModel):
    """The platform's Transformer behind transformers' names."""

    config_class = NsaHfConfig
    base_model_prefix = "model"

    def __init__(self, config: NsaHfConfig) -> None:
        super().__init__(config)
        self.model = Transformer(config.platform_config())
        self.post_init()

    def forward(
        self,
        input_ids: Tensor,
        attention_mask: Tensor | None = None,
        **unsupported: Any,
    ) -> CausalLMOutput:
        """Scores [batch, tokens, vocab] of unpadded sequences, input_ids [batch, tokens].

        Raises:
            ValueError: attention_mask marks padding, or another argument is given.
        """
        given = sorted(name for name, value in unsupported.items() if value is not None)
        if given:
            raise ValueError(f"{', '.join(given)}: not taken; only input_ids and attention_mask")
        if attention_mask is not None and not bool(attention_mask.all()):
            raise ValueError("attention_mask marks padding; give sequences of equal length")
        rows, length = input_ids.shape
        inputs = PackedInputs.from_lengths([length] * rows, device=input_ids.device)
        hidden = self.model(input_ids.flatten(), inputs).hidden
        return CausalLMOutput(logits=self.model.logits(hidden).unflatten(0, (rows, length)))

    @torch.no_grad()
    def _init_weights(self, module: torch.nn.Module) -> None:
        """Weights come from an export or from init_weights; transformers' own rules do not fit."""


def register() -> None:
    """Teach transformers' Auto classes the model type "nsa". Calling it again changes nothing."""
    AutoConfig.register(MODEL_TYPE, NsaHfConfig, exist_ok=True)
    AutoModelForCausalLM.register(NsaHfConfig, NsaForCausalLM, exist_ok=True)
