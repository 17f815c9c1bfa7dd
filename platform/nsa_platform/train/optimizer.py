"""AdamW with two groups of parameters: matrices decay, the rest does not."""

from fnmatch import fnmatch

import torch
from torch import nn

from nsa_platform.config.train import OptimizerConfig

# Embeddings, norms, biases, gates and phi's position encodings, by parameter name.
NO_DECAY = ("embedding.weight", "*norm.weight", "*.bias", "*.gate.*", "*.compress_*.position")


def decays(name: str) -> bool:
    """Whether weight decay pulls on the parameter of this name."""
    return not any(fnmatch(name, pattern) for pattern in NO_DECAY)


def build_optimizer(model: nn.Module, config: OptimizerConfig) -> torch.optim.AdamW:
    """AdamW over all parameters of the model; the learning rate is set before each step.

    Source:
        arXiv 1711.05101 (decoupled weight decay).
    """
    parameters = [(name, p) for name, p in model.named_parameters() if p.requires_grad]
    groups = [
        {
            "params": [p for name, p in parameters if decays(name)],
            "weight_decay": config.weight_decay,
        },
        {"params": [p for name, p in parameters if not decays(name)], "weight_decay": 0.0},
    ]
    return torch.optim.AdamW(
        groups,
        lr=config.learning_rate,
        betas=(config.beta1, config.beta2),
        eps=config.eps,
        fused=next(model.parameters()).device.type == "cuda",
    )


def set_learning_rate(optimizer: torch.optim.Optimizer, learning_rate: float) -> None:
    """Use this learning rate in the next step."""
    for group in optimizer.param_groups:
        group["lr"] = learning_rate
