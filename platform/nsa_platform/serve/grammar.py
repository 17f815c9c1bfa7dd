"""Grammars that bind an output: JSON schemas, regular expressions, context-free grammars.

The door to llguidance, which says after every token which ones may follow.
"""

import threading
from collections import OrderedDict

import numpy as np
from llguidance import LLMatcher, LLParserLimits, LLTokenizer

from nsa_platform.data.tokenizer import Tokenizer
from nsa_platform.serve.request import Grammar

MAX_KEPT = 64
"""Compiled grammars that are kept for the next request of the same."""
# Bounded, or a model that has learned no JSON writes spaces for ever.
WHITESPACE = r"[\x20\x0A\x0D\x09]{0,12}"
# All requests of a step wait for the slowest grammar: some 50 ms, where the library allows 200.
LIMITS = LLParserLimits(initial_lexer_fuel=200_000, step_lexer_fuel=50_000)


class GrammarError(ValueError):
    """A grammar that cannot be compiled; the message says where and why."""


class Grammars:
    """The grammars of one tokenizer, compiled once each. Any thread may ask."""

    def __init__(self, tokenizer: Tokenizer, *, vocab_size: int) -> None:
        """vocab_size: of the model's scores; ids that the tokenizer lacks never match."""
        self._tokens = LLTokenizer(
            tokenizer.transformers.backend_tokenizer.to_str(),
            n_vocab=vocab_size,
            eos_token=list(tokenizer.stop_ids()),
        )
        self._lock = threading.Lock()
        self._compiled: OrderedDict[Grammar, LLMatcher] = OrderedDict()

    def matcher(self, grammar: Grammar) -> LLMatcher:
        """A matcher at the beginning of an output, of the caller's own. May take a second.

        It offers the tokenizer's stop ids where the grammar may end, and no other token where it
        must.

        Raises:
            GrammarError: the grammar is malformed, or describes nothing.
        """
        with self._lock:
            known = self._compiled.get(grammar)
            if known is not None:
                self._compiled.move_to_end(grammar)
                return known.deep_copy()
        compiled = LLMatcher(self._tokens, _source(grammar), log_level=0, limits=LIMITS)
        self._try(grammar, compiled)
        with self._lock:
            self._compiled[grammar] = compiled
            if len(self._compiled) > MAX_KEPT:
                self._compiled.popitem(last=False)
            return compiled.deep_copy()

    def _try(self, grammar: Grammar, compiled: LLMatcher) -> None:
        """Take a first token: what describes nothing, or too much, shows only then.

        Raises:
            GrammarError: it does, or it was not compiled.
        """
        trial = compiled.deep_copy()
        if not trial.is_error():
            packed = np.frombuffer(trial.compute_bitmask(), dtype=np.uint8)
            trial.consume_token(int(np.unpackbits(packed, bitorder="little").argmax()))
        if trial.is_error():
            # The library's first line says why, those behind it where its parser stood.
            reason = " ".join(trial.get_error().partition("<state>")[0].split())
            if reason == "NoExtensionBias":
                reason = "no text fits it"
            raise GrammarError(f"{grammar.kind}: {reason}")


def _source(grammar: Grammar) -> str:
    if grammar.kind == "json_schema":
        try:
            return LLMatcher.grammar_from_json_schema(
                grammar.text, overrides={"whitespace_pattern": WHITESPACE}
            )
        except ValueError as error:
            raise GrammarError(f"json_schema: {error}") from None
    if grammar.kind == "regex":
        return LLMatcher.grammar_from_regex(grammar.text)
    return LLMatcher.grammar_from_lark(grammar.text)
