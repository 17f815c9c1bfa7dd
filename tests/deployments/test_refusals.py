"""What a server must refuse gets OpenAI's error shape, and the next request works."""

import json
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
from fastapi.testclient import TestClient

from nsa_platform.config.serve import EngineConfig
from tests.deployments.conftest import MODEL_ID, local_app
from tests.waiting import eventually

CHAT = "/v1/chat/completions"
COMPLETIONS = "/v1/completions"
USER = [{"role": "user", "content": "Hello"}]


def chat(**fields: Any) -> tuple[str, dict[str, Any]]:
    return CHAT, {"model": MODEL_ID, "messages": USER, "max_tokens": 2, **fields}


def completion(**fields: Any) -> tuple[str, dict[str, Any]]:
    return COMPLETIONS, {"model": MODEL_ID, "prompt": "Hello", "max_tokens": 2, **fields}


def says(role: object, content: object, **more: object) -> list[dict[str, object]]:
    return [{"role": role, "content": content, **more}]


def schema(tree: dict[str, Any]) -> dict[str, Any]:
    return {"type": "json_schema", "json_schema": {"name": "it", "schema": tree}}


REFUSED = [
    (chat(messages=[]), "messages", "at least 1 item"),
    (chat(messages=says("tool", "x")), "messages.0.role", "'developer', 'user' or 'assistant'"),
    (chat(messages=says("user", None)), "messages.0.content", "must be text or a list"),
    (chat(messages=says("user", [{"type": "image_url"}])), "messages.0.content", "images"),
    (chat(messages=says("user", "x", tool_calls=[])), "messages.0.tool_calls", "not supported"),
    (chat(messages=USER + says("system", "x")), "messages", "system must come first"),
    (chat(messages="Hello"), "messages", "valid list"),
    (chat(tools=[{"type": "function"}]), "tools", "not supported"),
    (chat(response_format={"type": "xml"}), "response_format", "'json_object', 'json_schema'"),
    (chat(response_format={"type": "json_schema"}), "response_format.json_schema", "required"),
    (chat(response_format=schema({"type": "objct"})), "response_format", "Invalid type: objct"),
    (chat(response_format=schema({"$ref": "#/no"})), "response_format", "json_schema: "),
    (chat(response_format={"type": "regex", "regex": "("}), "response_format", "unclosed group"),
    (chat(structured_outputs={}), "structured_outputs", "exactly one of json, json_object"),
    (chat(structured_outputs={"regex": "a", "json": {}}), "structured_outputs", "got 2"),
    (chat(structured_outputs={"grammar": "start: x"}), "structured_outputs", "unknown name"),
    (
        chat(response_format={"type": "json_object"}, structured_outputs={"regex": "a"}),
        "structured_outputs",
        "response_format and structured_outputs mean the same",
    ),
    (chat(response_format=schema({}), ignore_eos=True), "ignore_eos", "with a grammar"),
    (chat(chat_template="{{ messages }}"), "chat_template", "not supported"),
    (
        chat(continue_final_message=True),
        "continue_final_message",
        "needs add_generation_prompt=false",
    ),
    (chat(top_logprobs=3), "top_logprobs", "top_logprobs needs logprobs"),
    (chat(logprobs=True, top_logprobs=21), "top_logprobs", "less than or equal to 20"),
    (chat(max_completion_tokens=3), "max_tokens", "mean the same"),
    (chat(temprature=1), "temprature", "did you mean 'temperature'"),
    (chat(stream_options={"include_usage": True}), "stream_options", "needs stream=true"),
    (chat(stream="yes"), "stream", "valid boolean"),
    (completion(prompt=""), "prompt", "is empty"),
    (completion(prompt=[]), "prompt", "must be text, a list of token ids"),
    (completion(prompt=[1, "x"]), "prompt", "must be text, a list of token ids"),
    (completion(prompt=[512]), "prompt", r"token ids must lie in [0, 512), got 512"),
    (completion(prompt=[-1]), "prompt", "must be text, a list of token ids"),
    (completion(prompt=["x"] * 129), "prompt", "must be text, a list of token ids"),
    (completion(prompt=["x"] * 100, n=2), "n", "200 answers, at most 128"),
    (completion(prompt="\ud800"), "prompt", "must be text"),
    (completion(max_tokens=-1), "max_tokens", "greater than or equal to 0"),
    (completion(max_tokens=10**30), "max_tokens", "less than or equal to"),
    (completion(max_tokens=10**9), "max_tokens", "1000000000 more do not fit"),
    (completion(max_tokens=2.5), "max_tokens", "valid integer"),
    (completion(max_tokens="2"), "max_tokens", "valid integer"),
    (completion(max_tokens=True), "max_tokens", "valid integer"),
    (completion(min_tokens=5), "min_tokens", "between 0 and max_tokens=2"),
    (completion(temperature=-0.1), "temperature", "greater than or equal to 0"),
    (completion(temperature=1e300), "temperature", "less than or equal to 2"),
    (completion(temperature=float("nan")), "temperature", "finite number"),
    (completion(top_p=0), "top_p", "greater than 0"),
    (completion(top_k=-2), "top_k", "greater than or equal to -1"),
    (completion(repetition_penalty=1e-40), "repetition_penalty", "greater than or equal to 0.01"),
    (completion(presence_penalty=-3), "presence_penalty", "greater than or equal to -2"),
    (completion(seed=2**70), "seed", "less than or equal to"),
    (completion(n=0), "n", "greater than or equal to 1"),
    (completion(stop=["a", ""]), "stop", "none of them empty"),
    (completion(stop=["a"] * 17), "stop", "up to 16 strings"),
    (completion(stop_token_ids=[512]), "stop_token_ids", "must lie in [0, 512)"),
    (completion(logit_bias={"512": 1}), "logit_bias", "must lie in [0, 512)"),
    (completion(logit_bias={"x": 1}), "logit_bias.x.[key]", "match pattern"),
    (completion(logprobs=21), "logprobs", "less than or equal to 20"),
    (completion(max_tokens=0), "max_tokens", "max_tokens=0 needs echo=true"),
    (completion(allowed_token_ids=[512]), "allowed_token_ids", "must lie in [0, 512)"),
    (completion(allowed_token_ids=[]), "allowed_token_ids", "at least 1 item"),
    (completion(bad_words=[""]), "bad_words.0", "at least 1 item"),
    (
        completion(prompt_logprobs=1, stream=True),
        "prompt_logprobs",
        "cannot be combined with stream",
    ),
    (completion(truncate_prompt_tokens=0), "truncate_prompt_tokens", "greater than or equal to 1"),
    (completion(best_of=2), "best_of", "not supported"),
    (completion(suffix="x"), "suffix", "not supported"),
    (("/tokenize", {}), "prompt", "give prompt or messages"),
    (("/tokenize", {"prompt": "x", "messages": USER}), "prompt", "give prompt or messages"),
    (("/detokenize", {"tokens": [512]}), "tokens", "must lie in [0, 512)"),
]


@pytest.fixture(scope="module", autouse=True)
def the_next_request_works(client: TestClient) -> Iterator[None]:
    yield
    path, body = chat()
    assert client.post(path, json=body).status_code == 200


def post(client: TestClient, path: str, body: object):
    # The test client refuses to write NaN or half a surrogate pair; any client may send them.
    headers = {"Content-Type": "application/json"}
    return client.post(path, content=json.dumps(body), headers=headers)


def test_half_a_surrogate_pair_as_a_key(client):
    path, body = completion()
    response = post(client, path, {**body, "\ud800": 1})
    assert response.status_code == 400
    assert response.json()["error"]["code"] == "invalid_json"


def test_health_may_be_asked_without_a_body(client):
    assert client.head("/health").status_code == 200


@pytest.mark.parametrize(("request_", "param", "message"), REFUSED)
def test_impossible_requests(client, request_, param, message):
    response = post(client, *request_)
    assert response.status_code == 400
    error = response.json()["error"]
    assert set(error) == {"message", "type", "param", "code"}
    assert error["type"] == "invalid_request_error"
    assert message in error["message"]
    assert error["param"] == param


@pytest.mark.parametrize(
    "content",
    [b"", b"{", b"[]", b"null", b'"x"', b"\xff\xfe", b"{" * 100_000, b"[" * 100_000, b"1e999"],
)
@pytest.mark.parametrize("path", [CHAT, COMPLETIONS, "/tokenize", "/detokenize"])
def test_bodies_that_are_no_request(client, path, content):
    response = client.post(path, content=content, headers={"Content-Type": "application/json"})
    assert response.status_code == 400
    assert response.json()["error"]["type"] == "invalid_request_error"


@pytest.mark.parametrize("content_type", [None, "text/plain", "application/x-www-form-urlencoded"])
def test_a_body_that_is_not_said_to_be_json(client, content_type):
    path, body = chat()
    headers = {} if content_type is None else {"Content-Type": content_type}
    response = client.post(path, content=json.dumps(body), headers=headers)
    assert response.status_code == 400
    error = response.json()["error"]
    assert error["code"] == "invalid_content_type"
    assert "Content-Type: application/json" in error["message"]
    assert (content_type or "no Content-Type") in error["message"]
    # What came is not quoted: it may be a prompt.
    assert "Hello" not in error["message"]


def test_all_wrong_fields_are_named(client):
    path, body = completion(temperature=-1, top_p=2, n=0)
    message = post(client, path, body).json()["error"]["message"]
    assert all(name in message for name in ("temperature: ", "top_p: ", "n: "))


@pytest.mark.parametrize("path", [CHAT, COMPLETIONS])
def test_an_unknown_model_is_a_404(client, path):
    body = {"model": "gpt", "messages": USER} if path == CHAT else {"model": "gpt", "prompt": "x"}
    response = post(client, path, body)
    assert response.status_code == 404
    error = response.json()["error"]
    assert (error["code"], error["param"]) == ("model_not_found", "model")
    assert "there is: tiny" in error["message"]


@pytest.mark.parametrize(
    ("method", "path", "status"),
    [("GET", CHAT, 405), ("GET", "/v1/nothing", 404), ("DELETE", "/v1/models", 405)],
)
def test_other_routes_and_methods(client, method, path, status):
    response = client.request(method, path)
    assert response.status_code == status
    assert response.json()["error"]["type"] == "invalid_request_error"


def test_a_full_queue_is_a_429(model_folder, monkeypatch):
    small = EngineConfig(max_model_len=64, max_num_seqs=1, max_num_batched_tokens=64)
    small = small.model_copy(update={"max_num_queued": 2})
    with local_app(model_folder, small) as (app, backend), ThreadPoolExecutor(1) as others:
        with TestClient(app) as client:
            # More than the engine ever takes is wrong at any time.
            never = post(client, *completion(n=4))
            assert (never.status_code, never.json()["error"]["param"]) == (400, "n")
            assert "4 answers, at most 3 may be asked for" in never.json()["error"]["message"]
            engine = backend.engine.engine
            step = engine.step
            monkeypatch.setattr(engine, "step", lambda: (time.sleep(0.02), step())[1])
            others.submit(post, client, *completion(n=3, max_tokens=50, ignore_eos=True))
            eventually(lambda: backend.engine.stats().num_running == 1, "the first request runs")
            path, body = completion(n=2, max_tokens=20)
            response = post(client, path, body)
            assert response.status_code == 429
            assert int(response.headers["retry-after"]) >= 1
            assert response.json()["error"]["type"] == "rate_limit_error"
            streamed = post(client, path, {**body, "stream": True})
            assert streamed.status_code == 429
            # What was refused halfway is out of the queue after the step at hand.
            eventually(lambda: post(client, *completion()).status_code == 200, "room in the queue")
            rejections = 'nsa:admission_rejections_total{engine="here",model_name="tiny",reason='
            assert rejections + '"overloaded"}' in client.get("/metrics").text


def test_a_dead_engine_is_a_503_and_ends_streams_with_an_error(model_folder, monkeypatch):
    with local_app(model_folder) as (app, backend), TestClient(app) as client:
        assert client.get("/health").json() == {"status": "ok"}
        engine = backend.engine.engine
        step, calls = engine.step, []

        def fail_later():
            calls.append(None)
            if len(calls) > 5:
                raise RuntimeError("out of something")
            return step()

        monkeypatch.setattr(engine, "step", fail_later)
        path, body = completion(max_tokens=50, stream=True, ignore_eos=True)
        events = post(client, path, body).text.strip().split("\n\n")
        assert client.get("/health").status_code == 503
        assert '"error"' in events[-1] and "out of something" in events[-1]
        assert "[DONE]" not in events[-1]
        response = post(client, *completion())
        assert response.status_code == 503
        assert "out of something" in response.json()["error"]["message"]
