"""Imports the kernels under Triton's interpreter where there is no GPU.

Triton reads TRITON_INTERPRET once, when it and its kernels are imported; so this must come before
any other import of nsa_kernels in the test process. The variable is put back afterwards: it also
steers the dispatch of CPU tensors, which only the kernels' own tests want.
"""

import importlib
import os

import torch


def import_kernels() -> None:
    """Import nsa_kernels, interpreted unless a GPU can run the kernels."""
    before = os.environ.get("TRITON_INTERPRET")
    if not torch.cuda.is_available():
        os.environ["TRITON_INTERPRET"] = "1"
        importlib.import_module("tests.kernels.quick_interpreter").install()
    importlib.import_module("nsa_kernels")
    if before is None:
        os.environ.pop("TRITON_INTERPRET", None)
    else:
        os.environ["TRITON_INTERPRET"] = before
