"""What is measured on a trained model."""

from typing import Annotated

from pydantic import Field, PositiveInt

from nsa_platform.config.base import Strict


class BitsPerByteConfig(Strict):
    """Compression of held-out text, a unit that does not depend on the tokenizer."""

    tokens: PositiveInt = 65536
    """Held-out tokens that are read."""
    context_length: PositiveInt = 1024
    position_buckets: PositiveInt = 8
    """Equal parts of the context for which the loss is given separately."""


class NeedleConfig(Strict):
    """Needle in a haystack over length x depth."""

    lengths: Annotated[tuple[PositiveInt, ...], Field(min_length=1)] = (256, 512, 1024)
    """Prompt lengths in tokens."""
    depths: Annotated[tuple[Annotated[float, Field(ge=0, le=1)], ...], Field(min_length=1)] = (
        0.0,
        0.25,
        0.5,
        0.75,
        1.0,
    )
    """Where the needle stands, as a share of the haystack."""
    samples: PositiveInt = 2
    """Needles per cell."""
    seed: int = 0
