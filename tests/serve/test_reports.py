"""What went wrong with other servers of pictures: public reports by number, and where each is tested.

===  =======================================  ==============================================================
no.  what happened                            test, without its `test_`s
===  =======================================  ==============================================================
1    a vanished client is not noticed         reports.a_client_that_leaves_ends_its_job
2    what runs cannot be cancelled            reports.no_step_follows_a_cancel
3    one abort aborts all later ones          reports.cancels_at_random_moments
4    memory grows with aborted requests       reports.aborted_uploads_leave_nothing
5    two at once, one never answered          reports.equal_requests_at_once_each_get_an_answer
6    a batch changes pictures                 worker.pictures_are_those_of_a_pipeline
7    wrong seeds are told                     native.pictures_are_those_of_a_pipeline
8    overlapping calls crash or hang          a1111.many_at_once_have_their_own_pictures
9    progress shows another's job             a1111.nobody_sees_or_ends_anothers_job
10   stuck after an exception                 a1111.progress_is_idle_after_a_failure
11   unknown or empty options fail            a1111.odd_values_are_never_a_failure_of_the_server
12   an unknown model is silently replaced    native.strict_names_of_models
13   memory grows with failed requests        reports.failing_requests_leave_nothing
14   an interrupt ends another's job          a1111.nobody_sees_or_ends_anothers_job
15   an interrupt gives black pictures        worker.a_running_job_is_cancelled_within_a_step
16   two jobs of a second share an id         jobs.ten_thousand_ids_of_one_moment_differ_and_have_128_bits
17   an answer reaches another user           reports.everybody_gets_the_own_answer
18   one crash hangs all                      reports.the_death_of_a_worker_is_told_to_all
19   dropped streams crash the server         reports.streams_that_are_dropped
20   previews and a cancel race               reports.a_cancel_at_every_step_with_previews
21   a vanished client's pictures are lost    reports.a_job_outlives_its_client
22   a mask of another kind is ignored        openai.edits_that_are_wrong
23   cancels from other threads crash         reports.a_storm_of_cancels
24   refused after it was drawn               native.what_is_wrong_is_refused_before_a_step
25   the size is ignored                      openai.a_seed_of_the_answer_is_that_of_the_pixels
26   another form than was asked for          openai.response_formats
27   DNS rebinding, a forgotten method        reports.foreign_names_on_every_route_and_method
28   forms of foreign pages                   reports.forms_of_foreign_pages_make_no_job
29   a library's text leaks an address        pictures.corrupt_files
30   a picture of 1 x 1 kills the server      pictures.odd_shapes
31   any number of frames                     pictures.animations_are_refused_undecoded
32   a small file of gigapixels               pictures.a_small_file_of_gigapixels
33   floods of a form                         reports.floods_of_a_form
34   characters behind a form                 reports.characters_behind_the_last_boundary
35   a Range header of quadratic time         reports.a_long_range
36   addresses are fetched                    reports.no_address_is_called
37   paths are opened                         reports.no_path_is_opened
38   keys are guessed by time                 guard.every_key_is_compared_on_every_request
39   a huge body without a key                reports.the_key_comes_before_the_body
40   many tiny chunks                         reports.many_tiny_chunks
41   slow clients hold sockets                reports.slow_clients
42   open by default                          process.other_machines_need_a_key
43   a route without a key                    reports.every_route_needs_a_key
44   a client asks thrice in vain             openai.a_job_that_fails_is_drawn_once
45   streams hold up the end                  process.at_sigterm_jobs_end_and_streams_are_told
46   a traceback in an answer                 reports.an_error_tells_its_request_alone
===  =======================================  ==============================================================
"""

from __future__ import annotations

import base64
import gc
import itertools
import json
import logging
import os
import random
import re
import socket
import sys
import threading
import time
from collections.abc import Callable, Generator, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from functools import partial
from pathlib import Path
from typing import Any

import httpx
import pytest
from fastapi import APIRouter, Request
from starlette.concurrency import run_in_threadpool
from starlette.responses import JSONResponse, Response

from latentrt import Pipeline
from latentrt.serve import app as application
from latentrt.serve import native, worker
from latentrt.serve.app import Api
from latentrt.serve.door import heads
from latentrt.serve.door.access import allow
from latentrt.serve.door.body import BodyLimits
from latentrt.serve.door.guard import KEY_ID
from latentrt.serve.door.keys import keys_of_environment
from latentrt.serve.jobs.bounds import Bounds
from latentrt.serve.order import Order
from latentrt.serve.server import RESTARTS
from latentrt.serve.waiting import ended, unless_gone
from tests.serve.live import Live, live, open_demo

PROMPT = "a red circle on a blue background"
SMALL: dict[str, Any] = {"prompt": PROMPT, "width": 64, "height": 64, "num_inference_steps": 3, "seed": 7}
KEY = "0123456789abcdef-secret"
SLOW_S = 0.06  # of a step, where a test has to come between two
MIB = 2**20


@pytest.fixture(scope="module")
def pipe() -> Iterator[Pipeline]:
    with open_demo() as opened:
        yield opened


@pytest.fixture(scope="module")
def at(pipe: Pipeline) -> Iterator[Live]:
    with live(pipe, bounds=Bounds(jobs=300)) as made:
        yield made


def until(true: Callable[[], Any], seconds: float = 60) -> None:
    end = time.monotonic() + seconds
    while not true():
        assert time.monotonic() < end, "it does not happen"
        time.sleep(0.002)


def post(at: Live, **fields: Any) -> str:
    answer = at.client.post("/v1/jobs", json={**SMALL, **fields})
    assert answer.status_code == 202, answer.text
    return str(answer.json()["id"])


def told(at: Live, job: str) -> dict[str, Any]:
    return at.client.get(f"/v1/jobs/{job}").json()


def finished(at: Live, job: str) -> dict[str, Any]:
    until(lambda: told(at, job)["ended"])
    return told(at, job)


def it_still_draws(at: Live) -> None:
    answer = at.client.post("/v1/jobs", json=SMALL, headers={"prefer": "wait=60"})
    assert answer.json()["status"] == "completed"


def nothing_is_left(at: Live) -> None:
    until(lambda: not at.server.workers["demo"].busy)
    counts = at.server.jobs.counts()
    assert counts.queued == counts.running == 0
    assert counts.accepted == counts.completed + counts.failed + counts.cancelled


@contextmanager
def slow_steps(at: Live) -> Generator[list[int]]:
    """Each turn takes `SLOW_S` longer. Yields the rows of each call of the UNet."""
    calls: list[int] = []

    def wait(rows: int, seconds: float) -> None:
        time.sleep(SLOW_S)
        if rows:
            calls.append(rows)

    turns = at.server.workers["demo"].turns
    turns.append(wait)
    try:
        yield calls
    finally:
        turns.remove(wait)


def events(answer: httpx.Response) -> Iterator[tuple[str, dict[str, Any]]]:
    """Those of a stream, as they come."""
    kind = ""
    for line in answer.iter_lines():
        name, _, value = line.partition(": ")
        if name == "event":
            kind = value
        elif name == "data":
            yield kind, json.loads(value)


def connect(at: Live) -> socket.socket:
    host, _, port = at.url.removeprefix("http://").partition(":")
    return socket.create_connection((host, int(port)), timeout=60)


def head(method: str, path: str, *headers: str) -> bytes:
    return "\r\n".join([f"{method} {path} HTTP/1.1", "Host: localhost", *headers, "", ""]).encode()


def status_of(answer: bytes) -> int:
    assert answer.startswith(b"HTTP/1.1 "), answer[:80]
    return int(answer.split(b" ", 2)[1])


def resident() -> int:
    """Bytes of this process that are in memory."""
    return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")


def descriptors() -> int:
    return len(os.listdir("/proc/self/fd"))


def test_the_table_names_tests_that_there_are() -> None:
    found = re.findall(r"^(\d+) .* (\w+)\.(\w+)$", __doc__ or "", re.MULTILINE)
    assert [int(number) for number, _, _ in found] == list(range(1, 47))
    for number, file, name in found:
        source = Path(__file__).with_name(f"test_{file}.py").read_text(encoding="utf-8")
        assert f"def test_{name}(" in source, number


# ── clients that leave, and cancels ────────────────────────────────────────────────────────────────

blocking = APIRouter(prefix="/blocking")


@blocking.post("/draw")
async def draw(request: Request) -> Response:
    """As the APIs do it whose answer is the picture."""
    server, owner = native.server_of(request), str(request.scope[KEY_ID])
    values = await request.json()
    order = Order(model="demo", values=values, seeds=(7,))
    job = await run_in_threadpool(server.submit, owner, order)
    gone = partial(server.jobs.cancel, job.id, owner, "disconnect")
    done = await unless_gone(request.receive, ended(server.jobs, job), gone)
    return JSONResponse({"status": done and done.state})


def test_a_client_that_leaves_ends_its_job(pipe: Pipeline, monkeypatch: pytest.MonkeyPatch) -> None:
    """Report 1: within two steps, and health is told meanwhile as if nothing was drawn."""
    api = Api(router=blocking, error_form=native.error_form, prefixes=("/blocking",), bodies=lambda _: {})
    monkeypatch.setattr(application, "APIS", (api, *application.APIS))
    values = {name: SMALL[name] for name in SMALL if name != "seed"}
    with live(pipe) as at, slow_steps(at) as calls:
        answer = at.client.post("/blocking/draw", json=values)
        assert answer.json() == {"status": "completed"}
        before = len(calls)
        body = json.dumps({**values, "num_inference_steps": 100}).encode()
        with connect(at) as left:
            kind, length = "Content-Type: application/json", f"Content-Length: {len(body)}"
            left.sendall(head("POST", "/blocking/draw", kind, length) + body)
            until(lambda: len(calls) >= before + 2)
            waits: list[float] = []
            for _ in range(5):
                began = time.monotonic()
                assert at.client.get("/health/live").status_code == 200
                waits.append(time.monotonic() - began)
            assert min(waits) < 0.1
        done = len(calls)
        (job,) = at.server.jobs.owned("anyone", 1)
        until(lambda: at.server.jobs.get(job.id, "anyone").ended)
        assert len(calls) <= done + 2
        found = at.server.jobs.get(job.id, "anyone")
        assert (found.state, found.cancel_reason) == ("cancelled", "disconnect")
        it_still_draws(at)


def test_a_job_outlives_its_client(at: Live) -> None:
    """Report 21: who waits by `Prefer` and leaves finds the job later."""
    body = json.dumps({**SMALL, "num_inference_steps": 20}).encode()
    headers = ("Content-Type: application/json", f"Content-Length: {len(body)}", "Prefer: wait=60")
    before = at.server.jobs.counts().accepted
    with slow_steps(at) as calls, connect(at) as left:
        left.sendall(head("POST", "/v1/jobs", *headers) + body)
        until(lambda: len(calls) >= 2)
    assert at.server.jobs.counts().accepted == before + 1
    job = at.client.get("/v1/jobs?limit=1").json()["jobs"][0]
    assert finished(at, job["id"])["status"] == "completed"
    assert at.client.get(f"/v1/jobs/{job['id']}/images/0").is_success


@pytest.mark.parametrize("step", [0, 1, 5])
def test_no_step_follows_a_cancel(at: Live, step: int) -> None:
    """Report 2: one that is being computed may still come."""
    with slow_steps(at):
        job = post(at, num_inference_steps=40)
        last = -1
        with at.client.stream("GET", f"/v1/jobs/{job}/events") as answer:
            for kind, data in events(answer):
                if kind == "step":
                    last = data["index"]
                    if last == step:
                        at.client.delete(f"/v1/jobs/{job}")
        assert kind == "cancelled"
        assert data["reason"] == "request"
        assert last <= step + 1
    assert told(at, job)["images"] == []


@pytest.mark.parametrize("count", [60, pytest.param(300, marks=pytest.mark.slow)])
def test_cancels_at_random_moments(at: Live, count: int) -> None:
    """Report 3: each ends, and what comes afterwards is drawn."""
    chance = random.Random(3)
    jobs: list[str] = []
    for number in range(count):
        jobs.append(post(at, num_inference_steps=chance.choice([1, 5, 50]), seed=number))
        time.sleep(chance.random() * 0.02)
        method, end = chance.choice([("DELETE", ""), ("POST", "/cancel")])
        assert at.client.request(method, f"/v1/jobs/{jobs[-1]}{end}").status_code == 200
    states = [finished(at, job)["status"] for job in jobs]
    assert set(states) <= {"cancelled", "completed"}
    nothing_is_left(at)
    it_still_draws(at)


@pytest.mark.parametrize("count", [4, pytest.param(25, marks=pytest.mark.slow)])
def test_a_storm_of_cancels(at: Live, count: int) -> None:
    """Report 23: from eight threads, also of each other's jobs."""
    jobs: list[str] = []

    def storm(seed: int) -> list[int]:
        chance, codes = random.Random(seed), list[int]()
        for number in range(count):
            jobs.append(post(at, num_inference_steps=chance.choice([2, 30]), seed=number))
            for job in chance.sample(jobs, min(3, len(jobs))):
                codes.append(at.client.delete(f"/v1/jobs/{job}").status_code)
        return codes

    with ThreadPoolExecutor(8) as threads:
        codes = list(itertools.chain(*threads.map(storm, range(8))))
    assert set(codes) == {200}
    assert {finished(at, job)["status"] for job in jobs} <= {"cancelled", "completed"}
    nothing_is_left(at)
    it_still_draws(at)


def test_a_cancel_at_every_step_with_previews(at: Live, monkeypatch: pytest.MonkeyPatch) -> None:
    """Report 20."""
    monkeypatch.setattr(worker, "BETWEEN_PREVIEWS_S", 0.0)
    previews = 0
    for step in range(8):
        job = post(at, num_inference_steps=9, preview={"every": 1})
        with slow_steps(at), at.client.stream("GET", f"/v1/jobs/{job}/events") as answer:
            for kind, data in events(answer):
                previews += kind == "preview"
                if kind == "step" and data["index"] == step:
                    at.client.delete(f"/v1/jobs/{job}")
        assert kind in ("cancelled", "completed"), "the last step may be over"
        assert (kind == "completed") == bool(told(at, job)["images"])
    assert previews > 8
    it_still_draws(at)


def test_streams_that_are_dropped(at: Live) -> None:
    """Report 19: 200 readers come and go while a job is drawn; none is remembered."""
    with slow_steps(at):
        job = post(at, num_inference_steps=150)
        request = head("GET", f"/v1/jobs/{job}/events")
        for number in range(200):
            with connect(at) as reader:
                reader.sendall(request)
                if number % 4:
                    assert status_of(reader.recv(4096)) == 200
        log = at.server.jobs.get(job, "anyone").log
        until(lambda: not log._readers)  # pyright: ignore[reportPrivateUsage]
    at.client.delete(f"/v1/jobs/{job}")
    finished(at, job)
    it_still_draws(at)


# ── many at once ───────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize("count", [12, pytest.param(50, marks=pytest.mark.slow)])
def test_equal_requests_at_once_each_get_an_answer(at: Live, count: int) -> None:
    """Report 5: each is a job of its own with the same picture."""

    def one(_: int) -> dict[str, Any]:
        answer = at.client.post("/v1/jobs", json=SMALL, headers={"prefer": "wait=60"})
        return answer.json()

    with ThreadPoolExecutor(count) as threads:
        jobs = list(threads.map(one, range(count)))
    assert {job["status"] for job in jobs} == {"completed"}
    assert len({job["id"] for job in jobs}) == count
    assert len({job["images"][0]["sha256"] for job in jobs}) == 1


@pytest.mark.parametrize("count", [20, pytest.param(200, marks=pytest.mark.slow)])
def test_everybody_gets_the_own_answer(at: Live, count: int) -> None:
    """Report 17: all at once, and prompts are numbered."""

    def one(number: int) -> bool:
        fields = {**SMALL, "prompt": f"{PROMPT}, {number}", "num_inference_steps": 1 + number % 2}
        job = at.client.post("/v1/jobs", json=fields, headers={"prefer": "wait=60"}).json()
        while job["ended"] is None:
            time.sleep(0.5)
            job = told(at, job["id"])
        return job["images"][0]["infotext"].split("\n")[0] == fields["prompt"]

    with httpx.Client(base_url=at.url, timeout=120, limits=httpx.Limits(max_connections=200)) as client:
        at = Live(url=at.url, server=at.server, client=client)
        with ThreadPoolExecutor(count) as threads:
            assert all(threads.map(one, range(count)))


def test_the_death_of_a_worker_is_told_to_all(pipe: Pipeline, monkeypatch: pytest.MonkeyPatch) -> None:
    """Report 18: those that run, wait, watch and ask; then it is started again."""

    def dying(shared: Any) -> None:
        raise SystemExit

    with live(pipe) as at, slow_steps(at) as calls:
        jobs = [post(at, num_inference_steps=100, seed=seed) for seed in range(8)]
        until(lambda: calls)
        at.server.restarts["demo"] = RESTARTS
        with at.client.stream("GET", f"/v1/jobs/{jobs[0]}/events") as answer:
            monkeypatch.setattr(at.server.workers["demo"], "_turn", dying)
            *_, (kind, _) = events(answer)
        assert kind == "failed"
        for job in jobs:
            error = finished(at, job)["error"]
            assert error["type"] == "backend"
            assert error["fix"]
        assert at.client.get("/health/live").status_code == 503
        assert at.client.get("/health/ready").status_code == 503
        monkeypatch.undo()
        at.server.restarts["demo"] = 0
        until(lambda: at.client.get("/health/live").status_code == 200)
        assert at.server.restarts["demo"] == 1
        it_still_draws(at)


# ── what leaves nothing ────────────────────────────────────────────────────────────────────────────


def test_aborted_uploads_leave_nothing(at: Live) -> None:
    """Report 4: 500 clients that leave in their bodies."""
    sent = b'{"image": "' + b"A" * 200_000
    request = head("POST", "/v1/jobs", "Content-Type: application/json", "Content-Length: 2000000")

    def abort(times: int) -> None:
        for _ in range(times):
            with connect(at) as left:
                left.sendall(request + sent)

    def grown() -> int:
        before = resident()
        abort(250)
        it_still_draws(at)
        gc.collect()  # what an error holds of a body goes with the error
        return resident() - before

    # Arenas grow up to what is in them at once; bodies that were kept would be 50 MB in every round.
    grown()
    before = at.server.jobs.counts().accepted, descriptors()
    rounds = next((number for number in range(1, 9) if grown() < 10 * MIB), None)
    assert rounds is not None, "memory grows with every 250 of them"
    assert at.server.jobs.counts().accepted == before[0] + rounds
    until(lambda: descriptors() <= before[1] + 2)
    counted = at.client.get("/metrics").text
    assert re.search(r'http_requests_total\{method="POST",route="/v1/jobs",status="499"\} [1-9]', counted)
    assert 'status="500"' not in counted, "it is no failure of the server's"


def test_failing_requests_leave_nothing(at: Live) -> None:
    """Report 13: 300 with a damaged picture."""
    damaged = base64.b64encode(b"\x89PNG\r\n\x1a\n" + os.urandom(100_000)).decode()

    def fail(times: int) -> None:
        for _ in range(times):
            answer = at.client.post("/v1/jobs", json={**SMALL, "image": damaged, "strength": 0.5})
            assert answer.status_code == 400

    fail(20)
    before = resident(), descriptors(), at.server.jobs.counts().accepted
    fail(300)
    assert at.server.jobs.counts().accepted == before[2]
    assert descriptors() <= before[1] + 2
    assert resident() - before[0] < 20 * MIB


# ── who may call ───────────────────────────────────────────────────────────────────────────────────

METHODS = ("GET", "HEAD", "POST", "PUT", "PATCH", "DELETE", "OPTIONS", "TRACE", "PROPFIND")
# Without a key. A link is sealed, and a guessed one is none (tests/serve/test_openai.py).
OPEN = {"/health", "/health/live", "/health/ready", "/v1/images/linked/0"}


def paths(at: Live, headers: dict[str, str] | None = None) -> dict[str, list[str]]:
    """The document's routes with their methods, filled in."""
    document = at.client.get("/openapi.json", headers=headers).json()
    return {
        re.sub(r"\{\w+\}", "0", path): [method.upper() for method in methods]
        for path, methods in document["paths"].items()
    }


def test_foreign_names_on_every_route_and_method(at: Live) -> None:
    """Report 27."""
    known = [*paths(at), "/openapi.json", "/", "/static/page.js", "/none"]
    assert len(known) > 10
    before = at.server.jobs.counts().accepted
    for path, method in itertools.product(known, METHODS):
        for host in ("evil.example", "evil.example:7860", "127.0.0.1.evil.example"):
            answer = at.client.request(method, path, headers={"host": host})
            assert answer.status_code == 421, (method, path)
            assert answer.content == b""
    assert at.server.jobs.counts().accepted == before


def test_every_route_needs_a_key(pipe: Pipeline) -> None:
    """Report 43: but for an explicit list."""
    access = allow(keys=keys_of_environment("K", {"K": KEY}))
    with live(pipe, access=access, start=False) as closed:
        routes = paths(closed, {"x-api-key": KEY})
        assert set(routes) >= OPEN
        routes["/openapi.json"] = ["GET"]
        for path, method in [(path, way) for path, ways in routes.items() for way in ways]:
            for headers in ({}, {"x-api-key": f"{KEY}x"}):
                answer = closed.client.request(method, path, headers=headers)
                assert (answer.status_code == 401) == (path not in OPEN), (method, path)
        assert closed.server.jobs.counts().accepted == 0


@pytest.mark.parametrize("kind", ["application/x-www-form-urlencoded", "multipart/form-data", "text/plain"])
@pytest.mark.parametrize("origin", ["https://evil.example", "null", "http://localhost.evil.example"])
def test_forms_of_foreign_pages_make_no_job(at: Live, kind: str, origin: str) -> None:
    """Report 28."""
    before = at.server.jobs.counts().accepted
    boundary = "; boundary=x" if kind.startswith("multipart") else ""
    body = (
        b'--x\r\nContent-Disposition: form-data; name="prompt"\r\n\r\na\r\n--x--\r\n' if boundary else b"{}"
    )
    headers = {"content-type": kind + boundary, "origin": origin}
    assert at.client.post("/v1/jobs", content=body, headers=headers).status_code == 403
    assert at.server.jobs.counts().accepted == before


def test_the_key_comes_before_the_body(pipe: Pipeline) -> None:
    """Report 39: the answer is there though nothing of a large body has been sent."""
    access = allow(keys=keys_of_environment("K", {"K": KEY}))
    with live(pipe, access=access, start=False) as closed, connect(closed) as sending:
        length = f"Content-Length: {30 * MIB}"
        sending.sendall(head("POST", "/v1/jobs", "Content-Type: application/json", length))
        sending.settimeout(10)
        assert status_of(sending.recv(4096)) == 401


# ── bodies ─────────────────────────────────────────────────────────────────────────────────────────

PART = 'Content-Disposition: form-data; name="{}"\r\n\r\n'


def form(*parts: tuple[str, bytes], end: bytes = b"--x--\r\n") -> bytes:
    return b"".join(b"--x\r\n" + PART.format(name).encode() + data + b"\r\n" for name, data in parts) + end


def send_form(at: Live, content: Any) -> httpx.Response:
    headers = {"content-type": "multipart/form-data; boundary=x"}
    return at.client.post("/v1/jobs", content=content, headers=headers)


FILE = b'--x\r\nContent-Disposition: form-data; name="image"; filename="a.png"\r\n\r\n'
FLOODS: dict[str, tuple[Callable[[], Any], set[int]]] = {
    "a field without an end": (
        lambda: itertools.chain(
            [b"--x\r\n" + PART.format("prompt").encode()], itertools.repeat(b"a" * MIB, 64)
        ),
        {400, 413},
    ),
    "a file without an end": (lambda: itertools.chain([FILE], itertools.repeat(b"a" * MIB, 64)), {413}),
    "many parts": (lambda: form(*((f"f{number}", b"1") for number in range(10_000))), {400}),
    "many files": (lambda: FILE * 10_000 + b"--x--\r\n", {400}),
    "a name without an end": (
        lambda: b"--x\r\nContent-Disposition: form-data; name=" + b"a" * 2 * MIB,
        {400},
    ),
    "many headers": (lambda: b"--x\r\n" + b"a: b\r\n" * 100_000, {400}),
    "no boundary": (lambda: b"a" * MIB, {400}),
}


@pytest.mark.parametrize("kind", FLOODS)
def test_floods_of_a_form(at: Live, kind: str) -> None:
    """Report 33: refused in bounded memory, while others are served."""
    make, wanted = FLOODS[kind]
    before, accepted = resident(), at.server.jobs.counts().accepted
    codes: list[int] = []

    def flood() -> None:
        try:
            codes.append(send_form(at, make()).status_code)
        except (httpx.WriteError, httpx.ReadError):  # it hung up on what nobody wants to read
            codes.append(413)

    thread = threading.Thread(target=flood)
    thread.start()
    while thread.is_alive():
        assert at.client.get("/health/live").status_code == 200
    assert set(codes) <= wanted
    assert resident() - before < 100 * MIB
    assert at.server.jobs.counts().accepted == accepted


@pytest.mark.parametrize("tail", [b"-", b"\r\n", b"x" * MIB, b"--x\r\n" * 1000, b"\0" * 100_000])
def test_characters_behind_the_last_boundary(at: Live, tail: bytes) -> None:
    """Report 34: they cost nothing (no line of the log for each), and belong to no field."""
    noted: list[logging.LogRecord] = []

    class Kept(logging.Handler):
        def emit(self, record: logging.LogRecord) -> None:
            noted.append(record)

    handler = Kept(level=logging.WARNING)
    logging.getLogger().addHandler(handler)
    try:
        began = time.monotonic()
        plain = form(("prompt", PROMPT.encode()), ("num_inference_steps", b"1"), ("width", b"64"))
        answer = send_form(at, plain + tail)
        assert time.monotonic() - began < 2
    finally:
        logging.getLogger().removeHandler(handler)
    assert answer.status_code in (202, 400)
    assert len(noted) < 10
    assert at.client.get("/health/live").status_code == 200


@pytest.mark.parametrize(("size", "wanted"), [(10_000, {200}), (100_000, {200, 400}), (2_000_000, {400})])
def test_a_long_range(at: Live, size: int, wanted: set[int]) -> None:
    """Report 35: no route reads a Range, and heads that come in pieces have a bound."""
    answer = at.client.post("/v1/jobs", json=SMALL, headers={"prefer": "wait=60"}).json()
    ranges = "bytes=" + ",".join(["0-"] * (size // 3))
    began = time.monotonic()
    with connect(at) as sending, suppress(ConnectionError):  # which it may close in the middle
        sending.sendall(head("GET", answer["images"][0]["href"], f"Range: {ranges}"))
        assert status_of(sending.recv(4096)) in wanted
    assert time.monotonic() - began < 0.5


def test_many_tiny_chunks(at: Live) -> None:
    """Report 40: a body that comes in chunks of one byte is read as any other."""
    body = json.dumps(SMALL).encode() + b" " * 50_000
    chunks = b"".join(b"1\r\n%c\r\n" % byte for byte in body) + b"0\r\n\r\n"
    with connect(at) as sending:
        sending.sendall(
            head("POST", "/v1/jobs", "Content-Type: application/json", "Transfer-Encoding: chunked") + chunks
        )
        assert status_of(sending.recv(4096)) == 202


def test_slow_clients(pipe: Pipeline, monkeypatch: pytest.MonkeyPatch) -> None:
    """Report 41: heads, bodies and answers that take their time."""
    monkeypatch.setattr(heads, "HEAD_S", 1.0)
    with live(pipe, limits=BodyLimits(seconds=0.5)) as at:
        slow = [connect(at) for _ in range(100)]
        try:
            for one in slow[:50]:
                one.sendall(b"POST /v1/jobs HTTP/1.1\r\nHost: loc")
            for one in slow[50:]:
                kind = "Content-Type: application/json"
                one.sendall(head("POST", "/v1/jobs", kind, "Content-Length: 1000") + b"{")
            it_still_draws(at)
            for one in slow[50:]:
                assert status_of(one.recv(4096)) == 408
            for one in slow[:50]:
                assert one.recv(4096) == b""  # closed
            job = post(at, num_inference_steps=100)
            with connect(at) as reader:  # asks for all and reads nothing
                reader.sendall(head("GET", f"/v1/jobs/{job}/events") * 20)
                assert finished(at, job)["status"] == "completed"
            it_still_draws(at)
        finally:
            for one in slow:
                one.close()


def test_the_second_head_of_a_connection_has_its_time_too(
    pipe: Pipeline, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(heads, "HEAD_S", 0.5)
    with live(pipe, start=False) as at, connect(at) as one:
        for _ in range(3):
            one.sendall(head("GET", "/health/live"))
            answer = b""
            while not answer.endswith(b"}"):
                answer += one.recv(4096)
            assert status_of(answer) == 200
            time.sleep(0.3)  # between two heads it is uvicorn's own limit that counts
        began = time.monotonic()
        one.sendall(b"GET /health/live HTTP/1.1\r\nHost: loc")
        assert one.recv(4096) == b""
        assert time.monotonic() - began < 4  # uvicorn's own are 5 s


# ── what fields may not name ───────────────────────────────────────────────────────────────────────


def texts(at: Live) -> list[Callable[[str], dict[str, Any]]]:
    """All places of a request that take a text, but prompts."""
    schema = at.client.get("/v1/capabilities").json()["models"]["demo"]["schema"]["properties"]
    plain = [
        name
        for name, kind in schema.items()
        if kind.get("type") == "string" and "prompt" not in name and name not in ("image", "mask_image")
    ]
    assert "sampler" in plain
    picture = base64.b64encode(b"\x89PNG\r\n\x1a\n").decode()
    return [
        *(partial(lambda name, text: {name: text}, name) for name in (*plain, "image", "mask_image")),
        lambda text: {"image": picture, "mask_image": text},
        lambda text: {"loras": [text]},
        lambda text: {"loras": [{"name": text}]},
        lambda text: {"controls": [{"model": text, "image": picture}]},
        lambda text: {"controls": [{"model": "edges", "image": text}]},
        lambda text: {"output": {"format": text}},
        lambda text: {"preview": {"kind": text}},
        lambda text: {"prompt": f"a <lora:{text}:1>"},
        lambda text: {text: 1},
    ]


class Watched:
    """Files that are opened and addresses that are called in this process, while it is on."""

    def __init__(self) -> None:
        self.seen: list[str] | None = None
        sys.addaudithook(self._hook)  # for as long as the process lives

    def _hook(self, event: str, arguments: tuple[Any, ...]) -> None:
        seen = self.seen
        if seen is not None and event in ("open", "os.listdir", "os.scandir", "socket.getaddrinfo"):
            seen.append(f"{event} {arguments[0]!r}")

    @contextmanager
    def on(self) -> Generator[list[str]]:
        self.seen = seen = list[str]()
        try:
            yield seen
        finally:
            self.seen = None


@pytest.fixture(scope="module")
def watched() -> Watched:
    return Watched()


def test_no_address_is_called(at: Live) -> None:
    """Report 36: a socket that listens gets no connection, whatever field names it."""
    with socket.create_server(("127.0.0.1", 0)) as server:
        server.setblocking(False)
        port = server.getsockname()[1]
        host = f"127.0.0.1:{port}"
        for make, url in itertools.product(
            texts(at),
            (
                f"http://{host}/a.png",
                f"https://user@{host}\\@example.org/a.png",
                f"http://localhost:{port}",
                f"//{host}/a.png",
                f"file://{host}/a.png",
                host,
            ),
        ):
            answer = at.client.post("/v1/jobs", json={**SMALL, **make(url)})
            assert answer.status_code < 500, answer.text
            if answer.status_code == 202:
                finished(at, answer.json()["id"])
        with pytest.raises(BlockingIOError):
            server.accept()


MARK = "marked"
NAMES = (
    f"../../{MARK}",
    f"..%5C..%5C{MARK}",
    f"/etc/{MARK}",
    f"\\\\server\\{MARK}",
    f"C:\\{MARK}",
    f"{MARK}\0.png",
    f"~/{MARK}",
    f"CON/{MARK}",
)


def test_no_path_is_opened(at: Live, watched: Watched) -> None:
    """Report 37: no name of a request is looked for in a folder, and none is accepted."""
    for make, name in itertools.product(texts(at), NAMES):
        fields = make(name)
        with watched.on() as seen:
            answer = at.client.post("/v1/jobs", json={**SMALL, **fields})
            assert answer.status_code in (202, 400, 404), answer.text
            if answer.status_code == 202:
                assert "prompt" in fields, "the only place where a text may be anything"
                finished(at, answer.json()["id"])
        assert [one for one in seen if MARK in one] == []
    for name in NAMES:
        with watched.on() as seen:
            for path in ("/v1/jobs/{}", "/v1/jobs/{}/images/0", "/static/{}", "/{}"):
                quoted = httpx.URL(at.url).copy_with(path=path.format(name.replace("\0", "")))
                assert at.client.get(quoted).status_code in (404, 405)
        assert [one for one in seen if MARK in one] == []


def test_the_watch_sees_what_it_watches(watched: Watched, tmp_path: Path) -> None:
    with watched.on() as seen:
        (tmp_path / MARK).write_bytes(b"")
    assert any(MARK in one for one in seen)


def test_an_error_tells_its_request_alone(at: Live, monkeypatch: pytest.MonkeyPatch) -> None:
    """Report 46: the log has the reason under the id that the answer has."""
    lines: list[str] = []

    class Kept(logging.Handler):
        def emit(self, record: logging.LogRecord) -> None:
            lines.append(f"{record.getMessage()} {self.format(record)}")

    def broken(*_: Any) -> Any:
        raise ZeroDivisionError("/secret/path at 0x7f00deadbeef")

    monkeypatch.setattr(at.server.jobs, "owned", broken)
    handler = Kept()
    logging.getLogger("latentrt.serve").addHandler(handler)
    try:
        answer = at.client.get("/v1/jobs")
        until(lambda: any("ZeroDivisionError" in line for line in lines))  # written behind the answer
    finally:
        logging.getLogger("latentrt.serve").removeHandler(handler)
    assert answer.status_code == 500
    for word in ("secret", "0x", "ZeroDivision", "Traceback", "latentrt/"):
        assert word not in answer.text
    (noted,) = (line for line in lines if "ZeroDivisionError" in line)
    assert answer.headers["x-request-id"] in noted
