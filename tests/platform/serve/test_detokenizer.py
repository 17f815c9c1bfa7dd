"""Text in pieces: joined it is the text at once, and nothing is shown that is later taken back."""

import re

import pytest
import tokenizers
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import decoders, models

from nsa_platform.serve.detokenizer import MAX_OPEN_TOKENS, Detokenizer, StopStrings

REPLACEMENT = "\N{REPLACEMENT CHARACTER}"
TEXTS = [
    "the cat",
    "naïve café",
    "北京 and 🙂🙂",
    "Ελλάδα",
    "a\n\n b",
    "👩‍👩‍👧‍👦 family",
    f"real {REPLACEMENT}!",
]
BYTE_FALLBACK = {
    "<unk>": 0,
    "▁the": 1,
    "▁": 2,
    "cat": 3,
    **{f"<0x{byte:02X}>": 4 + byte for byte in range(256)},
}


def pieces_of(decode, ids: list[int]) -> list[str]:
    detokenizer = Detokenizer(decode)
    return [*(detokenizer.push(token) for token in ids), detokenizer.flush()]


@pytest.fixture(scope="module")
def fallback_decode():
    """A decoder in SentencePiece's manner: a mark for the space, the first one dropped."""
    backend = tokenizers.Tokenizer(
        models.BPE(vocab=BYTE_FALLBACK, merges=[], unk_token="<unk>", byte_fallback=True)
    )
    backend.decoder = decoders.Sequence(
        [
            decoders.Replace("▁", " "),
            decoders.ByteFallback(),
            decoders.Fuse(),
            decoders.Strip(" ", 1, 0),
        ]
    )
    return lambda ids: backend.decode(list(ids))


@pytest.mark.parametrize("text", TEXTS)
def test_a_text_comes_in_whole_characters(toy_tokenizer, text):
    ids = toy_tokenizer.encode(text)
    pieces = pieces_of(toy_tokenizer.decode, ids)
    assert "".join(pieces) == text
    assert "".join(pieces).count(REPLACEMENT) == text.count(REPLACEMENT)
    assert pieces[-1] == ""


@settings(deadline=None, max_examples=150)
@given(ids=st.lists(st.integers(0, 299), max_size=40))
def test_any_ids_give_the_text_at_once(toy_tokenizer, ids):
    ids = [token % toy_tokenizer.vocab_size for token in ids]
    pieces = pieces_of(toy_tokenizer.decode, ids)
    assert "".join(pieces) == toy_tokenizer.decode(ids)


@pytest.mark.parametrize("text", ["the cat", "the naïve cat", "北京 the 🙂🙂", "the  the"])
def test_byte_fallback_gives_the_text_at_once(fallback_decode, text):
    marked = text.replace(" ", "▁")
    words = re.findall("▁the|cat|▁|.", f"▁{marked}")
    ids = [
        token
        for word in words
        for token in (
            [BYTE_FALLBACK[word]] if word in BYTE_FALLBACK else [4 + b for b in word.encode()]
        )
    ]
    pieces = pieces_of(fallback_decode, ids)
    assert "".join(pieces) == fallback_decode(ids) == text
    assert not any(REPLACEMENT in piece for piece in pieces)


def test_broken_bytes_are_shown_and_stay_cheap(toy_tokenizer):
    broken = next(
        token
        for token in range(toy_tokenizer.vocab_size)
        if toy_tokenizer.decode([token]) == REPLACEMENT
    )
    lengths = []

    def decode(ids):
        lengths.append(len(ids))
        return toy_tokenizer.decode(ids)

    ids = [broken] * 500 + toy_tokenizer.encode("the end 🙂")
    pieces = pieces_of(decode, ids)
    assert "".join(pieces) == toy_tokenizer.decode(ids)
    assert sum(map(len, pieces[:500])) >= 490
    assert max(lengths) <= MAX_OPEN_TOKENS + 1


def test_control_tokens_are_no_text(toy_tokenizer):
    ids = [toy_tokenizer.eos_id] * 100 + toy_tokenizer.encode("cat")
    assert "".join(pieces_of(toy_tokenizer.decode, ids)) == "cat"


def cut_by_hand(text: str, stops: list[str], is_included: bool) -> tuple[str, str | None]:
    """Character by character: after each, does the text end with a stop string?"""
    for end in range(1, len(text) + 1):
        found = [stop for stop in stops if text[:end].endswith(stop)]
        if found:
            stop = max(found, key=len)
            return text[: end if is_included else end - len(stop)], stop
    return text, None


@settings(deadline=None, max_examples=300)
@given(
    pieces=st.lists(st.text("ab.", max_size=4), max_size=12),
    stops=st.lists(st.text("ab.", min_size=1, max_size=4), max_size=3, unique=True),
    is_included=st.booleans(),
)
def test_stop_strings_cut_as_if_character_by_character(pieces, stops, is_included):
    wanted, wanted_stop = cut_by_hand("".join(pieces), stops, is_included)
    cutter = StopStrings(stops, is_included=is_included)
    shown, found = "", None
    for piece in pieces:
        text, found = cutter.push(piece)
        shown += text
        assert wanted.startswith(shown)
        if found is not None:
            break
    assert shown + cutter.flush() == wanted
    assert found == wanted_stop


def test_only_what_may_become_a_stop_string_is_held_back():
    cutter = StopStrings(["<end>", "##"])
    assert cutter.push("a <e") == ("a ", None)
    assert cutter.push("nd of #1 ") == ("<end of #1 ", None)
    assert cutter.push("x#") == ("x", None)
    assert cutter.push("<end") == ("#", None)
    assert cutter.push("> y") == ("", "<end>")
