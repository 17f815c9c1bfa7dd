"""AdamW: matrices decay, the rest does not."""

from fnmatch import fnmatch

import torch
from torch import nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor

from nsa_platform.config.train import OptimizerConfig

# Embeddings, norms, biases, gates and phi's position encodings, by parameter name.
NO_DECAY = ("embedding.weight", "*norm.weight", "*.bias", "*.gate.*", "*.compress_*.position")


def decays(name: str) -> bool:
    """Whether weight decay pulls on the parameter of this name."""
    return not any(fnmatch(name, pattern) for pattern in NO_DECAY)


def build_optimizer(model: nn.Module, config: OptimizerConfig) -> torch.optim.AdamW:
    """AdamW over all parameters of the model; the learning rate is set before each step.

    Parameters on different meshes are in different groups: one operation takes one mesh.

    Source:
        arXiv 1711.05101 (decoupled weight decay).
    """
    groups: dict[tuple[bool, DeviceMesh | None], list[nn.Parameter]] = {}
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            groups.setdefault((decays(name), _mesh(parameter)), []).append(parameter)
    return torch.optim.AdamW(
        [
            {"params": parameters, "weight_decay": config.weight_decay if is_decayed else 0.0}
            for (is_decayed, _), parameters in sorted(
                groups.items(), key=lambda group: not group[0][0]
            )
        ],
        lr=config.learning_rate,
        betas=(config.beta1, config.beta2),
        eps=config.eps,
        fused=next(model.parameters()).device.type == "cuda",
    )


def _mesh(parameter: nn.Parameter) -> DeviceMesh | None:
    return parameter.device_mesh if isinstance(parameter, DTensor) else None


def set_learning_rate(optimizer: torch.optim.Optimizer, learning_rate: float) -> None:
    """Use this learning rate in the next step."""
    for group in optimizer.param_groups:
        group["lr"] = learning_rate
