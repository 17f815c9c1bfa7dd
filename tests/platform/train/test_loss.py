"""Cross-entropy in chunks is cross-entropy."""

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.utils._python_dispatch import TorchDispatchMode

from nsa_platform.train.loss import IGNORED, chunk_tokens, cross_entropy_sum, token_losses

VOCAB = 50
# float32 sums of a few dozen terms in another order.
ROUNDING = 1e-5


@pytest.fixture
def parts() -> tuple[Tensor, Tensor, nn.Linear]:
    """Hidden states, targets with gaps and a head."""
    torch.manual_seed(0)
    targets = torch.randint(VOCAB, (23,))
    targets[::4] = IGNORED
    return torch.randn(23, 16, requires_grad=True), targets, nn.Linear(16, VOCAB, bias=False)


@pytest.mark.parametrize("chunk", [1, 5, 22, 23, 100])
def test_any_chunk_gives_the_plain_sum_and_gradients(parts, chunk: int) -> None:
    hidden, targets, head = parts
    plain = functional.cross_entropy(head(hidden), targets, ignore_index=IGNORED, reduction="sum")
    expected = torch.autograd.grad(plain, [hidden, head.weight])
    found = cross_entropy_sum(hidden, targets, head.weight, chunk=chunk)
    gradients = torch.autograd.grad(found, [hidden, head.weight])
    assert found.dtype == torch.float32
    torch.testing.assert_close(found, plain, rtol=ROUNDING, atol=0)
    torch.testing.assert_close(gradients, expected, rtol=ROUNDING, atol=ROUNDING)


def test_gradients_take_the_loss_s_own_gradient(parts) -> None:
    hidden, targets, head = parts
    loss = cross_entropy_sum(hidden.double(), targets, head.weight.double(), chunk=5)
    inputs = [hidden.detach().double().requires_grad_(), head.weight.detach().double()]

    def scaled(states: Tensor) -> Tensor:
        return 3 * cross_entropy_sum(states, targets, inputs[1], chunk=5) ** 2

    assert loss.dtype == torch.float64
    assert torch.autograd.gradcheck(scaled, [inputs[0]])


def test_no_logits_of_all_tokens_stand_in_memory(parts) -> None:
    hidden, targets, head = parts

    class Largest(TorchDispatchMode):
        elements = 0

        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            result = func(*args, **(kwargs or {}))
            if isinstance(result, Tensor):
                self.elements = max(self.elements, result.numel())
            return result

    with Largest() as seen:
        cross_entropy_sum(hidden, targets, head.weight, chunk=5).backward()
    assert seen.elements == max(head.weight.numel(), hidden.numel(), 5 * VOCAB) < 23 * VOCAB


def test_each_token_has_its_loss(parts) -> None:
    hidden, targets, head = parts
    losses = token_losses(hidden, targets, head, chunk=7)
    logits = head(hidden).log_softmax(-1)
    for i, target in enumerate(targets.tolist()):
        expected = 0.0 if target == IGNORED else -logits[i, target].item()
        assert losses[i].item() == pytest.approx(expected, rel=ROUNDING, abs=ROUNDING)
    total = cross_entropy_sum(hidden, targets, head.weight, chunk=7)
    torch.testing.assert_close(losses.sum(), total, rtol=ROUNDING, atol=0)


def test_no_target_is_no_loss_and_no_gradient(parts) -> None:
    hidden, _, head = parts
    loss = cross_entropy_sum(hidden, torch.full((23,), IGNORED), head.weight, chunk=5)
    loss.backward()
    assert loss.item() == 0.0
    assert hidden.grad is not None
    assert not hidden.grad.any()


def test_low_precision_logits_are_summed_in_float32() -> None:
    hidden = torch.zeros(300, 4, dtype=torch.bfloat16)
    head = nn.Linear(4, 8, bias=False).to(torch.bfloat16)
    loss = cross_entropy_sum(hidden, torch.zeros(300, dtype=torch.long), head.weight, chunk=64)
    torch.testing.assert_close(loss, 300 * torch.tensor(8.0).log(), rtol=ROUNDING, atol=0)


def test_chunks_shrink_as_the_vocabulary_grows() -> None:
    assert chunk_tokens(1 << 10) == 64 * chunk_tokens(1 << 16)
    assert chunk_tokens(1 << 30) == 1
