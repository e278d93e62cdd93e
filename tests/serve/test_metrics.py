"""What the server counts and logs, read by Prometheus' own parser; and what neither has: prompts, keys."""

from __future__ import annotations

import json
import logging
import time
from collections.abc import Iterator
from typing import Any

import pytest
from prometheus_client.openmetrics.parser import text_string_to_metric_families as read_open
from prometheus_client.parser import text_string_to_metric_families as read_plain

from latentrt import Pipeline
from latentrt.serve.door.access import HEALTH_PATHS, allow
from latentrt.serve.door.keys import keys_of_environment
from latentrt.serve.jobs.bounds import Bounds
from latentrt.serve.log_lines import LONGEST, log_line
from latentrt.serve.metrics import PATH
from tests.serve.live import Live, live, open_demo

PROMPT = "a secret red circle"
KEY = "0123456789abcdef-secret"
SMALL: dict[str, Any] = {"prompt": PROMPT, "width": 64, "height": 64, "num_inference_steps": 3, "seed": 7}
Series = dict[tuple[str, tuple[tuple[str, str], ...]], float]


@pytest.fixture(scope="module")
def pipe() -> Iterator[Pipeline]:
    with open_demo() as opened:
        yield opened


@pytest.fixture
def at(pipe: Pipeline) -> Iterator[Live]:
    with live(pipe) as made:
        yield made


@pytest.fixture
def lines() -> Iterator[list[str]]:
    """What the server logs from INFO on."""
    found: list[str] = []

    class Kept(logging.Handler):
        def emit(self, record: logging.LogRecord) -> None:
            found.append(record.getMessage())

    logger, handler = logging.getLogger("latentrt.serve"), Kept()
    before = logger.level
    logger.setLevel(logging.INFO)
    logger.addHandler(handler)
    yield found
    logger.removeHandler(handler)
    logger.setLevel(before)


def series(at: Live) -> Series:
    answer = at.client.get(PATH)
    assert answer.status_code == 200
    return {
        (sample.name, tuple(sorted(sample.labels.items()))): sample.value
        for family in read_plain(answer.text)
        for sample in family.samples
    }


def value(found: Series, name: str, **labels: str) -> float:
    return found[f"latentrt_{name}", tuple(sorted(labels.items()))]


def draw(at: Live, **fields: Any) -> dict[str, Any]:
    answer = at.client.post("/v1/jobs", json={**SMALL, **fields}, headers={"prefer": "wait=60"})
    assert answer.status_code == 200, answer.text
    return answer.json()


def test_ends_steps_rows_and_pictures_are_counted(at: Live, monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[int] = []
    at.server.workers["demo"].turns.append(lambda rows, seconds: seen.append(rows))
    draw(at, num_images_per_prompt=2)
    draw(at)
    job = at.client.post("/v1/jobs", json={**SMALL, "num_inference_steps": 150}).json()
    at.client.delete(f"/v1/jobs/{job['id']}")
    while at.client.get(f"/v1/jobs/{job['id']}").json()["status"] == "running":
        time.sleep(0.005)

    def broken(values: Any) -> Iterator[Any]:
        yield 1 / 0

    monkeypatch.setattr(at.server.workers["demo"].pipe, "shared", broken)
    assert draw(at)["status"] == "failed"
    monkeypatch.undo()
    found = series(at)
    for outcome, count in (("completed", 2), ("failed", 1), ("cancelled", 1)):
        assert value(found, "requests_total", outcome=outcome, model="demo") == count
        assert value(found, "request_duration_seconds_count", outcome=outcome) == count
    assert value(found, "cancelled_total", reason="request") == 1
    assert value(found, "failed_total", type="internal") == 1
    assert value(found, "pictures_total", model="demo") == 3
    calls = [rows for rows in seen if rows]
    assert value(found, "unet_rows_count", model="demo") == len(calls)
    assert value(found, "unet_rows_sum", model="demo") == sum(calls)
    assert value(found, "step_seconds_count", model="demo") == len(calls)
    assert value(found, "step_seconds_sum", model="demo") > 0
    assert value(found, "queue_duration_seconds_count") in (3, 4), "one may have been cancelled in the queue"
    assert (
        value(found, "seconds_per_pixel_step", model="demo") == at.server.paces["demo"].seconds_per_pixel_step
    )
    assert value(found, "bytes", kind="results") == at.server.jobs.kept_bytes > 0
    assert value(found, "worker_alive", model="demo") == value(found, "ready") == 1


def test_what_waits_and_what_is_refused(pipe: Pipeline) -> None:
    with live(pipe, bounds=Bounds(jobs=2), start=False) as full:
        for _ in range(5):
            full.client.post("/v1/jobs", json=SMALL)
        found = series(full)
        assert value(found, "requests_waiting") == 2
        assert value(found, "requests_running") == 0
        assert value(found, "rejected_total", bound="jobs") == 3
        assert value(found, "pixel_steps") == 2 * 64 * 64 * 3
        assert value(found, "worker_alive", model="demo") == value(found, "ready") == 0
        assert value(found, "worker_restarts_total", model="demo") == 0
        full.server.restarts["demo"] = 2
        assert value(series(full), "worker_restarts_total", model="demo") == 2


def test_strangers_make_no_series(at: Live) -> None:
    """Paths, methods, names of models, seeds and prompts are as many as callers like."""

    def odd(number: int) -> None:
        at.client.get(f"/none/{number}")
        at.client.get(f"/v1/jobs/{number}")
        at.client.request(f"ODD{number}", "/v1/jobs")
        draw(at, prompt=f"{PROMPT} {number}", seed=number, model=f"other-{number}")

    odd(0)
    series(at)
    before = set(series(at))
    for number in range(1, 12):
        odd(number)
    found = series(at)
    assert set(found) == before
    assert PROMPT not in at.client.get(PATH).text
    for route, status, count in (("other", "404", 12), ("/v1/jobs/{name}", "404", 12)):
        assert value(found, "http_requests_total", method="GET", route=route, status=status) == count
    assert value(found, "http_requests_total", method="other", route="/v1/jobs", status="405") == 12
    assert value(found, "http_requests_total", method="POST", route="/v1/jobs", status="200") == 12


def test_the_newer_form_for_who_asks_for_it(at: Live) -> None:
    answer = at.client.get(PATH, headers={"accept": "application/openmetrics-text; version=1.0.0"})
    assert answer.headers["content-type"].startswith("application/openmetrics-text")
    names = {family.name for family in read_open(answer.text)}
    assert {"latentrt_requests", "latentrt_step_seconds", "latentrt_bytes"} <= names
    assert at.client.get(PATH).headers["content-type"].startswith("text/plain")


def test_a_key_unless_it_is_open(pipe: Pipeline) -> None:
    keys = keys_of_environment("K", {"K": KEY})
    with live(pipe, access=allow(keys=keys), start=False) as closed:
        assert closed.client.get(PATH).status_code == 401
        assert closed.client.get(PATH, headers={"x-api-key": KEY}).status_code == 200
    opened = allow(keys=keys, open_paths=HEALTH_PATHS | {PATH})
    with live(pipe, access=opened, start=False) as known:
        assert known.client.get(PATH).status_code == 200
        assert known.client.get("/v1/jobs").status_code == 401


# ── the log ────────────────────────────────────────────────────────────────────────────────────────


def parts(line: str) -> dict[str, str]:
    return dict(part.split("=", 1) for part in line.split(" ")[1:])


def test_a_line_for_each_job_and_each_request(pipe: Pipeline, lines: list[str]) -> None:
    with live(pipe, access=allow(keys=keys_of_environment("K", {"K": KEY}))) as at:
        at.client.headers["authorization"] = f"Bearer {KEY}"
        answer = at.client.post("/v1/jobs", json=SMALL, headers={"prefer": "wait=60"})
        job = answer.json()
        at.client.get("/health/live")
        at.client.get("/v1/jobs?limit=3")
        at.client.get("/a%0Ab")
        at.client.get(PATH)
    found = {
        word: [parts(line) for line in lines if line.split(" ")[0] == word] for word in ("job", "request")
    }
    (told,) = found["job"]
    wanted = {"id": job["id"], "model": "demo", "outcome": "completed", "size": "64x64", "steps": "3"}
    assert wanted.items() <= told.items()
    assert told["pictures"] == "1/1"
    assert told["bytes"] == str(job["images"][0]["bytes"])
    assert float(told["ran_s"]) > 0
    posted, listed, odd = found["request"]  # probes are not among them
    assert (posted["method"], posted["path"], posted["status"]) == ("POST", "/v1/jobs", "200")
    assert posted["location"] == f"/v1/jobs/{job['id']}"
    assert posted["id"] == answer.headers["x-request-id"]
    assert int(posted["bytes"]) == len(answer.content)
    assert posted["key"] == told["key"] == listed["key"]
    assert listed["path"] == "/v1/jobs"
    assert odd["status"] == "404"
    text = "\n".join(lines)
    assert PROMPT not in text
    assert KEY not in text
    assert "limit" not in text


def test_lines_are_one_line_whatever_strangers_write() -> None:
    odd = 'a b="c"\r\n\x1b[2J\x7f\u2028é' + "x" * 1000
    line = log_line("request", path=odd, status=200, none=None, seconds=0.12345)
    assert line.isascii()
    assert line.isprintable()
    what, _, rest = line.partition(" ")
    assert (what, line.endswith("seconds=0.123")) == ("request", True)
    path = rest.removeprefix("path=").removesuffix(" status=200 seconds=0.123")
    assert json.loads(path) == odd[:LONGEST]
    assert log_line("job", id="a-b/c", size="64x64") == "job id=a-b/c size=64x64"
