"""Chats in OpenAI's message shape, rendered by the tokenizer's own chat template.

Training and serving render through the same template: the ids of a prompt are the first ids of the
chat that continues it. Loss is counted on what the assistant writes, the end of its turn included.
"""

import re
from collections.abc import Mapping, Sequence
from typing import Any, Literal

from nsa_platform.data.tokenizer import Tokenizer, TokenizerError

ROLES = ("system", "user", "assistant")

Reason = Literal["malformed_messages", "no_assistant_turn", "control_token"]
Message = dict[str, str]


class ChatError(ValueError):
    """A chat cannot be used. `reason` is the word under which such chats are counted."""

    def __init__(self, reason: Reason, message: str) -> None:
        super().__init__(message)
        self.reason: Reason = reason


def check_messages(messages: object) -> list[Message]:
    """Validate a chat and return it as plain role and content strings.

    Content may be a string or OpenAI's list of text parts, which are joined.

    Raises:
        ChatError: not a non-empty list of messages, an unknown role, a system message that is not
            the first, content that is no text.
    """
    if not isinstance(messages, Sequence) or isinstance(messages, str) or not messages:
        raise ChatError("malformed_messages", "messages must be a non-empty list")
    return [_check_message(index, message) for index, message in enumerate(messages)]


def render_chat(tokenizer: Tokenizer, messages: object) -> tuple[list[int], list[bool]]:
    """Ids of a whole chat and, for each, whether the assistant wrote it.

    Raises:
        ChatError: the messages are malformed, no assistant turn has content, or a message contains
            the name of a control token and could forge a turn.
        TokenizerError: the tokenizer has no chat template with generation marks.
    """
    check_template(tokenizer)
    turns = check_messages(messages)
    if not any(turn["role"] == "assistant" and turn["content"].strip() for turn in turns):
        raise ChatError("no_assistant_turn", "a chat needs an assistant message with content")
    for turn in turns:
        for token in tokenizer.control_tokens.values():
            if token in turn["content"]:
                raise ChatError("control_token", f"a message contains the control token {token}")
    encoded: Any = tokenizer.transformers.apply_chat_template(
        turns, tokenize=True, return_dict=True, return_assistant_tokens_mask=True
    )
    return list(encoded["input_ids"]), [bool(written) for written in encoded["assistant_masks"]]


def render_prompt(
    tokenizer: Tokenizer,
    messages: object,
    *,
    begin_turn: bool = True,
    continue_last: bool = False,
) -> list[int]:
    """Ids of a chat up to where the assistant is to write.

    Names of control tokens inside messages are encoded as ordinary text.

    Args:
        begin_turn: begin a turn of the assistant's after the last message.
        continue_last: leave the last message open; not together with begin_turn.

    Raises:
        ChatError: the messages are malformed.
        TokenizerError: the tokenizer has no chat template.
    """
    if tokenizer.chat_template is None:
        raise TokenizerError(f"{tokenizer.folder}: has no chat template, so it cannot read chats")
    ids: Any = tokenizer.transformers.apply_chat_template(
        check_messages(messages),
        tokenize=True,
        add_generation_prompt=begin_turn,
        continue_final_message=continue_last,
        return_dict=False,
        sanitize_control_tokens=True,
    )
    return list(ids)


def check_template(tokenizer: Tokenizer) -> None:
    """Raise TokenizerError unless the chat template marks what the assistant writes."""
    template = tokenizer.chat_template
    if template is None:
        raise TokenizerError(
            f"{tokenizer.folder}: has no chat template (chat_template.jinja, or chat_template in "
            "tokenizer_config.json), so chats cannot be rendered"
        )
    if not re.search(r"\{%-?\s*generation\b", template):
        raise TokenizerError(
            f"{tokenizer.folder}: the chat template does not put what the assistant writes between "
            "{% generation %} and {% endgeneration %}, so the loss mask is unknown; add the marks "
            "to chat_template.jinja"
        )


def _check_message(index: int, message: object) -> Message:
    if not isinstance(message, Mapping):
        raise ChatError("malformed_messages", f"messages[{index}] must be an object")
    role = message.get("role")
    if role not in ROLES:
        raise ChatError(
            "malformed_messages",
            f"messages[{index}].role must be one of {', '.join(ROLES)}, got {role!r}",
        )
    if role == "system" and index:
        raise ChatError("malformed_messages", f"messages[{index}]: system must come first")
    return {"role": role, "content": _text(index, message.get("content"))}


def _text(index: int, content: object) -> str:
    if isinstance(content, str):
        return content
    if isinstance(content, Sequence):
        parts = [part.get("text") for part in content if isinstance(part, Mapping)]
        texts = [part for part in parts if isinstance(part, str)]
        if len(texts) == len(content):
            return "".join(texts)
    raise ChatError(
        "malformed_messages",
        f"messages[{index}].content must be a string or a list of text parts",
    )
