"""The application on Ray Serve: streams, crowds, cancellation, dead replicas, redeploys, scale.

The chat page in a browser as well: one cluster for all of them, and gone when they are.
"""

import json
import re
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import httpx2
import pytest
from openai import APIError, BadRequestError, NotFoundError, RateLimitError
from playwright.sync_api import Page, expect

from deployments.metric_families import FAMILIES
from jobs import benchmark
from nsa_platform.data.chat import render_prompt
from nsa_platform.data.tokenizer import Tokenizer
from nsa_platform.model.weights import load_model
from nsa_platform.serve.generator import Generator
from tests.deployments.conftest import MAX_CONTEXT, MODEL_ID
from tests.deployments.running import Serving
from tests.jobs.mlflow_pages import need_chromium, open_page
from tests.waiting import eventually

pytestmark = pytest.mark.cluster

QUESTION: Any = [{"role": "user", "content": "What is 2 + 3?"}]
LONG: dict[str, Any] = {"max_tokens": 400, "extra_body": {"ignore_eos": True}}
"""A stream that lasts a second or two."""


@pytest.fixture(scope="module")
def tokenizer(model_folder: Path) -> Tokenizer:
    return Tokenizer(model_folder)


@pytest.fixture(scope="module")
def generator(model_folder: Path) -> Generator:
    return Generator(load_model(model_folder).requires_grad_(False))


def stream_of(serving: Serving, **settings: Any) -> Iterator[Any]:
    settings = {"temperature": 0, **settings}
    return iter(
        serving.client.chat.completions.create(
            model=MODEL_ID, messages=QUESTION, stream=True, **settings
        )
    )


def text_of(stream: Iterator[Any]) -> str:
    return "".join(chunk.choices[0].delta.content or "" for chunk in stream if chunk.choices)


def test_what_serves_is_what_was_deployed(serving):
    (card,) = serving.client.models.list().data
    assert (card.id, card.max_model_len) == (MODEL_ID, MAX_CONTEXT)
    assert httpx2.get(f"{serving.address}/health").json() == {"status": "ok"}
    answer = httpx2.get(f"{serving.address}/version", headers={"X-Request-Id": "mine"})
    assert "version" in answer.json()
    assert answer.headers.get_list("x-request-id") == ["mine"]
    with pytest.raises(NotFoundError, match="does not exist"):
        serving.client.completions.create(model="gpt", prompt="x")


def test_a_streamed_chat_is_the_generators(serving, tokenizer, generator):
    prompt = render_prompt(tokenizer, QUESTION)
    ids = list(generator.stream(prompt, 40, stop_ids=tokenizer.stop_ids()))
    assert text_of(stream_of(serving, max_tokens=40)) == tokenizer.decode(ids)


def test_tokens_arrive_one_by_one(serving):
    with serving.client.chat.completions.create(
        model=MODEL_ID, messages=QUESTION, stream=True, **LONG | {"max_tokens": 3500}
    ) as stream:
        for _ in range(10):
            next(stream)
        assert serving.metric("nsa:num_requests_running") == 1, "it is far from its end"


def test_twenty_clients_get_what_each_would_get_alone(serving, tokenizer, generator):
    source = Path(__file__).read_text()
    prompts = [source[start : start + 30 + 90 * start] for start in range(20)]

    def ask(prompt: str) -> list[int]:
        answer = serving.client.completions.create(
            model=MODEL_ID,
            prompt=prompt,
            max_tokens=16,
            temperature=0,
            extra_body={"return_token_ids": True, "ignore_eos": True},
        )
        return answer.choices[0].token_ids

    with ThreadPoolExecutor(20) as pool:
        answers = list(pool.map(ask, prompts))
    for prompt, ids in zip(prompts, answers, strict=True):
        assert ids == list(generator.stream(tokenizer.encode(prompt), 16))


def test_the_context_can_be_filled_to_its_last_token(serving):
    prompt = [300] * (MAX_CONTEXT - 1)
    settings = {"model": MODEL_ID, "max_tokens": 1}
    answer = serving.client.completions.create(prompt=prompt, **settings)
    assert answer.usage.total_tokens == MAX_CONTEXT
    with pytest.raises(BadRequestError, match=f"maximum context length is {MAX_CONTEXT}"):
        serving.client.completions.create(prompt=[*prompt, 300], **settings)


def test_the_benchmark_counts_what_it_asked_for(serving, tmp_path, capsys):
    record = tmp_path / "record.json"
    load = ["--base-url", serving.address, "--output-len=8", "--num-prompts=5"]
    load += ["--max-concurrency=2", "--metadata=gpu=none", f"--result-filename={record}"]
    assert benchmark.main([*load, "--input-len=96"]) == 0
    assert "Successful requests:                               5" in capsys.readouterr().out
    result = json.loads(record.read_text())
    assert (result["model_id"], result["gpu"], result["failed"]) == (MODEL_ID, "none", 0)
    assert (result["total_input_tokens"], result["total_output_tokens"]) == (5 * 96, 5 * 8)
    assert 0 < result["median_ttft_ms"] < result["median_e2el_ms"] < 1000 * result["duration"]
    turns = ["--dataset-name=prefix_repetition", "--prefix-repetition-prefix-len=400"]
    turns += ["--prefix-repetition-num-prefixes=1", "--goodput", "ttft:60000"]
    # One after the other: the first that parts from the warm-up's prompt may have to compute the
    # window before that place once more, and from then on it stays.
    assert benchmark.main([*load, *turns, "--max-concurrency=1"]) == 0
    result = json.loads(record.read_text())
    assert result["total_cached_tokens"] >= 4 * 384
    assert result["request_goodput"] == result["request_throughput"]
    with pytest.raises(SystemExit) as end:
        benchmark.main([*load, f"--input-len={MAX_CONTEXT}"])
    assert end.value.code == 2
    assert f"exceed the model's max_model_len={MAX_CONTEXT}" in capsys.readouterr().err


@pytest.mark.parametrize("is_streamed", [True, False])
def test_a_disconnect_ends_the_answer_and_frees_its_pages(serving, is_streamed):
    eventually(lambda: serving.metric("nsa:kv_pages_used") == 0, "idle")
    before = serving.metric("nsa:generation_tokens_total")
    body = {"model": MODEL_ID, "prompt": "x", "max_tokens": 3500, "ignore_eos": True}
    with serving.connection("/v1/completions", {**body, "stream": is_streamed}):
        eventually(lambda: serving.metric("nsa:kv_pages_used") > 2, "pages in use")
    eventually(lambda: serving.metric("nsa:kv_pages_used") == 0, "pages free")
    assert serving.metric("nsa:generation_tokens_total") - before < 3500
    assert serving.metric("nsa:num_requests_running") == 0


def refused_of(serving: Serving, clients: int) -> list[RateLimitError]:
    """What those hear who are too many, of clients that ask all at once."""
    settings = {"model": MODEL_ID, "prompt": "x", "max_tokens": 40}

    def ask(_: int) -> object:
        try:
            return serving.client.completions.create(**settings, extra_body={"ignore_eos": True})
        except RateLimitError as error:
            return error

    with ThreadPoolExecutor(clients) as pool:
        answers = list(pool.map(ask, range(clients)))
    return [answer for answer in answers if isinstance(answer, RateLimitError)]


def test_more_than_the_queue_takes_is_refused_with_429(serving):
    refused = refused_of(serving, clients=80)
    assert refused and len(refused) < 80
    for error in refused:
        assert int(error.response.headers["retry-after"]) >= 1
        assert error.type == "rate_limit_error"


def test_a_replica_that_is_killed_ends_its_stream_with_an_error(serving):
    stream = stream_of(serving, **LONG | {"max_tokens": 4000})
    for _ in range(20):
        next(stream)
    serving.kill_replica()
    with pytest.raises(APIError, match="has gone; ask again") as caught:
        text_of(stream)
    assert caught.value.type == "server_error"
    # The next request waits for the replica that takes the dead one's place.
    assert text_of(stream_of(serving, max_tokens=5))


def test_rays_exporter_shows_what_dashboards_ask_for(serving):
    # Gates are sampled once in 256 steps, refusals counted from the first: the replica may be new.
    text_of(stream_of(serving, **LONG))
    assert refused_of(serving, clients=80)
    # Counters and histograms that only a mishap moves are not shown before it.
    rare = re.compile(r"preemptions|prefix_cache_hits")
    wanted = {
        f"ray_nsa_{name}"
        for family in FAMILIES.values()
        for name in family.series
        if not rare.search(name)
    } | {"ray_serve_deployment_queued_queries"}

    def missing() -> set[str]:
        return wanted - set(re.findall(r"^(ray_\w+)", serving.exported(), re.MULTILINE))

    eventually(lambda: not missing(), "the exporter shows all of them", every_s=0.5)
    line = next(x for x in serving.exported().splitlines() if x.startswith("ray_nsa_kv_pages_to"))
    assert f'model_name="{MODEL_ID}"' in line and 'engine="' in line


@contextmanager
def asking(serving: Serving, clients: int) -> Iterator[list[str]]:
    """Clients that ask again and again during the block; the texts that they have got."""
    texts: list[str] = []
    is_over = threading.Event()

    def keep_asking() -> None:
        while not is_over.is_set():
            texts.append(text_of(stream_of(serving, **LONG)))

    with ThreadPoolExecutor(clients) as pool:
        running = [pool.submit(keep_asking) for _ in range(clients)]
        try:
            yield texts
        finally:
            is_over.set()
        for each in running:
            each.result()


@pytest.fixture(scope="module")
def wanted(serving: Serving) -> str:
    return text_of(stream_of(serving, **LONG))


def test_a_redeploy_drops_no_stream(serving, wanted):
    before = serving.replicas()
    serving.config["engine_kwargs"]["max_num_seqs"] = 9
    del serving.config["deployment_config"]["num_replicas"]
    with asking(serving, clients=2) as texts:
        serving.deploy(
            autoscaling_config={
                "min_replicas": 1,
                "max_replicas": 3,
                # A stream fills a hundredth of a replica's cache at its end: one is below the
                # target. Twelve fill six hundredths on average, fewer where they share pages.
                "policy": {
                    "policy_kwargs": {
                        "target_kv_usage": 0.013,
                        "target_ttft_s": 60.0,
                        "shrink_at": 0.95,
                    }
                },
                "look_back_period_s": 1,
                "upscale_delay_s": 0.5,
                "downscale_delay_s": 2,
            }
        )
        eventually(lambda: serving.replicas() and not serving.replicas() & before, "new replica")
    assert texts and set(texts) == {wanted}


def test_scaling_up_and_down_drops_no_stream(serving, wanted):
    with asking(serving, clients=12) as texts:
        eventually(lambda: len(serving.replicas()) == 3, "three replicas")
    with asking(serving, clients=1) as more:
        eventually(lambda: len(serving.replicas()) == 1, "one replica")
    assert more and set(texts + more) == {wanted}


def test_a_model_that_cannot_start_is_told_in_a_line(serving, tmp_path):
    path = tmp_path / "bad.yaml"
    config = (Path(__file__).parents[2] / "deployments/configs/smoke.yaml").read_text()
    path.write_text(config.replace("name: llm", "name: bad").replace("prefix: /", "prefix: /bad"))
    key = "applications.0.args.llm_configs.0"
    done = serving.run(
        "python",
        *("-m", "deployments.serve", "--config", str(path)),
        *("--set", f"{key}.model_loading_config.model_source={tmp_path}/nothing"),
        *("--set", f"{key}.deployment_config.max_constructor_retry_count=1"),
    )
    assert done.returncode == 1
    (line,) = [line for line in done.stderr.splitlines() if line.startswith("error: ")]
    assert line.startswith("error: model 'nsa-smoke' cannot be served: ")
    assert f"{tmp_path}/nothing" in line
    assert text_of(stream_of(serving, max_tokens=5)), "what ran before still runs"


@pytest.fixture
def page(serving: Serving) -> Iterator[Page]:
    need_chromium()
    with open_page(f"{serving.address}/") as page:
        expect(page.locator("#model")).to_have_value("tiny")
        yield page


def say(page: Page, text: str, *, max_tokens: int) -> None:
    page.locator("#temperature").fill("0")
    page.locator("#max-tokens").fill(str(max_tokens))
    page.locator("#question").fill(text)
    page.locator("#question").press("Enter")


@pytest.mark.browser
def test_a_conversation(page, serving):
    say(page, "What is 2 + 3?", max_tokens=12)
    expect(page.locator("#status")).to_have_text(re.compile(r"\d+ \+ \d+ tokens, .* tokens/s"))
    answer = serving.client.chat.completions.create(
        model="tiny",
        messages=[{"role": "user", "content": "What is 2 + 3?"}],
        max_tokens=12,
        temperature=0,
    )
    first = page.locator(".turn.assistant").text_content()
    assert first == answer.choices[0].message.content
    say(page, "<b>Sure?</b>", max_tokens=3)
    expect(page.locator(".turn")).to_have_count(4)
    # What was typed is text and never markup.
    expect(page.locator(".turn.user").nth(1)).to_have_text("<b>Sure?</b>")
    expect(page.locator("#stop")).to_be_hidden()
    page.locator("#new").click()
    expect(page.locator(".turn")).to_have_count(0)
    expect(page.locator("#empty")).to_be_visible()


@pytest.mark.browser
def test_what_was_read_is_marked(page):
    page.locator("#show-reads").check()
    text = "Remember that the key is under the mat. " * 12 + "Where is the key?"
    say(page, text, max_tokens=6)
    expect(page.locator("#status")).to_contain_text("tokens/s")
    blocks = page.locator(".reads .block")
    assert "the key is under the mat" in "".join(blocks.all_text_contents())
    # The prompt's first block is always read, its last one for the first token at least.
    for block in (blocks.first, blocks.last):
        expect(block).to_have_class(re.compile("read"))
    expect(blocks.first).to_have_attribute("title", "100 % of heads")
    assert page.locator(".reads .block:not(.read)").count() > 0, "some blocks were not read"
    page.locator(".token").first.hover()
    expect(page.locator(".reads summary")).to_contain_text("Blocks of the prompt that \u201c")
    page.locator("#new").click()
    expect(page.locator(".reads")).to_have_count(0)


def long_winded(tokenizer: Tokenizer, generator: Generator) -> str:
    """A question whose greedy answer is not over before somebody can press a button."""
    lengths: dict[str, int] = {}
    for number in range(60):
        text = f"Go on from {number}."
        prompt = render_prompt(tokenizer, [{"role": "user", "content": text}])
        answer = generator.stream(prompt, 300, stop_ids=tokenizer.stop_ids())
        lengths[text] = sum(1 for _ in answer)
        if lengths[text] == 300:
            return text
    longest = max(lengths, key=lengths.__getitem__)
    assert lengths[longest] >= 120, lengths
    return longest


@pytest.mark.browser
def test_stop_ends_the_answer_and_frees_its_pages(page, serving, tokenizer, generator):
    say(page, long_winded(tokenizer, generator), max_tokens=3500)
    expect(page.locator(".turn.assistant.streaming")).not_to_be_empty()
    page.locator("#stop").click()
    expect(page.locator("#status")).to_have_text("Stopped.")
    assert page.locator(".turn.assistant").text_content()
    eventually(lambda: serving.metric("nsa:kv_pages_used") == 0, "pages free")
    say(page, "And now?", max_tokens=3)
    expect(page.locator("#status")).to_contain_text("tokens/s")


@pytest.mark.browser
def test_a_refusal_is_shown_and_the_question_kept(page):
    say(page, "Hello", max_tokens=100_000)
    expect(page.locator("#status.error")).to_contain_text("maximum context length is 4096")
    expect(page.locator(".turn")).to_have_count(0)
    expect(page.locator("#question")).to_have_value("Hello")


@pytest.mark.browser
def test_light_and_dark(page):
    def background() -> str:
        return page.evaluate("getComputedStyle(document.body).backgroundColor")

    page.emulate_media(color_scheme="light")
    light = background()
    page.emulate_media(color_scheme="dark")
    dark = background()
    assert light != dark
    page.locator("#theme").click()
    assert background() == light
    page.reload()
    assert background() == light


@pytest.mark.browser
def test_nothing_comes_from_elsewhere_and_nothing_fails(page, serving):
    addresses: list[str] = []
    problems: list[str] = []
    page.on("request", lambda request: addresses.append(request.url))
    page.on("pageerror", lambda error: problems.append(str(error)))
    page.on("console", lambda line: problems.append(line.text) if line.type == "error" else None)
    page.reload()
    expect(page.locator("#model")).to_have_value("tiny")
    assert len(addresses) >= 4
    assert all(address.startswith(serving.address) for address in addresses)
    assert problems == []


def test_two_ranks_serve_what_one_serves_and_go_together(serving, wanted):
    before = serving.replicas()
    serving.config["engine_kwargs"]["tensor_parallel_size"] = 2
    serving.config["deployment_config"].pop("autoscaling_config", None)
    serving.deploy(num_replicas=1)
    eventually(lambda: serving.replicas() and not serving.replicas() & before, "two ranks")
    assert text_of(stream_of(serving, **LONG)) == wanted
    stream = stream_of(serving, **LONG | {"max_tokens": 4000})
    next(stream)
    serving.kill("ray::Follower")
    with pytest.raises(APIError, match="a rank of the model has died"):
        text_of(stream)

    def answer() -> str | None:
        try:
            return text_of(stream_of(serving, **LONG))
        except APIError:
            return None

    # Until the replica's health is asked for, it refuses; then both are replaced.
    eventually(lambda: answer() == wanted, "an answer of two new ranks", every_s=0.5)
