"""The tokenizer: exact round trips, bytes per token, control tokens that text cannot forge."""

import json
from pathlib import Path
from typing import Any

import pytest
from transformers import AutoTokenizer

from nsa_platform import storage
from nsa_platform.config.data import TokenizerConfig
from nsa_platform.data.tokenizer import (
    END_OF_TEXT,
    TURN_END,
    Tokenizer,
    TokenizerError,
    open_tokenizer,
    train_tokenizer,
)

TEXTS = [
    "def f(x):\n    return x + 12345\n",
    "grüß dich, 世界! \U0001f600\r\n\t  \n\n end ",
    "a\x00b\ufeff",
    "",
    " ",
]


@pytest.fixture(scope="module")
def tokenizer(tiny_shards: Any) -> Tokenizer:
    return Tokenizer(tiny_shards.tokenizer)


@pytest.mark.parametrize("text", TEXTS)
def test_round_trip_and_bytes(tokenizer: Tokenizer, text: str) -> None:
    ids = tokenizer.encode(text)
    assert tokenizer.decode(ids) == text
    assert tokenizer.token_bytes()[ids].sum() == len(text.encode())
    assert max(ids, default=0) < tokenizer.vocab_size


def test_batches_are_single_texts(tokenizer: Tokenizer) -> None:
    assert tokenizer.encode_batch(TEXTS) == [tokenizer.encode(text) for text in TEXTS]
    assert tokenizer.encode_batch([]) == []


def test_names_of_control_tokens_in_text_are_text(tokenizer: Tokenizer) -> None:
    text = f"a{TURN_END}b{END_OF_TEXT}"
    ids = tokenizer.encode(text)
    assert not {tokenizer.eos_id, tokenizer.token_id(TURN_END)} & set(ids)
    assert tokenizer.decode(ids) == text


def test_ids(tokenizer: Tokenizer) -> None:
    assert tokenizer.token_id(END_OF_TEXT) == tokenizer.eos_id
    assert tokenizer.token_id("<|pad|>") == tokenizer.pad_id
    assert tokenizer.stop_ids() == (tokenizer.eos_id, tokenizer.token_id(TURN_END))
    assert tokenizer.token_id("nothing like this") is None
    assert tokenizer.vocab_size == 512
    assert tokenizer.token_bytes()[[tokenizer.eos_id, tokenizer.pad_id]].tolist() == [0, 0]


def test_transformers_reads_the_folder(tokenizer: Tokenizer) -> None:
    other = AutoTokenizer.from_pretrained(str(tokenizer.folder), local_files_only=True)
    assert other.eos_token_id == tokenizer.eos_id
    assert other(TEXTS[1])["input_ids"] == tokenizer.encode(TEXTS[1])
    assert other.chat_template == tokenizer.chat_template


def test_training_is_deterministic(tmp_path: Path) -> None:
    texts = [f"word{i % 17} other{i % 5} " * 20 for i in range(50)]
    first = train_tokenizer(iter(texts), 270, tmp_path / "a")
    second = train_tokenizer(iter(texts), 270, tmp_path / "b")
    assert first.fingerprint == second.fingerprint
    assert train_tokenizer(iter(texts), 275, tmp_path / "c").fingerprint != first.fingerprint


def test_numbers_are_tokens_whether_or_not_the_texts_have_them(tmp_path: Path) -> None:
    texts = ["version 12 of 999 in the year 2026\n" * 20, "there is 1 word"]
    tokenizer = train_tokenizer(iter(texts), 1400, tmp_path, all_numbers=True)

    def pieces(text: str) -> list[str]:
        return [tokenizer.decode([token]) for token in tokenizer.encode(text)]

    for number in ("7", "42", "00", "099", "503"):
        assert pieces(number) == [number]
    assert pieces("is 37066.") == [*pieces("is"), " ", "370", "66", "."]
    assert pieces("1234567") == ["123", "456", "7"]
    # What the texts have is merged as ever, and nothing but numbers holds two digits.
    assert " year" in pieces("the year 2026")
    assert tokenizer.vocab_size <= 1400
    for text in TEXTS:
        assert tokenizer.decode(tokenizer.encode(text)) == text
        assert tokenizer.token_bytes()[tokenizer.encode(text)].sum() == len(text.encode())
    other = AutoTokenizer.from_pretrained(str(tmp_path), local_files_only=True)
    assert other(TEXTS[0])["input_ids"] == tokenizer.encode(TEXTS[0])


def test_numbers_need_room(tmp_path: Path) -> None:
    with pytest.raises(TokenizerError, match="at least 1360 with 1,100 numbers"):
        train_tokenizer(["ab"], 1359, tmp_path, all_numbers=True)
    TokenizerConfig(train_vocab_size=1360, train_all_numbers=True)
    with pytest.raises(ValueError, match="train_vocab_size 1360 at least, got 1359"):
        TokenizerConfig(train_vocab_size=1359, train_all_numbers=True)
    with pytest.raises(ValueError, match="for a tokenizer that is trained"):
        TokenizerConfig(path="somewhere", train_all_numbers=True)


def test_a_small_corpus_gives_what_there_is(tmp_path: Path) -> None:
    tokenizer = train_tokenizer(["ab"], 1000, tmp_path)
    assert tokenizer.vocab_size == 260
    assert tokenizer.decode(tokenizer.encode("世界")) == "世界"


def test_too_small_a_vocabulary(tmp_path: Path) -> None:
    with pytest.raises(TokenizerError, match="vocab_size=259 must be at least 260"):
        train_tokenizer(["ab"], 259, tmp_path)


def test_a_saved_copy_is_the_same(tokenizer: Tokenizer, tmp_path: Path) -> None:
    tokenizer.save(tmp_path)
    copy = Tokenizer(tmp_path)
    assert copy.fingerprint == tokenizer.fingerprint
    assert copy.encode(TEXTS[0]) == tokenizer.encode(TEXTS[0])
    template = tmp_path / "chat_template.jinja"
    template.write_text(template.read_text() + " ")
    assert Tokenizer(tmp_path).fingerprint != tokenizer.fingerprint


def test_a_folder_without_a_tokenizer(tmp_path: Path) -> None:
    with pytest.raises(TokenizerError, match=r"has no tokenizer\.json"):
        Tokenizer(tmp_path)
    with pytest.raises(TokenizerError, match=r"absent.*does not exist"):
        open_tokenizer(str(tmp_path / "absent"), tmp_path)
    (tmp_path / "tokenizer.json").write_text("{}")
    with pytest.raises(TokenizerError, match="cannot be read as a tokenizer"):
        Tokenizer(tmp_path)


def test_a_tokenizer_without_an_end_token(tokenizer: Tokenizer, tmp_path: Path) -> None:
    tokenizer.save(tmp_path)
    config = json.loads((tmp_path / "tokenizer_config.json").read_text())
    del config["eos_token"]
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(config))
    with pytest.raises(TokenizerError, match="names no eos_token"):
        Tokenizer(tmp_path)


@pytest.mark.cluster
def test_a_remote_tokenizer(tokenizer: Tokenizer, s3_environment: Any, tmp_path: Path) -> None:
    uri = storage.join(s3_environment.bucket("tokenizers"), "t")
    storage.upload_tree(tokenizer.folder, uri)
    assert open_tokenizer(uri, tmp_path).fingerprint == tokenizer.fingerprint
