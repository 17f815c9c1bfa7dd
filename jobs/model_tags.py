"""Tags by which runs of models are found and compared in MLflow, the same for every job."""

from nsa_platform.config.model import ModelConfig
from nsa_platform.model.cost import count_parameters


def model_tags(model: ModelConfig, context_length: int) -> dict[str, str]:
    """nsa.model, nsa.attention, nsa.parameters and nsa.context, the tokens of a row."""
    return {
        "nsa.model": model.name,
        "nsa.attention": model.attention.kind,
        "nsa.parameters": str(count_parameters(model).total),
        "nsa.context": str(context_length),
    }
