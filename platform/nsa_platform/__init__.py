"""nsa_platform: train and serve language models with Native Sparse Attention."""

__version__ = "0.1.0"
