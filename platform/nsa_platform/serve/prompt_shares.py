"""Who of the prompts that are being prefilled gets how much of a step. No tensors.

Deficit round-robin (Shreedhar and Varghese, 1995) with a step as the round: every prompt earns an
equal share of the step's prompt tokens and pays for what it gets. What it earned and did not get is
its deficit. Short prompts borrow: who has fewest tokens left goes first, so that a short prompt
is through in one step while a long one is under way. A prompt to which more than max_deficit tokens
are owed goes before all others until that is paid: no prompt is ever further than that behind its
fair share. Priorities are strict: shares are among equals.
"""

from collections.abc import Iterator, Mapping, Sequence

from nsa_platform.serve.request import Request
from nsa_platform.serve.step_cost import CostModel


class PromptShares:
    """Splits the steps' tokens and time among prompts."""

    def __init__(self, cost: CostModel, *, max_deficit: int) -> None:
        """max_deficit: tokens that may be owed to a prompt before it goes first."""
        self.cost = cost
        self.max_deficit = max_deficit

    def split(
        self, prompts: Sequence[Request], num_tokens: int, seconds: float
    ) -> dict[Request, int]:
        """Who gets how many of num_tokens tokens that take, as predicted, at most `seconds`."""
        counts: dict[Request, int] = {}
        for request, most in self._turns(prompts):
            got = counts.get(request, 0)
            start = request.pages.num_tokens + got
            fitting = self.cost.tokens_within(seconds, start)
            count = min(most, request.num_pending - got, num_tokens, fitting)
            if count > 0:
                counts[request] = got + count
                num_tokens -= count
                seconds -= self.cost.prompt_seconds(count, start)
        return counts

    def book(self, prompts: Sequence[Request], taken: Mapping[Request, int]) -> None:
        """Note a step in which these prompts could have been served, and what each of them got."""
        for priority in {request.priority for request in prompts}:
            equals = [request for request in prompts if request.priority == priority]
            share = sum(taken.get(request, 0) for request in equals) / len(equals)
            for request in equals:
                request.deficit += share - taken.get(request, 0)

    def _turns(self, prompts: Sequence[Request]) -> Iterator[tuple[Request, int]]:
        """Prompts in the order in which they are served, and how many tokens a turn may have."""
        order = sorted(prompts, key=lambda r: (r.priority, r.num_pending, r.arrival))
        for priority in sorted({request.priority for request in order}):
            equals = [request for request in order if request.priority == priority]
            owed = [request for request in equals if request.deficit > self.max_deficit]
            for request in sorted(owed, key=lambda r: -r.deficit):
                yield request, int(request.deficit)
            for request in equals:
                yield request, request.num_pending
