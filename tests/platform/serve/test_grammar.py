"""Grammars: what comes out matches them, and what cannot be compiled is refused with a reason."""

import json
import re
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import jsonschema
import pytest

from nsa_platform.config.serve import EngineConfig
from nsa_platform.serve import grammar as grammars
from nsa_platform.serve.engine import Engine
from nsa_platform.serve.grammar import GrammarError, Grammars
from nsa_platform.serve.request import Grammar, Output, SamplingParams

SCHEMA = {
    "type": "object",
    "properties": {
        "age": {"type": "integer", "minimum": 0, "maximum": 150},
        "kind": {"enum": ["cat", "dog"]},
        "tags": {"type": "array", "items": {"type": "boolean"}, "maxItems": 2},
    },
    "required": ["age", "kind"],
    "additionalProperties": False,
}
JSON = Grammar("json_schema", json.dumps(SCHEMA))
CODE = Grammar("regex", r"[A-C]{2}-\d{3,5}(é|🙂)")
ECHO = Grammar("lark", 'start: "<" (start | "x") ">"')


@pytest.fixture(scope="module")
def compiler(toy_tokenizer) -> Grammars:
    return Grammars(toy_tokenizer, vocab_size=toy_tokenizer.vocab_size + 7)


@pytest.fixture(scope="module")
def model(make_speaker):
    return make_speaker()


def run(engine: Engine) -> dict[str, list[Output]]:
    outputs: dict[str, list[Output]] = {}
    while engine.has_work:
        for output in engine.step():
            outputs.setdefault(output.request_id, []).append(output)
        engine.check()
    return outputs


def text_of(outputs: list[Output]) -> str:
    return "".join(output.text for output in outputs)


def test_every_output_matches_its_own_grammar(model, toy_tokenizer):
    engine = Engine(model, toy_tokenizer, EngineConfig(max_num_seqs=5, num_kv_tokens=256))
    for seed in range(4):
        for kind, grammar in (("json", JSON), ("code", CODE), ("echo", ECHO), ("free", None)):
            params = SamplingParams(max_tokens=110, temperature=1.0, seed=seed, grammar=grammar)
            engine.add(f"{kind}{seed}", [40, 41], params)
    outputs = run(engine)
    ends = {name: found[-1].finish_reason for name, found in outputs.items()}
    for seed in range(4):
        answer = text_of(outputs[f"json{seed}"])
        if ends[f"json{seed}"] == "stop":
            jsonschema.validate(json.loads(answer), SCHEMA)
        assert ends[f"code{seed}"] == "stop"
        assert re.fullmatch(CODE.text, text_of(outputs[f"code{seed}"]))
        depth = re.fullmatch(r"(<*)x(>*)", text_of(outputs[f"echo{seed}"]))
        if ends[f"echo{seed}"] == "stop":
            assert depth and len(depth[1]) == len(depth[2]) > 0
    stopped = [name for name, end in ends.items() if end == "stop" and name.startswith("json")]
    assert stopped, "no JSON came to its end"


def test_a_grammar_leaves_the_others_of_the_batch_alone(model, toy_tokenizer):
    def text(*others: Grammar) -> str:
        engine = Engine(model, toy_tokenizer, EngineConfig(max_num_seqs=4))
        engine.add("a", [50, 51], SamplingParams(max_tokens=20, temperature=1.0, seed=3))
        for number, grammar in enumerate(others):
            engine.add(str(number), [40], SamplingParams(max_tokens=20, grammar=grammar))
        return text_of(run(engine)["a"])

    assert text() == text(JSON, CODE, ECHO)


def test_an_output_that_has_left_its_grammar_is_aborted(model, toy_tokenizer):
    engine = Engine(model, toy_tokenizer, EngineConfig(max_num_seqs=2))
    engine.add("a", [40], SamplingParams(max_tokens=20, grammar=CODE))
    engine.step()
    engine.scheduler.running[0].output_ids[-1] = toy_tokenizer.encode("z")[0]
    (last,) = engine.step()
    assert (last.finish_reason, last.token_ids, last.text) == ("abort", (), "")
    assert last.stop_reason == "grammar"
    engine.check()
    assert not engine.has_work


@pytest.mark.parametrize(
    ("grammar", "message"),
    [
        (Grammar("json_schema", '{"type": "objct"}'), "json_schema: Invalid type: objct"),
        (Grammar("json_schema", '{"type": '), "json_schema: "),
        (Grammar("json_schema", "3"), "Expecting object"),
        (Grammar("json_schema", '{"$ref": "https://x.y/z"}'), "does not fetch"),
        (Grammar("json_schema", '{"not": {}}'), "not"),
        (Grammar("regex", "("), "unclosed group"),
        (Grammar("regex", "(?=a)b"), "look-around"),
        (Grammar("regex", r"[^\s\S]"), "regex: no text fits it"),
        (Grammar("regex", "(b{1000}){1000}"), "too many expressions"),
        (Grammar("lark", "start: nothing"), "unknown name"),
    ],
)
def test_what_cannot_be_compiled_is_refused(compiler, grammar, message):
    with pytest.raises(GrammarError, match=message) as caught:
        compiler.matcher(grammar)
    assert "\n" not in str(caught.value)


def test_the_engine_refuses_it_before_anything_starts(model, toy_tokenizer):
    engine = Engine(model, toy_tokenizer, EngineConfig(max_num_seqs=2))
    with pytest.raises(GrammarError, match="unclosed group"):
        engine.add("a", [40], SamplingParams(max_tokens=2, grammar=Grammar("regex", "(")))
    assert not engine.has_work
    settings: dict[str, Any]
    for settings in ({"ignore_eos": True}, {"min_tokens": 1}):
        with pytest.raises(ValueError, match="cannot be combined with a grammar"):
            SamplingParams(max_tokens=2, grammar=CODE, **settings)


def test_the_latest_are_kept_compiled_and_never_shared(compiler, monkeypatch):
    monkeypatch.setattr(grammars, "MAX_KEPT", 2)
    first = compiler.matcher(CODE)
    assert first.consume_tokens([37, 37]) and not compiler.matcher(CODE).is_error()
    with ThreadPoolExecutor(4) as pool:
        found = pool.map(compiler.matcher, [Grammar("regex", f"a{{{n}}}") for n in range(1, 9)])
    assert not any(matcher.is_error() for matcher in found)
    assert len(compiler._compiled) == 2
