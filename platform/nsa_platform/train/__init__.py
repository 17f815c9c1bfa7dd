"""Training: loss, optimizer, checkpoints, the loop, and what Ray runs on a worker."""
