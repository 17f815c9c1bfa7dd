"""The layer's benchmark on a CPU: its parts compute what the layer does; timing needs a GPU."""

import pytest
import torch

from benchmarks import layer as benchmark
from benchmarks.layer import AROUND, PROJECTIONS, make_case, parts_of, table
from nsa_platform.config.model import ModelConfig

SMALL = {"kind": "nsa", "query_heads": 4, "kv_heads": 2, "key_width": 16, "value_width": 16}


def test_parts_run_both_ways_and_the_op_receives_what_the_layer_gives_it(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("NSA_KERNELS_BACKEND", "torch")
    config = ModelConfig.parse({**benchmark.MODEL, "width": 64, "attention": SMALL})
    case = make_case(config, 200, "cpu", torch.float32)
    parts = parts_of(case)
    assert set(parts) == {"layer", "op", *AROUND, *PROJECTIONS}
    for part in parts.values():
        gradients = part.both_ways()()
        assert isinstance(gradients, tuple)
        assert len(gradients) == len(part.inputs) + len(part.weights)
    (mixed,) = parts["op"].outputs()
    (hidden,) = parts["layer"].outputs()
    torch.testing.assert_close(case.layer.output(mixed.flatten(1)), hidden)


def test_overhead_is_what_neither_the_op_nor_a_projection_takes() -> None:
    times = {"layer": 10.0, "op": 6.0, "phi": 0.5, "rotary q": 0.25, "rotary k": 0.125}
    times |= {"gates": 0.0625} | dict.fromkeys(PROJECTIONS, 0.75)
    rows = table({f"{n}/eager/{way}": ms for n, ms in times.items() for way in ("forward", "both")})
    overhead = next(row for row in rows if row.startswith("| overhead |"))
    assert overhead.split(" | ")[1:4] == ["1.000", "1.000", "10.0%"]
    rest = next(row for row in rows if row.startswith("| the rest |"))
    assert rest.split(" | ")[1] == f"{1 - 0.9375:.3f}"


def test_without_a_gpu_it_says_so(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    monkeypatch.setattr("sys.argv", ["layer.py"])
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert benchmark.main() == 2
    assert "GPU" in capsys.readouterr().err
