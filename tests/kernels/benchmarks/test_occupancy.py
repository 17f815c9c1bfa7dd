"""The occupancy benchmark: arithmetic on a CPU, a real profile on a GPU."""

import pytest
import torch

from benchmarks import occupancy as benchmark
from benchmarks.occupancy import Launch, launches_of, read_trace, records_of


def test_long_kernels_count_by_their_time() -> None:
    launches = [
        Launch("choose", us=30.0, occupancy=0.5, registers=64, shared_bytes=0),
        Launch("attend", us=60.0, occupancy=0.125, registers=168, shared_bytes=4096),
        Launch("attend", us=10.0, occupancy=0.25, registers=255, shared_bytes=2048),
    ]
    found = {record["name"]: record for record in records_of("64k", launches, flops=4e7, rate=1e12)}
    assert found["64k/occupancy"]["value"] == pytest.approx(0.3 * 0.5 + 0.6 * 0.125 + 0.1 * 0.25)
    assert found["64k/fullest"]["value"] == 0.5
    # 40 us of products in 100 us of kernels.
    assert found["64k/products"]["value"] == pytest.approx(0.4)
    assert found["64k/time"]["value"] == pytest.approx(0.1)
    attend = found["64k/kernel/attend"]
    assert attend["value"] == pytest.approx((60 * 0.125 + 10 * 0.25) / 70)
    assert (attend["us"], attend["launches"]) == (70.0, 2)
    assert (attend["registers"], attend["shared_bytes"]) == (255, 4096)
    names = [name for name in found if "/kernel/" in name]
    assert names == ["64k/kernel/attend", "64k/kernel/choose"]


def test_a_trace_holds_more_than_kernels() -> None:
    arguments = {
        "est. achieved occupancy %": 25,
        "registers per thread": 90,
        "shared memory": 512,
    }
    kernel = {"cat": "kernel", "name": "attend", "dur": 1.5, "args": arguments}
    copy = {"cat": "gpu_memcpy", "name": "Memcpy", "dur": 9.0, "args": {}}
    assert read_trace({"traceEvents": [copy, kernel, {"ph": "M"}]}) == [
        Launch("attend", us=1.5, occupancy=0.25, registers=90, shared_bytes=512)
    ]


@pytest.mark.gpu
def test_a_profile_of_a_product() -> None:
    a = torch.randn(1024, 1024, device="cuda")
    (launch,) = launches_of(lambda: a @ a)
    assert launch.us > 0
    assert 0 < launch.occupancy <= 1
    assert launch.registers > 0


def test_without_a_gpu_it_says_so(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    monkeypatch.setattr("sys.argv", ["occupancy.py"])
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert benchmark.main() == 2
    assert "GPU" in capsys.readouterr().err
