"""What an op refuses, and that it says which argument, what came and what is allowed."""

import os
import re
import subprocess
import sys
from typing import Any

import pytest
import torch

import nsa_kernels
from nsa_kernels.dispatch import resolve_backend
from tests.kernels.cases import SMALL, make_inputs, offsets
from tests.kernels.judge import op_inputs, reference_blocks
from tests.kernels.triton.pages import make_paged

CALLS = {
    "compressed": nsa_kernels.compressed_attention,
    "selected": nsa_kernels.selected_attention,
    "sliding": nsa_kernels.sliding_attention,
    "full": nsa_kernels.full_attention,
    "nsa": nsa_kernels.nsa_attention,
}


@pytest.fixture(autouse=True)
def cpu_tensors_may_ask_for_triton(monkeypatch: pytest.MonkeyPatch) -> None:
    """The refusals come before any kernel runs, so these tests need neither GPU nor interpreter."""
    monkeypatch.setenv("TRITON_INTERPRET", "1")


def arguments(op: str, dtype: torch.dtype = torch.float32, **sizes: Any) -> dict[str, Any]:
    """Good arguments for an op, to be spoilt one at a time."""
    inputs = make_inputs([30, 10], dtype=dtype, **sizes)
    given: dict[str, Any] = dict(op_inputs(op, inputs))
    if op == "selected":
        given["block_indices"] = reference_blocks(inputs)
    if op != "full":
        given["config"] = SMALL
    return {**given, "cu_seqlens": inputs.cu_seqlens, "backend": "torch"}


def refused(op: str, given: dict[str, Any], *parts: str) -> None:
    """The op raises a ValueError that holds every part."""
    with pytest.raises(ValueError) as error:
        CALLS[op](**given)
    for part in parts:
        assert part in str(error.value), f"{part!r} not in {error.value!s}"


@pytest.mark.parametrize("op", CALLS)
def test_good_arguments_are_taken(op: str) -> None:
    CALLS[op](**arguments(op))


@pytest.mark.parametrize("op", CALLS)
def test_what_is_no_tensor(op: str) -> None:
    given = arguments(op)
    refused(op, given | {"q": given["q"].numpy()}, "q must be a torch.Tensor, got ndarray")
    refused(op, given | {"cu_seqlens": [0, 40]}, "cu_seqlens must be a torch.Tensor, got list")


@pytest.mark.parametrize("op", [op for op in CALLS if op != "full"])
def test_sizes_that_are_no_config(op: str) -> None:
    given = arguments(op) | {"config": {"window_size": 8}}
    refused(op, given, "config must be an NsaConfig, got dict")


@pytest.mark.parametrize("block", [-2, 4, 2**31 - 1])
def test_a_block_that_the_sequence_does_not_have(block: int) -> None:
    given = arguments("selected")
    given["block_indices"][3, 0, -1] = block
    refused("selected", given, "block_indices[3, 0]", str(block), "-1 and the blocks 0 to")


@pytest.mark.parametrize("op", CALLS)
def test_q_of_four_axes(op: str) -> None:
    given = arguments(op)
    given["q"] = given["q"][None]
    refused(op, given, "q must have shape [T, H, K]", "[1, 40, 4, 16]")


@pytest.mark.parametrize("op", CALLS)
def test_integer_q(op: str) -> None:
    given = arguments(op)
    given["q"] = given["q"].long()
    refused(op, given, "q has dtype torch.int64", "bfloat16, float16, float32, float64")


@pytest.mark.parametrize("op", CALLS)
def test_every_tensor_must_fit(op: str) -> None:
    """Each key or value in another width, row count, dtype or device is named."""
    for name in op_inputs(op, make_inputs([30, 10])):
        if name in ("q", "gates"):
            continue
        given = arguments(op)
        good = given[name]
        given[name] = good.double()
        refused(op, given, f"{name} has dtype torch.float64, q has torch.float32")
        given[name] = good.to("meta")
        refused(op, given, f"{name} is on meta, q is on cpu")
        given[name] = good[..., 0]
        refused(op, given, f"{name} must have shape")
        if name.startswith("k"):
            given[name] = good[..., :8]
            refused(op, given, f"{name} must have shape", "any, 16]", "8]")
        given[name] = good[:-1]
        if op not in ("compressed", "nsa") or not name.endswith("cmp"):
            refused(op, given, f"{name} must have shape", "39")


@pytest.mark.parametrize("op", CALLS)
def test_groups_must_divide_heads(op: str) -> None:
    given = arguments(op)
    given["q"] = given["q"][:, :3].contiguous()
    if op == "nsa":
        given["gates"] = given["gates"][:, :3]
    refused(op, given, "G=2 key/value heads", "must divide the H=3 heads of q")


@pytest.mark.parametrize("op", CALLS)
@pytest.mark.parametrize(
    ("values", "got"),
    [
        ([0, 30], "[0, 30]"),
        ([1, 40], "[1, 40]"),
        ([0, 35, 30, 40], "[0, 35, 30, 40]"),
        ([0, 41], "[0, 41]"),
    ],
    ids=["short", "late", "falling", "long"],
)
def test_offsets_must_cover_the_tokens(op: str, values: list[int], got: str) -> None:
    given = arguments(op)
    given["cu_seqlens"] = torch.tensor(values, dtype=torch.int32)
    refused(op, given, "cu_seqlens must start with 0, never decrease and end with T=40", got)


@pytest.mark.parametrize("op", CALLS)
def test_offsets_of_a_wrong_kind(op: str) -> None:
    given = arguments(op)
    given["cu_seqlens"] = offsets([30, 10]).long()
    refused(op, given, "cu_seqlens must be int32, got torch.int64")
    given["cu_seqlens"] = offsets([30, 10])[None]
    refused(op, given, "cu_seqlens must have shape [B+1]")
    given["cu_seqlens"] = torch.zeros(1, dtype=torch.int32)
    refused(op, given, "B+1 >= 2")


@pytest.mark.parametrize("op", CALLS)
@pytest.mark.parametrize("scale", [0.0, -1.0, float("nan"), float("inf"), "1"])
def test_scale_must_be_positive(op: str, scale: Any) -> None:
    refused(op, {**arguments(op), "scale": scale}, f"scale={scale!r} must be a positive finite")


@pytest.mark.parametrize("op", CALLS)
def test_float64_on_triton(op: str) -> None:
    given = {**arguments(op, dtype=torch.float64), "backend": "triton"}
    refused(op, given, "triton backend takes bfloat16, float16 and float32", "backend='torch'")


@pytest.mark.parametrize("op", CALLS)
def test_widths_on_triton(op: str) -> None:
    given = {**arguments(op, key_width=20), "backend": "triton"}
    refused(op, given, "multiples of 16 up to 256, got K=20")
    given = {**arguments(op, value_width=272), "backend": "triton"}
    refused(op, given, "multiples of 16 up to 256, got V=272")


@pytest.mark.parametrize("op", CALLS)
def test_heads_per_group_on_triton(op: str) -> None:
    given = {**arguments(op, groups=1, heads_per_group=65), "backend": "triton"}
    refused(op, given, "up to 64 query heads per group, got R=65")


def test_too_few_compressed_rows() -> None:
    for op in ("compressed", "nsa"):
        given = arguments(op)
        for name in ("k_cmp", "v_cmp"):
            given[name] = given[name][:-1]
        refused(op, given, "k_cmp has 6 rows; these sequences have 7 compressed blocks")


def test_branches_must_agree() -> None:
    given = arguments("nsa")
    given["v_win"] = given["v_win"][..., :8].contiguous()
    refused("nsa", given, "v_win has width V=8, v_cmp has 16")
    given = arguments("nsa")
    given["k_slc"], given["v_slc"] = given["k_slc"][:, :1], given["v_slc"][:, :1]
    refused("nsa", given, "k_slc has G=1 heads, k_cmp has 2")


def test_gates() -> None:
    given = arguments("nsa")
    given["gates"] = given["gates"][..., :2]
    refused("nsa", given, "gates must have shape [T, H, 3] = [40, 4, 3], got [40, 4, 2]")
    given["gates"] = torch.zeros(40, 4, 3, dtype=torch.float16)
    refused("nsa", given, "gates have dtype torch.float16", "torch.float32")
    given["gates"] = torch.full((40, 4, 3), -0.5)
    refused("nsa", given, "gates must not be negative", "-0.5")


def test_block_indices() -> None:
    given = arguments("selected")
    good = given["block_indices"]
    given["block_indices"] = good[..., :2]
    refused("selected", given, "block_indices must have shape [T, G, n] = [40, 2, 4]")
    given["block_indices"] = good.long()
    refused("selected", given, "block_indices must be int32, got torch.int64")


def test_lse_of_select_blocks() -> None:
    inputs = make_inputs([40])
    for lse, part in (
        (torch.zeros(40, 3), "lse must have shape [T, H] = [40, 4], got [40, 3]"),
        (torch.zeros(40, 4).half(), "lse has dtype torch.float16; for q of torch.float32 it is"),
    ):
        with pytest.raises(ValueError, match=re.escape(part)):
            nsa_kernels.select_blocks(inputs.q, inputs.k_cmp, lse, config=SMALL, backend="torch")


@pytest.mark.parametrize(
    ("changes", "part"),
    [
        ({"k_slc": torch.zeros(4, 24, 2, 16)}, "pages of 24 tokens; allowed are multiples of"),
        ({"k_cmp": torch.zeros(9, 3, 2, 16)}, "k_cmp must have shape [pages, rows, G, K]"),
        ({"v_win": torch.zeros(9, 16, 2, 8)}, "v_win must have shape [pages, rows, G, V]"),
        ({"page_table": torch.zeros(2, 3)}, "page_table must be int32, got torch.float32"),
        (
            {"window_page_table": torch.zeros(3, 3, dtype=torch.int32)},
            "window_page_table must have shape [B, M] = [2, any], got [3, 3]",
        ),
        (
            {"context_lens": torch.zeros(3, dtype=torch.int32)},
            "context_lens must have shape [B] = [2], got [3]",
        ),
        (
            {"block_indices": torch.zeros(2, 2, 3, dtype=torch.int32)},
            f"block_indices must have shape [T, G, n] = [2, 2, {SMALL.num_selected_blocks}]",
        ),
        (
            {"block_indices": torch.zeros(2, 2, SMALL.num_selected_blocks)},
            "block_indices must be int32",
        ),
    ],
    ids=["page", "k_cmp", "v_win", "table", "window_table", "context", "room", "room_type"],
)
def test_pages(changes: dict[str, torch.Tensor], part: str) -> None:
    paged = make_paged([40, 30], [1, 1], config=SMALL)
    given: dict[str, Any] = {
        "q": paged.whole.q[paged.rows],
        **paged.caches,
        "gates": paged.whole.gates[paged.rows],
        "page_table": paged.page_table,
        "window_page_table": paged.window_page_table,
        "cu_seqlens": paged.cu_seqlens,
        "context_lens": paged.context_lens,
        "config": SMALL,
        "backend": "torch",
    }
    nsa_kernels.nsa_paged_attention(**given)
    with pytest.raises(ValueError, match=re.escape(part)):
        nsa_kernels.nsa_paged_attention(**{**given, **changes})


def test_a_cache_is_never_copied() -> None:
    paged = make_paged([40], [1], config=SMALL)
    keys = paged.caches["k_slc"].transpose(1, 2).contiguous().transpose(1, 2)
    with pytest.raises(ValueError, match="k must be contiguous"):
        nsa_kernels.full_paged_attention(
            paged.whole.q[paged.rows],
            keys,
            paged.caches["v_slc"],
            page_table=paged.page_table,
            context_lens=paged.context_lens,
            backend="torch",
        )


class TestDispatch:
    """Which backend runs, by device, argument and environment."""

    @pytest.fixture(autouse=True)
    def plain_environment(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.delenv("TRITON_INTERPRET", raising=False)
        monkeypatch.delenv("NSA_KERNELS_BACKEND", raising=False)

    def test_cpu_tensors_go_to_torch(self) -> None:
        assert resolve_backend(torch.zeros(1), None) == "torch"

    def test_the_interpreter_takes_cpu_tensors(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setenv("TRITON_INTERPRET", "1")
        assert resolve_backend(torch.zeros(1), None) == "triton"
        assert resolve_backend(torch.zeros(1), "torch") == "torch"

    def test_the_environment_decides(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setenv("TRITON_INTERPRET", "1")
        monkeypatch.setenv("NSA_KERNELS_BACKEND", "torch")
        assert resolve_backend(torch.zeros(1), None) == "torch"
        assert resolve_backend(torch.zeros(1), "triton") == "triton"

    def test_an_unknown_wish(self, monkeypatch: pytest.MonkeyPatch) -> None:
        with pytest.raises(ValueError, match="backend='cuda' is not one of 'triton', 'torch'"):
            resolve_backend(torch.zeros(1), "cuda")
        monkeypatch.setenv("NSA_KERNELS_BACKEND", "fast")
        with pytest.raises(ValueError, match="NSA_KERNELS_BACKEND='fast' is not one of"):
            resolve_backend(torch.zeros(1), None)

    @pytest.mark.parametrize("source", ["backend", "NSA_KERNELS_BACKEND"])
    def test_triton_on_the_cpu(self, source: str, monkeypatch: pytest.MonkeyPatch) -> None:
        wish = "triton" if source == "backend" else None
        if wish is None:
            monkeypatch.setenv(source, "triton")
        with pytest.raises(ValueError, match=f"{source}='triton' needs.*got one on cpu"):
            resolve_backend(torch.zeros(1), wish)

    def test_what_the_interpreter_gets_wrong(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setenv("TRITON_INTERPRET", "1")
        for wish in (None, "triton"):
            with pytest.raises(ValueError, match="interpreter multiplies bfloat16 wrongly"):
                resolve_backend(torch.zeros(1, dtype=torch.bfloat16), wish)
        assert resolve_backend(torch.zeros(1, dtype=torch.bfloat16), "torch") == "torch"

    def test_a_variable_set_after_the_import(self) -> None:
        """The kernels are no interpreted ones then: torch, and no other wish."""
        code = (
            "import os, torch; from nsa_kernels.dispatch import resolve_backend as resolve; "
            "os.environ['TRITON_INTERPRET'] = '1'; print(resolve(torch.zeros(1), None)); "
            "resolve(torch.zeros(1), 'triton')"
        )
        environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
        command = [sys.executable, "-c", code]
        done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
        assert done.stdout.strip() == "torch"
        assert "TRITON_INTERPRET=1 set before nsa_kernels is imported" in done.stderr

    @pytest.mark.gpu
    def test_gpu_tensors_go_to_triton(self, device: str) -> None:
        assert resolve_backend(torch.zeros(1, device=device), None) == "triton"
