"""Log probabilities as OpenAI and vLLM shape them: of a chat, of a completion, of a prompt."""

from collections.abc import Sequence

from deployments.replies import (
    ChatLogprobs,
    CompletionLogprobs,
    PromptLogprob,
    TokenLogprob,
    TopLogprob,
)
from deployments.token_text import TokenTexts
from nsa_platform.serve.request import TokenLogprob as Logprob


class LogprobShapes:
    """Writes log probabilities down, with names of the tokens or with their ids."""

    def __init__(self, texts: TokenTexts, *, as_ids: bool) -> None:
        """as_ids: a token is called `token_id:N`."""
        self._texts = texts
        self._as_ids = as_ids

    def chat(self, entries: Sequence[Logprob]) -> ChatLogprobs:
        """One entry for each token of an answer."""
        return ChatLogprobs(content=[self._chat_entry(entry) for entry in entries], refusal=None)

    def completion(self, entries: Sequence[Logprob], *, offset: int) -> CompletionLogprobs:
        """The same for a completion, whose first token stands at a character of its text."""
        offsets: list[int] = []
        for entry in entries:
            offsets.append(offset)
            offset += self.width(entry.token_id)
        return CompletionLogprobs(
            tokens=[self._name(entry.token_id) for entry in entries],
            token_logprobs=[entry.logprob for entry in entries],
            top_logprobs=[
                {self._name(entry.token_id): entry.logprob}
                | {self._name(token): logprob for token, logprob in entry.top}
                for entry in entries
            ],
            text_offset=offsets,
        )

    def echoed(self, ids: Sequence[int], entries: Sequence[Logprob]) -> CompletionLogprobs:
        """Those of a prompt that a completion begins with; nothing foretells its first token."""
        rest = self.completion(entries, offset=self.width(ids[0]))
        first = CompletionLogprobs(
            tokens=[self._name(ids[0])],
            token_logprobs=[None],
            top_logprobs=[None],
            text_offset=[0],
        )
        return joined(first, rest)

    def prompt(self, entries: Sequence[Logprob]) -> list[dict[str, PromptLogprob] | None]:
        """One mapping by token id for each token of a prompt, None for the first."""
        return [None, *(self._prompt_entry(entry) for entry in entries)]

    def width(self, token_id: int) -> int:
        """Characters of a token's text."""
        return len(self._texts.text(token_id))

    def _prompt_entry(self, entry: Logprob) -> dict[str, PromptLogprob]:
        own = {str(entry.token_id): self._ranked(entry.token_id, entry.logprob, entry.rank)}
        return own | {
            str(token): self._ranked(token, logprob, rank)
            for rank, (token, logprob) in enumerate(entry.top, 1)
        }

    def _ranked(self, token_id: int, logprob: float, rank: int) -> PromptLogprob:
        return PromptLogprob(logprob=logprob, rank=rank, decoded_token=self._texts.text(token_id))

    def _chat_entry(self, entry: Logprob) -> TokenLogprob:
        token = self._top(entry.token_id, entry.logprob)
        alternatives = [self._top(token_id, logprob) for token_id, logprob in entry.top]
        return TokenLogprob(
            token=token.token,
            logprob=token.logprob,
            bytes=token.bytes,
            top_logprobs=alternatives,
        )

    def _top(self, token_id: int, logprob: float) -> TopLogprob:
        stands_for = self._texts.bytes(token_id)
        name = f"token_id:{token_id}" if self._as_ids else stands_for.decode(errors="replace")
        return TopLogprob(token=name, logprob=logprob, bytes=list(stands_for))

    def _name(self, token_id: int) -> str:
        return f"token_id:{token_id}" if self._as_ids else self._texts.name(token_id)


def joined(first: CompletionLogprobs, second: CompletionLogprobs) -> CompletionLogprobs:
    """Those of a text and of what follows it; offsets are kept."""
    return CompletionLogprobs(
        tokens=first.tokens + second.tokens,
        token_logprobs=first.token_logprobs + second.token_logprobs,
        top_logprobs=first.top_logprobs + second.top_logprobs,
        text_offset=first.text_offset + second.text_offset,
    )
