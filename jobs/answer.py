"""One answer from a model folder, streamed through the paged sparse cache."""

from collections.abc import Iterator
from pathlib import Path

from nsa_platform.data.chat import render_prompt
from nsa_platform.data.tokenizer import Tokenizer
from nsa_platform.model.weights import load_model
from nsa_platform.serve.generator import Generator

UNFINISHED = "\N{REPLACEMENT CHARACTER}"


def stream_answer(folder: Path, question: str, *, max_new_tokens: int) -> Iterator[str]:
    """Yield the pieces of text of the model's greedy answer to one user message.

    Raises:
        ValueError: the folder holds no model of ours, or the question leaves no room to answer.
    """
    tokenizer = Tokenizer(folder)
    model = load_model(folder)
    prompt = render_prompt(tokenizer, [{"role": "user", "content": question}])
    room = min(max_new_tokens, model.config.max_context - len(prompt))
    ids: list[int] = []
    shown = ""
    for token in Generator(model).stream(prompt, room, stop_ids=tokenizer.stop_ids()):
        ids.append(token)
        text = tokenizer.decode(ids)
        # A character may take several byte-level tokens; it is shown when it is whole.
        if not text.endswith(UNFINISHED):
            yield text[len(shown) :]
            shown = text
