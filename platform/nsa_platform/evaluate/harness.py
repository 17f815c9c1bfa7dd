"""A model as lm-eval-harness asks it: log-likelihoods, rolling ones, generation until a string.

The harness brings tasks, few-shot prompts and metrics; what a token is worth is decided by the same
scorer as everywhere here, and texts are written, many at once, by whoever is passed in.

Source: github.com/EleutherAI/lm-evaluation-harness, lm_eval/api/model.py (0.4.13).
"""

import logging
from collections.abc import Callable, Sequence
from typing import Any

from lm_eval.api.instance import Instance
from lm_eval.api.model import TemplateLM
from lm_eval.models.utils import normalize_gen_kwargs
from lm_eval.utils import get_rolling_token_windows, make_disjoint_window
from tqdm import tqdm

from nsa_platform.data.tokenizer import Tokenizer
from nsa_platform.evaluate.prompt import Decoding, Prompt, Write
from nsa_platform.evaluate.scores import AnswerScore

ScoreAnswers = Callable[[Sequence[tuple[list[int], list[int]]]], list[AnswerScore]]
"""Prompts with answers to the answers' scores; all go through the model at once."""

DEFAULT_NEW_TOKENS = 256
KNOWN_SETTINGS = {"until", "max_gen_toks", "do_sample", "temperature", "top_p", "seed"}

log = logging.getLogger(__name__)


class HarnessModel(TemplateLM):
    """The three questions of the harness, answered by a scorer and a writer."""

    def __init__(
        self,
        tokenizer: Tokenizer,
        score: ScoreAnswers,
        write: Write,
        *,
        max_context: int,
        batch_size: int = 1,
    ) -> None:
        """batch_size: requests that are scored in one forward pass. Raises ValueError below 1."""
        super().__init__()
        if batch_size < 1:
            raise ValueError(f"batch_size={batch_size} must be positive")
        self.ids, self.score, self.write = tokenizer, score, write
        self.max_context, self.batch_size = max_context, batch_size
        self.tokenizer = tokenizer.transformers
        self._has_cut = False

    @property
    def eot_token_id(self) -> int:
        return self.ids.eos_id

    @property
    def tokenizer_name(self) -> str:
        return self.ids.fingerprint

    def tok_encode(
        self, string: str, add_special_tokens: bool | None = None, **kwargs: Any
    ) -> list[int]:
        """Ids of a text; the template's control tokens count as such, nothing is added."""
        return list(self.tokenizer.encode(string, add_special_tokens=False))

    def apply_chat_template(
        self, chat_history: list[dict[str, str]], add_generation_prompt: bool = True
    ) -> str:
        """The chat as text, up to where the assistant is to write."""
        return str(
            self.tokenizer.apply_chat_template(
                chat_history,
                tokenize=False,
                add_generation_prompt=add_generation_prompt,
                continue_final_message=not add_generation_prompt,
            )
        )

    def loglikelihood_rolling(
        self, requests: list[Instance], disable_tqdm: bool = False
    ) -> list[float]:
        """Log-likelihood of whole texts, in windows of max_context that do not overlap."""
        results = []
        for request in requests:
            (text,) = request.args
            windows = get_rolling_token_windows(
                self.tok_encode(text), self.prefix_token_id, self.max_context, 1
            )
            pairs = [(("", text), *make_disjoint_window(window)) for window in windows]
            total = sum(each for each, _ in self._loglikelihood_tokens(pairs, disable_tqdm=True))
            results.append(total)
            self.cache_hook.add_partial("loglikelihood_rolling", (text,), total)
        return results

    def generate_until(self, requests: list[Instance], disable_tqdm: bool = False) -> list[str]:
        """Texts up to the first stop string, the end of a turn, or max_gen_toks tokens.

        Raises:
            ValueError: a setting of the generation is not known here.
        """
        arguments: list[Any] = [request.args for request in requests]
        prompts = [self._prompt(context, given) for context, given in arguments]
        texts = [""] * len(prompts)
        answers = self.write(prompts)
        for place, ids in tqdm(answers, "generating", total=len(prompts), disable=disable_tqdm):
            texts[place] = _before(prompts[place].stops, self.ids.decode(ids))
            self.cache_hook.add_partial("generate_until", arguments[place], texts[place])
        return texts

    def _loglikelihood_tokens(
        self,
        requests: list[tuple[tuple[str, str], list[int], list[int]]],
        disable_tqdm: bool = False,
        **kwargs: Any,
    ) -> list[tuple[float, bool]]:
        results: list[tuple[float, bool]] = []
        starts = range(0, len(requests), self.batch_size)
        for start in tqdm(starts, desc="scoring", disable=disable_tqdm):
            batch = requests[start : start + self.batch_size]
            pairs = [(self._kept(ids, len(answer) - 1), answer) for _, ids, answer in batch]
            for (names, _, _), scored in zip(batch, self.score(pairs), strict=True):
                found = (-sum(scored.nats), all(scored.hits))
                results.append(found)
                self.cache_hook.add_partial("loglikelihood", names, found)
        return results

    def _prompt(self, context: str, given: dict[str, Any]) -> Prompt:
        """What a request asks to be written."""
        settings: dict[str, Any] = dict(normalize_gen_kwargs(given, DEFAULT_NEW_TOKENS))
        unknown = sorted(set(settings) - KNOWN_SETTINGS)
        if unknown:
            raise ValueError(
                f"gen_kwargs: {', '.join(unknown)} not known (known: "
                f"{', '.join(sorted(KNOWN_SETTINGS))})"
            )
        wanted = settings["max_gen_toks"]
        decoding = Decoding(
            settings.get("temperature", 0.0), settings.get("top_p", 1.0), settings.get("seed", 0)
        )
        return Prompt(
            self._kept(self.tok_encode(context) or [self.prefix_token_id], wanted),
            wanted,
            decoding,
            stops=tuple(stop for stop in settings["until"] if stop),
        )

    def _kept(self, ids: list[int], more: int) -> list[int]:
        """The last ids that leave room for so many more in the context, as the harness has it."""
        room = self.max_context - more
        if room < 1:
            raise ValueError(
                f"{more} tokens of an answer leave no room in max_context={self.max_context}"
            )
        if len(ids) > room and not self._has_cut:
            log.warning(
                "a prompt of %d tokens is cut to its last %d: max_context=%d; others may be too",
                *(len(ids), room, self.max_context),
            )
            self._has_cut = True
        return ids[-room:]


def _before(stops: Sequence[str], text: str) -> str:
    """A text up to the first of some strings that it holds."""
    return text[: min((at for stop in stops if (at := text.find(stop)) >= 0), default=None)]
