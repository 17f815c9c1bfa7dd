"""The benchmarks' inputs and counts of work, and a whole run on a CPU whose clock is made up."""

import json
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch

import nsa_kernels
from benchmarks import bench, gate, measure
from benchmarks.choices import uniform_blocks
from benchmarks.counting import attended_pairs, least_bytes, least_flops
from benchmarks.exact import selected_row, spot_error, whole_row
from benchmarks.gate import RedGate, check_gate
from benchmarks.overlap import measure_overlap
from benchmarks.peers import TORCH
from benchmarks.workloads import (
    LONG,
    WORKLOADS,
    Drift,
    Workload,
    drifting_queries,
    make_tensors,
)
from nsa_kernels import NsaConfig, compressed_attention, reference, select_blocks

CONFIG = NsaConfig(8, 4, 16, 4, 1, 2, 24)
SMALL = Workload(
    "small",
    200,
    heads=4,
    groups=2,
    key_width=16,
    value_width=16,
    dtype=torch.float32,
    config=CONFIG,
)


@pytest.fixture(autouse=True)
def fast_backend(monkeypatch: pytest.MonkeyPatch) -> None:
    """The kernels have tests of their own; interpreted they would take minutes here."""
    monkeypatch.setenv("NSA_KERNELS_BACKEND", "torch")


def test_pairs_are_counted_as_the_ops_see_them() -> None:
    """An op over constant keys has lse = log(pairs of the row) at scale times q.k = 0."""
    tensors = make_tensors(SMALL, "cpu")
    q = torch.zeros_like(tensors.q)
    config = SMALL.config
    lses = {
        "compressed": reference.compressed_attention(
            q, tensors.k_cmp, tensors.v_cmp, config=config
        )[1],
        "sliding": reference.sliding_attention(q, tensors.k_win, tensors.v_win, config=config)[1],
        "selected": reference.selected_attention(
            q, tensors.k_slc, tensors.v_slc, tensors.blocks, config=config
        )[1],
    }
    total = 0.0
    for op, lse in lses.items():
        pairs = attended_pairs(SMALL, op)
        assert abs(float(lse.double().exp().sum()) / SMALL.heads - pairs) < 1e-2
        total += pairs
    assert attended_pairs(SMALL, "nsa") == total
    assert attended_pairs(SMALL, "full") == 200 * 201 / 2
    with pytest.raises(ValueError, match="op='dense' is not"):
        attended_pairs(SMALL, "dense")


def test_work_at_64k() -> None:
    """64k tokens, 64 heads of 128, 4 groups, counted by hand in TFLOP and GB."""
    workload = next(w for w in WORKLOADS if w.name == "64k")
    forward = {op: least_flops(workload, op, "forward") / 1e12 for op in (*gate.OPS,)}
    rounded = {op: round(value, 2) for op, value in forward.items()}
    assert rounded == {
        "compressed": 4.39,
        "selected": 2.12,
        "sliding": 1.10,
        "full": 70.37,
        "nsa": 7.61,
    }
    assert least_flops(workload, "full", "backward") == 2.5e12 * forward["full"]
    assert least_flops(workload, "select_blocks", "forward") == 0.5e12 * forward["compressed"]
    assert least_flops(workload, "compress_and_select", "forward") == 1e12 * forward["compressed"]
    wide = replace(workload, key_width=192)
    ratio = least_flops(wide, "full", "backward") / least_flops(workload, "full", "backward")
    assert ratio == (3 * 192 + 2 * 128) / (5 * 128)

    q = out = 65536 * 64 * 128 * 2
    pair = 65536 * 4 * 256 * 2
    lse, chosen, gates = 65536 * 64 * 4, 65536 * 4 * 16 * 4, 65536 * 64 * 3 * 2
    assert least_bytes(workload, "full", "forward") == q + pair + out
    assert least_bytes(workload, "selected", "forward") == q + pair + chosen + out + lse
    assert least_bytes(workload, "sliding", "backward") == 2 * (q + pair) + 2 * out + lse
    compressed = 4095 * 4 * 256 * 2
    assert least_bytes(workload, "nsa", "forward") == q + compressed + 2 * pair + gates + out
    assert least_bytes(workload, "select_blocks", "forward") == (q + compressed // 2 + lse + chosen)


def test_drifting_queries_choose_alike() -> None:
    """The more they have in common, the more blocks they share; their variance stays 1."""
    shape = Workload(
        "drift", 4096, heads=16, groups=1, key_width=64, dtype=torch.float32, config=CONFIG
    )
    torch.manual_seed(0)
    k_cmp = torch.randn(1023, 1, 64)
    kept = []
    for share in (0.0, 0.3, 0.9):
        q = drifting_queries(shape, Drift(share, life=32), "cpu")
        assert q.shape == (4096, 16, 64)
        assert abs(float(q.var()) - 1) < 0.1
        _, lse = compressed_attention(q, k_cmp, k_cmp, config=CONFIG)
        blocks = select_blocks(q, k_cmp, lse, config=CONFIG)
        kept.append(measure_overlap(blocks, CONFIG).kept)
    assert kept[0] < 0.1 and kept[0] < kept[1] < kept[2] and kept[2] > 0.6


def test_exact_rows_are_those_of_the_reference() -> None:
    """In float64, at rows with no compressed block, few and many blocks, on both sides of edges."""
    tensors = make_tensors(replace(SMALL, dtype=torch.float64), "cpu")
    whole = gate.op_output(
        nsa_kernels, "nsa", gate.op_tensors("nsa", tensors), tensors.blocks, CONFIG
    )
    selected = gate.op_output(
        nsa_kernels, "selected", gate.op_tensors("selected", tensors), tensors.blocks, CONFIG
    )
    rows = [0, 6, 7, 8, 15, 16, 63, 64, 100, 127, 128, 199]
    for t in rows:
        exact = whole_row(tensors, t, CONFIG)
        assert exact is not None
        torch.testing.assert_close(whole[t], exact)
        torch.testing.assert_close(selected[t], selected_row(tensors, t, CONFIG))
    assert spot_error("nsa", whole, tensors, CONFIG, rows) < 1e-12
    assert spot_error("selected", selected, tensors, CONFIG, rows) < 1e-12
    assert spot_error("nsa", whole * 1.5, tensors, CONFIG, rows) > 0.3
    alike = replace(tensors, q=torch.zeros_like(tensors.q))
    assert whole_row(alike, 199, CONFIG) is None and whole_row(alike, 63, CONFIG) is not None


def test_gate_refuses_a_wrong_op(monkeypatch: pytest.MonkeyPatch) -> None:
    short = replace(SMALL, tokens=100)
    check_gate([short], "cpu", short)

    def broken(module: Any, op: str, *rest: Any) -> torch.Tensor:
        out = honest(module, op, *rest)
        return out * 1.02 if module is not reference and op == "sliding" else out

    honest = gate.op_output
    monkeypatch.setattr(gate, "op_output", broken)
    with pytest.raises(RedGate, match="sliding"):
        check_gate([short], "cpu", short)


def shrunk(workload: Workload, tokens: int) -> Workload:
    """The workload's ops at a size for a CPU."""
    return replace(
        workload,
        tokens=tokens,
        heads=8,
        groups=2 if workload.groups == 4 else 4,
        key_width=workload.key_width // 8,
        value_width=16,
        dtype=torch.float32,
        config=CONFIG,
    )


@pytest.fixture
def still_clock(monkeypatch: pytest.MonkeyPatch) -> None:
    """Every call runs once and took 2 ms."""

    def clock(run: Callable[[], Any], rep_ms: int = 0) -> float:
        run()
        return 2.0

    monkeypatch.setattr(measure, "median_ms", clock)
    monkeypatch.setattr(measure, "once_ms", clock)
    small = {"size": 64, "copied": 2**10}
    ceilings = measure.ceilings
    monkeypatch.setattr(measure, "ceilings", lambda device: ceilings(device, **small))
    monkeypatch.setattr(
        bench, "WORKLOADS", tuple(shrunk(w, 160 + w.tokens // 1024) for w in WORKLOADS)
    )
    monkeypatch.setattr(bench, "LONG", tuple(shrunk(w, 320) for w in LONG))
    monkeypatch.setattr(bench, "measure_decode", lambda batches, contexts: iter(()))


def test_a_whole_run(still_clock: None, tmp_path_factory: pytest.TempPathFactory) -> None:
    path = tmp_path_factory.mktemp("bench") / "kernels.json"
    names = {w.name for w in (*WORKLOADS, *LONG)} | {"decode"}
    parts = bench.sections(names, "cpu", list(TORCH), quick=False)
    records, broken = bench.run(parts, {"device": "a CPU"}, path)
    assert broken == 0
    assert json.loads(path.read_text()) == records
    by_name = {record["name"]: record for record in records}
    assert len(by_name) == len(records)
    for op in ("compressed", "selected", "selected_real", "sliding", "full", "nsa", "nsa_real"):
        for direction in ("forward", "backward"):
            record = by_name[f"64k/{op}/{direction}"]
            assert (record["value"], record["unit"]) == (2.0, "ms")
            assert record["flops"] > 0 and record["bytes"] > 0
    for name in ("64k/compress_and_select/forward", "8k/select_blocks/forward", "12k/nsa/forward"):
        assert name in by_name
    assert "10k/selected/forward" not in by_name
    assert by_name["32k-r1/selected_real/backward"]["groups"] == 4
    for workload in ("264k", "1m"):
        assert by_name[f"{workload}/nsa/forward"]["spot_error"] < 1e-5
        assert f"{workload}/nsa/backward" not in by_name
    for choice in ("selected", "selected_real", "nsa", "nsa_real"):
        assert set(by_name[f"overlap/64k/{choice}"]["union"]) == {"2", "4", "8", "16"}


def test_a_part_that_breaks_leaves_the_others(tmp_path_factory: pytest.TempPathFactory) -> None:
    def broken() -> Any:
        yield {"name": "a/b/forward", "value": 1.0, "unit": "ms"}
        raise RuntimeError("out of memory")

    path = tmp_path_factory.mktemp("bench") / "kernels.json"
    good = [{"name": "c/d/forward", "value": 2.0, "unit": "ms"}]
    records, count = bench.run([("one", broken), ("two", lambda: good)], {}, path)
    assert count == 1
    assert [record["name"] for record in records] == ["a/b/forward", "c/d/forward"]


def test_uniform_blocks_are_in_the_tensors() -> None:
    torch.manual_seed(0)
    blocks = make_tensors(SMALL, "cpu").blocks
    torch.manual_seed(0)
    assert torch.equal(blocks, uniform_blocks(200, 2, CONFIG, "cpu"))
