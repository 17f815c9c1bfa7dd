"""Every Triton kernel compiles without a GPU, for the shapes in use, and fits shared memory."""

import json
import os
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).parents[3]
# Two processes, one for each of two cores.
SHARES = (("sm_90 narrow", "sm_80"), ("sm_90 wide", "gfx942", "sm_100"))
PARTS = tuple(part for share in SHARES for part in share)
TIMEOUT_S = 1100
pytestmark = pytest.mark.timeout(TIMEOUT_S + 60)
# What one program may have: 227 KB of a B200 and an H100, 163 KB of an A100, 64 KB of an MI300.
SHARED_BYTES = {
    "sm_100": 227 * 1024,
    "sm_90": 227 * 1024,
    "sm_80": 163 * 1024,
    "gfx942": 64 * 1024,
}
# Kernels that move or add numbers and have no product of matrices.
WITHOUT_DOTS = {
    "row_delta_kernel",
    "mix_forward_kernel",
    "mix_backward_kernel",
    "selected_backward_sum_kernel",
    "top_blocks_kernel",
    "locate_rows_kernel",
    "paged_append_kernel",
    "paged_merge_kernel",
    "paged_places_kernel",
    "merge_softmax_kernel",
    "merge_sum_kernel",
    "unite_choices_kernel",
}


def compile_share(parts: tuple[str, ...]) -> dict[str, Any]:
    """Run compile_ahead in a process of its own, where kernels are not interpreted."""
    environment = {
        **os.environ,
        "TRITON_INTERPRET": "0",
        "OMP_NUM_THREADS": "1",
        "PYTHONPATH": os.pathsep.join([str(ROOT / "kernels"), str(ROOT / "platform")]),
    }
    done = subprocess.run(
        [sys.executable, "-m", "tests.kernels.triton.compile_ahead", *parts],
        cwd=ROOT,
        env=environment,
        capture_output=True,
        text=True,
        timeout=TIMEOUT_S,
    )
    assert done.returncode == 0, f"{parts}:\n{done.stderr[-3000:]}"
    return json.loads(done.stdout.splitlines()[-1])


@pytest.fixture(scope="module")
def shares() -> list[dict[str, Any]]:
    """What each process reports: all kernels there are, and what it compiled for each part."""
    with ThreadPoolExecutor(len(SHARES)) as pool:
        return list(pool.map(compile_share, SHARES))


@pytest.fixture(scope="module")
def built(shares: list[dict[str, Any]]) -> dict[str, list[dict[str, Any]]]:
    """What was compiled for each part."""
    return {part: ones for share in shares for part, ones in share["built"].items()}


@pytest.mark.parametrize("target", SHARED_BYTES)
def test_every_kernel_compiles(
    shares: list[dict[str, Any]], built: dict[str, list[dict[str, Any]]], target: str
) -> None:
    names = {one["kernel"] for part in PARTS if part.startswith(target) for one in built[part]}
    wanted = set(shares[0]["kernels"])
    assert wanted
    assert names == wanted


@pytest.mark.parametrize("part", PARTS)
def test_shared_memory_fits(built: dict[str, list[dict[str, Any]]], part: str) -> None:
    allowed = SHARED_BYTES[part.split()[0]]
    assert not [one for one in built[part] if one["shared_bytes"] > allowed]


@pytest.mark.parametrize("part", PARTS)
def test_16_bit_products_use_tensor_cores(
    built: dict[str, list[dict[str, Any]]], part: str
) -> None:
    for one in built[part]:
        if "float32" not in one["shape"]:
            assert one["uses_tensor_cores"] == (one["kernel"] not in WITHOUT_DOTS), one
