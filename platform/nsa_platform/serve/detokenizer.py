"""Text of tokens as they come: whole characters only, and nothing of a stop string."""

from collections.abc import Callable, Sequence

REPLACEMENT = "\N{REPLACEMENT CHARACTER}"
MAX_PARTIAL_BYTES = 3
"""Bytes of a UTF-8 character that may be there without it being whole."""
MAX_OPEN_TOKENS = 64
"""Tokens that are decoded again for each new one, at most, as long as they can be cut."""


class Detokenizer:
    """Decodes the tokens of one output one by one.

    All pieces joined are what decoding all tokens at once gives. A piece ends with a whole
    character: bytes that may still become one are held back, those of at most three tokens.
    """

    def __init__(self, decode: Callable[[Sequence[int]], str]) -> None:
        """decode: text of ids; bytes that form no character become U+FFFD."""
        self._decode = decode
        self._open: list[int] = []
        """Tokens that are still decoded: what the next ones may hang on."""
        self._num_settled = 0
        """Tokens of _open after which the text was last whole."""
        self._num_shown = 0
        """Characters of _open's text that have been given out."""

    def push(self, token_id: int) -> str:
        """The text that the next token adds."""
        self._open.append(token_id)
        text = self._decode(self._open)
        whole = self._num_whole(text)
        piece = text[self._num_shown : whole]
        self._num_shown = max(self._num_shown, whole)
        if piece and whole == len(text):
            # The tokens of the last piece stay: some tokenizers treat the first token differently.
            self._cut(self._num_settled)
            self._num_settled = len(self._open)
        elif len(self._open) > MAX_OPEN_TOKENS:
            self._cut_broken(text)
        return piece

    def flush(self) -> str:
        """What was held back; the output has ended."""
        piece = self._decode(self._open)[self._num_shown :]
        self._num_shown += len(piece)
        return piece

    def _num_whole(self, text: str) -> int:
        """Characters of _open's text that no later token can change."""
        num_broken = len(text) - len(text.rstrip(REPLACEMENT))
        if num_broken and len(self._open) - self._num_settled <= MAX_PARTIAL_BYTES:
            # Decoders differ in what they make of the characters before half a one.
            return self._num_shown
        return len(text) - min(num_broken, MAX_PARTIAL_BYTES)

    def _cut(self, count: int) -> None:
        """Forget the first tokens of _open, whose text was given out."""
        if count:
            self._open = self._open[count:]
            self._num_shown = len(self._decode(self._open))

    def _cut_broken(self, text: str) -> None:
        """Shorten a long run of bytes that form no characters, where the text stays the same."""
        for count in range(len(self._open) - 8, len(self._open) - MAX_PARTIAL_BYTES):
            head, tail = self._decode(self._open[:count]), self._decode(self._open[count:])
            if head + tail == text and len(head) <= self._num_shown:
                self._open, self._num_settled = self._open[count:], 0
                self._num_shown -= len(head)
                return


class StopStrings:
    """Cuts a text that comes in pieces before the first of some strings.

    The first is the one that is complete first; of several that are complete at once, the longest.
    So the result does not depend on where the pieces part.
    """

    def __init__(self, stops: Sequence[str], *, is_included: bool = False) -> None:
        """is_included: cut after the string instead of before it."""
        self._stops = tuple(stops)
        self._is_included = is_included
        self._held = ""

    def push(self, piece: str) -> tuple[str, str | None]:
        """Text that certainly belongs to the output, and the stop string that ended it."""
        if not self._stops:
            return piece, None
        text = self._held + piece
        ends = [
            (start + len(stop), -len(stop), stop)
            for stop in self._stops
            if (start := text.find(stop)) >= 0
        ]
        if ends:
            end, negative_length, stop = min(ends)
            self._held = ""
            return text[: end if self._is_included else end + negative_length], stop
        num_held = max(_num_begun(text, stop) for stop in self._stops)
        self._held = text[len(text) - num_held :]
        return text[: len(text) - num_held], None

    def flush(self) -> str:
        """What was held back; no stop string came of it."""
        held, self._held = self._held, ""
        return held


def _num_begun(text: str, stop: str) -> int:
    """Length of the longest end of a text that is a beginning of a stop string."""
    longest = min(len(stop) - 1, len(text))
    return next((n for n in range(longest, 0, -1) if text.endswith(stop[:n])), 0)
