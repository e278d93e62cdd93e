"""The server's own API over a real socket: jobs, their events, cancels, pictures, and errors."""

from __future__ import annotations

import base64
import gzip
import io
import json
import threading
import time
from collections.abc import Iterator
from typing import Any

import httpx
import numpy as np
import pytest
from PIL import Image

from latentrt import Control, Pipeline
from latentrt.serve.door.access import allow
from latentrt.serve.door.keys import Keys, keys_of_environment
from latentrt.serve.jobs.bounds import Bounds
from latentrt.serve.server import Options
from tests.parity_pair import photo
from tests.serve.live import Live, live, open_demo

PROMPT = "a red circle on a blue background"
SMALL: dict[str, Any] = {"prompt": PROMPT, "width": 64, "height": 64, "num_inference_steps": 3, "seed": 7}
KEY = "0123456789abcdef-secret"


@pytest.fixture(scope="module")
def pipe() -> Iterator[Pipeline]:
    with open_demo() as opened:
        yield opened


@pytest.fixture(scope="module")
def at(pipe: Pipeline) -> Iterator[Live]:
    with live(pipe) as made:
        yield made


@pytest.fixture(scope="module")
def controlled() -> Iterator[Live]:
    with open_demo() as opened:
        opened.load_control("edges")
        with live(opened) as made:
            yield made


def draw(at: Live, **fields: Any) -> dict[str, Any]:
    answer = at.client.post("/v1/jobs", json={**SMALL, **fields}, headers={"prefer": "wait=60"})
    assert answer.status_code == 200, answer.text
    return answer.json()


def pixels(at: Live, job: dict[str, Any], index: int = 0) -> np.ndarray:
    return np.asarray(Image.open(io.BytesIO(at.client.get(job["images"][index]["href"]).content)))


def encoded(image: Any) -> str:
    file = io.BytesIO()
    Image.fromarray(np.asarray(image)).save(file, "PNG")
    return base64.b64encode(file.getvalue()).decode()


def events(at: Live, job: str, last: int | None = None, most: int = 10**6) -> list[tuple[int, str, Any]]:
    headers = {} if last is None else {"last-event-id": str(last)}
    found: list[tuple[int, str, Any]] = []
    with at.client.stream("GET", f"/v1/jobs/{job}/events", headers=headers) as answer:
        assert answer.headers["content-type"].startswith("text/event-stream")
        event: dict[str, str] = {}
        for line in answer.iter_lines():
            if line:
                name, _, value = line.partition(": ")
                event[name] = value
            elif "event" in event:
                found.append((int(event["id"]), event["event"], json.loads(event["data"])))
                event = {}
                if len(found) == most:
                    break
    return found


# ── jobs ───────────────────────────────────────────────────────────────────────────────────────────


def test_pictures_are_those_of_a_pipeline(at: Live, pipe: Pipeline) -> None:
    job = draw(at, num_images_per_prompt=2, sampler="euler_a", guidance_scale=4.0)
    assert [image["seed"] for image in sorted(job["images"], key=lambda one: one["index"])] == [7, 8]
    for image in job["images"]:
        wanted = pipe(**{**SMALL, "seed": image["seed"], "sampler": "euler_a", "guidance_scale": 4.0})
        found = at.client.get(image["href"])
        assert found.headers["content-type"] == image["media_type"] == "image/png"
        assert found.headers["etag"] == f'"{image["sha256"]}"'
        np.testing.assert_array_equal(np.asarray(Image.open(io.BytesIO(found.content))), wanted.images[0])
        assert (image["width"], image["height"]) == (64, 64)
        assert image["parameters"]["guidance_scale"] == 4.0
        assert image["infotext"].startswith(PROMPT)
        again = at.client.get(image["href"], headers={"if-none-match": found.headers["etag"]})
        assert (again.status_code, again.content) == (304, b"")


def test_a_job_is_accepted_before_it_is_drawn(at: Live) -> None:
    answer = at.client.post("/v1/jobs", json=SMALL)
    job = answer.json()
    assert answer.status_code == 202
    assert answer.headers["location"] == f"/v1/jobs/{job['id']}" == job["links"]["self"]
    assert job["status"] in ("queued", "running")
    told = events(at, job["id"])
    assert told[0][1] == "queued"
    assert told[-1][1] == "completed"
    numbers = [number for number, _, _ in told]
    assert numbers == sorted(set(numbers))
    assert at.client.get(f"/v1/jobs/{job['id']}").json()["status"] == "completed"
    assert job["id"] in [one["id"] for one in at.client.get("/v1/jobs").json()["jobs"]]
    assert len(at.client.get("/v1/jobs?limit=1").json()["jobs"]) == 1


def test_events_go_on_where_a_reader_stopped(at: Live) -> None:
    job = at.client.post(
        "/v1/jobs", json={**SMALL, "num_inference_steps": 40, "preview": {"every": 2}}
    ).json()
    first = events(at, job["id"], most=2)
    rest = events(at, job["id"], last=first[-1][0])
    assert rest[-1][1] == "completed"
    assert rest[0][0] > first[-1][0]
    whole = events(at, job["id"])
    assert whole[-1] == rest[-1]
    previews = [data for _, kind, data in [*first, *rest] if kind == "preview"]
    assert previews
    shown = Image.open(io.BytesIO(base64.b64decode(previews[0]["b64"])))
    assert shown.format == "JPEG"


def test_a_picture_and_a_mask_are_sent(at: Live, pipe: Pipeline) -> None:
    start = photo(64, 64)
    mask = np.pad(np.full((64, 32), 255, np.uint8), ((0, 0), (0, 32)))
    fields: dict[str, Any] = {"strength": 0.7, "image": encoded(start), "mask_image": encoded(mask)}
    job = draw(at, **fields)
    wanted = pipe(
        **{
            **SMALL,
            "strength": 0.7,
            "image": Image.fromarray(np.asarray(start)),
            "mask_image": Image.fromarray(mask),
        }
    )
    np.testing.assert_array_equal(pixels(at, job), wanted.images[0])
    file = base64.b64decode(fields["image"])
    answer = at.client.post(
        "/v1/jobs",
        data={name: str(value) for name, value in SMALL.items()} | {"strength": "0.7"},
        files={"image": ("a.png", file), "mask_image": ("m.png", base64.b64decode(fields["mask_image"]))},
        headers={"prefer": "wait=60"},
    )
    np.testing.assert_array_equal(pixels(at, answer.json()), wanted.images[0])


def test_the_same_key_is_the_same_job(at: Live) -> None:
    headers = {"idempotency-key": "one"}
    first = at.client.post("/v1/jobs", json=SMALL, headers=headers).json()
    again = at.client.post("/v1/jobs", json=SMALL, headers=headers).json()
    assert first["id"] == again["id"]
    other = at.client.post("/v1/jobs", json={**SMALL, "seed": 8}, headers=headers)
    assert other.status_code == 422
    assert other.json()["error"]["code"] == "idempotency_mismatch"
    assert at.client.post("/v1/jobs", json=SMALL, headers={"idempotency-key": "x" * 256}).status_code == 400


@pytest.mark.parametrize("way", ["delete", "post"])
def test_a_running_job_is_cancelled(at: Live, way: str) -> None:
    job = at.client.post("/v1/jobs", json={**SMALL, "num_inference_steps": 150}).json()
    while at.client.get(f"/v1/jobs/{job['id']}").json()["status"] == "queued":
        time.sleep(0.005)
    if way == "delete":
        at.client.delete(f"/v1/jobs/{job['id']}")
    else:
        at.client.post(f"/v1/jobs/{job['id']}/cancel")
    told = events(at, job["id"])
    assert told[-1][1] == "cancelled"
    assert told[-1][2]["reason"] == "request"
    assert at.client.get(f"/v1/jobs/{job['id']}/images/0").status_code == 404


def test_a_client_that_stops_reading_leaves_the_others(at: Live) -> None:
    job = at.client.post("/v1/jobs", json={**SMALL, "num_inference_steps": 60}).json()
    for _ in range(20):
        events(at, job["id"], most=1)
    assert events(at, job["id"])[-1][1] == "completed"


# ── what is refused ────────────────────────────────────────────────────────────────────────────────

REFUSED: list[tuple[dict[str, Any], int, str]] = [
    ({"num_steps": 3}, 400, "there is no parameter 'num_steps'"),
    ({"num_inference_steps": 0}, 400, "num_inference_steps is 0"),
    ({"num_inference_steps": 151}, 413, "151 steps"),
    ({"width": 65}, 400, "width is 65"),
    ({"width": 8192, "height": 8192}, 413, "pixels a picture"),
    ({"num_images_per_prompt": 11}, 400, "num_images_per_prompt is 11"),
    ({"prompt": ["a", "b"]}, 400, "prompt is ['a', 'b']"),
    ({"prompt": "a\0"}, 400, "none of them NUL"),
    ({"seed": 1.5}, 400, "seed is 1.5"),
    ({"sampler": "fast"}, 400, "fast"),
    ({"output_type": "np"}, 400, "the field output_type"),
    ({"latents": "x.npy"}, 400, "the field latents"),
    ({"output": {"format": "bmp"}}, 400, "bmp"),
    ({"output": {"quality": 0}}, 400, "quality is 0"),
    ({"output": {"quality": 90}}, 400, "quality is 90, of png"),
    ({"output": {"quality": 101, "format": "webp"}}, 400, "quality is 101"),
    ({"output": {"metadata": 1}}, 400, "metadata is 1"),
    ({"output": "png"}, 400, "output is 'png'"),
    ({"preview": {"kind": "slow"}}, 400, "slow"),
    ({"preview": {"often": 1}}, 400, "preview is"),
    ({"image": "/etc/passwd"}, 400, "image"),
    ({"image": "http://127.0.0.1/a.png"}, 400, "image"),
    ({"loras": "x"}, 400, "loras is 'x'"),
    ({"loras": ["/etc/x.safetensors"]}, 400, "x.safetensors"),
    ({"loras": [{"name": "x", "path": "y"}]}, 400, "loras is"),
    ({"controls": [{"model": "canny", "image": "x"}]}, 400, "the model of a control is 'canny'"),
    ({"controls": [7]}, 400, "controls is 7"),
    ({"model": 7}, 400, "model is 7"),
    ({"timeout_s": 0}, 400, "timeout_s is 0"),
    ({"priority": 0.5}, 400, "priority is 0.5"),
]


@pytest.mark.parametrize(("fields", "status", "words"), REFUSED)
def test_what_is_wrong_is_refused_before_a_step(
    at: Live, fields: dict[str, Any], status: int, words: str
) -> None:
    before = at.server.jobs.counts().accepted
    answer = at.client.post("/v1/jobs", json={**SMALL, **fields})
    assert answer.status_code == status, answer.text
    error = answer.json()["error"]
    assert words in f"{error['found']} {error['expected']}"
    assert error["fix"]
    assert not error["retryable"]
    assert at.server.jobs.counts().accepted == before


@pytest.mark.parametrize(
    ("body", "why"),
    [
        (b"[]", ""),
        (b"null", ""),
        (b"{", ": expecting property name enclosed in double quotes in line 1, column 2"),
        (b"nan", ": expecting value in line 1, column 1"),
        (b'{"seed": NaN}', ": NaN is no number of JSON"),
        (b'{"seed": -Infinity}', ": -Infinity is no number of JSON"),
        (b'{"seed": 1' + b"0" * 5000 + b"}", ": a number has too many digits"),
        (b"[" * 100_000, ": it is nested too deeply"),
        (b"\xff", ": it is not UTF-8"),
        (gzip.compress(b"{}", mtime=0), ": it is not UTF-8"),
    ],
    ids=lambda value: repr(value)[:30],
)
def test_bodies_that_are_no_objects(at: Live, body: bytes, why: str) -> None:
    answer = at.client.post("/v1/jobs", content=body, headers={"content-type": "application/json"})
    assert (answer.status_code, answer.json()["error"]["found"]) == (
        400,
        f"a body that is no JSON object{why}",
    )


def test_an_empty_body_asks_for_nothing_special(at: Live) -> None:
    assert at.client.post("/v1/jobs", content=b"").status_code == 202


def test_a_packed_body(at: Live) -> None:
    headers = {"content-encoding": "gzip"}
    answer = at.client.post("/v1/jobs", content=gzip.compress(b"{}"), headers=headers)
    assert (answer.status_code, "Content-Encoding: gzip" in answer.text) == (400, True)


@pytest.mark.parametrize(
    ("prefer", "applied"),
    [
        (["wait=60"], "wait=60"),
        (["WAIT = 60"], "wait=60"),
        (['wait="60"'], "wait=60"),
        (["respond-async, wait=60; x=1"], "wait=60"),
        (["return=minimal", "wait=60"], "wait=60"),
        (["wait=99999"], "wait=60"),
        (["wait=" + "9" * 400], "wait=60"),
        (["wait=0"], "wait=0"),
        (["wait"], None),
        (["wait=-1"], None),
        (["wait=soon"], None),
        (["await=60"], None),
    ],
)
def test_preferences(at: Live, prefer: list[str], applied: str | None) -> None:
    """RFC 7240, sections 2 and 4.3; the longest wait is a minute."""
    headers = [("prefer", one) for one in prefer]
    answer = at.client.post("/v1/jobs", json={**SMALL, "num_inference_steps": 1}, headers=headers)
    assert answer.headers.get("preference-applied") == applied
    if applied == "wait=60":
        assert answer.json()["status"] == "completed"


@pytest.mark.parametrize(
    ("path", "allowed"),
    [
        ("/v1/jobs", "GET, HEAD, POST"),
        ("/v1/jobs/x", "DELETE, GET, HEAD"),
        ("/v1/images/edits", "POST"),
        ("/health", "GET, HEAD"),
        ("/", "GET, HEAD"),
    ],
)
def test_a_wrong_method_is_told_the_right_ones(at: Live, path: str, allowed: str) -> None:
    answer = at.client.put(path)
    assert (answer.status_code, answer.headers["allow"]) == (405, allowed)


def test_head_is_get_without_a_body(at: Live) -> None:
    job = draw(at)
    for path in ("/", "/health", "/v1/jobs", "/openapi.json", "/metrics", job["images"][0]["href"]):
        answer, whole = at.client.head(path), at.client.get(path)
        assert (answer.status_code, answer.content) == (200, b"")
        assert answer.headers["content-type"] == whole.headers["content-type"]
    assert at.client.head("/v1/images/generations").status_code == 405
    assert at.client.head("/v1/jobs/none").status_code == 404


def test_a_damaged_form(at: Live) -> None:
    answer = at.client.post(
        "/v1/jobs", content=b"--x\r\nnothing", headers={"content-type": "multipart/form-data; boundary=y"}
    )
    assert answer.status_code == 400
    assert answer.json()["error"]["found"] == "a damaged form"


def test_jobs_that_there_are_none_of(at: Live) -> None:
    for way, path in (
        ("GET", "/v1/jobs/none"),
        ("DELETE", "/v1/jobs/none"),
        ("GET", "/v1/jobs/none/events"),
        ("GET", "/v1/jobs/none/images/0"),
    ):
        answer = at.client.request(way, path)
        assert answer.status_code == 404
        assert answer.json()["error"]["type"] == "unknown_job"
    job = draw(at)
    assert at.client.get(f"/v1/jobs/{job['id']}/images/1").json()["error"]["type"] == "unknown_picture"
    assert at.client.get(f"/v1/jobs/{job['id']}/images/first").status_code == 400
    assert at.client.get("/v2").status_code == 404
    assert at.client.put("/v1/jobs").status_code == 405


CONTROLS: list[tuple[dict[str, Any], str]] = [
    ({"preparation": "sketch"}, "the preparation is 'sketch'"),
    ({"preparation": "openpose"}, "takes a net that latentrt does not have"),
    ({"preparation": ["canny"]}, "preparation of controls is ['canny']"),
    ({"preparation": "canny", "settings": {"lowest": 1}}, "no setting 'lowest'"),
    ({"settings": [1]}, "settings of controls is [1]"),
    ({"strength": "much"}, "control_strength is 'much'"),
    ({"start": 0.9, "end": 0.1}, "is not before control_end"),
    ({"mode": 7}, "mode of controls is 7"),
    ({"resize_mode": 7}, "resize_mode of controls is 7"),
    ({"image": None}, "a control without image"),
    ({"size": 7}, "controls is"),
]


@pytest.mark.parametrize(("fields", "words"), CONTROLS)
def test_odd_controls_are_refused_before_a_step(controlled: Live, fields: dict[str, Any], words: str) -> None:
    control = {"model": "edges", "image": encoded(photo(64, 64)), **fields}
    control = {name: value for name, value in control.items() if value is not None}
    answer = controlled.client.post("/v1/jobs", json={**SMALL, "controls": [control]})
    assert answer.status_code == 400, answer.text
    assert words in answer.json()["error"]["found"]


def test_a_control_steers(controlled: Live) -> None:
    control = {"model": "edges", "image": encoded(photo(64, 64)), "preparation": "canny", "strength": 0.8}
    job = draw(controlled, controls=[control])
    with open_demo() as alone:
        alone.load_control("edges")
        hint = Image.fromarray(np.asarray(photo(64, 64)))
        steered = Control(model="edges", image=hint, preparation="canny", strength=0.8)
        wanted = alone(**SMALL, controls=[steered])
    np.testing.assert_array_equal(pixels(controlled, job), wanted.images[0])


def test_a_full_queue_says_when_to_come_again(pipe: Pipeline) -> None:
    with live(pipe, bounds=Bounds(jobs=2), start=False) as full:
        answers = [full.client.post("/v1/jobs", json=SMALL) for _ in range(3)]
        assert [answer.status_code for answer in answers] == [202, 202, 429]
        assert 1 <= int(answers[-1].headers["retry-after"]) <= 120
        assert answers[-1].json()["error"]["code"] == "jobs"
        assert answers[1].json()["queue_position"] == 2
        full.server.queue.drain()
        refused = full.client.post("/v1/jobs", json=SMALL)
        assert refused.status_code == 503
        assert full.client.get("/health/ready").json() == {"status": "draining"}


def test_strict_names_of_models(pipe: Pipeline) -> None:
    with live(pipe, options=Options(strict_models=True), start=False) as strict:
        answer = strict.client.post("/v1/jobs", json={**SMALL, "model": "dall-e-2"})
        assert answer.status_code == 404
        assert answer.json()["error"]["code"] == "model_not_found"


def test_an_error_of_ours_in_a_route_tells_nothing(at: Live, monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(*_: Any) -> Any:
        raise ZeroDivisionError("/secret/path at 0x7f00deadbeef")

    monkeypatch.setattr(at.server.jobs, "owned", broken)
    answer = at.client.get("/v1/jobs")
    assert answer.status_code == 500
    assert answer.headers["x-should-retry"] == "false"
    assert answer.json()["error"]["type"] == "internal"
    assert "secret" not in answer.text


# ── who may call ───────────────────────────────────────────────────────────────────────────────────


def test_keys_and_whose_jobs_are_whose(pipe: Pipeline) -> None:
    keys = keys_of_environment("K", {"K": f"{KEY} {KEY}-other"})
    assert isinstance(keys, Keys)
    with live(pipe, access=allow(keys=keys)) as closed:
        assert closed.client.post("/v1/jobs", json=SMALL).status_code == 401
        assert closed.client.get("/health/live").status_code == 200
        mine, other = ({"authorization": f"Bearer {key}"} for key in (KEY, f"{KEY}-other"))
        job = closed.client.post("/v1/jobs", json=SMALL, headers={**mine, "prefer": "wait=60"}).json()
        assert closed.client.get(job["images"][0]["href"], headers=mine).status_code == 200
        assert closed.client.get(job["images"][0]["href"], headers=other).status_code == 404
        assert closed.client.get("/v1/jobs", headers=other).json() == {"jobs": []}


def test_foreign_pages_and_names(at: Live) -> None:
    assert at.client.get("/v1/jobs", headers={"host": "evil.example"}).status_code == 421
    refused = at.client.post("/v1/jobs", json=SMALL, headers={"origin": "https://evil.example"})
    assert refused.status_code == 403
    assert refused.content == b"", "nothing is told to a foreign page"


# ── what there is ──────────────────────────────────────────────────────────────────────────────────


def test_capabilities_have_what_a_model_has_a_use_for(at: Live) -> None:
    told = at.client.get("/v1/capabilities").json()
    assert told["default"] == "demo"
    model = told["models"]["demo"]
    schema = model["schema"]["properties"]
    assert schema["num_inference_steps"]["maximum"] == at.server.bounds.request_steps == 150
    assert schema["guidance_rescale"] == {
        "type": "number",
        "minimum": 0.0,
        "maximum": 1.0,
        "default": 0.0,
        "description": "0 (off) to 1, against overexposure (Lin et al. 2023).",
    }
    assert "euler_a" in schema["sampler"]["enum"]
    assert not {"latents", "output_type", "original_size", "prompt_2"} & set(schema)
    assert model["defaults"]["width"] == 128
    assert model["loras"] == schema["loras"]["items"]["properties"]["name"]["enum"]
    assert model["rows"] == 4


def test_headers_keep_browsers_safe(at: Live) -> None:
    answer = at.client.get("/v1/capabilities")
    assert "unsafe" not in answer.headers["content-security-policy"]
    assert answer.headers["x-content-type-options"] == "nosniff"
    assert len(answer.headers["x-request-id"]) == 16
    assert "access-control-allow-origin" not in answer.headers


def test_health_and_the_document(at: Live) -> None:
    for path in ("/health", "/health/ready", "/health/live"):
        answer = at.client.get(path)
        assert (answer.status_code, answer.json()) == (200, {"status": "ready"})
    paths = at.client.get("/openapi.json").json()["paths"]
    assert {"/v1/jobs", "/v1/jobs/{name}/events", "/v1/capabilities"} <= set(paths)
    assert at.client.get("/docs").status_code == 404, "which would load scripts from elsewhere"


def test_many_at_once_have_their_own_pictures(at: Live, pipe: Pipeline) -> None:
    found: dict[int, Any] = {}

    def one(seed: int) -> None:
        with httpx.Client(base_url=at.url, timeout=60) as client:
            fields = {**SMALL, "seed": seed, "num_inference_steps": 2 + seed % 3}
            job = client.post("/v1/jobs", json=fields, headers={"prefer": "wait=60"}).json()
            found[seed] = np.asarray(Image.open(io.BytesIO(client.get(job["images"][0]["href"]).content)))

    threads = [threading.Thread(target=one, args=(seed,)) for seed in range(12)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for seed in range(12):
        wanted = pipe(**{**SMALL, "seed": seed, "num_inference_steps": 2 + seed % 3}).images[0]
        np.testing.assert_array_equal(found[seed], wanted)


# ── bodies that cannot be what was meant ───────────────────────────────────────────────────────────

HALVES = ['{"prompt":"\\ud800"}', '{"prompt":"a","\\ud800":1}', '{"prompt":"a","loras":[{"name":"\\udfff"}]}']
OF_A1111 = [
    '{"force_task_id":"\\ud800"}',
    '{"override_settings":{"\\ud800":1}}',
    '{"override_settings":{"sd_model_checkpoint":"\\ud800"}}',
    '{"alwayson_scripts":{"\\ud800":{}}}',
]


@pytest.mark.parametrize(
    ("path", "body"),
    [
        *(("/v1/jobs", body) for body in HALVES),
        *((f"/v1/images/{name}", body) for name in ("generations", "edits") for body in HALVES),
        *(("/sdapi/v1/txt2img", body) for body in (*HALVES, *OF_A1111)),
    ],
)
def test_half_of_a_character_is_refused(at: Live, path: str, body: str) -> None:
    before = at.server.jobs.counts().accepted
    answer = at.client.post(path, content=body, headers={"content-type": "application/json"})
    assert answer.status_code == 400
    assert "half of a character" in answer.text
    assert at.server.jobs.counts().accepted == before


def test_whole_characters_are_not(at: Live) -> None:
    answer = at.client.post(
        "/v1/jobs", content='{"prompt":"\\ud83d\\ude00 \\u00e9", "num_inference_steps": 1}'
    )
    assert answer.status_code == 202


@pytest.mark.parametrize("path", ["/v1/jobs", "/v1/images/edits"])
def test_a_form_that_breaks_off_is_refused(at: Live, path: str) -> None:
    part = b'--x\r\nContent-Disposition: form-data; name="prompt"\r\n\r\na red ci'
    before = at.server.jobs.counts().accepted
    headers = {"content-type": "multipart/form-data; boundary=x"}
    answer = at.client.post(path, content=part, headers=headers)
    assert answer.status_code == 400
    assert "breaks off" in answer.text
    assert at.server.jobs.counts().accepted == before
    whole = at.client.post("/v1/jobs", content=part + b"\r\n--x--\r\n", headers=headers)
    assert whole.status_code == 202
