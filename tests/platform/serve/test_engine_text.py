"""What the engine says beside the ids: text, ends, log probabilities."""

import pytest
import torch

from nsa_platform.config.serve import EngineConfig
from nsa_platform.model.inputs import PackedInputs
from nsa_platform.serve.engine import Engine
from nsa_platform.serve.request import Output, SamplingParams

PROMPT = list(range(30, 50))


@pytest.fixture(scope="module")
def model(make_speaker):
    return make_speaker()


@pytest.fixture(scope="module")
def plain(toy_tokenizer) -> dict[int, float]:
    """A bias that leaves only tokens of plain letters and spaces."""
    texts = [toy_tokenizer.decode([token]) for token in range(toy_tokenizer.vocab_size)]
    return {
        token: -100.0
        for token, text in enumerate(texts)
        if not text.isascii() or not text.replace(" ", "").isalpha()
    }


@pytest.fixture
def generate(model, toy_tokenizer):
    def generate(**settings) -> list[Output]:
        engine = Engine(model, toy_tokenizer, EngineConfig(max_num_seqs=2))
        engine.add("a", PROMPT, SamplingParams(**{"max_tokens": 30, "temperature": 0, **settings}))
        outputs = []
        while engine.has_work:
            outputs += engine.step()
            engine.check()
        assert [output.finish_reason for output in outputs[:-1]] == [None] * (len(outputs) - 1)
        return outputs

    return generate


def test_names_of_control_tokens_are_shown_if_asked_for(generate, toy_tokenizer):
    token, name = next(iter(toy_tokenizer.control_tokens.items()))
    settings = {"allowed_token_ids": (token,), "max_tokens": 2, "ignore_eos": True}
    assert text_of(generate(**settings)) == ""
    assert text_of(generate(**settings, skip_special_tokens=False)) == 2 * name


def ids_of(outputs: list[Output]) -> list[int]:
    return [token for output in outputs for token in output.token_ids]


def text_of(outputs: list[Output]) -> str:
    return "".join(output.text for output in outputs)


def test_the_text_is_that_of_all_ids(generate, toy_tokenizer):
    outputs = generate(ignore_eos=True)
    assert text_of(outputs) == toy_tokenizer.decode(ids_of(outputs))
    last = outputs[-1]
    assert (last.finish_reason, last.stop_reason) == ("length", None)
    assert (last.num_prompt_tokens, last.num_output_tokens, last.num_cached_tokens) == (20, 30, 0)


def test_half_a_character_is_shown_when_nothing_can_follow(generate, toy_tokenizer):
    half = next(
        token
        for token in range(toy_tokenizer.vocab_size)
        if toy_tokenizer.decode([token]) == "\N{REPLACEMENT CHARACTER}"
        and toy_tokenizer.decode([token, token]) == 2 * "\N{REPLACEMENT CHARACTER}"
    )
    outputs = generate(logit_bias={half: 100.0}, ignore_eos=True, max_tokens=2)
    assert [output.text for output in outputs] == ["", 2 * "\N{REPLACEMENT CHARACTER}"]


def test_a_stop_string_across_tokens_ends_the_text(generate, plain, toy_tokenizer):
    whole = text_of(generate(logit_bias=plain, ignore_eos=True))
    assert whole.isascii() and len(whole) > 30
    for start, end in ((3, 4), (5, 9), (10, 21)):
        stop = whole[start:end]
        first = whole.index(stop)
        for is_included in (False, True):
            outputs = generate(
                logit_bias=plain,
                ignore_eos=True,
                stop=("never", stop),
                include_stop_str_in_output=is_included,
            )
            assert text_of(outputs) == whole[: first + is_included * len(stop)]
            last = outputs[-1]
            assert (last.finish_reason, last.stop_reason) == ("stop", stop)
            # No more tokens than the stop string needs.
            ids = ids_of(outputs)
            assert stop not in toy_tokenizer.decode(ids[:-1])
            shown = ""
            for output in outputs:
                shown += output.text
                assert whole.startswith(shown)


def test_a_beginning_of_a_stop_string_is_not_lost_at_the_end(generate, plain):
    whole = text_of(generate(logit_bias=plain, ignore_eos=True))
    outputs = generate(logit_bias=plain, ignore_eos=True, stop=(whole[-3:] + "!",))
    assert text_of(outputs) == whole
    assert outputs[-1].finish_reason == "length"


def test_min_tokens_hold_stop_strings_off(generate, plain):
    whole = generate(logit_bias=plain, ignore_eos=True)
    stop = text_of(whole[:2])
    outputs = generate(logit_bias=plain, ignore_eos=True, stop=(stop,), min_tokens=2)
    assert ids_of(outputs)[:2] == ids_of(whole)[:2]
    assert len(ids_of(outputs)) > 2
    assert text_of(outputs).startswith(stop)


def test_the_tokenizer_s_stop_ids_end_the_text(generate, toy_tokenizer):
    eos = toy_tokenizer.eos_id
    outputs = generate(logit_bias={eos: 100.0})
    assert ids_of(outputs) == [eos]
    last = outputs[-1]
    assert (last.finish_reason, last.stop_reason, last.text) == ("stop", None, "")

    ignored = generate(logit_bias={eos: 100.0}, ignore_eos=True)
    assert ids_of(ignored) == [eos] * 30
    assert ignored[-1].finish_reason == "length"

    late = ids_of(generate(logit_bias={eos: 100.0}, min_tokens=4))
    assert late[4:] == [eos] and eos not in late[:4]
    assert late[:4] == ids_of(generate(logit_bias={eos: -100.0}))[:4]


def test_a_stop_id_of_the_request_is_named(generate, plain, toy_tokenizer):
    whole = ids_of(generate(logit_bias=plain, ignore_eos=True))
    stop = whole[6]
    first = whole.index(stop)
    for is_included in (False, True):
        outputs = generate(
            logit_bias=plain, stop_token_ids=(stop,), include_stop_str_in_output=is_included
        )
        assert ids_of(outputs) == whole[: first + 1]
        assert text_of(outputs) == toy_tokenizer.decode(whole[: first + is_included])
        assert (outputs[-1].finish_reason, outputs[-1].stop_reason) == ("stop", stop)


def test_logprobs_are_those_of_the_model(generate, model):
    outputs = generate(logprobs=5, ignore_eos=True, logit_bias={5: 40.0}, max_tokens=6)
    ids = PROMPT + ids_of(outputs)
    with torch.no_grad():
        hidden = model(torch.tensor(ids), PackedInputs.from_lengths([len(ids)])).hidden
        wanted = model.logits(hidden).log_softmax(-1)[len(PROMPT) - 1 : -1]
    for output, row in zip(outputs, wanted, strict=True):
        assert output.logprobs is not None
        (found,) = output.logprobs
        assert (found.token_id,) == output.token_ids
        assert found.logprob == pytest.approx(float(row[found.token_id]), abs=1e-4)
        assert found.rank == int((row > row[found.token_id]).sum()) + 1
        best = row.topk(5)
        assert [token for token, _ in found.top] == best.indices.tolist()
        assert [value for _, value in found.top] == pytest.approx(best.values.tolist(), abs=1e-4)


def test_logprobs_come_only_when_asked_for(generate):
    assert all(output.logprobs is None for output in generate(max_tokens=2))
    (output,) = generate(max_tokens=1, logprobs=0)
    assert output.logprobs is not None and output.logprobs[0].top == ()
