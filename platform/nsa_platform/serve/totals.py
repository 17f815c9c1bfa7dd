"""What an engine has done so far, counted step by step. No tensors."""

from collections import deque
from collections.abc import Sequence

from nsa_platform.serve.request import Request
from nsa_platform.serve.scheduler import Step

MOST_STEP_TOKENS = 1 << 14
"""Steps whose tokens are kept until somebody asks."""


class Totals:
    """Counts that only grow, under the names of EngineStats."""

    def __init__(self) -> None:
        self.prompt_tokens = self.generation_tokens = self.computed_tokens = 0
        self.prefix_queries = self.prefix_hits = 0
        self.preemptions = self.steps = 0
        self._step_tokens: deque[int] = deque(maxlen=MOST_STEP_TOKENS)

    def add_step(self, step: Step) -> None:
        """A step was given to the device."""
        self.steps += 1
        self.preemptions += step.num_preempted
        self.computed_tokens += step.num_tokens
        self.prefix_queries += sum(len(request.prompt_ids) for request in step.begun)
        self.prefix_hits += sum(request.num_cached_tokens for request in step.begun)
        self._step_tokens.append(step.num_tokens)

    def add_tokens(self, requests: Sequence[Request]) -> None:
        """Each of these requests is about to get a token."""
        self.generation_tokens += len(requests)
        self.prompt_tokens += sum(len(r.prompt_ids) for r in requests if not r.output_ids)

    def take_step_tokens(self) -> list[int]:
        """Tokens of each step since this was asked last; of very many the newest. Any thread may
        ask."""
        taken = []
        while self._step_tokens:
            taken.append(self._step_tokens.popleft())
        return taken
