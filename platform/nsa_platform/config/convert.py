"""What a checkpoint with full attention becomes: its new attention, and where it is written."""

from typing import Annotated, Literal

from pydantic import Field, PositiveInt

from nsa_platform.config.base import Strict
from nsa_platform.config.locations import Location
from nsa_platform.config.model import NsaChoices
from nsa_platform.config.runs import RunName


class NsaConversion(NsaChoices):
    """Native Sparse Attention in the place of full attention."""

    gate_bias: tuple[float, float, float] = (-4.7, -4.7, 4.0)
    """Initial bias of the gates in the order cmp, slc, win. With these the window has 0.982 of
    the output and the three gates add up to one: within the window the model is nearly what it
    was, and the other branches open in training. With [-6, 6, -6] it reads what it selects: with
    branch_kv=shared and compression=mean a model that looks far back goes on doing so, where means
    of a few tokens (compression_block_size) tell its keys apart."""


class FullConversion(Strict):
    """Full attention as it was: the same function under this platform's names."""

    kind: Literal["full"] = "full"


class ConvertRun(Strict):
    """A checkpoint with full attention, of transformers or our own, to a model with NSA."""

    name: RunName
    """Name of the model."""
    checkpoint: Location
    """Folder with config.json, safetensors and tokenizer.json, local or s3://: Llama-, Mistral- or
    Qwen-shaped, or an exported model of this platform."""
    attention: Annotated[NsaConversion | FullConversion, Field(discriminator="kind")]
    max_context: PositiveInt | None = None
    """Longest sequence in tokens that the model is meant for; default: the checkpoint's. With NSA
    it holds at least the blocks that every query reads."""
    seed: int = 0
    """Initialisation of phi's matrices; whatever it is, phi starts as the mean."""
    output: Location
    """Folder of the model, local or s3://; an earlier one there is replaced as a whole."""
    cache_dir: Location | None = None
    """Where remote files are kept locally; default: a folder under the system's temporary one."""
