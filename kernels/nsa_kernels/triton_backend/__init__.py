"""The Triton kernels behind every op: plain tensors in, plain tensors out, no autograd."""
