"""From a request's chat or text to token ids."""

from collections.abc import Sequence
from dataclasses import dataclass, replace

from deployments.errors import ApiError, bad_request
from deployments.fields import MAX_CHOICES
from deployments.protocol import ChatMessage, CompletionRequest, Generation
from nsa_platform.data.chat import render_prompt
from nsa_platform.data.tokenizer import Tokenizer


@dataclass(frozen=True, slots=True)
class Limits:
    """What a prompt must fit into."""

    max_model_len: int
    """Tokens of prompt and output together."""
    vocab_size: int
    """Token ids are below this."""
    longest_token_bytes: int
    """UTF-8 bytes of the longest token: a text of b bytes has at least b / this many tokens."""


@dataclass(frozen=True, slots=True)
class Prompt:
    """What the model continues."""

    ids: tuple[int, ...]
    text: str
    """The same as text; what `echo` repeats."""
    blocks: tuple[str, ...] = ()
    """Texts of its selection blocks, for who asks which were read."""


def limits_of(tokenizer: Tokenizer, *, max_model_len: int, vocab_size: int) -> Limits:
    """Limits of a model with its tokenizer.

    Raises:
        TokenizerError: the tokenizer is not byte-level.
    """
    return Limits(max_model_len, vocab_size, max(1, int(tokenizer.token_bytes().max())))


def chat_prompt(
    tokenizer: Tokenizer,
    messages: Sequence[ChatMessage],
    limits: Limits,
    *,
    begin_turn: bool = True,
    continue_last: bool = False,
    keep: int | None = None,
) -> Prompt:
    """A chat as training saw it, up to where the assistant writes. Its text is the last message's,
    if that is the assistant's.

    Args:
        begin_turn, continue_last: as for render_prompt.
        keep: of more tokens only this many, the last; None: all.

    Raises:
        ApiError: 400, the chat is malformed or does not fit.
    """
    texts = [
        message.content
        if isinstance(message.content, str)
        else "".join(part.text for part in message.content)
        for message in messages
    ]
    for text in texts if keep is None else ():
        _check_bytes(text, limits, "messages")
    turns = [
        {"role": "system" if message.role == "developer" else message.role, "content": text}
        for message, text in zip(messages, texts, strict=True)
    ]
    try:
        ids = render_prompt(tokenizer, turns, begin_turn=begin_turn, continue_last=continue_last)
    except ValueError as error:
        # A ChatError, or transformers' own when the template hides where the last message ends.
        raise bad_request(str(error), param="messages") from None
    text = texts[-1] if messages[-1].role == "assistant" else ""
    return _checked(Prompt(_last(ids, keep), text), limits, "messages")


def text_prompt(
    tokenizer: Tokenizer, text: str, limits: Limits, *, keep: int | None = None
) -> Prompt:
    """A text as it stands, or the last `keep` tokens of it.

    Raises:
        ApiError: 400, it is empty or does not fit.
    """
    if keep is None:
        _check_bytes(text, limits, "prompt")
    ids = tokenizer.encode(text)
    kept = _last(ids, keep)
    shown = text if len(kept) == len(ids) else tokenizer.decode(kept)
    return _checked(Prompt(kept, shown), limits, "prompt")


def completion_prompts(
    tokenizer: Tokenizer, request: CompletionRequest, limits: Limits
) -> list[Prompt]:
    """One prompt for each that the request holds.

    Raises:
        ApiError: 400, one is empty, does not fit or holds an id that the model does not have.
    """
    given, keep = request.prompt, request.truncate_prompt_tokens
    if isinstance(given, str):
        return [text_prompt(tokenizer, given, limits, keep=keep)]
    numbers = [each for each in given if isinstance(each, int)]
    if numbers:
        return [id_prompt(tokenizer, numbers, limits, keep=keep)]
    return [
        text_prompt(tokenizer, each, limits, keep=keep)
        if isinstance(each, str)
        else id_prompt(tokenizer, each, limits, keep=keep)
        for each in given
        if not isinstance(each, int)
    ]


def id_prompt(
    tokenizer: Tokenizer, ids: Sequence[int], limits: Limits, *, keep: int | None = None
) -> Prompt:
    """Token ids as they stand, or the last `keep` of them.

    Raises:
        ApiError: 400, there are too many or the model does not have one.
    """
    checked = _checked(Prompt(_last(ids, keep), ""), limits, "prompt")
    return Prompt(checked.ids, tokenizer.decode(checked.ids))


def with_blocks(tokenizer: Tokenizer, prompt: Prompt, block_size: int | None) -> Prompt:
    """The prompt with the text of its blocks; characters that two blocks share are U+FFFD in both.

    Raises:
        ApiError: 400, block_size is None: the model has full attention.
    """
    if block_size is None:
        raise bad_request(
            "nsa.return_selected_blocks: the model has full attention, which reads everything",
            param="nsa",
        )
    starts = range(0, len(prompt.ids), block_size)
    texts = (
        tokenizer.decode(prompt.ids[start : start + block_size], skip_special_tokens=False)
        for start in starts
    )
    return replace(prompt, blocks=tuple(texts))


def check_choices(request: Generation, num_prompts: int, *, most: int) -> None:
    """Refuse more answers to one request than it may ask for, or than an engine takes at all.
    Raises ApiError."""
    total, most = num_prompts * (request.n or 1), min(most, MAX_CHOICES)
    if total > most:
        raise bad_request(
            f"n={request.n or 1} for {num_prompts} prompts are {total} answers, at most "
            f"{most} may be asked for at once",
            param="n",
        )


def _last(ids: Sequence[int], keep: int | None) -> tuple[int, ...]:
    return tuple(ids) if keep is None else tuple(ids[-keep:])


def _check_bytes(text: str, limits: Limits, param: str) -> None:
    """Refuse what cannot fit before the tokenizer reads all of it."""
    least = len(text.encode()) // limits.longest_token_bytes
    if least > limits.max_model_len:
        raise _too_long(f"at least {least}", limits, param)


def _checked(prompt: Prompt, limits: Limits, param: str) -> Prompt:
    if not prompt.ids:
        raise bad_request(f"{param} is empty: at least one token is needed", param=param)
    check_ids(prompt.ids, limits, param)
    if len(prompt.ids) >= limits.max_model_len:
        raise _too_long(str(len(prompt.ids)), limits, param)
    return prompt


def check_ids(ids: Sequence[int], limits: Limits, param: str) -> None:
    """Refuse ids that the model does not have. Raises ApiError."""
    if ids and max(ids) >= limits.vocab_size:
        raise bad_request(
            f"{param}: token ids must lie in [0, {limits.vocab_size}), got {max(ids)}", param=param
        )


def _too_long(count: str, limits: Limits, param: str) -> ApiError:
    return bad_request(
        f"This model's maximum context length is {limits.max_model_len} tokens; the prompt has "
        f"{count} tokens, and at least one more is generated",
        param=param,
        code="context_length_exceeded",
    )
