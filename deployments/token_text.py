"""The text and the bytes of single tokens, for log probabilities."""

from functools import lru_cache

from nsa_platform.data.tokenizer import Tokenizer


@lru_cache(maxsize=1)
def _bytes_by_letter() -> dict[str, int]:
    """The byte-level alphabet: printable Latin-1 bytes are themselves, the others follow U+0100."""
    printable = {*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)}
    others = [byte for byte in range(0x100) if byte not in printable]
    return {chr(byte): byte for byte in printable} | {
        chr(0x100 + place): byte for place, byte in enumerate(others)
    }


class TokenTexts:
    """Text and bytes of a byte-level tokenizer's ids."""

    def __init__(self, tokenizer: Tokenizer) -> None:
        self._tokenizer = tokenizer
        self._added = tokenizer.transformers.added_tokens_decoder

    def bytes(self, token_id: int) -> bytes:
        """What the token stands for; may be a part of a character. Unused ids: nothing."""
        if token_id in self._added:
            return self._added[token_id].content.encode()
        name = self._tokenizer.transformers.convert_ids_to_tokens(token_id)
        letters = _bytes_by_letter()
        return bytes(letters[letter] for letter in name or "")

    def text(self, token_id: int) -> str:
        """The same as text; a part of a character is U+FFFD."""
        return self.bytes(token_id).decode(errors="replace")

    def name(self, token_id: int) -> str:
        """The text, or for a part of a character its bytes: names of different tokens differ."""
        stands_for = self.bytes(token_id)
        try:
            return stands_for.decode()
        except UnicodeDecodeError:
            return "bytes:" + "".join(f"\\x{byte:02x}" for byte in stands_for)
