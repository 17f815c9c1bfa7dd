"""MLflow's real pages on any store, seen through headless Chromium."""

import os
import re
import shutil
import signal
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from tempfile import TemporaryDirectory

import pytest
from playwright.sync_api import Page, expect, sync_playwright

from jobs.ports import free_ports
from nsa_platform.tracking.store import connect

ROOT = Path(__file__).resolve().parents[2]
CHROMIUM = os.environ.get("CHROMIUM", "/usr/bin/chromium")
FLAGS = (
    "--no-sandbox",
    "--disable-gpu",
    "--disable-quic",
    "--no-first-run",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
)
PATIENCE_S = 90
expect.set_options(timeout=PATIENCE_S * 1000)


def need_chromium() -> None:
    """Skip the test where there is no Chromium; fail it where there must be one."""
    if shutil.which(CHROMIUM) is not None:
        return
    message = f"{CHROMIUM} is not installed (apt-get install chromium, or set CHROMIUM)"
    if os.environ.get("CI") == "true":
        pytest.fail(message)
    pytest.skip(message)


@contextmanager
def pages_of(store_uri: str) -> Iterator[str]:
    """Serve a SQLite store's pages for the block; a server serves its own. Yields the address."""
    if store_uri.startswith("http"):
        yield store_uri
        return
    (port,) = free_ports(1)
    address = f"http://127.0.0.1:{port}"
    command = [sys.executable, "-m", "jobs.experiments", "--uri", store_uri, "--port", str(port)]
    with TemporaryDirectory() as folder, Path(folder, "log").open("w+") as log:
        server = subprocess.Popen(command, cwd=ROOT, stdout=log, stderr=log, start_new_session=True)
        try:
            _wait_for(address, server, Path(folder, "log"))
            yield address
        finally:
            os.killpg(server.pid, signal.SIGKILL)
            server.wait()


@contextmanager
def open_page(address: str, *, screenshot: Path | None = None) -> Iterator[Page]:
    """A page of headless Chromium that reaches nothing but the address's host.

    `screenshot` names a file for a picture of the page as it was at the end of the block.
    """
    host = "/".join(address.split("/")[:3])
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=CHROMIUM, args=list(FLAGS))
        try:
            page = browser.new_page(viewport={"width": 1500, "height": 1000})
            page.route(lambda url: not url.startswith((host, "data:")), lambda r: r.abort())
            page.set_default_timeout(PATIENCE_S * 1000)
            page.goto(address)
            try:
                yield page
            finally:
                if screenshot is not None:
                    page.screenshot(path=screenshot)
        finally:
            browser.close()


def assert_curve_visible(
    store_uri: str,
    experiment: str,
    run_id: str,
    metric: str,
    *,
    screenshot: Path | None = None,
) -> None:
    """Fail unless MLflow's pages on the store draw a curve of the run's metric.

    Args:
        store_uri: sqlite:///file (its pages are served for the time) or a server's address.
        screenshot: where to keep a picture of the page.
    """
    found = connect(store_uri).get_experiment_by_name(experiment)
    assert found is not None, f"{store_uri} has no experiment {experiment!r}"
    place = f"#/experiments/{found.experiment_id}/runs/{run_id}/model-metrics"
    with (
        pages_of(store_uri) as address,
        open_page(f"{address}/{place}", screenshot=screenshot) as page,
    ):
        page.get_by_placeholder("Search metric charts").fill(f"^{metric}$")
        page.wait_for_selector(".js-plotly-plot .main-svg")
        page.get_by_text(f"({metric})").first.wait_for()
        line = page.locator(".js-plotly-plot .scatterlayer path.js-line").first
        line.wait_for(state="attached")
        drawn = line.get_attribute("d") or ""
        assert len(re.findall("[LHVCQ]", drawn)) >= 1, f"{metric} is no curve: {drawn!r}"


def _wait_for(address: str, server: "subprocess.Popen[bytes]", log: Path) -> None:
    deadline = time.monotonic() + PATIENCE_S
    while True:
        try:
            with urllib.request.urlopen(f"{address}/health", timeout=5):
                return
        except (urllib.error.URLError, OSError):
            assert server.poll() is None and time.monotonic() < deadline, log.read_text()[-2000:]
            time.sleep(0.3)
