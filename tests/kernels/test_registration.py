"""The ops as torch sees them: registered, faked, traceable, compiled without a graph break."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils.checkpoint import checkpoint

import nsa_kernels
from tests.kernels.cases import SMALL, Inputs, make_inputs
from tests.kernels.judge import OPS, call, op_inputs, reference_blocks
from tests.kernels.triton.pages import make_paged

CHECKS = (
    "test_schema",
    "test_autograd_registration",
    "test_faketensor",
    "test_aot_dispatch_dynamic",
)
FORWARD_OPS = ("compressed", "sliding", "full", "selected")
OPTIONS = (0.25, "torch")


def arguments(op: str, inputs: Inputs) -> tuple[Any, ...]:
    """What the registered forward op takes."""
    sizes = () if op == "full" else (SMALL.sizes,)
    blocks = (reference_blocks(inputs),) if op == "selected" else ()
    tensors = op_inputs(op, inputs).values()
    return (*tensors, *blocks, inputs.cu_seqlens, *sizes, *OPTIONS)


@pytest.mark.parametrize("op", FORWARD_OPS)
def test_forward_ops(op: str) -> None:
    inputs = make_inputs([30, 9]).require_grad()
    registered = getattr(torch.ops.nsa_kernels, f"{op}_attention").default
    torch.library.opcheck(registered, arguments(op, inputs), test_utils=CHECKS)


@pytest.mark.parametrize("op", FORWARD_OPS)
def test_backward_ops(op: str) -> None:
    inputs = make_inputs([30, 9])
    given = arguments(op, inputs)
    out, lse = getattr(torch.ops.nsa_kernels, f"{op}_attention")(*given)
    registered = getattr(torch.ops.nsa_kernels, f"{op}_attention_backward").default
    upstream = (torch.randn_like(out), torch.randn_like(lse))
    args = (*upstream, *given[:3], out, lse, *given[3:])
    torch.library.opcheck(registered, args, test_utils=CHECKS)


def test_selection_op() -> None:
    inputs = make_inputs([80, 9])
    _, lse = call(nsa_kernels, "compressed", inputs, backend="torch")
    args = (inputs.q, inputs.k_cmp, lse, inputs.cu_seqlens, SMALL.sizes, *OPTIONS)
    registered = torch.ops.nsa_kernels.select_blocks.default
    torch.library.opcheck(registered, args, test_utils=CHECKS)


@pytest.mark.parametrize("lengths", [[30, 9], [70, 9]], ids=["dense", "sparse"])
def test_whole_op(lengths: list[int]) -> None:
    """As many tokens as every query's blocks hold, and more."""
    inputs = make_inputs(lengths).require_grad()
    rest = (inputs.cu_seqlens, SMALL.sizes, *OPTIONS)
    ops = torch.ops.nsa_kernels
    torch.library.opcheck(ops.nsa_attention.default, (*inputs.tensors, *rest), test_utils=CHECKS)
    detached = [tensor.detach() for tensor in inputs.tensors]
    out, *branches = ops.nsa_attention(*detached, *rest)
    args = (torch.randn_like(out), detached, branches, *rest)
    torch.library.opcheck(ops.nsa_attention_backward.default, args, test_utils=CHECKS)


def test_paged_ops() -> None:
    paged = make_paged([70, 30], [3, 1], config=SMALL)
    lengths = (paged.cu_seqlens, paged.context_lens)
    q, gates = paged.whole.q[paged.rows], paged.whole.gates[paged.rows]
    caches = {name: pages.nan_to_num() for name, pages in paged.caches.items()}
    tables = (paged.page_table, paged.window_page_table)
    groups = caches["k_slc"].shape[2]
    room = torch.empty(len(q), groups, SMALL.num_selected_blocks, dtype=torch.int32)
    registered = torch.ops.nsa_kernels.nsa_paged_attention.default
    for blocks in (None, room):
        args = (q, *caches.values(), gates, *tables, *lengths, blocks, SMALL.sizes, *OPTIONS)
        torch.library.opcheck(registered, args, test_utils=CHECKS)
    args = (q, caches["k_slc"], caches["v_slc"], paged.page_table, *lengths, *OPTIONS)
    registered = torch.ops.nsa_kernels.full_paged_attention.default
    torch.library.opcheck(registered, args, test_utils=CHECKS)


def test_every_registered_op_is_checked_here() -> None:
    names = {
        name.removeprefix("nsa_kernels::").partition(".")[0]
        for name in torch._C._dispatch_get_all_op_names()
        if name.startswith("nsa_kernels::")
    }
    ops = (*FORWARD_OPS, "nsa")
    attention = {f"{op}_attention{suffix}" for op in ops for suffix in ("", "_backward")}
    assert names == attention | {"select_blocks", "nsa_paged_attention", "full_paged_attention"}


@pytest.mark.parametrize("backend", ["torch", "triton"])
@pytest.mark.parametrize("op", OPS)
def test_fake_shapes(op: str, backend: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Shapes, dtypes and devices without running anything, for either backend."""
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    # Triton's interpreter takes no bfloat16.
    dtype = torch.bfloat16 if backend == "torch" else torch.float16
    real = make_inputs([47, 9], value_width=32, dtype=dtype)
    wanted = call(nsa_kernels, op, real, reference_blocks(real), backend="torch")
    blocks = reference_blocks(real)
    with FakeTensorMode(allow_non_fake_inputs=True) as mode:
        fake = make_inputs([47, 9], value_width=32, dtype=dtype)
        outputs = call(nsa_kernels, op, fake, mode.from_tensor(blocks), backend=backend)
    for output, expected in zip(outputs, wanted, strict=True):
        assert output.shape == expected.shape
        assert output.dtype == expected.dtype
        assert output.stride() == expected.stride()


def whole(*tensors: Tensor, cu_seqlens: Tensor) -> Tensor:
    return nsa_kernels.nsa_attention(
        *tensors, config=SMALL, cu_seqlens=cu_seqlens, backend="torch"
    ).square()


@pytest.mark.parametrize("compiler", ["eager", "aot_eager"])
@pytest.mark.parametrize("dynamic", [False, True], ids=["static", "dynamic"])
def test_compiles_in_one_graph(compiler: str, dynamic: bool) -> None:
    compiled: Callable[..., Tensor] = torch.compile(
        whole, fullgraph=True, backend=compiler, dynamic=dynamic
    )
    for lengths in ([47, 20], [33, 80]):
        inputs = make_inputs(lengths).require_grad()
        wanted = whole(*inputs.tensors, cu_seqlens=inputs.cu_seqlens)
        out = compiled(*inputs.tensors, cu_seqlens=inputs.cu_seqlens)
        assert torch.equal(out, wanted)
        expected = torch.autograd.grad(wanted.sum(), inputs.tensors)
        for gradient, truth in zip(
            torch.autograd.grad(out.sum(), inputs.tensors), expected, strict=True
        ):
            assert torch.equal(gradient, truth)


def test_default_arguments_compile(monkeypatch: pytest.MonkeyPatch) -> None:
    """No cu_seqlens, no scale, no backend: the defaults are traceable too."""
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    inputs = make_inputs([47])

    def run(*tensors: Tensor) -> Tensor:
        return nsa_kernels.nsa_attention(*tensors, config=SMALL)

    compiled = torch.compile(run, fullgraph=True, backend="eager")
    assert torch.equal(compiled(*inputs.tensors), run(*inputs.tensors))


def test_paged_compiles() -> None:
    paged = make_paged([70], [1], config=SMALL)
    caches: dict[str, Any] = {**paged.caches}

    def run(q: Tensor, gates: Tensor, table: Tensor, window: Tensor, lens: Tensor) -> Tensor:
        return nsa_kernels.nsa_paged_attention(
            q,
            **caches,
            gates=gates,
            page_table=table,
            window_page_table=window,
            context_lens=lens,
            config=SMALL,
            backend="torch",
        )

    given = (paged.whole.q[paged.rows], paged.whole.gates[paged.rows], paged.page_table)
    given = (*given, paged.window_page_table, paged.context_lens)
    compiled = torch.compile(run, fullgraph=True, backend="eager")
    assert torch.equal(compiled(*given), run(*given))


def test_checkpointing_recomputes_the_same() -> None:
    inputs = make_inputs([60]).require_grad()
    plain = whole(*inputs.tensors, cu_seqlens=inputs.cu_seqlens)
    again = checkpoint(whole, *inputs.tensors, cu_seqlens=inputs.cu_seqlens, use_reentrant=False)
    assert isinstance(again, Tensor)
    expected = torch.autograd.grad(plain.sum(), inputs.tensors)
    for gradient, truth in zip(
        torch.autograd.grad(again.sum(), inputs.tensors), expected, strict=True
    ):
        assert torch.equal(gradient, truth)
