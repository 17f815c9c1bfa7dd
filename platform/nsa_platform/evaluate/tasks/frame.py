"""What stands around a task's text: nothing, or the chat template's turns."""

from dataclasses import dataclass

from nsa_platform.data.tokenizer import Tokenizer, TokenizerError

PLACE = "\ufffcthe text\ufffc"
"""Stands for the text while the template is rendered."""


@dataclass(frozen=True, slots=True)
class Frame:
    """Ids before and after a user's text; an answer begins after `after`."""

    before: tuple[int, ...] = ()
    after: tuple[int, ...] = ()

    @property
    def size(self) -> int:
        return len(self.before) + len(self.after)

    def around(self, text: list[int], begun: list[int] | None = None) -> list[int]:
        """The prompt: a text and the beginning of its answer, which the model goes on with."""
        return [*self.before, *text, *self.after, *(begun or [])]


def open_frame(tokenizer: Tokenizer, *, chat: bool) -> Frame:
    """The frame of plain text, or of one message of a user's and the assistant's turn.

    Raises:
        TokenizerError: there is no chat template, or it changes what a message says.
    """
    if not chat:
        return Frame()
    if tokenizer.chat_template is None:
        raise TokenizerError(f"{tokenizer.folder}: chat: true needs a chat template, it has none")
    rendered = tokenizer.transformers.apply_chat_template(
        [{"role": "user", "content": PLACE}], tokenize=False, add_generation_prompt=True
    )
    before, place, after = str(rendered).partition(PLACE)
    if not place:
        raise TokenizerError(f"{tokenizer.folder}: the chat template leaves out a message's text")
    # Control tokens of the template are wanted as such; `Tokenizer.encode` reads none.
    backend = tokenizer.transformers
    encode = (backend.encode(part, add_special_tokens=False) for part in (before, after))
    return Frame(*(tuple(ids) for ids in encode))
