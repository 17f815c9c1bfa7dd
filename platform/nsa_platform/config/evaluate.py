"""What is measured on a trained model."""

from typing import Annotated, Literal

from pydantic import Field, PositiveInt

from nsa_platform.config.base import Strict


class BitsPerByteConfig(Strict):
    """Compression of held-out text, a unit that does not depend on the tokenizer."""

    tokens: PositiveInt = 65536
    """Held-out tokens that are read."""
    context_length: PositiveInt = 1024
    """Tokens of one row; documents are cut at row ends."""
    sequences_per_batch: PositiveInt = 4
    """Rows that go through the model at once."""
    position_buckets: PositiveInt = 8
    """Equal parts of the context for which the loss is given separately."""
    baseline_tokens: PositiveInt = 4_000_000
    """Training tokens, at most, from which the unigram and bigram baselines count."""


class NeedleConfig(Strict):
    """Needle in a haystack over length x depth."""

    lengths: Annotated[tuple[Annotated[int, Field(ge=64)], ...], Field(min_length=1)] = (
        256,
        512,
        1024,
    )
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
    filler: Literal["heldout", "synthetic"] = "heldout"
    """heldout: the haystack is held-out text of the data. synthetic: five plain sentences."""
    seed: int = 0
