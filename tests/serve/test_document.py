"""The OpenAPI document, and what schemathesis sends by it: no answer is the server's failure."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import suppress
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis.errors import Unsatisfiable

from latentrt import Pipeline
from latentrt.serve.jobs.bounds import Bounds
from tests.serve.live import Live, live, open_demo

schemathesis = pytest.importorskip("schemathesis", reason="there is none for this Python")

TINY = Bounds(request_pixels=64 * 64, request_steps=3, request_pictures=2, jobs=32)
EXAMPLES = 15  # of each kind for each route


@pytest.fixture(scope="module")
def pipe() -> Iterator[Pipeline]:
    with open_demo() as opened:
        yield opened


@pytest.fixture(scope="module")
def at(pipe: Pipeline) -> Iterator[Live]:
    with live(pipe, bounds=TINY) as made:
        yield made


def test_the_fields_of_jobs_are_in_it(at: Live) -> None:
    document = at.client.get("/openapi.json").json()
    body = document["paths"]["/v1/jobs"]["post"]["requestBody"]["content"]["application/json"]["schema"]
    schema = at.client.get("/v1/capabilities").json()["models"]["demo"]["schema"]
    assert schema["properties"].items() <= body["properties"].items()
    assert {"model", "priority", "timeout_s"} <= set(body["properties"])
    for name, value in (("priority", 11), ("timeout_s", 0)):
        assert at.client.post("/v1/jobs", json={name: value}).status_code == 400
    several = at.server.workers["demo"]
    at.server.workers["other"] = several
    try:
        two = at.client.get("/openapi.json").json()["paths"]["/v1/jobs"]["post"]["requestBody"]
        assert len(two["content"]["application/json"]["schema"]["anyOf"]) == 2
    finally:
        del at.server.workers["other"]


@pytest.mark.slow
def test_whatever_is_sent_by_the_document_is_answered(at: Live) -> None:
    schema = schemathesis.openapi.from_url(f"{at.url}/openapi.json")
    codes: dict[str, set[int]] = {}

    def send(case: Any) -> None:
        answer = case.call(headers={"prefer": "wait=5"})
        codes.setdefault(f"{case.method} {case.path}", set()).add(answer.status_code)
        assert answer.status_code < 500, (case.as_curl_command(), answer.text)

    sending = settings(
        max_examples=EXAMPLES,
        deadline=None,
        database=None,
        derandomize=True,
        suppress_health_check=list(HealthCheck),
    )
    for found in schema.get_all_operations():
        for mode in (schemathesis.GenerationMode.POSITIVE, schemathesis.GenerationMode.NEGATIVE):
            cases = found.ok().as_strategy(generation_mode=mode)
            with suppress(Unsatisfiable):  # a route without fields has no wrong ones
                sending(given(case=cases)(lambda case: send(case)))()
    assert len(codes) > 8
    assert codes["POST /v1/jobs"] >= {400}
    assert codes["POST /v1/jobs"] & {200, 202, 413}
    assert at.client.get("/health/live").status_code == 200
