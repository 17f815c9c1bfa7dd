"""Random state of a worker, to and from a checkpoint."""

import io

import torch
from torch import Tensor

from nsa_platform import storage
from nsa_platform.train.parallel import World


def file_name(rank: int) -> str:
    """Name of a worker's file in a checkpoint."""
    return f"rng-{rank:05d}.pt"


def taken(world: World) -> dict[str, Tensor]:
    """The state as it is."""
    state = {"cpu": torch.get_rng_state()}
    if world.device.type == "cuda":
        state["cuda"] = torch.cuda.get_rng_state(world.device)
    return state


def restore(uri: str, world: World) -> None:
    """Take it from the checkpoint at `uri`.

    A worker that did not exist when the snapshot was taken keeps its own.
    """
    place = storage.join(uri, file_name(world.rank))
    if not storage.exists(place):
        return
    state = torch.load(io.BytesIO(storage.read_bytes(place)), weights_only=True)
    torch.set_rng_state(state["cpu"])
    if world.device.type == "cuda" and "cuda" in state:
        torch.cuda.set_rng_state(state["cuda"], world.device)
