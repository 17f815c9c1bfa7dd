"""Who may ask, how much of it, under which id, and what is written down."""

import json
import logging
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import yaml
from fastapi.testclient import TestClient
from hypothesis import given
from hypothesis import strategies as st
from openai import AuthenticationError, OpenAI, RateLimitError

from deployments import new_key
from deployments.accounts import Account
from deployments.keys import AccessSettings, ApiKey, KeyRing, hash_of, read_keys
from jobs import benchmark
from nsa_platform.config.base import ConfigError
from tests.deployments.conftest import MODEL_ID, listening, local_app

SECRET, OTHER = "nsa-first", "nsa-second"
KEYS = {
    "keys": [
        {"name": "alice", "sha256": hash_of(SECRET), "tokens_per_minute": 200},
        {"name": "bob", "sha256": hash_of(OTHER), "max_concurrent_requests": 1},
    ]
}
BODY = {"model": MODEL_ID, "prompt": "Hello", "max_tokens": 3, "ignore_eos": True}


def bearer(secret: str, **more: str) -> dict[str, str]:
    return {"Authorization": f"Bearer {secret}", **more}


@pytest.fixture(scope="module")
def access(tmp_path_factory: pytest.TempPathFactory) -> AccessSettings:
    path = tmp_path_factory.mktemp("access") / "keys.yaml"
    path.write_text(yaml.safe_dump(KEYS))
    return AccessSettings(api_keys_file=str(path))


@pytest.fixture(scope="module")
def guarded(model_folder: Path, access: AccessSettings):
    with local_app(model_folder, access=access) as (app, _), TestClient(app) as client:
        yield client


@pytest.fixture
def lines(caplog):
    caplog.set_level(logging.INFO, logger="nsa.requests")
    return lambda: [json.loads(record.message) for record in caplog.records]


def test_only_keys_open_the_api(guarded):
    assert guarded.get("/health").status_code == 200
    assert guarded.get("/metrics").status_code == 200
    assert guarded.get("/load").json() == {"server_load": 0}
    assert guarded.post("/reset_prefix_cache").status_code == 401
    for headers in ({}, bearer("nsa-wrong"), {"Authorization": f"Basic {SECRET}"}):
        for path in ("/v1/completions", "/v1/chat/completions", "/tokenize", "/detokenize"):
            refused = guarded.post(path, json=BODY, headers=headers)
            assert refused.status_code == 401
            assert refused.json()["error"]["code"] == "invalid_api_key"
            assert refused.headers["www-authenticate"] == "Bearer"
    assert guarded.get("/v1/models").status_code == 401
    assert guarded.get("/v1/models", headers=bearer(OTHER)).status_code == 200


def test_the_official_client_and_its_key(guarded):
    settings: dict[str, Any] = {"base_url": "http://testserver/v1", "http_client": guarded}
    asked = OpenAI(api_key=OTHER, **settings).completions.create(
        model=MODEL_ID, prompt="Hello", max_tokens=2
    )
    assert asked.choices
    with pytest.raises(AuthenticationError, match="a wrong API key"):
        OpenAI(api_key="nsa-no", **settings).models.list()


def test_the_benchmark_brings_its_key(
    model_folder, access, tmp_path, monkeypatch, capsys: pytest.CaptureFixture[str]
) -> None:
    flags = ["--input-len=8", "--output-len=2", "--num-prompts=2", "--num-warmups=1"]
    with local_app(model_folder, access=access) as (app, _), listening(app) as address:
        monkeypatch.delenv("OPENAI_API_KEY", raising=False)
        with pytest.raises(SystemExit):
            benchmark.main(["--base-url", address, *flags])
        assert f"{address}/v1/models: Error code: 401" in capsys.readouterr().err
        monkeypatch.setenv("OPENAI_API_KEY", OTHER)
        assert benchmark.main(["--base-url", address, *flags, "--max-concurrency=1"]) == 0
    assert "Successful requests" in capsys.readouterr().out


def test_tokens_run_out_and_come_back(model_folder, access, monkeypatch):
    now = [1000.0]
    monkeypatch.setattr("deployments.gate.Account", partial(Account, clock=lambda: now[0]))
    with local_app(model_folder, access=access) as (app, _), TestClient(app) as client:
        long = {**BODY, "prompt": [300] * 100, "max_tokens": 60}
        first = client.post("/v1/completions", json=long, headers=bearer(SECRET))
        assert first.status_code == 200
        assert first.headers["x-ratelimit-limit-tokens"] == "200"
        again = client.post("/v1/completions", json=long, headers=bearer(SECRET))
        assert again.headers["x-ratelimit-remaining-tokens"] == "0"
        refused = client.post("/v1/completions", json=BODY, headers=bearer(SECRET))
        assert refused.status_code == 429
        assert refused.json()["error"]["code"] == "rate_limit_exceeded"
        # 320 used of 200: the debt of 120 takes 36 s at 200 a minute.
        assert refused.headers["retry-after"] == "36"
        assert client.post("/v1/completions", json=BODY, headers=bearer(OTHER)).status_code == 200
        now[0] += 35.0
        assert (
            client.post("/tokenize", json={"prompt": "x"}, headers=bearer(SECRET)).status_code
            == 429
        )
        now[0] += 2.0
        assert client.post("/v1/completions", json=BODY, headers=bearer(SECRET)).status_code == 200


def test_a_stream_counts_and_its_place_is_free_again(guarded):
    settings: dict[str, Any] = {"base_url": "http://testserver/v1", "http_client": guarded}
    client = OpenAI(api_key=OTHER, max_retries=0, **settings)
    for _ in range(3):
        stream = client.completions.create(
            model=MODEL_ID, prompt="Hello", max_tokens=3, stream=True
        )
        assert len(list(stream)) <= 3


def test_open_requests_are_bounded():
    account = Account(ApiKey(name="bob", sha256="0" * 64, max_concurrent_requests=2))
    assert account.enter() is None and account.enter() is None
    refused = account.enter()
    assert refused is not None
    assert (refused.status, refused.code) == (429, "concurrency_limit_exceeded")
    account.leave()
    assert account.enter() is None
    shared = Account(ApiKey(name="b", sha256="0" * 64, max_concurrent_requests=5), processes=4)
    assert shared.enter() is None and shared.enter() is not None


@given(st.lists(st.tuples(st.floats(0, 30), st.integers(0, 500)), max_size=60))
def test_no_order_of_requests_gets_more_than_its_rate(steps):
    now = [0.0]
    key = ApiKey(name="a", sha256="0" * 64, tokens_per_minute=600)
    account = Account(key, clock=lambda: now[0])
    used = last = 0
    for wait_s, tokens in steps:
        now[0] += wait_s
        if account.enter() is None:
            account.charge(tokens)
            account.leave()
            used, last = used + tokens, tokens
        else:
            assert account.wait_s() >= 1
    # A minute's worth to begin with, the rate since, and what the last one took beyond.
    assert used - last <= 600 + 10 * now[0] + 1


def test_ids_are_the_clients_or_fresh_ones(guarded, lines):
    asked = guarded.post(
        "/v1/completions", json=BODY, headers=bearer(OTHER, **{"X-Request-Id": "r-7"})
    )
    assert asked.headers["x-request-id"] == "r-7"
    assert asked.json()["id"] == "cmpl-r-7"
    for bad in ("two words", "x" * 129, ""):
        headers = bearer(OTHER, **{"X-Request-Id": bad})
        answer = guarded.post("/v1/completions", json=BODY, headers=headers)
        assert len(answer.headers["x-request-id"]) == 32
    refused = guarded.post(
        "/v1/completions", json={}, headers=bearer(OTHER, **{"X-Request-Id": "r-8"})
    )
    assert (refused.status_code, refused.headers["x-request-id"]) == (400, "r-8")
    assert guarded.get("/health").headers["x-request-id"]
    assert lines()[0]["request_id"] == "r-7"


def test_a_line_tells_what_happened_and_never_what_was_said(guarded, lines):
    secret_text = "my secret question"
    body = {**BODY, "prompt": secret_text}
    guarded.post("/v1/completions", json=body, headers=bearer(OTHER))
    guarded.post("/v1/completions", json={**body, "stream": True}, headers=bearer(OTHER))
    guarded.post("/v1/completions", json={**body, "n": 0}, headers=bearer(OTHER))
    guarded.post("/v1/completions", json=body, headers=bearer("nsa-wrong"))
    guarded.get("/health")
    whole, streamed, wrong, stranger = lines()
    assert (whole["status"], whole["key"], whole["model"]) == (200, "bob", MODEL_ID)
    assert whole["prompt_tokens"] == streamed["prompt_tokens"] > 0
    assert whole["completion_tokens"] == streamed["completion_tokens"] == 3
    assert 0 < streamed["first_byte_s"] <= streamed["duration_s"]
    assert (wrong["status"], wrong["model"], wrong["prompt_tokens"]) == (400, None, 0)
    assert (stranger["status"], stranger["key"], stranger["error"]) == (
        401,
        None,
        "invalid_api_key",
    )
    written = json.dumps(lines())
    assert secret_text not in written and OTHER not in written and "nsa-wrong" not in written


def test_bodies_are_logged_only_if_asked_for(model_folder, lines):
    access = AccessSettings(log_prompts=True)
    with local_app(model_folder, access=access) as (app, _), TestClient(app) as client:
        client.post("/v1/completions", json=BODY)
    (line,) = lines()
    assert (line["body"]["prompt"], line["key"]) == ("Hello", None)


def test_a_new_key_opens_and_only_its_hash_is_kept(tmp_path, capsys, monkeypatch):
    new_key.main(["--name=carol", "--tokens-per-minute=1000"])
    out, err = capsys.readouterr()
    secret = err.strip().rpartition(" ")[2]
    assert secret.startswith("nsa-") and len(secret) > 40 and secret not in out
    path = tmp_path / "keys.yaml"
    path.write_text(out)
    ring = read_keys(AccessSettings(api_keys_file=str(path)))
    assert ring is not None
    found = ring.find(secret)
    assert found is not None and (found.name, found.tokens_per_minute) == ("carol", 1000)
    assert ring.find(secret[:-1]) is None and ring.find("") is None
    monkeypatch.setenv("MY_KEYS", out)
    assert read_keys(AccessSettings(api_keys_env="MY_KEYS")) is not None
    with pytest.raises(SystemExit) as end:
        new_key.main(["--name=two words"])
    assert end.value.code == 2


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("keys: []", "at least 1 item"),
        ("keys: [{name: a}]", "sha256"),
        ("keys: [{name: a, sha256: xyz}]", "match pattern"),
        (yaml.safe_dump({"keys": [KEYS["keys"][0]] * 2}), "alice comes twice"),
        ("keys: [{nme: a}]", "did you mean 'name'"),
        ("keys: [", "is not YAML"),
        ("just words", ""),
    ],
)
def test_wrong_files_of_keys_are_refused(monkeypatch, text, message):
    monkeypatch.setenv("MY_KEYS", text)
    with pytest.raises(ConfigError, match="MY_KEYS") as caught:
        read_keys(AccessSettings(api_keys_env="MY_KEYS"))
    assert message in str(caught.value)


def test_a_missing_source_is_named(tmp_path):
    with pytest.raises(ConfigError, match="no variable NOTHING"):
        read_keys(AccessSettings(api_keys_env="NOTHING"))
    with pytest.raises(ConfigError, match="nothing"):
        read_keys(AccessSettings(api_keys_file=str(tmp_path / "nothing.yaml")))
    with pytest.raises(ConfigError, match="exclude each other"):
        AccessSettings.parse({"api_keys_file": "a", "api_keys_env": "B"}, source="x")
    assert read_keys(AccessSettings()) is None


def test_every_key_is_compared_whichever_is_right(monkeypatch):
    compared: list[str] = []

    def compare(digest: str, stored: str) -> bool:
        compared.append(stored)
        return digest == stored

    monkeypatch.setattr("deployments.keys.hmac.compare_digest", compare)
    ring = KeyRing([ApiKey(**entry) for entry in KEYS["keys"]])
    assert ring.find(SECRET) is not None
    assert ring.find("nothing") is None
    assert len(compared) == 4


def test_a_limited_client_waits_as_it_is_told(guarded):
    with pytest.raises(RateLimitError, match="tokens per minute"):
        client = OpenAI(
            base_url="http://testserver/v1", api_key=SECRET, http_client=guarded, max_retries=0
        )
        for _ in range(10):
            client.completions.create(model=MODEL_ID, prompt=[300] * 90, max_tokens=60)
