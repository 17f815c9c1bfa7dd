"""Requests made up from the OpenAPI document: no 500, and every answer is one that it promises."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import schemathesis
from hypothesis import HealthCheck, given, settings
from schemathesis import GenerationMode
from schemathesis.checks import not_a_server_error
from schemathesis.specs.openapi.checks import (
    content_type_conformance,
    response_schema_conformance,
    status_code_conformance,
)

from nsa_platform.config.serve import EngineConfig
from tests.deployments.conftest import MODEL_ID, local_app

CHECKS = [
    not_a_server_error,
    status_code_conformance,
    content_type_conformance,
    response_schema_conformance,
]
EXAMPLES = 20
MOST = {"n": 2, "max_tokens": 8, "max_completion_tokens": 8}


PATHS = [
    "POST /v1/chat/completions",
    "POST /v1/completions",
    "POST /tokenize",
    "POST /detokenize",
    "GET /v1/models/{model}",
]


@pytest.fixture(scope="module")
def api(model_folder: Path) -> Iterator[Any]:
    short = EngineConfig(max_model_len=48, max_num_seqs=4, max_num_batched_tokens=64)
    with local_app(model_folder, short) as (app, _):
        yield schemathesis.openapi.from_asgi("/openapi.json", app)


def test_the_document_names_every_route(api: Any) -> None:
    labels = {found.ok().label for found in api.get_all_operations()}
    rest = {"GET /v1/models", "GET /health", "GET /version", "GET /metrics", "GET /load"}
    assert labels == {*PATHS, *rest, "POST /reset_prefix_cache"}


@pytest.mark.parametrize(
    ("path", "mode"),
    [
        *((path, GenerationMode.POSITIVE) for path in PATHS),
        *((path, GenerationMode.NEGATIVE) for path in PATHS if path.startswith("POST")),
    ],
)
def test_no_request_breaks_the_server(api: Any, path: str, mode: GenerationMode) -> None:
    method, place = path.split()
    statuses: set[int] = set()

    @settings(
        max_examples=EXAMPLES,
        deadline=None,
        derandomize=True,
        database=None,
        suppress_health_check=[HealthCheck.too_slow, HealthCheck.filter_too_much],
    )
    @given(case=api[place][method].as_strategy(generation_mode=mode))
    def ask(case: schemathesis.Case) -> None:
        case.body = _tamed(case.body)
        response = case.call()
        case.validate_response(response, checks=CHECKS)
        statuses.add(response.status_code)

    ask()
    if mode is GenerationMode.NEGATIVE:
        assert statuses <= {400, 404, 405}
    elif method == "POST":
        assert 200 in statuses


def _tamed(body: Any) -> Any:
    """The request with the model's name, which nobody guesses, and not too much to generate."""
    if not isinstance(body, dict):
        return body
    tamed = dict(body)
    if isinstance(body.get("model"), str):
        tamed["model"] = MODEL_ID
    for name, most in MOST.items():
        if type(body.get(name)) is int:
            tamed[name] = min(body[name], most)
    return tamed
