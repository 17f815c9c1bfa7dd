"""Training-free policies over the keys and values of a model with full attention."""
