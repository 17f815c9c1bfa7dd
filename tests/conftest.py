"""Imports the kernels under Triton's interpreter when no GPU is there, before any test does.

Triton reads TRITON_INTERPRET once, when its kernels are decorated. The variable is put back after
the import: it also steers the dispatch of CPU tensors, which only the kernels' tests want.
"""

import importlib
import os

import pytest
import torch


def _import_kernels() -> None:
    before = os.environ.get("TRITON_INTERPRET")
    if not torch.cuda.is_available():
        os.environ["TRITON_INTERPRET"] = "1"
    importlib.import_module("nsa_kernels")
    if before is None:
        os.environ.pop("TRITON_INTERPRET", None)
    else:
        os.environ["TRITON_INTERPRET"] = before


def pytest_configure(config: pytest.Config) -> None:
    _import_kernels()
