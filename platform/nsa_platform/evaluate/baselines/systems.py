"""Every policy with its published defaults, or within a budget; patterns are not searched here."""

from nsa_platform.config.evaluate import BaselineName
from nsa_platform.config.model import ModelConfig
from nsa_platform.evaluate.baselines.budget import Budget
from nsa_platform.evaluate.baselines.exact_top import ExactTop
from nsa_platform.evaluate.baselines.full import Full
from nsa_platform.evaluate.baselines.h2o import H2o
from nsa_platform.evaluate.baselines.infllm import InfLlm
from nsa_platform.evaluate.baselines.minference import MInference, everywhere
from nsa_platform.evaluate.baselines.patterns import Grain, VerticalSlash
from nsa_platform.evaluate.baselines.policy import Policy
from nsa_platform.evaluate.baselines.quest import Quest
from nsa_platform.evaluate.baselines.sliding import SlidingWindow
from nsa_platform.evaluate.baselines.streaming import StreamingLlm


def published(name: BaselineName, config: ModelConfig, *, prompt_tokens: int) -> Policy:
    """A policy with the sizes of its paper or of its authors' code.

    prompt_tokens: of the prompt, of which H2O keeps shares.
    """
    match name:
        case "full":
            return Full(config)
        case "sliding":
            return SlidingWindow(config, window=512)
        case "streaming":
            return StreamingLlm(config, sinks=4, recent=512)
        case "h2o":
            tenth = max(1, prompt_tokens // 10)
            return H2o(config, heavy=tenth, recent=tenth)
        case "quest":
            return Quest(config, page=16, pages=1024 // 16, dense_layers=2)
        case "infllm":
            return InfLlm(
                config, initial=128, local=4096, block=128, top=16, representatives=4, chunk=512
            )
        case "exact_top":
            return ExactTop(config, top=2560)
        case "minference":
            # What the published code takes for heads without a searched pattern.
            return MInference(config, everywhere(config, VerticalSlash(1000, 6096)), Grain())


def within(name: BaselineName, config: ModelConfig, budget: Budget) -> Policy:
    """A policy whose query reads what the budget gives: leading, local and, of the rest, its pick.

    Sizes of pages and blocks keep the ratio to the budget that they have to the paper's 2560
    tokens: 16 for Quest's pages, 128 for InfLLM's blocks, which share the dynamic tokens with what
    has left the window and is in no whole block yet. MInference without searched patterns
    spends half of the dynamic tokens on columns and half on diagonals, beside the budget's own.
    """
    leading, local, dynamic = budget.leading, budget.local, budget.dynamic
    match name:
        case "full":
            return Full(config)
        case "sliding":
            return SlidingWindow(config, window=budget.total)
        case "streaming":
            return StreamingLlm(config, sinks=leading, recent=local + dynamic)
        case "h2o":
            # The query's own token comes on top of what H2O keeps.
            return H2o(config, heavy=dynamic, recent=local - 1, leading=leading)
        case "quest":
            page = budget.scaled(16)
            return Quest(
                config,
                page=page,
                pages=max(1, dynamic // page),
                dense_layers=0,
                leading=leading,
                local=local,
            )
        case "infllm":
            block = budget.scaled(128)
            return InfLlm(
                config,
                initial=leading,
                local=local,
                block=block,
                top=max(1, dynamic // block),
                representatives=4,
                chunk=min(512, local),
                room=dynamic,
            )
        case "exact_top":
            return ExactTop(config, top=dynamic, leading=leading, local=local)
        case "minference":
            columns = dynamic // 2
            lines = VerticalSlash(leading + columns, local + dynamic - columns)
            grain = Grain(leading=leading, local=local)
            return MInference(config, everywhere(config, lines), grain)
