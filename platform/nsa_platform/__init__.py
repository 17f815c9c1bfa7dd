"""nsa_platform: train and serve language models with Native Sparse Attention."""
