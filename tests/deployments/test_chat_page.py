"""The chat page in a real browser: a streamed answer, stop, new chat, errors, light and dark."""

import re
from collections.abc import Iterator

import pytest
from playwright.sync_api import Page, expect

from tests.deployments.running import Serving, eventually
from tests.jobs.mlflow_pages import need_chromium, open_page

pytestmark = [pytest.mark.browser, pytest.mark.cluster, pytest.mark.xdist_group("ray-serve")]


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


def test_stop_ends_the_answer_and_frees_its_pages(page, serving):
    say(page, "Go on.", max_tokens=3500)
    expect(page.locator(".turn.assistant.streaming")).not_to_be_empty()
    page.locator("#stop").click()
    expect(page.locator("#status")).to_have_text("Stopped.")
    assert page.locator(".turn.assistant").text_content()
    eventually(lambda: serving.metric("nsa:kv_pages_used") == 0, within_s=5, what="pages free")
    say(page, "And now?", max_tokens=3)
    expect(page.locator("#status")).to_contain_text("tokens/s")


def test_a_refusal_is_shown_and_the_question_kept(page):
    say(page, "Hello", max_tokens=100_000)
    expect(page.locator("#status.error")).to_contain_text("maximum context length is 4096")
    expect(page.locator(".turn")).to_have_count(0)
    expect(page.locator("#question")).to_have_value("Hello")


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
