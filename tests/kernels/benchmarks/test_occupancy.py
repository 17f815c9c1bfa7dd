"""The occupancy benchmark: arithmetic on a CPU, a real profile on a GPU."""

from typing import Any

import pytest
import torch

from benchmarks import occupancy as benchmark
from benchmarks.occupancy import Launch, Multiprocessors, launches_of, read_trace, records_of

H100 = Multiprocessors(count=132, warps=64, registers=65536, shared_bytes=233472)


def launch(name: str = "attend", **changes: Any) -> Launch:
    usual = {"us": 10.0, "blocks": 10_000, "threads": 128, "registers": 32, "shared_bytes": 0}
    return Launch(name, **{**usual, **changes})


@pytest.mark.parametrize(
    ("changes", "warps"),
    [
        ({}, 64),
        ({"threads": 32}, 32),  # 32 blocks of one warp
        ({"registers": 128}, 16),
        ({"registers": 129}, 12),  # 136 for each thread: 15 warps, of which whole blocks fit
        ({"registers": 255, "threads": 256}, 8),
        ({"shared_bytes": 98336, "threads": 256}, 16),  # two blocks in 228 KiB
        ({"shared_bytes": 131616, "threads": 256}, 8),
        ({"blocks": 66}, 2),  # every second multiprocessor has a block of four warps
        ({"blocks": 132, "threads": 1024}, 32),
    ],
)
def test_warps_that_fit(changes: dict[str, Any], warps: int) -> None:
    assert launch(**changes).occupancy(H100) == pytest.approx(warps / 64)


def test_long_kernels_count_by_their_time() -> None:
    launches = [
        launch("choose", us=30.0),
        launch("attend", us=60.0, registers=128, shared_bytes=4096),
        launch("attend", us=10.0, registers=255, shared_bytes=2048),
    ]
    found = {
        record["name"]: record for record in records_of("64k", launches, H100, flops=4e7, rate=1e12)
    }
    assert found["64k/occupancy"]["value"] == pytest.approx(0.3 + 0.6 * 0.25 + 0.1 * 0.125)
    # 40 us of products in 100 us of kernels.
    assert found["64k/products"]["value"] == pytest.approx(0.4)
    assert found["64k/time"]["value"] == pytest.approx(0.1)
    attend = found["64k/kernel/attend"]
    assert attend["value"] == pytest.approx((60 * 0.25 + 10 * 0.125) / 70)
    assert (attend["us"], attend["launches"]) == (70.0, 2)
    assert (attend["registers"], attend["shared_bytes"]) == (255, 4096)
    names = [name for name in found if "/kernel/" in name]
    assert names == ["64k/kernel/attend", "64k/kernel/choose"]


def test_a_trace_holds_more_than_kernels() -> None:
    arguments = {
        "est. achieved occupancy %": 0,
        "registers per thread": 90,
        "shared memory": 512,
        "grid": [4, 3, 2],
        "block": [64, 2, 1],
    }
    kernel = {"cat": "kernel", "name": "attend", "dur": 1.5, "args": arguments}
    copy = {"cat": "gpu_memcpy", "name": "Memcpy", "dur": 9.0, "args": {}}
    (found,) = read_trace({"traceEvents": [copy, kernel, {"ph": "M"}]})
    assert found == Launch("attend", us=1.5, blocks=24, threads=128, registers=90, shared_bytes=512)


@pytest.mark.gpu
def test_a_profile_of_a_product() -> None:
    a = torch.randn(1024, 1024, device="cuda")
    (product,) = launches_of(lambda: a @ a)
    assert product.us > 0
    assert 0 < product.occupancy(Multiprocessors.of_device()) <= 1
    assert product.registers > 0


def test_without_a_gpu_it_says_so(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    monkeypatch.setattr("sys.argv", ["occupancy.py"])
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert benchmark.main() == 2
    assert "GPU" in capsys.readouterr().err
