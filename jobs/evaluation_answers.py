"""What a model writes in an evaluation: an engine answers many prompts at once."""

from collections import deque
from collections.abc import Iterator, Sequence
from functools import cached_property

from nsa_platform.config.evaluate import EvaluationEngineConfig
from nsa_platform.config.model import ModelConfig
from nsa_platform.data.tokenizer import Tokenizer
from nsa_platform.evaluate.prompt import Prompt
from nsa_platform.model.transformer import Transformer
from nsa_platform.serve.capacity import blocks_per_page_of, model_len_of
from nsa_platform.serve.engine import Engine
from nsa_platform.serve.kv_cache import check_fp8_cache
from nsa_platform.serve.loading import make_engine
from nsa_platform.serve.request import SamplingParams


class Answers:
    """An evaluation's answers. The engine is there from the first prompt on: a model that writes
    nothing needs no cache."""

    def __init__(
        self,
        model: Transformer,
        tokenizer: Tokenizer,
        config: EvaluationEngineConfig,
        *,
        longest: int,
    ) -> None:
        """longest: tokens of a prompt and its answer together at most."""
        self._model = model
        self._tokenizer = tokenizer
        self._config = _sized(config, longest)
        self._longest = longest

    def write(self, prompts: Sequence[Prompt]) -> Iterator[tuple[int, list[int]]]:
        """As `evaluate.prompt.Write`. An answer hangs on its prompt and its decoding alone.

        Raises:
            ValueError: a prompt is empty or longer than it may be; as `engine`.
        """
        engine, waiting = self.engine, deque(enumerate(prompts))
        stop_ids = self._tokenizer.stop_ids()
        written: dict[str, list[int]] = {}
        while waiting or engine.has_work:
            while waiting and len(written) < engine.max_num_requests:
                place, prompt = waiting.popleft()
                engine.add(str(place), prompt.ids, _params(prompt))
                written[str(place)] = []
            for output in engine.step():
                written[output.request_id] += output.token_ids
                if output.finish_reason is not None:
                    ids = written.pop(output.request_id)
                    # What ended it is among its ids: a stop id, or text up to a stop string.
                    is_left_out = output.finish_reason == "stop" and ids[-1] in stop_ids
                    yield int(output.request_id), ids[:-1] if is_left_out else ids

    @cached_property
    def engine(self) -> Engine:
        """Made when it is first asked for.

        Raises:
            ValueError: the memory does not hold the longest prompt and its answer.
        """
        engine = make_engine(self._model, self._tokenizer, self._config)
        # What does not fit is known before the first answer, not at the longest prompt.
        engine.check_request([0] * (self._longest - 1), SamplingParams(max_tokens=1))
        engine.warm_up()
        return engine


def check_sizes(config: EvaluationEngineConfig, model: ModelConfig, *, longest: int) -> None:
    """Find what does not fit before the model is loaded.

    longest: tokens of a prompt and its answer together at most.

    Raises:
        ValueError: a size does not suit the model or the prompts, or the model does not generate.
    """
    for name in ("max_model_len", "num_kv_tokens"):
        size = getattr(config, name)
        if size is not None and size < longest:
            raise ValueError(
                f"engine.{name}={size} must be at least {longest}, the tokens of the longest "
                "prompt and its answer"
            )
    try:
        model_len_of(model, config)
        blocks_per_page_of(model, config)
        if config.kv_cache_dtype == "fp8":
            check_fp8_cache(model)
    except ValueError as error:
        raise ValueError(f"engine: {error}") from None


def _sized(config: EvaluationEngineConfig, longest: int) -> EvaluationEngineConfig:
    if config.max_model_len is not None:
        return config
    return config.model_copy(update={"max_model_len": longest})


def _params(prompt: Prompt) -> SamplingParams:
    how = prompt.decoding
    return SamplingParams(
        max_tokens=prompt.max_new_tokens,
        temperature=how.temperature,
        top_p=how.top_p,
        seed=how.seed,
        stop=prompt.stops,
    )
