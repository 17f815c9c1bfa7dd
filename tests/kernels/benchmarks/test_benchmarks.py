"""The benchmarks' inputs, counts of work and page; timing itself needs a GPU."""

from dataclasses import replace

import torch

from benchmarks.report import render
from benchmarks.workloads import WORKLOADS, Workload, attended_pairs, attention_flops, make_tensors
from nsa_kernels import NsaConfig, reference

SMALL = Workload(
    "small",
    200,
    heads=4,
    groups=2,
    key_width=16,
    value_width=16,
    dtype=torch.float32,
    config=NsaConfig(8, 4, 16, 4, 1, 2, 24),
)


def test_blocks_are_a_legal_choice() -> None:
    blocks = make_tensors(SMALL, "cpu").blocks
    for t in range(SMALL.tokens):
        own = t // 16
        for chosen in blocks[t].tolist():
            picked = [j for j in chosen if j >= 0]
            assert chosen == picked + [-1] * (4 - len(picked))
            assert picked == sorted(set(picked))
            assert len(picked) == min(4, own + 1)
            assert {0, own, max(0, own - 1)} <= set(picked)


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
        pairs = attended_pairs(SMALL, op, tensors.blocks)
        assert abs(float(lse.double().exp().sum()) / SMALL.heads - pairs) < 1e-2
        total += pairs
    assert attended_pairs(SMALL, "nsa", tensors.blocks) == total
    assert attended_pairs(SMALL, "full", tensors.blocks) == 200 * 201 / 2


def test_flops_of_the_full_baseline() -> None:
    """64k tokens of 64 heads of 128: 70.4 TFLOP forward, as counted by hand."""
    workload = next(w for w in WORKLOADS if w.name == "64k")
    pairs = attended_pairs(workload, "full", torch.empty(0))
    assert round(attention_flops(workload, "forward", pairs) / 1e12, 1) == 70.4
    backward = attention_flops(workload, "backward", pairs)
    assert backward == 2.5 * attention_flops(workload, "forward", pairs)
    wide = replace(workload, key_width=192)
    assert attention_flops(wide, "backward", 1.0) == 2 * 64 * (3 * 192 + 2 * 128)


def test_page_shows_times_floors_and_ratios() -> None:
    about = {
        "device": "a GPU",
        "versions": {"torch": "1", "triton": "2"},
        "commit": "abc",
        "date": "2026-01-01",
        "command": "python kernels/benchmarks/bench.py",
    }
    times = {"nsa/forward": 2.0, "full/forward": 8.0, "nsa/backward": 4.0, "full/backward": 6.0}
    records = [
        {"name": "ceiling/matmul", "value": 500.0, "unit": "TFLOP/s", **about},
        {"name": "ceiling/copy", "value": 3.0, "unit": "TB/s", **about},
        *(
            {
                "name": f"8k/{name}",
                "value": ms,
                "unit": "ms",
                "direction": name.split("/")[1],
                "flops": 5e11,
                **about,
            }
            for name, ms in times.items()
        ),
        {"name": "decode/nsa/b", "value": 7.25, "unit": "us", "batch": 8, "context": 1024, **about},
    ]
    page = render(records)
    assert "a GPU; torch 1, triton 2; commit abc; 2026-01-01." in page
    assert "| nsa | 2.000 | 50 | 4.000 | 25 |" in page
    assert "forward 4.00 times as fast as full; backward 1.50 times as fast as full" in page
    assert "| 8 | 1024 | 7.2 |" in page
