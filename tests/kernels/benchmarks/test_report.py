"""The benchmarks' page and pictures, from records that are made up."""

import json
from pathlib import Path
from typing import Any

import pytest

from benchmarks import report
from benchmarks.pictures import draw_occupancy
from benchmarks.report import Times, first_win, render, write_page

ABOUT = {
    "device": "a GPU",
    "versions": {"torch": "1", "triton": "2"},
    "commit": "abc",
    "date": "2026-01-01",
    "command": "python kernels/benchmarks/bench.py",
}
SHAPE = {"heads": 64, "groups": 4, "key_width": 128, "value_width": 128, "dtype": "bfloat16"}


def timed(name: str, ms: float, tokens: int, **more: Any) -> dict[str, Any]:
    """A record of 5e11 operations and 3e9 bytes: floors of 1 ms each at the ceilings below."""
    return {
        "name": name, "value": ms, "unit": "ms", "direction": name.split("/")[2],
        "flops": 5e11, "bytes": 3e9, "tokens": tokens, **SHAPE, **ABOUT, **more,
    }  # fmt: skip


def decoded(op: str, batch: int, context: int, us: float) -> dict[str, Any]:
    return {
        "name": f"decode/{op}/batch={batch}/context={context}", "value": us, "unit": "us",
        "batch": batch, "context": context, "read_bytes": 12_000_000, **SHAPE, **ABOUT,
    }  # fmt: skip


def both(workload: str, op: str, tokens: int, forward: float, backward: float) -> list[Any]:
    return [
        timed(f"{workload}/{op}/forward", forward, tokens),
        timed(f"{workload}/{op}/backward", backward, tokens),
    ]


CEILINGS = [
    {"name": "ceiling/matmul", "value": 500.0, "unit": "TFLOP/s", **ABOUT},
    {"name": "ceiling/copy", "value": 3.0, "unit": "TB/s", **ABOUT},
]
OVERLAP = {
    "name": "overlap/64k/nsa", "value": 0.031, "unit": "share",
    "union": {"2": 1.76, "4": 3.1}, "distance": [0.2, 0.5, 0.7],
    "parameters": {"share": 0.7, "life": 32}, **ABOUT,
}  # fmt: skip
RECORDS = [
    *CEILINGS,
    *both("8k", "nsa", 8192, 3.0, 7.0),
    *both("8k", "full", 8192, 2.5, 7.5),
    *both("8k", "sdpa_cudnn", 8192, 2.0, 5.0),
    timed("8k/select_blocks/forward", 2.0, 8192),
    *both("10k", "nsa", 10240, 4.0, 8.0),
    *both("10k", "nsa_real", 10240, 2.0, 6.0),
    *both("10k", "sdpa_cudnn", 10240, 3.0, 8.0),
    *both("64k", "nsa", 65536, 30.0, 60.0),
    *both("64k", "nsa_real", 65536, 20.0, 50.0),
    *both("64k", "sdpa_cudnn", 65536, 120.0, 330.0),
    timed("264k/nsa/forward", 200.0, 270336, spot_error=0.0031),
    timed("264k/sdpa_cudnn/forward", 2100.0, 270336),
    OVERLAP,
    decoded("nsa_paged", 8, 65536, 10.0),
    decoded("full_paged", 8, 65536, 80.0),
    decoded("torch_sdpa", 8, 65536, 75.0),
]


def test_page_shows_times_floors_and_ratios() -> None:
    page = render(RECORDS, [{**OVERLAP, "name": "overlap/trained", "value": 0.72, "model": "tiny"}])
    assert "a GPU; torch 1, triton 2; commit abc; 2026-01-01." in page
    assert "500 TFLOP/s" in page and "3.00 TB/s" in page
    # Forward and backward together: 10 ms beside 7, then 12 beside 11, then 90 beside 450.
    assert "| 8k | 10.000 |  | 7.000 | 10.000 | 0.70 |  |" in page
    assert "| 10k | 12.000 | 8.000 | 11.000 |  | 0.92 | 1.38 |" in page
    assert "| 64k | 90.000 | 70.000 | 450.0 |  | 5.00 | 6.43 |" in page
    assert "- blocks at random: faster than the best dense kernel from 65,536 tokens on" in page
    assert "as in a trained model: faster than the best dense kernel from 10,240 tokens on" in page
    assert "## 8k: 8,192 tokens, 64 query and 4 key/value heads, widths 128 and 128" in page
    assert "| `nsa` | 3.000 | 33 | 7.000 | 14 |" in page
    assert "| `select_blocks` | 2.000 | 50 |  |  |" in page
    assert "| 270,336 | 64/4 | 200.0 | 0 | 2100.0 | 10.5 | 0.31 % |" in page
    assert "| 64k/nsa | 0.03 | 1.76 | 3.10 |" in page
    assert "| trained | 0.72 | 1.76 | 3.10 |" in page
    assert "`nsa` is drawn with share 0.7, life 32" in page
    assert "- The trained model: tiny." in page
    assert "| 8 | 65,536 | 10.0 | 80.0 | 75.0 | 7.50 | 40 |" in page


def test_a_win_must_last() -> None:
    """A shorter context does not count when a longer one is lost."""
    records = [
        *both("8k", "nsa", 8192, 1.0, 1.0),
        *both("8k", "full", 8192, 2.0, 2.0),
        *both("16k", "nsa", 16384, 4.0, 4.0),
        *both("16k", "full", 16384, 2.0, 2.0),
    ]
    assert first_win(Times(records), "nsa") is None
    assert first_win(Times(records[:4]), "nsa") == "8k"
    assert "not faster than the best dense kernel at the longest" in render([*CEILINGS, *records])


def test_other_shapes_are_not_compared_with_the_first() -> None:
    wide = [{**record, "key_width": 192} for record in both("16k-k192", "nsa", 16384, 9.0, 20.0)]
    assert Times([*RECORDS, *wide]).same_shape() == ["8k", "10k", "64k", "264k"]


def test_page_of_a_run_without_decoding_or_dense_attention() -> None:
    page = render([*CEILINGS, *both("8k", "selected", 8192, 2.0, 4.0)])
    assert "| `selected` | 2.000 | 50 | 4.000 | 25 |" in page
    assert "## Decoding" not in page and "## Forward and backward" not in page


def test_page_says_how_full_multiprocessors_are(tmp_path: Path) -> None:
    def kernel(name: str, us: float, share: float) -> dict[str, Any]:
        sizes = {"registers": 128, "shared_bytes": 98336, "launches": 2}
        return {"name": f"8k/forward/kernel/{name}", "value": share, "us": us, **sizes, **ABOUT}

    occupancy = [
        {"name": "8k/forward/occupancy", "value": 0.262, **ABOUT},
        {"name": "8k/forward/products", "value": 0.31, **ABOUT},
        {"name": "8k/forward/time", "value": 1.0, **ABOUT},
        kernel("choose_kernel", 200.0, 0.5),
        kernel("attend_kernel", 780.0, 0.125),
        kernel("void at::fill<float>(int)", 15.0, 1.0),
        kernel("tiny_kernel", 5.0, 0.2),
    ]
    page = render(RECORDS, None, occupancy)
    assert "**8k forward**: 1.00 ms, occupancy 26%, products 31%" in page
    rows = page[page.index("| kernel | time") :].splitlines()[2:5]
    assert rows[0] == "| `attend_kernel` | 78% | 12% | 128 | 96 KiB |"
    assert rows[1].startswith("| `choose_kernel` | 20% | 50% |")
    assert rows[2] == "| all others | 2% | 80% |  |  |"
    assert "How full" not in render(RECORDS)
    draw_occupancy(occupancy, tmp_path / "picture.png")
    assert (tmp_path / "picture.png").stat().st_size > 10_000


def test_page_and_pictures_are_written(tmp_path_factory: pytest.TempPathFactory) -> None:
    folder: Path = tmp_path_factory.mktemp("page")
    write_page(RECORDS, folder / "RESULTS.md", folder)
    assert (folder / "RESULTS.md").read_text().startswith("# Kernel benchmarks")
    for name in ("docs/kernels_context.png", "docs/kernels_decode.png"):
        picture = (folder / name).read_bytes()
        assert picture.startswith(b"\x89PNG") and len(picture) > 20_000


def test_results_page_is_that_of_the_records() -> None:
    """RESULTS.md is rendered again whenever the records or the page's words change."""
    records = json.loads((report.ROOT / "results" / "kernels.json").read_text())
    trained = json.loads(report.OVERLAP.read_text()) if report.OVERLAP.exists() else []
    occupancy = json.loads(report.OCCUPANCY.read_text()) if report.OCCUPANCY.exists() else []
    assert report.RESULTS.read_text() == report.render(records, trained, occupancy)
    for picture in (report.CONTEXT_PICTURE, report.DECODE_PICTURE, report.OCCUPANCY_PICTURE):
        assert (report.ROOT / picture).stat().st_size > 20_000
