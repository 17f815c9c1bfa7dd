"""Settings beyond OpenAI's first ones, through the official client: prompts, bounds, structure."""

import json
import re
from typing import Any

import jsonschema
import pytest
from fastapi.testclient import TestClient
from openai import OpenAI
from pydantic import BaseModel

from deployments.errors import ApiError
from deployments.prompts import Prompt, with_blocks
from nsa_platform.config.model import NsaAttentionConfig
from nsa_platform.data.chat import render_prompt
from nsa_platform.serve.selection_sample import SelectionSampler
from tests.deployments.conftest import MODEL_ID, local_app, tiny_config

QUESTION: Any = [{"role": "user", "content": "What is 2 + 3?"}]


class Pet(BaseModel):
    kind: bool
    age: int


def chat(client: OpenAI, **settings: Any) -> Any:
    settings = {"messages": QUESTION, "max_tokens": 12, "temperature": 0, **settings}
    return client.chat.completions.create(model=MODEL_ID, **settings)


def complete(client: OpenAI, **settings: Any) -> Any:
    settings = {"prompt": "def main(", "max_tokens": 12, "temperature": 0, **settings}
    return client.completions.create(model=MODEL_ID, **settings)


def test_json_of_a_schema_as_the_client_parses_it(openai_client):
    answer = openai_client.chat.completions.parse(
        model=MODEL_ID, messages=QUESTION, response_format=Pet, max_tokens=150, seed=2
    )
    assert isinstance(answer.choices[0].message.parsed, Pet)


@pytest.mark.parametrize("is_streamed", [False, True])
def test_texts_of_every_structure(openai_client, is_streamed):
    def text(**body: Any) -> str:
        settings = {"temperature": 1.0, "seed": 5, "max_tokens": 120, "extra_body": body}
        answer = complete(openai_client, stream=is_streamed, **settings)
        pieces = list(answer) if is_streamed else [answer]
        assert pieces[-1].choices[0].finish_reason == "stop"
        return "".join(piece.choices[0].text for piece in pieces)

    schema = {"type": "array", "items": {"type": "boolean"}, "minItems": 1, "maxItems": 2}
    jsonschema.validate(json.loads(text(structured_outputs={"json": schema})), schema)
    found = json.loads(text(structured_outputs={"json": json.dumps(schema)}))
    jsonschema.validate(found, schema)
    code = r"[a-c]{3}-\d\d"
    assert re.fullmatch(code, text(structured_outputs={"regex": code}))
    assert re.fullmatch(code, text(response_format={"type": "regex", "regex": code}))
    choice = ['a "quoted" one', "línea\n2"]
    assert text(structured_outputs={"choice": choice}) in choice
    assert text(structured_outputs={"grammar": 'start: "x" ("y" | "z")'}) in ("xy", "xz")


def test_any_json_object_begins_as_one(openai_client):
    for body in (
        {"response_format": {"type": "json_object"}},
        {"structured_outputs": {"json_object": True}},
    ):
        answer = complete(openai_client, extra_body=body)
        assert answer.choices[0].text.lstrip().startswith("{")


def test_deeply_nested_schemas_are_answered_or_refused(client):
    tree: dict[str, Any] = {"type": "integer"}
    for _ in range(300):
        tree = {"type": "array", "items": tree, "maxItems": 1}
    body = {"model": MODEL_ID, "prompt": "x", "max_tokens": 2}
    answer = client.post("/v1/completions", json={**body, "structured_outputs": {"json": tree}})
    assert answer.status_code in (200, 400)
    assert client.post("/v1/completions", json=body).status_code == 200


def test_echo_reports_the_prompts_logprobs_too(openai_client, tokenizer):
    plain = complete(openai_client, logprobs=2).choices[0].logprobs
    choice = complete(openai_client, logprobs=2, echo=True).choices[0]
    report, ids = choice.logprobs, tokenizer.encode("def main(")
    count = len(ids)
    assert report.tokens[:count] == [tokenizer.decode([token]) for token in ids]
    assert (report.token_logprobs[0], report.top_logprobs[0]) == (None, None)
    assert all(logprob < 0 for logprob in report.token_logprobs[1:])
    assert report.tokens[count:] == plain.tokens
    assert report.token_logprobs[count:] == pytest.approx(plain.token_logprobs, abs=1e-5)
    assert report.text_offset[:3] == [0, *map(len, _sums(report.tokens[:2]))]
    assert report.text_offset[count] == len("def main(")
    streamed = list(complete(openai_client, logprobs=2, echo=True, stream=True))
    parts = [chunk.choices[0].logprobs for chunk in streamed]
    assert [token for part in parts for token in part.tokens] == report.tokens
    assert [place for part in parts for place in part.text_offset] == report.text_offset


def _sums(words: list[str]) -> list[str]:
    return ["".join(words[: end + 1]) for end in range(len(words))]


def test_a_prompt_can_be_scored_without_generating(openai_client, tokenizer):
    ids = tokenizer.encode("def main(")
    answer = complete(openai_client, max_tokens=0, echo=True, logprobs=0)
    choice = answer.choices[0]
    assert (choice.text, choice.finish_reason) == ("def main(", "length")
    assert len(choice.logprobs.tokens) == len(ids)
    assert (answer.usage.prompt_tokens, answer.usage.completion_tokens) == (len(ids), 0)
    (chunk,) = complete(openai_client, max_tokens=0, echo=True, stream=True)
    assert (chunk.choices[0].text, chunk.choices[0].finish_reason) == ("def main(", "length")


def test_prompt_logprobs_in_vllms_shape(openai_client, tokenizer):
    scored = complete(openai_client, max_tokens=0, echo=True, logprobs=0).choices[0].logprobs
    body = {"prompt_logprobs": 2, "return_token_ids": True}
    choice = complete(openai_client, extra_body=body).choices[0]
    ids = tokenizer.encode("def main(")
    assert choice.prompt_token_ids == ids
    first, *rest = choice.prompt_logprobs
    assert first is None and len(rest) == len(ids) - 1
    for token, entry, logprob in zip(ids[1:], rest, scored.token_logprobs[1:], strict=True):
        own = entry[str(token)]
        assert own["logprob"] == pytest.approx(logprob, abs=1e-5)
        assert own["decoded_token"] == tokenizer.decode([token])
        assert {1, 2} <= {each["rank"] for each in entry.values()}
    answer = chat(openai_client, extra_body=body)
    assert answer.prompt_token_ids == render_prompt(tokenizer, QUESTION)
    assert len(answer.prompt_logprobs) == len(answer.prompt_token_ids)


def test_names_of_tokens_can_be_their_ids(openai_client):
    body = {"return_tokens_as_token_ids": True, "return_token_ids": True}
    choice = complete(openai_client, logprobs=1, extra_body=body).choices[0]
    assert choice.logprobs.tokens == [f"token_id:{token}" for token in choice.token_ids]


def test_what_may_and_what_may_not_come(openai_client, tokenizer):
    allowed = [tokenizer.encode(letter)[0] for letter in "abc"]
    body = {"allowed_token_ids": allowed, "return_token_ids": True}
    ids = complete(openai_client, extra_body=body).choices[0].token_ids
    assert len(ids) == 12 and set(ids) <= set(allowed)
    text = complete(openai_client, max_tokens=20).choices[0].text
    word = next(each for each in re.findall(r"[a-z]{2,}", text) if f" {each}" not in text)
    barred = complete(openai_client, max_tokens=20, extra_body={"bad_words": [word]})
    assert barred.choices[0].text != text
    nothing = {"allowed_token_ids": [5], "logit_bias": {"5": -100}, "bad_words": ["x"]}
    assert complete(openai_client, extra_body=nothing).choices[0].text


def test_a_long_prompt_can_be_cut_to_its_end(openai_client, tokenizer):
    ids = tokenizer.encode("import os, sys\n" * 60)
    body = {"truncate_prompt_tokens": 9, "return_token_ids": True}
    for prompt in ("import os, sys\n" * 60, ids):
        answer = complete(openai_client, prompt=prompt, echo=True, extra_body=body)
        assert answer.choices[0].prompt_token_ids == ids[-9:]
        assert answer.choices[0].text.startswith(tokenizer.decode(ids[-9:]))
    chat_ids = render_prompt(tokenizer, QUESTION)
    assert chat(openai_client, extra_body=body).prompt_token_ids == chat_ids[-9:]


def test_the_last_message_can_be_continued(openai_client, client, tokenizer):
    messages = [*QUESTION, {"role": "assistant", "content": "It is"}]
    opened = {"add_generation_prompt": False, "continue_final_message": True}
    ids = client.post("/tokenize", json={"messages": messages, **opened}).json()["tokens"]
    assert ids == render_prompt(tokenizer, QUESTION) + tokenizer.encode("It is")
    body = {**opened, "echo": True, "return_token_ids": True}
    answer = chat(openai_client, messages=messages, extra_body=body)
    assert answer.prompt_token_ids == ids
    assert answer.choices[0].message.content.startswith("It is")
    streamed = chat(openai_client, messages=messages, extra_body=body, stream=True)
    text = "".join(chunk.choices[0].delta.content or "" for chunk in streamed)
    assert text == answer.choices[0].message.content


def test_what_was_computed_before_is_counted_and_salts_part_it(openai_client):
    prompt = [301] * 60

    def cached(**body: Any) -> int:
        answer = complete(openai_client, prompt=prompt, extra_body=body)
        return answer.usage.prompt_tokens_details.cached_tokens

    assert cached(cache_salt="a") == 0
    assert cached(cache_salt="a") >= 40
    assert cached(cache_salt="b") == 0
    assert cached(cache_salt="a", priority=-3) >= 40
    assert cached(cache_salt="a", prompt_logprobs=0) == 0, "scores need every token computed"


def test_the_prefix_cache_can_be_emptied(openai_client, client):
    def cached() -> int:
        answer = complete(openai_client, prompt=[303] * 60, max_tokens=2)
        return answer.usage.prompt_tokens_details.cached_tokens

    assert cached() == 0
    assert cached() >= 40
    reply = client.post("/reset_prefix_cache")
    assert (reply.status_code, reply.text) == (200, "")
    assert cached() == 0


def test_the_parts_of_an_answer_s_time_are_counted(openai_client, client):
    def sums() -> dict[str, float]:
        text = client.get("/metrics").text
        found = re.findall(r"^nsa:(\w+_seconds_(?:sum|count))\{.*\} (\S+)$", text, re.MULTILINE)
        return {name: float(value) for name, value in found}

    complete(openai_client, prompt=[304] * 50)
    before = sums()
    complete(openai_client, prompt=[305] * 50, max_tokens=9)
    spent = {name: value - before[name] for name, value in sums().items()}
    parts = {
        name: spent[f"request_{name}_time_seconds_sum"] for name in ("queue", "prefill", "decode")
    }
    assert spent["request_queue_time_seconds_count"] == 1
    assert spent["request_inference_time_seconds_count"] == 1
    assert parts["prefill"] > 0 and parts["decode"] > 0
    first = spent["time_to_first_token_seconds_sum"]
    assert parts["queue"] + parts["prefill"] == pytest.approx(first, abs=1e-6)
    inference = spent["request_inference_time_seconds_sum"]
    assert parts["prefill"] + parts["decode"] == pytest.approx(inference, abs=1e-6)


def test_the_tokens_of_steps_and_the_cache_s_sizes_are_told(model_folder):
    with local_app(model_folder) as (app, backend), TestClient(app) as client:
        body = {"model": MODEL_ID, "prompt": [306] * 60, "max_tokens": 5, "ignore_eos": True}
        assert client.post("/v1/completions", json=body).status_code == 200
        text = client.get("/metrics").text
        found = re.findall(r"^nsa:iteration_tokens_total_(\w+)\{.*\} (\S+)$", text, re.MULTILINE)
        assert ("count", "5.0") in found and ("sum", "64.0") in found
        (cache,) = re.findall(r"^nsa:cache_config_info\{(.*)\} 1\.0$", text, re.MULTILINE)
        pages = backend.engine.engine.cache.book.num_pages
        for label in ('block_size="8"', 'cache_dtype="float32"', f'num_gpu_blocks="{pages}"'):
            assert label in cache


def test_developer_is_another_name_of_system(client):
    def ids(role: str) -> list[int]:
        messages = [{"role": role, "content": "Add."}, *QUESTION]
        return client.post("/tokenize", json={"messages": messages}).json()["tokens"]

    assert ids("developer") == ids("system") != ids("user")


def test_gates_and_ages_of_selected_blocks_are_sampled(model_folder):
    with local_app(model_folder) as (app, backend), TestClient(app) as client:
        engine = backend.engine.engine
        engine.runner.selection = SelectionSampler(engine.block_size, every=1)
        body = {"model": MODEL_ID, "prompt": [306] * 60, "max_tokens": 5, "ignore_eos": True}
        assert client.post("/v1/completions", json=body).status_code == 200
        text = client.get("/metrics").text
        branches = set(re.findall(r'nsa:gate_mean\{branch="(\w+)",.*layer="[01]"', text))
        assert branches == {"compressed", "selected", "sliding"}
        counts = re.findall(
            r"^nsa:selected_block_age_tokens_count\{.*\} (\S+)$", text, re.MULTILINE
        )
        # Layers, key/value heads, selected blocks: of the newest sample alone.
        assert counts == [str(float(2 * 2 * 3))]
        # A sample is told once.
        again = client.get("/metrics").text
        assert "selected_block_age_tokens_count" in again
        assert re.findall(r"age_tokens_count\{.*\} (\S+)", again) == counts


def test_a_deadline_ends_what_misses_it(openai_client):
    assert complete(openai_client, extra_body={"nsa": {"deadline_s": 60}}).choices
    late = complete(openai_client, prompt=[302] * 200, extra_body={"nsa": {"deadline_s": 1e-9}})
    assert (late.choices[0].finish_reason, late.choices[0].text) == ("abort", "")


def test_which_blocks_were_read_is_told(openai_client, tokenizer):
    prompt = tokenizer.encode("def main(argument): return argument + 1\n" * 30)[:203]
    attention = tiny_config().attention
    assert isinstance(attention, NsaAttentionConfig)
    body = {"nsa": {"return_selected_blocks": True}}
    plain = complete(openai_client, prompt=prompt, max_tokens=6)
    answer = complete(openai_client, prompt=prompt, max_tokens=6, extra_body=body, n=2)
    for choice in answer.choices:
        assert choice.text == plain.choices[0].text
        told = choice.model_extra["nsa"]
        size, reads = told["block_size"], told["selected_blocks"]
        assert len(told["prompt_blocks"]) == -(-len(prompt) // size)
        assert "".join(told["prompt_blocks"]) == tokenizer.decode(prompt)
        assert len(reads) == answer.usage.completion_tokens // 2 == 6
        for number, stretches in enumerate(reads):
            context = len(prompt) + number
            starts = [start for start, _, _ in stretches]
            assert starts == sorted(starts) and all(start % size == 0 for start in starts)
            assert stretches[0][0] == 0 and stretches[0][2] == 1.0, "the first block, by all"
            assert stretches[-1][1] == context and stretches[-1][2] == 1.0, "the last one, by all"
            assert all(0 < share <= 1 for _, _, share in stretches)
            # Each head reads n blocks; together they read their tokens' shares.
            blocks = sum(-(-(end - start) // size) * share for start, end, share in stretches)
            assert blocks == pytest.approx(attention.num_selected_blocks, abs=0.01)
    assert plain.choices[0].model_extra.get("nsa") is None
    with pytest.raises(ApiError, match="full attention, which reads everything"):
        with_blocks(tokenizer, Prompt((1, 2), ""), None)


def test_a_stream_tells_which_blocks_were_read(openai_client):
    body = {"nsa": {"return_selected_blocks": True}}
    whole = chat(openai_client, extra_body=body).choices[0].model_extra["nsa"]
    events = [
        chunk.choices[0].model_extra.get("nsa") or {}
        for chunk in chat(openai_client, extra_body=body, stream=True)
    ]
    assert events[0]["prompt_blocks"] == whole["prompt_blocks"]
    assert not any("prompt_blocks" in event for event in events[1:])
    told = [reads for event in events for reads in event.get("selected_blocks", ())]
    assert told == whole["selected_blocks"]


def test_the_same_seed_gives_the_same_text_in_a_crowd(openai_client):
    def sample(**settings: Any) -> list[str]:
        answer = complete(openai_client, temperature=1.3, seed=11, max_tokens=24, **settings)
        return [choice.text for choice in answer.choices]

    alone = sample(n=1)
    crowd = complete(
        openai_client, prompt=["x", "def main(", "yy"], n=3, temperature=1.3, seed=11, max_tokens=24
    )
    assert crowd.choices[3].text == alone[0]
    assert sample(n=4)[0] == alone[0]
