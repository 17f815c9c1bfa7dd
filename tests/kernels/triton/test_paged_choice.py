"""The search for a new token's most important blocks, on importances that no attention gives."""

# Jitted functions and their launches have no types that a checker knows.
# pyright: reportArgumentType=false, reportCallIssue=false

import pytest
import torch
from torch import Tensor

from nsa_kernels.triton_backend.paged_choice import store_chosen

CHOSEN, INITIAL, LOCAL = 16, 1, 2
ROOM = 256


def draws(num_candidates: int) -> dict[str, Tensor]:
    """Importances by name; a softmax's 32 overlaps add up to at most 32."""
    generator = torch.Generator().manual_seed(num_candidates)
    flat = torch.rand(num_candidates, generator=generator)
    peaked = torch.softmax(40 * torch.randn(num_candidates, generator=generator), 0)
    neighbours = torch.full((num_candidates,), 0.125).view(torch.int32)
    neighbours += torch.randint(0, 3, (num_candidates,), generator=generator, dtype=torch.int32)
    return {
        "flat": flat / flat.sum() * 32,
        "peaked": peaked * 32,
        "all equal": torch.full((num_candidates,), 0.125),
        "one": torch.zeros(num_candidates).index_fill(0, torch.tensor([5]), 32.0),
        "zeros": torch.zeros(num_candidates),
        "subnormal": flat * 1e-42,
        "two values": (flat > 0.5).float(),
        "neighbours": neighbours.view(torch.float32),
        "overflow": torch.where(flat > 0.9, float("inf"), flat),
    }


def check(name: str, num_candidates: int, device: str) -> None:
    importance = draws(num_candidates)[name]
    chosen = torch.full((CHOSEN,), -1, dtype=torch.int32, device=device)
    room = torch.zeros(ROOM)
    room[:num_candidates] = importance
    store_chosen[(1,)](
        room.to(device), chosen, num_candidates, OVERLAPS=32, CHOSEN=CHOSEN, INITIAL=INITIAL,
        LOCAL=LOCAL, NUM_BLOCKS=ROOM,
    )  # fmt: skip
    ranked = importance.clamp(max=torch.finfo(torch.float32).max)
    ranked[:INITIAL] = ranked[num_candidates - LOCAL :] = float("inf")
    # A stable descending sort puts the lower of equal ones first.
    expected = ranked.sort(descending=True, stable=True).indices[:CHOSEN]
    assert chosen.tolist() == sorted(expected.tolist())


NAMES = tuple(draws(20))


@pytest.mark.parametrize("num_candidates", [17, 18, 64, 255, 256])
@pytest.mark.parametrize("name", NAMES)
def test_the_search_finds_the_largest(name: str, num_candidates: int) -> None:
    check(name, num_candidates, "cpu")


@pytest.mark.gpu
@pytest.mark.parametrize("name", NAMES)
def test_the_compiled_search_finds_the_largest(name: str, device: str) -> None:
    for num_candidates in (17, 100, 256):
        check(name, num_candidates, device)
