"""The OpenAPI document, and what schemathesis sends by it: no answer is the server's failure."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import suppress
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis.errors import Unsatisfiable

from latentrt import Pipeline
from latentrt.serve.a1111.fields import FIELDS
from latentrt.serve.jobs.bounds import Bounds
from latentrt.serve.jobs.refusals import FieldError
from latentrt.serve.openai.fields import EDITS, GENERATIONS, VARIATIONS
from tests.serve.live import Live, live, open_demo

schemathesis = pytest.importorskip("schemathesis", reason="there is none for this Python")

TINY = Bounds(request_pixels=64 * 64, request_steps=3, request_pictures=2, jobs=32)
EXAMPLES = 15  # of each kind for each route
VALUES = ((7, ("integer", "number")), ("x", ("string",)), ([], ("array",)), ({}, ("object",)))


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


def test_the_fields_of_the_other_apis_are_in_it(at: Live) -> None:
    """Each field of the document is known, and what it says of one is what the server does."""
    paths = at.client.get("/openapi.json").json()["paths"]
    for name, endpoint in (("generations", GENERATIONS), ("edits", EDITS), ("variations", VARIATIONS)):
        for kind in paths[f"/v1/images/{name}"]["post"]["requestBody"]["content"].values():
            fields = set(kind["schema"]["properties"])
            assert fields <= endpoint.known
            assert set(endpoint.needed) | {"model", "n", "size", "num_inference_steps"} <= fields
    content = paths["/v1/images/edits"]["post"]["requestBody"]["content"]
    assert set(content) == {"application/json", "multipart/form-data"}
    body = content["application/json"]["schema"]["properties"]
    for name in ("size", "response_format", "background", "output_format", "n"):
        answer = at.client.post("/v1/images/generations", json={"prompt": "a circle", name: "odd"})
        assert answer.status_code == 400
        assert name in answer.json()["error"]["message"]
        assert "enum" in body[name] or "pattern" in body[name] or body[name]["type"] == "integer"
    for route, fields in FIELDS.items():
        schema = paths[f"/sdapi/v1/{route}"]["post"]["requestBody"]["content"]["application/json"]["schema"]
        assert set(schema["properties"]) == set(fields)
        for name, kind in schema["properties"].items():
            if "type" not in kind:
                continue
            for value, types in VALUES:
                if kind["type"][0] in types:
                    fields[name].read(name, value)
                elif kind["type"][0] != "boolean":
                    with pytest.raises(FieldError):
                        fields[name].read(name, value)


def test_fields_that_exclude_each_other(at: Live) -> None:
    schema = at.client.get("/v1/capabilities").json()["models"]["demo"]["schema"]
    pairs = [rule["not"]["required"] for rule in schema["allOf"]]
    assert ["timesteps", "sigmas"] in pairs
    assert all(set(pair) <= schema["properties"].keys() for pair in pairs)
    values = {"timesteps": [999, 500], "sigmas": [14.0, 1.0], "num_inference_steps": 2}
    for pair in pairs:
        if set(pair) <= values.keys():
            answer = at.client.post("/v1/jobs", json={name: values[name] for name in pair})
            assert answer.status_code == 400
            assert all(name in answer.json()["error"]["found"] for name in pair)


@pytest.mark.slow
def test_whatever_is_sent_by_the_document_is_answered(at: Live) -> None:
    schema = schemathesis.openapi.from_url(f"{at.url}/openapi.json")
    codes: dict[str, set[int]] = {}

    def send(case: Any) -> None:
        answer = case.call(headers={"prefer": "wait=5"})
        codes.setdefault(f"{case.method} {case.path}", set()).add(answer.status_code)
        told = case.operation.definition.raw["responses"]  # 501 of services of AUTOMATIC1111's
        assert answer.status_code < 500 or str(answer.status_code) in told, (
            case.as_curl_command(),
            answer.text,
        )

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
