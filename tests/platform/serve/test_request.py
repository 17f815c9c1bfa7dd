"""What may be asked of the engine, and how a request counts its tokens."""

import math

import pytest

from nsa_platform.serve.page_keys import PageKeys
from nsa_platform.serve.request import Request, SamplingParams


@pytest.mark.parametrize(
    ("field", "value", "rule"),
    [
        ("max_tokens", 0, "at least 1"),
        ("min_tokens", -1, "between 0 and max_tokens=8"),
        ("min_tokens", 9, "between 0 and max_tokens=8"),
        ("temperature", -0.1, "finite number >= 0"),
        ("temperature", math.nan, "finite number >= 0"),
        ("temperature", math.inf, "finite number >= 0"),
        ("top_p", 0.0, r"\(0, 1\]"),
        ("top_p", 1.01, r"\(0, 1\]"),
        ("top_p", math.nan, r"\(0, 1\]"),
        ("top_k", -1, "must not be negative"),
        ("min_p", -0.1, r"\[0, 1\]"),
        ("min_p", 1.1, r"\[0, 1\]"),
        ("repetition_penalty", 1e-40, r"\[0.01, 10.0\]"),
        ("repetition_penalty", math.inf, r"\[0.01, 10.0\]"),
        ("presence_penalty", 2.1, r"\[-2, 2\]"),
        ("frequency_penalty", -2.1, r"\[-2, 2\]"),
        ("stop", ("a", ""), "no empty string"),
        ("stop_token_ids", (3, -1), "no negative id"),
        ("logprobs", -1, "between 0 and 20"),
        ("logprobs", 21, "between 0 and 20"),
    ],
)
def test_values_out_of_range_are_named(field, value, rule):
    with pytest.raises(ValueError, match=rf"^{field}=.*{rule}"):
        SamplingParams(**{"max_tokens": 8, field: value})


@pytest.mark.parametrize("bias", [{-1: 0.0}, {5: 100.5}, {5: math.nan}])
def test_a_bias_out_of_range_is_named(bias):
    with pytest.raises(ValueError, match=r"^logit_bias\[-?\d\]=.*\[-100, 100\]"):
        SamplingParams(max_tokens=8, logit_bias=bias)


def request_of(*prompt: int) -> Request:
    keys = PageKeys(prompt, page_size=2, lookahead=0)
    params = SamplingParams(max_tokens=4)
    return Request("a", prompt, params, arrival=0, seed=0, keys=keys, num_to_compute=len(prompt))


def test_tokens_are_the_prompt_and_the_output():
    request = request_of(10, 11, 12)
    assert (request.num_tokens, request.num_pending, request.is_decoding) == (3, 3, False)
    request.pages.num_tokens = 3
    request.output_ids += [20]
    assert (request.num_tokens, request.num_pending, request.is_decoding) == (4, 1, True)
    request.output_ids += [21, 22]
    whole = [10, 11, 12, 20, 21, 22]
    for start in range(7):
        for end in range(start, 7):
            assert request.tokens(start, end) == whole[start:end]
    for _ in range(2):
        request.update_keys()
        assert request.keys.num_tokens == 6
    assert request.keys.key(2) == PageKeys(whole, page_size=2, lookahead=0).key(2)


def test_a_prompt_of_one_token_is_no_decode():
    request = request_of(10)
    assert request.num_pending == 1
    assert not request.is_decoding
