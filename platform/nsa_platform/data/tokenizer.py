"""The tokenizer: one Hugging Face folder, used alike by data, training and serving.

A folder holds tokenizer.json, tokenizer_config.json and chat_template.jinja. Text is data: a
document that happens to contain the name of a control token is encoded as ordinary text.
"""

import hashlib
import json
import shutil
from collections.abc import Iterable, Sequence
from pathlib import Path

import numpy as np
import tokenizers
from tokenizers import Regex, decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

from nsa_platform import storage

END_OF_TEXT = "<|endoftext|>"
TURN_START = "<|im_start|>"
TURN_END = "<|im_end|>"
PAD = "<|pad|>"

FILES = (
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "chat_template.jinja",
)

# Words with one leading mark or space, numbers by three digits, runs of marks, line ends, spaces.
# Source: the split that byte-level BPE has used since GPT-2 (Radford et al. 2019, section 2.2).
WORDS = (
    r"[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+"
    r"|\s*[\r\n]+|\s+(?!\S)|\s+"
)

# One digit is a byte, and so a token already.
NUMBERS = tuple(f"{number:0{digits}}" for digits in (2, 3) for number in range(10**digits))

# `generation` marks what the assistant writes: its content and the token that ends its turn.
CHAT_TEMPLATE = """\
{%- for message in messages %}
    {%- if message['role'] == 'assistant' %}
        {{- '<|im_start|>assistant\\n' }}
        {%- generation %}
        {{- (message['content'] | trim) + '<|im_end|>' }}
        {%- endgeneration %}
        {{- '\\n' }}
    {%- else %}
        {{- '<|im_start|>' + message['role'] + '\\n' + message['content'] + '<|im_end|>\\n' }}
    {%- endif %}
{%- endfor %}
{%- if add_generation_prompt %}
    {{- '<|im_start|>assistant\\n' }}
{%- endif %}
"""


class TokenizerError(ValueError):
    """A folder is not a usable tokenizer; the message names the folder and what is missing."""


class Tokenizer:
    """A fast Hugging Face tokenizer read from a local folder.

    Raises:
        TokenizerError: the folder has no readable tokenizer.json, or it names no end token.
    """

    def __init__(self, folder: str | Path) -> None:
        self.folder = Path(folder)
        file = self.folder / "tokenizer.json"
        if not file.is_file():
            raise TokenizerError(f"{folder}: is no tokenizer folder, it has no tokenizer.json")
        try:
            self.transformers = PreTrainedTokenizerFast.from_pretrained(
                str(folder), local_files_only=True
            )
        except Exception as error:  # tokenizers raises bare Exception for a malformed file
            raise TokenizerError(f"{folder}: cannot be read as a tokenizer: {error}") from error
        eos_id, pad_id = self.transformers.eos_token_id, self.transformers.pad_token_id
        if not isinstance(eos_id, int):
            raise TokenizerError(f"{folder}: tokenizer_config.json names no eos_token")
        self.eos_id = eos_id
        # Padding is a document of its own that nobody learns from, so any valid id will do.
        self.pad_id = pad_id if isinstance(pad_id, int) else eos_id
        template = self.transformers.chat_template
        self.chat_template: str | None = template if isinstance(template, str) else None
        self._backend = _plain_text_backend(self.transformers)
        added = self._backend.get_added_tokens_decoder()
        self.control_tokens = {
            index: token.content for index, token in added.items() if token.special
        }
        """Tokens that stand for no text, by id."""
        self.vocab_size = max(self._backend.get_vocab(with_added_tokens=True).values()) + 1
        """Ids are below this: the least number of rows of an embedding."""
        content = file.read_bytes() + b"\0" + (self.chat_template or "").encode()
        self.fingerprint = hashlib.sha256(content).hexdigest()
        """sha256 of tokenizer.json and the chat template, in hex."""

    def encode(self, text: str) -> list[int]:
        """Ids of a text. Nothing is added, and names of control tokens are ordinary text."""
        return self._backend.encode(text, add_special_tokens=False).ids

    def encode_batch(self, texts: Sequence[str]) -> list[list[int]]:
        """Ids of several texts, as `encode` gives them."""
        encodings = self._backend.encode_batch_fast(list(texts), add_special_tokens=False)
        return [encoding.ids for encoding in encodings]

    def decode(self, ids: Sequence[int], *, skip_special_tokens: bool = True) -> str:
        """Text of ids; bytes that form no character become U+FFFD."""
        return self._backend.decode(list(ids), skip_special_tokens=skip_special_tokens)

    def token_id(self, token: str) -> int | None:
        """Id of one token by its name, or None."""
        return self._backend.token_to_id(token)

    def stop_ids(self) -> tuple[int, ...]:
        """Ids that end an answer: the end of a text, and the end of a turn if there is one."""
        turn_end = self.token_id(TURN_END)
        return (self.eos_id,) if turn_end in (None, self.eos_id) else (self.eos_id, turn_end)

    def token_bytes(self) -> np.ndarray:
        """UTF-8 bytes that each id stands for, int32 [vocab_size]; control tokens stand for 0.

        The bytes of a text are the sum over its ids, so bits per byte of any stretch is exact.

        Raises:
            TokenizerError: the tokenizer is not byte-level, so ids have no fixed bytes.
        """
        if "ByteLevel" not in json.dumps(json.loads(self._backend.to_str())["decoder"]):
            raise TokenizerError(f"{self.folder}: bytes of a token need a byte-level tokenizer")
        result = np.zeros(self.vocab_size, dtype=np.int32)
        added = self._backend.get_added_tokens_decoder()
        for token, index in self._backend.get_vocab(with_added_tokens=True).items():
            if index not in self.control_tokens:
                # The byte-level alphabet writes each byte as one character.
                result[index] = len(token.encode()) if index in added else len(token)
        return result

    def save(self, folder: str | Path) -> None:
        """Copy the tokenizer's files to a local folder; its fingerprint stays the same."""
        Path(folder).mkdir(parents=True, exist_ok=True)
        for name in FILES:
            if (self.folder / name).is_file():
                shutil.copyfile(self.folder / name, Path(folder) / name)


def open_tokenizer(uri: str, cache_dir: str | Path) -> Tokenizer:
    """The tokenizer of a folder, local or s3://.

    Raises:
        TokenizerError: there is no usable tokenizer at `uri`.
        StorageError: the store cannot be reached.
    """
    try:
        return Tokenizer(storage.fetch(uri, cache_dir))
    except storage.MissingFileError as error:
        raise TokenizerError(str(error)) from error


def train_tokenizer(
    texts: Iterable[str], vocab_size: int, folder: str | Path, *, all_numbers: bool = False
) -> Tokenizer:
    """Train a byte-level BPE on texts and save it with the ChatML template.

    The result is a function of the texts and their order. A small corpus may yield fewer than
    `vocab_size` tokens; `Tokenizer.vocab_size` tells.

    all_numbers: each number of up to three digits is one token, in the texts or not.

    Raises:
        TokenizerError: vocab_size has no room for the 256 bytes and the control tokens, or not for
            the numbers as well.
    """
    specials = [END_OF_TEXT, TURN_START, TURN_END, PAD]
    numbers = NUMBERS if all_numbers else ()
    least = 256 + len(specials) + len(numbers)
    if vocab_size < least:
        beside = f" with {len(numbers):,} numbers" if numbers else ""
        raise TokenizerError(f"vocab_size={vocab_size} must be at least {least}{beside}")
    # Digits that are to be merged by three are not merged by what the texts have.
    words = WORDS.replace(r"\p{N}{1,3}", r"\p{N}") if numbers else WORDS
    backend = tokenizers.Tokenizer(models.BPE(ignore_merges=bool(numbers)))
    backend.pre_tokenizer = _split(words)
    backend.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size - len(numbers),
        special_tokens=specials,
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        min_frequency=2,
        show_progress=False,
    )
    backend.train_from_iterator(texts, trainer)
    if numbers:
        backend = _with_words(backend, numbers)
    place = Path(folder)
    place.mkdir(parents=True, exist_ok=True)
    backend.save(str(place / "tokenizer.json"))
    settings = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "eos_token": END_OF_TEXT,
        "pad_token": PAD,
        "clean_up_tokenization_spaces": False,
        "model_max_length": 1_000_000_000,
    }
    (place / "tokenizer_config.json").write_text(json.dumps(settings, indent=2) + "\n")
    (place / "chat_template.jinja").write_text(CHAT_TEMPLATE)
    return Tokenizer(place)


def _split(words: str) -> pre_tokenizers.PreTokenizer:
    return pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(words), behavior="isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )


def _with_words(backend: tokenizers.Tokenizer, words: Sequence[str]) -> tokenizers.Tokenizer:
    """A backend that ignores merges for its whole words, with more of them."""
    saved = json.loads(backend.to_str())
    vocabulary = saved["model"]["vocab"]
    vocabulary.update({word: len(vocabulary) + i for i, word in enumerate(words)})
    more = tokenizers.Tokenizer.from_str(json.dumps(saved))
    more.pre_tokenizer = _split(WORDS)
    return more


def _plain_text_backend(tokenizer: PreTrainedTokenizerFast) -> tokenizers.Tokenizer:
    """A copy of the Rust tokenizer that never reads a control token out of text."""
    backend = tokenizers.Tokenizer.from_str(tokenizer.backend_tokenizer.to_str())
    backend.no_padding()
    backend.no_truncation()
    backend.encode_special_tokens = True
    return backend
