"""lm-eval-harness with our models: the harness's own command line, with the model `nsa` in it.

    python -m jobs.lm_eval --model nsa --model_args checkpoint=runs/nsa-150m/model \\
        --tasks mmlu --num_fewshot 5 --batch_size 8 --device cuda

The harness finds models only in its own package, so they are registered before it starts. Options
and exit status are those of `python -m lm_eval`; model_args: checkpoint (a folder, s3://, or
models:/name@alias), tracking_uri (of the registry), dtype. Needs `pip install .[eval]`.

--batch_size texts are scored in one forward pass, and as many answers are written side by side by
the engine that serves models.
"""

from collections.abc import Iterator, Sequence
from typing import Any

import torch
from lm_eval.__main__ import cli_evaluate
from lm_eval.api.registry import register_model

from jobs.cli import fail, interruptible
from jobs.evaluation_answers import Answers
from nsa_platform import storage
from nsa_platform.config.evaluate import EvaluationEngineConfig
from nsa_platform.config.train import TrackingConfig
from nsa_platform.data.tokenizer import Tokenizer
from nsa_platform.evaluate.harness import HarnessModel
from nsa_platform.evaluate.prompt import Prompt
from nsa_platform.evaluate.scores import ModelScorer
from nsa_platform.model.weights import load_model
from nsa_platform.tracking import fetch_model, is_model_reference

MODEL_ARGS = ("checkpoint", "tracking_uri", "dtype")
DTYPES = {"bfloat16": torch.bfloat16, "float16": torch.float16, "float32": torch.float32}


class NsaModel(HarnessModel):
    """An exported model, for `--model nsa`."""

    def __init__(
        self,
        checkpoint: str = "",
        *,
        tracking_uri: str = TrackingConfig().uri,
        dtype: str | None = None,
        device: str = "cpu",
        batch_size: int | str = 1,
        max_batch_size: int | None = None,
        **unknown: Any,
    ) -> None:
        """Load the model. dtype: default bfloat16 on a GPU, float32 on a CPU.

        Raises:
            ValueError: an argument has no meaning here; the model cannot be read.
            OSError: it cannot be reached.
        """
        if unknown or not checkpoint:
            what = f"{', '.join(unknown)} not known" if unknown else "checkpoint is missing"
            raise ValueError(f"--model_args: {what} (there are {', '.join(MODEL_ARGS)})")
        if not str(batch_size).isdecimal() or max_batch_size is not None:
            raise ValueError(f"batch_size={batch_size!r} must be a number; auto is not there")
        if dtype is not None and dtype not in DTYPES:
            raise ValueError(f"dtype={dtype!r} must be one of {', '.join(DTYPES)}")
        if device.startswith("cuda") and not torch.cuda.is_available():
            raise ValueError(f"device={device!r}, but torch sees no GPU here; --device cpu")
        default = "float32" if device == "cpu" else "bfloat16"
        place = _folder(checkpoint, tracking_uri)
        model = load_model(place, device=device, dtype=DTYPES[dtype or default])
        tokenizer = Tokenizer(place)

        def write(prompts: Sequence[Prompt]) -> Iterator[tuple[int, list[int]]]:
            # An engine for each call: its cache suits what is asked, and is free for scorers after.
            longest = max(len(prompt.ids) + prompt.max_new_tokens for prompt in prompts)
            sizes = _engine(self.batch_size)
            return Answers(model, tokenizer, sizes, longest=longest).write(prompts)

        super().__init__(
            tokenizer,
            ModelScorer(model).answers,
            write,
            max_context=model.config.max_context,
            batch_size=int(batch_size),
        )


def _engine(batch_size: int) -> EvaluationEngineConfig:
    """Sizes of an engine that writes so many answers at once."""
    default = EvaluationEngineConfig().max_num_batched_tokens
    return EvaluationEngineConfig(
        max_num_seqs=batch_size, max_num_batched_tokens=max(default, batch_size)
    )


def _folder(checkpoint: str, tracking_uri: str) -> Any:
    if is_model_reference(checkpoint):
        return fetch_model(checkpoint, tracking_uri, storage.default_cache("models"))
    return storage.fetch(checkpoint, storage.default_cache("files"))


register_model("nsa")(NsaModel)


@interruptible("interrupted; the same command begins anew")
def main() -> None:
    """The harness's command line; what cannot be measured ends with one line."""
    try:
        cli_evaluate()
    except (ValueError, OSError) as error:
        fail(str(error))


if __name__ == "__main__":
    main()
