"""What the server answers is what its OpenAPI document says: requests that schemathesis makes of the document.

Status codes, content types, headers and bodies of every answer are those of the document; none is a server error.
"""

from __future__ import annotations

import base64
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings

from common import smooth
from leanvit.imaging import encode_png
from serving import Running, serving

schemathesis = pytest.importorskip("schemathesis")

from schemathesis import GenerationMode  # noqa: E402
from schemathesis.checks import not_a_server_error  # noqa: E402
from schemathesis.specs.openapi import checks  # noqa: E402

IMAGE = encode_png(smooth(24, 20, seed=5))

TENSOR = {
    "inputs": [
        {"name": "encoded", "shape": [1], "datatype": "BYTES", "data": [base64.b64encode(IMAGE).decode("ascii")]}
    ]
}

OPERATIONS = [
    ("GET", "/metrics"), ("GET", "/v1/models"), ("GET", "/v1/models/{name}"), ("POST", "/v1/models/{name}:predict"),
    ("GET", "/v2"), ("GET", "/v2/health/live"), ("GET", "/v2/health/ready"), ("GET", "/v2/models/{name}"),
    ("GET", "/v2/models/{name}/ready"), ("POST", "/v2/models/{name}/infer"), ("GET", "/v2/models/{name}/versions/1"),
    ("GET", "/v2/models/{name}/versions/1/ready"), ("POST", "/v2/models/{name}/versions/1/infer"),
]  # fmt: skip
"""test_the_routes_are_those_of_the_documents has them too."""

CHECKS = [
    not_a_server_error, checks.status_code_conformance, checks.content_type_conformance,
    checks.response_headers_conformance, checks.response_schema_conformance, checks.unsupported_method,
]  # fmt: skip


@pytest.fixture(scope="module")
def server(shared_bundle: Path) -> Iterator[Running]:
    with serving(f"one={shared_bundle}", "--threads", 1, "--no-access-log") as running:
        yield running


@pytest.fixture(scope="module")
def document(server: Running) -> Any:
    return schemathesis.openapi.from_url(f"http://127.0.0.1:{server.port}/openapi.json")


def answers(strategy: Any, examples: int) -> Counter[int]:
    """How often each code was answered; raises where an answer is not one of the document."""
    found: Counter[int] = Counter()

    @settings(
        max_examples=examples, deadline=None, derandomize=True, database=None, suppress_health_check=list(HealthCheck)
    )
    @given(case=strategy)
    def ask(case: Any) -> None:
        response = case.call()
        found[response.status_code] += 1
        case.validate_response(response, checks=CHECKS)

    ask()
    return found


@pytest.mark.parametrize(("method", "path"), OPERATIONS)
def test_every_answer_is_one_of_the_document(document: Any, method: str, path: str) -> None:
    operation = document[path][method]
    # Where a route has no body, header or parameter, nothing of a request can be wrong but the model's name.
    modes = list(GenerationMode) if method == "POST" else [GenerationMode.POSITIVE]
    for mode in modes:
        if "{name}" not in path:
            assert answers(operation.as_strategy(mode), 4) == {200: 1}
            continue
        # A deadline of few milliseconds may pass.
        assert set(answers(operation.as_strategy(mode, path_parameters={"name": "one"}), 12)) <= {200, 400, 429}
        assert set(answers(operation.as_strategy(mode), 4)) == {404}


@pytest.mark.parametrize(
    ("path", "kind", "body"),
    [
        ("/v1/models/{name}:predict", "image/*", IMAGE),
        ("/v2/models/{name}/infer", "application/json", TENSOR),
        ("/v2/models/{name}/versions/1/infer", "application/json", TENSOR),
    ],
)
def test_good_bodies_are_answered_as_described_whatever_stands_beside_them(
    document: Any, path: str, kind: str, body: Any
) -> None:
    strategy = document[path]["POST"].as_strategy(path_parameters={"name": "one"}, body=body, media_type=kind)
    found = answers(strategy, 25)
    # Not every parameter is one of a classifier, and a deadline of few milliseconds passes.
    assert set(found) <= {200, 400, 429}
    assert found[200]


def test_a_deadline_that_passes_is_answered_as_described(document: Any) -> None:
    operation = document["/v1/models/{name}:predict"]["POST"]
    given = {"path_parameters": {"name": "one"}, "body": IMAGE, "media_type": "image/*"}
    found = answers(operation.as_strategy(headers={"X-Timeout-Ms": "0"}, **given), 8)
    assert found[429]
    assert set(found) <= {400, 429}


def test_the_document_says_nothing_of_what_the_server_never_answers(document: Any) -> None:
    for path, methods in document.raw_schema["paths"].items():
        for method, operation in methods.items():
            assert "422" not in operation["responses"], (method, path)
            assert {"200", "413", "415", "429", "431"} <= set(operation["responses"])
    assert "HTTPValidationError" not in str(document.raw_schema)


def test_other_methods_are_told_which_one_is_taken(server: Running) -> None:
    for method, path, taken in (("DELETE", "/v1/models", "GET"), ("GET", "/v2/models/one/infer", "POST")):
        reply = server.ask(method, path)
        assert (reply.code, reply.headers["allow"]) == (405, taken)
        assert list(reply.json) == ["error"]
