"""OpenAI's images API, as its own clients call it, over a real socket."""

from __future__ import annotations

import asyncio
import base64
import io
import json
import socket
import threading
import time
from collections.abc import Callable, Iterator
from typing import Any

import httpx
import numpy as np
import openai
import pytest
from openai import AsyncOpenAI, OpenAI
from PIL import Image

from latentrt import Pipeline
from latentrt.engines.errors import NumericError
from latentrt.serve.door.access import allow
from latentrt.serve.door.keys import keys_of_environment
from latentrt.serve.jobs.bounds import Bounds
from latentrt.serve.jobs.job import ANYONE, Job
from latentrt.serve.server import Options
from tests.parity_pair import photo
from tests.serve.live import Live, live, open_demo

PROMPT = "a red circle on a blue background"
FEW: dict[str, Any] = {"num_inference_steps": 3, "seed": 7}
SMALL: dict[str, Any] = {"prompt": PROMPT, "size": "64x64", **FEW}
KEY = "0123456789abcdef-secret"
Draw = Callable[..., Any]


@pytest.fixture(scope="module")
def pipe() -> Iterator[Pipeline]:
    with open_demo() as opened:
        yield opened


@pytest.fixture(scope="module")
def at(pipe: Pipeline) -> Iterator[Live]:
    with live(pipe) as made:
        yield made


@pytest.fixture(scope="module")
def client(at: Live) -> Iterator[OpenAI]:
    with OpenAI(base_url=f"{at.url}/v1", api_key="none") as made:
        yield made


def decoded(text: str) -> Image.Image:
    return Image.open(io.BytesIO(base64.b64decode(text)))


def pixels(text: str) -> np.ndarray:
    return np.asarray(decoded(text))


def file_of(image: Image.Image, kind: str = "PNG") -> bytes:
    file = io.BytesIO()
    image.save(file, kind)
    return file.getvalue()


def in_base64(image: Image.Image) -> str:
    return base64.b64encode(file_of(image)).decode()


def erased(image: Image.Image, left: int, top: int, right: int, bottom: int, alpha: int = 0) -> Image.Image:
    """A mask as OpenAI has it: the image, transparent where it is to be repainted."""
    mask = image.convert("RGBA")
    mask.putalpha(255)
    hole = Image.new("RGBA", (right - left, bottom - top), (0, 0, 0, alpha))
    mask.paste(hole, (left, top))
    return mask


def accepted(at: Live) -> int:
    return at.server.jobs.counts().accepted


def until(true: Callable[[], Any], seconds: float = 60) -> None:
    end = time.monotonic() + seconds
    while not true():
        assert time.monotonic() < end, "it does not happen"
        time.sleep(0.005)


def newest(at: Live) -> Job:
    until(lambda: at.server.jobs.owned(ANYONE, 1))
    return at.server.jobs.owned(ANYONE, 1)[0]


# ── pictures ───────────────────────────────────────────────────────────────────────────────────────


def test_a_seed_of_the_answer_is_that_of_the_pixels(client: OpenAI, pipe: Pipeline) -> None:
    """Reports 7, 12 and 25."""
    answer = client.images.generate(
        prompt=PROMPT, model="gpt-image-1", n=3, size="96x64", extra_body={"num_inference_steps": 3}
    )
    assert answer.data is not None
    assert len(answer.data) == 3
    assert (answer.size, answer.output_format, answer.background) == ("96x64", "png", "opaque")
    assert answer.model_extra is not None
    assert answer.model_extra["model"] == "demo", "what ran"
    assert abs(answer.created - time.time()) < 60
    seeds = [one.model_extra["latentrt"]["seed"] for one in answer.data if one.model_extra]
    assert seeds == [seeds[0], seeds[0] + 1, seeds[0] + 2], "in their order, whichever was done first"
    for one, seed in zip(answer.data, seeds, strict=True):
        assert one.b64_json is not None
        assert one.url is None
        wanted = pipe(PROMPT, num_inference_steps=3, seed=seed, width=96, height=64).images[0]
        np.testing.assert_array_equal(pixels(one.b64_json), np.asarray(wanted))
        assert one.model_extra is not None
        assert one.model_extra["latentrt"]["infotext"].startswith(PROMPT)


def test_parameters_of_a_pipeline_are_fields(client: OpenAI, pipe: Pipeline) -> None:
    ours: dict[str, Any] = {
        "negative_prompt": "square",
        "guidance_scale": 4.0,
        "sampler": "euler_a",
        "guidance_rescale": 0.5,
        **FEW,
    }
    for size in ("64x64", "auto", None):
        given = {} if size is None else {"size": size}
        answer = client.images.generate(prompt=PROMPT, extra_body={**ours, **given})
        assert answer.data is not None
        assert answer.data[0].b64_json is not None
        found = pixels(answer.data[0].b64_json)
        sides = {"width": 64, "height": 64} if size == "64x64" else {}
        np.testing.assert_array_equal(found, np.asarray(pipe(PROMPT, **ours, **sides).images[0]))
        assert answer.size == f"{found.shape[1]}x{found.shape[0]}"


@pytest.mark.parametrize(
    ("fields", "kind"),
    [
        ({"output_format": "jpeg", "output_compression": 40}, "JPEG"),
        ({"output_format": "webp", "output_compression": 0}, "WEBP"),
        ({"output_format": "jpg"}, "JPEG"),
        ({"output_format": "png", "output_compression": 100}, "PNG"),
    ],
)
def test_formats(client: OpenAI, fields: dict[str, Any], kind: str) -> None:
    answer = client.images.generate(prompt=PROMPT, extra_body={**SMALL, **fields})
    assert answer.data is not None
    assert answer.data[0].b64_json is not None
    assert decoded(answer.data[0].b64_json).format == kind
    assert answer.output_format == kind.lower()


def test_an_edit_repaints_what_is_transparent(client: OpenAI, pipe: Pipeline) -> None:
    image = photo(64, 64)
    mask = erased(image, 16, 8, 48, 40)
    answer = client.images.edit(
        image=("a.png", file_of(image), "image/png"),
        mask=("m.png", file_of(mask), "image/png"),
        prompt=PROMPT,
        extra_body={**FEW, "strength": 0.9},
    )
    assert answer.data is not None
    assert answer.data[0].b64_json is not None
    found, before = pixels(answer.data[0].b64_json), np.asarray(image)
    outside = np.ones((64, 64), bool)
    outside[8:40, 16:48] = False
    np.testing.assert_array_equal(found[outside], before[outside])
    assert (found != before).any(-1)[~outside].mean() > 0.9
    white = Image.fromarray(np.where(outside, 0, 255).astype(np.uint8))
    wanted = pipe(PROMPT, image=image, mask_image=white, strength=0.9, **FEW).images[0]
    np.testing.assert_array_equal(found, np.asarray(wanted))


def test_half_transparent_is_not_transparent(client: OpenAI, pipe: Pipeline) -> None:
    image = photo(64, 64)
    mask = erased(erased(image, 0, 0, 64, 32, alpha=1), 0, 48, 64, 64)
    mask.putalpha(Image.fromarray(np.repeat([255, 1, 255, 0], 16)[:, None].repeat(64, 1).astype(np.uint8)))
    answer = client.images.edit(
        image=file_of(image), mask=file_of(mask), prompt=PROMPT, extra_body={**FEW, "strength": 0.9}
    )
    assert answer.data is not None
    assert answer.data[0].b64_json is not None
    changed = (pixels(answer.data[0].b64_json) != np.asarray(image)).any(-1)
    assert not changed[:48].any()
    assert changed[48:].mean() > 0.9


def test_an_edit_without_a_mask_redraws(client: OpenAI, at: Live, pipe: Pipeline) -> None:
    image = photo(64, 96)
    wanted = np.asarray(pipe(PROMPT, image=image, strength=0.6, **FEW).images[0])
    answer = client.images.edit(image=[file_of(image)], prompt=PROMPT, extra_body={**FEW, "strength": 0.6})
    assert answer.data is not None
    assert answer.data[0].b64_json is not None
    assert answer.size == "96x64"
    np.testing.assert_array_equal(pixels(answer.data[0].b64_json), wanted)
    url = f"data:image/png;base64,{in_base64(image)}"
    for sent in ({"image": url}, {"image": [url]}, {"images": [{"image_url": url}]}):
        fields = {"prompt": PROMPT, "strength": 0.6, **FEW, **sent}
        told = at.client.post("/v1/images/edits", json=fields).json()
        np.testing.assert_array_equal(pixels(told["data"][0]["b64_json"]), wanted)


def test_the_asynchronous_client(at: Live, pipe: Pipeline) -> None:
    async def several() -> list[Any]:
        async with AsyncOpenAI(base_url=f"{at.url}/v1", api_key="none") as many:
            asked = [
                many.images.generate(prompt=PROMPT, extra_body={**SMALL, "seed": seed}) for seed in range(6)
            ]
            return await asyncio.gather(*asked)

    for seed, answer in enumerate(asyncio.run(several())):
        wanted = pipe(PROMPT, width=64, height=64, **{**FEW, "seed": seed}).images[0]
        np.testing.assert_array_equal(pixels(answer.data[0].b64_json), np.asarray(wanted))


def test_what_has_no_meaning_is_listed(client: OpenAI, at: Live) -> None:
    raw = client.images.with_raw_response.generate(
        prompt=PROMPT,
        quality="hd",
        style="vivid",
        moderation="low",
        user="me",
        background="auto",
        extra_body=SMALL,
    )
    ignored = raw.headers["x-latentrt-ignored"].split(", ")
    assert sorted(ignored) == ["moderation", "quality", "style", "user"]
    assert len(raw.headers["x-request-id"]) == 16
    plain = client.images.with_raw_response.generate(prompt=PROMPT, extra_body=SMALL)
    assert "x-latentrt-ignored" not in plain.headers


# ── addresses ──────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize("wanted", [None, "b64_json", "url"])
def test_response_formats(client: OpenAI, at: Live, wanted: Any) -> None:
    """Report 26: the shape is what was asked for."""
    given = {} if wanted is None else {"response_format": wanted}
    answer = client.images.generate(prompt=PROMPT, extra_body={**SMALL, **given})
    assert answer.data is not None
    (one,) = answer.data
    assert (one.b64_json is None, one.url is None) == (wanted == "url", wanted != "url")
    if one.url is not None:
        assert one.url.startswith(f"{at.url}/v1/images/linked/")
        assert one.url.endswith(".png")
        found = httpx.get(one.url)
        assert (found.status_code, found.headers["content-type"]) == (200, "image/png")
        assert one.model_extra is not None
        assert Image.open(io.BytesIO(found.content)).size == (64, 64)
        assert httpx.get(one.url.removesuffix(".png")).content == found.content


def test_a_link_needs_no_key_and_cannot_be_guessed(pipe: Pipeline) -> None:
    keys = keys_of_environment("K", {"K": KEY})
    with live(pipe, access=allow(keys=keys)) as closed:
        mine = {"authorization": f"Bearer {KEY}"}
        fields = {**SMALL, "response_format": "url"}
        assert closed.client.post("/v1/images/generations", json=fields).status_code == 401
        told = closed.client.post("/v1/images/generations", json=fields, headers=mine).json()
        link = httpx.URL(told["data"][0]["url"]).path
        shown = closed.client.get(link, headers={"sec-fetch-site": "cross-site"})
        assert shown.status_code == 200, "a chat shows it on its own page"
        assert shown.headers["cross-origin-resource-policy"] == "cross-origin"
        token = link.removeprefix("/v1/images/linked/").removesuffix(".png")
        guesses = [token[:-2], token + "AA", token.swapcase(), "A" * len(token), "", "é", "../../jobs"]
        guesses += [f"{token[:at]}{'A' if token[at] != 'A' else 'B'}{token[at + 1 :]}" for at in range(60)]
        for guess in guesses:
            assert closed.client.get(f"/v1/images/linked/{guess}").status_code in (401, 404), guess
        assert closed.client.get(link, headers={"host": "evil.example"}).status_code == 421
        assert closed.client.post(link).status_code == 401
        assert closed.client.get("/v1/images/linked").status_code == 401
        plain = closed.client.get("/v1/models", headers={**mine, "sec-fetch-site": "cross-site"})
        assert plain.status_code == 403


def test_a_link_lasts_as_long_as_its_picture(pipe: Pipeline) -> None:
    with live(pipe, bounds=Bounds(result_seconds=0.5)) as forgetful:
        fields = {**SMALL, "response_format": "url"}
        told = forgetful.client.post("/v1/images/generations", json=fields).json()
        until(lambda: httpx.get(told["data"][0]["url"]).status_code in (404, 410))


# ── streams ────────────────────────────────────────────────────────────────────────────────────────


def test_a_stream_has_partial_images_and_the_finished_one(client: OpenAI, pipe: Pipeline) -> None:
    """The last is a pipeline's; those before it are fewer than was asked for where steps are quick."""
    fields: dict[str, Any] = {"num_inference_steps": 40, "seed": 3, "width": 64, "height": 64}
    stream = client.images.generate(prompt=PROMPT, stream=True, partial_images=3, extra_body=fields)
    with stream:
        events = list(stream)
    *partials, last = events
    assert partials
    assert [one.type for one in partials] == ["image_generation.partial_image"] * len(partials)
    assert [getattr(one, "partial_image_index", None) for one in partials] == list(range(len(partials)))
    assert len(partials) <= 3
    for one in partials:
        shown = decoded(one.b64_json)
        assert shown.format is not None
        assert (one.size, one.output_format) == (f"{shown.width}x{shown.height}", shown.format.lower())
    assert last.type == "image_generation.completed"
    assert (last.size, last.output_format, last.quality, last.background) == (
        "64x64",
        "png",
        "auto",
        "opaque",
    )
    assert last.usage.total_tokens == 0
    wanted = pipe(PROMPT, **fields).images[0]
    np.testing.assert_array_equal(pixels(last.b64_json), np.asarray(wanted))
    assert last.model_extra is not None
    assert last.model_extra["latentrt"]["seed"] == 3


def test_a_stream_of_edits(at: Live) -> None:
    image = photo(64, 64)

    async def watch() -> list[Any]:
        async with AsyncOpenAI(base_url=f"{at.url}/v1", api_key="none") as many:
            stream = await many.images.edit(
                image=file_of(image),
                mask=file_of(erased(image, 16, 8, 48, 40)),
                prompt=PROMPT,
                n=2,
                stream=True,
                partial_images=0,
                extra_body={**FEW, "quality": "low"},
            )
            assert stream.response.headers["x-latentrt-ignored"] == "quality"
            return [event async for event in stream]

    events = asyncio.run(watch())
    assert [event.type for event in events] == ["image_edit.completed"] * 2
    assert {event.model_extra["latentrt"]["seed"] for event in events} == {7, 8}


def test_a_job_that_fails_in_a_stream(
    client: OpenAI, pipe: Pipeline, monkeypatch: pytest.MonkeyPatch
) -> None:
    def broken(values: Any) -> Iterator[Any]:
        raise NumericError("not a number", expected="numbers", fix="Use fp32.")
        yield

    monkeypatch.setattr(pipe, "shared", broken)
    with pytest.raises(openai.APIError, match="not a number; expected numbers") as caught:
        list(client.images.generate(prompt=PROMPT, stream=True, extra_body=SMALL))
    assert caught.value.code == "numeric"


def test_every_picture_of_a_stream_is_sent_once(at: Live) -> None:
    """A reader that is too late for the events finds the pictures in a snapshot."""
    few = Bounds(events=1)
    pipe = at.server.workers["demo"].pipe
    with live(pipe, bounds=few) as short:
        with short.client.stream(
            "POST", "/v1/images/generations", json={**SMALL, "n": 4, "stream": True}
        ) as got:
            lines = [line for line in got.iter_lines() if line.startswith("data: ")]
        indexes = [json.loads(line[6:])["latentrt"]["index"] for line in lines]
        assert sorted(indexes) == [0, 1, 2, 3]


# ── errors ─────────────────────────────────────────────────────────────────────────────────────────

# fields, status, the one to blame, words of the message
REFUSED: list[tuple[dict[str, Any], int, str | None, str]] = [
    ({"prompt": None}, 400, "prompt", "prompt is missing"),
    ({"prompt": ["a", "b"]}, 400, "prompt", "prompt is ['a', 'b']"),
    ({"prompt": "a\0"}, 400, "prompt", "none of them NUL"),
    ({"num_steps": 3}, 400, "num_steps", "'num_inference_steps'"),
    ({"steps": 3}, 400, "steps", "'num_inference_steps'"),
    ({"cfg_scale": 3}, 400, "cfg_scale", "'guidance_scale'"),
    ({"batch_size": 3}, 400, "batch_size", "expected 'n'"),
    ({"num_images_per_prompt": 2}, 400, "num_images_per_prompt", "expected 'n'"),
    ({"output": {}}, 400, "output", "'output_format'"),
    ({"zzz": 1}, 400, "zzz", "--lenient"),
    ({"image": "x"}, 400, "image", "v1/images/edits"),
    ({"mask_image": "x"}, 400, "mask_image", "v1/images/edits"),
    ({"n": 0}, 400, "n", "n is 0; expected an integer from 1 to 10. Change n."),
    ({"n": 11}, 400, "n", "n is 11"),
    ({"n": True}, 400, "n", "n is True"),
    ({"size": "65x64"}, 400, "size", "multiple of"),
    ({"size": "large"}, 400, "size", "WIDTHxHEIGHT"),
    ({"size": 64}, 400, "size", "size is 64"),
    ({"size": "64x64", "width": 64}, 400, "size", "size with width"),
    ({"size": "8192x8192"}, 413, "size", "pixels a picture"),
    ({"num_inference_steps": 0}, 400, "num_inference_steps", "num_inference_steps is 0"),
    ({"num_inference_steps": 151}, 413, None, "151 steps"),
    ({"seed": 1.5}, 400, "seed", "seed is 1.5"),
    ({"sampler": "fast"}, 400, "sampler", "fast"),
    ({"strength": 0.5}, 400, "strength", "strength without an image"),
    ({"response_format": "png"}, 400, "response_format", "b64_json, url"),
    ({"output_format": "gif"}, 400, "output_format", "png, jpeg, webp"),
    ({"output_compression": 101}, 400, "output_compression", "output_compression is 101"),
    ({"output_compression": 50}, 400, "output_compression", "of png"),
    ({"background": "transparent"}, 400, "background", "background is 'transparent'"),
    ({"stream": "yes"}, 400, "stream", "stream is 'yes'"),
    ({"partial_images": 4, "stream": True}, 400, "partial_images", "partial_images is 4"),
    ({"partial_images": 1}, 400, "partial_images", "without a stream"),
    ({"response_format": "url", "stream": True}, 400, "response_format", "in a stream"),
    ({"model": 7}, 400, "model", "model is 7"),
    ({"timeout_s": 0}, 400, "timeout_s", "timeout_s is 0"),
    ({"loras": ["/etc/x.safetensors"]}, 400, None, "x.safetensors"),
    ({"svg": {"model": "x"}}, 400, "svg", "there is no field 'svg'"),
    (
        {"num_images_per_prompt": 2},
        400,
        "num_images_per_prompt",
        "there is no field 'num_images_per_prompt'; expected 'n'",
    ),
]


@pytest.mark.parametrize(("fields", "status", "param", "words"), REFUSED)
def test_what_is_wrong_is_refused_before_a_step(
    client: OpenAI, at: Live, fields: dict[str, Any], status: int, param: str | None, words: str
) -> None:
    """Reports 24 and 44: no job, and one answer, although the client would try thrice."""
    before = accepted(at)
    sent = {**SMALL, **fields}
    with pytest.raises(openai.APIStatusError) as caught:
        client.images.generate(prompt=sent.pop("prompt"), extra_body=sent)
    error = caught.value
    assert (error.status_code, error.type) == (status, "invalid_request_error")
    assert words in error.message
    assert error.param == param
    assert error.code
    assert error.response.request.headers.get("x-stainless-retry-count", "0") == "0"
    assert accepted(at) == before


def no_hole(image: Image.Image) -> Image.Image:
    return erased(image, 0, 0, 8, 8, alpha=255)


@pytest.mark.parametrize(
    ("fields", "param", "words"),
    [
        ({"image": None}, "image", "image is missing"),
        ({"image": 7}, "image", "image is 7"),
        ({"image": []}, "image", "image has 0 pictures"),
        ({"image": ["a", "b"]}, "image", "image has 2 pictures"),
        ({"images": [{"file_id": "x"}], "image": None}, None, "image is {'file_id': 'x'}"),
        ({"images": "x"}, "image", "image has 2 pictures"),
        ({"image": "http://127.0.0.1/a.png"}, "image", "image is no base64"),
        ({"image": "/etc/passwd"}, "image", "image"),
        ({"mask": in_base64(photo(64, 64))}, "mask", "no pixel that is fully transparent"),
        ({"mask": in_base64(no_hole(photo(64, 64)))}, "mask", "no pixel that is fully transparent"),
        ({"mask": in_base64(erased(photo(32, 32), 0, 0, 9, 9))}, "mask", "mask has 32 x 32 pixels for"),
        ({"mask": [in_base64(photo(64, 64))] * 2}, "mask", "mask has 2 pictures"),
        ({"mask": [1, 2, 3]}, "mask", "mask has 3 pictures"),
        ({"mask": True}, "mask", "mask is True"),
        ({"mask": "x" * 9}, "mask", "mask is no base64"),
        ({"mask_image": "x"}, "mask_image", "expected 'mask'"),
        ({"width": 32, "mask": in_base64(erased(photo(64, 64), 0, 0, 9, 9))}, None, ""),
    ],
)
def test_edits_that_are_wrong(at: Live, fields: dict[str, Any], param: str | None, words: str) -> None:
    """Report 22: a mask of another kind is named, not left out."""
    before = accepted(at)
    sent = {"prompt": PROMPT, "image": in_base64(photo(64, 64)), **FEW, **fields}
    answer = at.client.post("/v1/images/edits", json=sent)
    if not words:  # the last: what only looks odd is drawn
        assert answer.status_code == 200
        return
    assert answer.status_code == 400, answer.text
    error = answer.json()["error"]
    assert words in error["message"]
    assert param is None or error["param"] == param
    assert accepted(at) == before


@pytest.mark.filterwarnings("ignore:deprecated:DeprecationWarning")
def test_variations_need_a_model_that_varies(client: OpenAI, at: Live) -> None:
    before = accepted(at)
    for mask in ({}, {"mask": in_base64(photo(64, 64))}):
        with pytest.raises(openai.BadRequestError, match="v1/images/edits"):
            client.images.create_variation(image=file_of(photo(64, 64)), extra_body=mask)
    assert accepted(at) == before


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:.*is deprecated:FutureWarning")
@pytest.mark.filterwarnings("ignore:deprecated:DeprecationWarning")
def test_variations(tmp_path_factory: pytest.TempPathFactory) -> None:
    from tests.parity_pair import exported

    image = photo(64, 64)
    package = exported(tmp_path_factory, "unclip-tiny") / "package"
    options: dict[str, Any] = {"num_inference_steps": 2, "seed": 5}
    with (
        Pipeline.open(package, backend="onnxruntime", device="cpu") as varies,
        live(varies) as made,
        OpenAI(base_url=f"{made.url}/v1", api_key="none") as one,
    ):
        answer = one.images.create_variation(image=file_of(image), n=2, size=None, extra_body=options)
        wanted = varies("", image=image, num_images_per_prompt=2, **options).images
        assert answer.data is not None
        for found, want in zip(answer.data, wanted, strict=True):
            assert found.b64_json is not None
            np.testing.assert_array_equal(pixels(found.b64_json), np.asarray(want))
        with pytest.raises(openai.BadRequestError, match="has no image"):
            one.images.generate(prompt=PROMPT)


@pytest.mark.parametrize("body", [b"[]", b"{", b"nan", b"", b"\xff"])
def test_bodies_that_are_no_objects(at: Live, body: bytes) -> None:
    headers = {"content-type": "application/json"}
    answer = at.client.post("/v1/images/generations", content=body, headers=headers)
    assert answer.status_code == 400
    assert set(answer.json()["error"]) == {"message", "type", "param", "code"}


@pytest.mark.parametrize(
    ("error", "code"),
    [
        (NumericError("not a number", expected="numbers", fix="Use fp32."), "numeric"),
        (ZeroDivisionError("/secret/path at 0x7f00deadbeef"), "server_error"),
    ],
)
def test_a_job_that_fails_is_drawn_once(
    client: OpenAI,
    at: Live,
    pipe: Pipeline,
    monkeypatch: pytest.MonkeyPatch,
    error: Exception,
    code: str,
) -> None:
    """Report 44, and 46: what is none of our errors tells nothing."""

    def broken(values: Any) -> Iterator[Any]:
        raise error
        yield

    before = accepted(at)
    monkeypatch.setattr(pipe, "shared", broken)
    with pytest.raises(openai.InternalServerError) as caught:
        client.images.generate(prompt=PROMPT, extra_body=SMALL)
    assert (caught.value.code, caught.value.type) == (code, "server_error")
    assert "secret" not in caught.value.message
    assert caught.value.response.headers["x-should-retry"] == "false"
    assert accepted(at) == before + 1


def test_a_cancelled_job(client: OpenAI, at: Live) -> None:
    def cancel() -> None:
        until(lambda: newest(at).state == "running" and newest(at).submission.work.steps == 149)
        at.client.delete(f"/v1/jobs/{newest(at).id}")

    thread = threading.Thread(target=cancel)
    thread.start()
    before = accepted(at)
    with pytest.raises(openai.InternalServerError, match="cancelled") as caught:
        client.images.generate(prompt=PROMPT, extra_body={**FEW, "num_inference_steps": 149})
    thread.join()
    assert (caught.value.status_code, caught.value.code) == (503, "cancelled")
    assert accepted(at) == before + 1


def test_a_full_queue(pipe: Pipeline) -> None:
    with live(pipe, bounds=Bounds(jobs=1), start=False) as full:
        full.client.post("/v1/jobs", json={"prompt": PROMPT})
        with OpenAI(base_url=f"{full.url}/v1", api_key="none", max_retries=0) as one:
            with pytest.raises(openai.RateLimitError) as caught:
                one.images.generate(prompt=PROMPT, extra_body=SMALL)
            assert (caught.value.code, caught.value.type) == ("jobs", "rate_limit_error")
            assert 1 <= int(caught.value.response.headers["retry-after"]) <= 120
            full.server.queue.drain()
            with pytest.raises(openai.InternalServerError) as caught:
                one.images.generate(prompt=PROMPT, extra_body=SMALL)
            assert (caught.value.status_code, caught.value.code) == (503, "draining")


def test_a_client_comes_again_to_a_full_queue(pipe: Pipeline) -> None:
    with live(pipe, bounds=Bounds(jobs=1, retry_after_s=(1, 1))) as full:
        full.client.post("/v1/jobs", json={"prompt": PROMPT, "num_inference_steps": 20, "width": 64})
        with OpenAI(base_url=f"{full.url}/v1", api_key="none", max_retries=30) as one:
            answer = one.images.generate(prompt=PROMPT, extra_body=SMALL)
        assert answer.data
        assert full.server.jobs.counts().accepted == 2


def test_keys(pipe: Pipeline) -> None:
    access = allow(keys=keys_of_environment("K", {"K": KEY}))
    with live(pipe, access=access, start=False) as closed:
        with (
            OpenAI(base_url=f"{closed.url}/v1", api_key="none") as stranger,
            pytest.raises(openai.AuthenticationError) as caught,
        ):
            stranger.images.generate(prompt=PROMPT)
        assert (caught.value.type, caught.value.code) == ("authentication_error", "invalid_api_key")
        with OpenAI(base_url=f"{closed.url}/v1", api_key=KEY) as friend:
            assert [one.id for one in friend.models.list()] == ["demo"]


# ── models ─────────────────────────────────────────────────────────────────────────────────────────


def test_paths_of_openais_that_are_not_here(client: OpenAI) -> None:
    with pytest.raises(openai.NotFoundError, match="v1/chat/completions") as caught:
        client.chat.completions.create(model="demo", messages=[{"role": "user", "content": "a circle"}])
    assert (caught.value.code, caught.value.type) == ("not_found", "invalid_request_error")


def test_models(client: OpenAI) -> None:
    (one,) = client.models.list()
    assert (one.id, one.object, one.owned_by) == ("demo", "model", "latentrt")
    assert abs(one.created - time.time()) < 3600
    assert client.models.retrieve("demo") == one
    for name in ("gpt-image-1", "a/b"):
        with pytest.raises(openai.NotFoundError) as caught:
            client.models.retrieve(name)
        assert caught.value.code == "model_not_found"
        assert "one of demo" in caught.value.message


def test_strict_names_and_lenient_fields(pipe: Pipeline) -> None:
    """Report 12; and what proxies such as LiteLLM pass on."""
    with live(pipe, options=Options(rows=4, strict_models=True, lenient=True)) as made:
        with OpenAI(base_url=f"{made.url}/v1", api_key="none") as one:
            with pytest.raises(openai.NotFoundError) as caught:
                one.images.generate(prompt=PROMPT, model="dall-e-2", extra_body=SMALL)
            assert (caught.value.code, caught.value.param) == ("model_not_found", "model")
            odd = {**SMALL, "metadata": {"a": 1}, "x\r\nset-cookie: a": 1, "é" * 100: 2, "image": "x"}
            raw = one.images.with_raw_response.generate(prompt=PROMPT, model="demo", extra_body=odd)
        ignored = raw.headers["x-latentrt-ignored"].split(", ")
        assert ignored[0] == "metadata"
        assert ignored[1] == "x%0D%0Aset-cookie%3A%20a"
        assert ignored[3] == "image"
        assert "set-cookie" not in raw.headers
        many = {f"odd{number}": 1 for number in range(1000)}
        told = made.client.post("/v1/images/generations", json={**SMALL, **many})
        assert len(told.headers["x-latentrt-ignored"]) < 400


# ── who leaves ─────────────────────────────────────────────────────────────────────────────────────


def sent_by_hand(at: Live, headers: str = "", **fields: Any) -> socket.socket:
    body = json.dumps({"prompt": PROMPT, "num_inference_steps": 148, "seed": 1, **fields}).encode()
    url = httpx.URL(at.url)
    made = socket.create_connection((url.host, url.port or 0))
    head = f"POST /v1/images/generations HTTP/1.1\r\nHost: {url.host}\r\nContent-Type: application/json\r\n"
    made.sendall(f"{head}{headers}Content-Length: {len(body)}\r\n\r\n".encode() + body)
    return made


def drawing(at: Live) -> Job:
    """The job that was just sent, when it has drawn steps."""
    until(lambda: newest(at).state == "running" and newest(at).submission.work.steps == 148)
    job = newest(at)
    until(lambda: any(event.kind == "step" for event in job.log.after(0).events))
    return job


@pytest.mark.parametrize("fields", [{}, {"stream": True}, {"stream": True, "partial_images": 2}])
def test_who_leaves_ends_the_job_within_a_step(
    at: Live, monkeypatch: pytest.MonkeyPatch, fields: dict[str, Any]
) -> None:
    """Report 1; meanwhile others are answered."""
    turns: list[int] = []
    at_cancel: list[int] = []
    worker, plain = at.server.workers["demo"], at.server.jobs.cancel
    monkeypatch.setattr(worker, "turns", [lambda rows, seconds: turns.append(rows)])

    def cancel(name: str, owner: str, reason: str = "request") -> Job:
        cancelled = plain(name, owner, reason)
        at_cancel.append(len(turns))
        return cancelled

    monkeypatch.setattr(at.server.jobs, "cancel", cancel)
    connection = sent_by_hand(at, **fields)
    job = drawing(at)
    assert at.client.get("/health/live").status_code == 200
    connection.close()
    until(lambda: at.server.jobs.get(job.id, ANYONE).ended is not None)
    ended = at.server.jobs.get(job.id, ANYONE)
    assert (ended.state, ended.cancel_reason) == ("cancelled", "disconnect")
    assert at_cancel
    assert len(turns) - at_cancel[0] <= 1
    assert len(turns) < 148
    assert at.client.get("/health/live").status_code == 200
    assert at.client.post("/v1/images/generations", json=SMALL).status_code == 200


@pytest.mark.parametrize("fields", [{}, {"stream": True}])
@pytest.mark.parametrize("header", ["x-latentrt-on-disconnect: keep\r\n", "Idempotency-Key: {}\r\n"])
def test_who_wants_to_come_back_leaves_the_job(at: Live, header: str, fields: dict[str, Any]) -> None:
    """Report 21."""
    key = f"key-{fields}"
    connection = sent_by_hand(at, header.format(key), size="64x64", **fields)
    job = drawing(at)
    connection.close()
    until(lambda: at.server.jobs.get(job.id, ANYONE).ended is not None)
    told = at.client.get(f"/v1/jobs/{job.id}").json()
    assert told["status"] == "completed"
    assert at.client.get(told["images"][0]["href"]).status_code == 200


def test_the_same_key_is_the_same_job(at: Live) -> None:
    headers = {"idempotency-key": "openai"}
    before = accepted(at)
    first, again = (
        at.client.post("/v1/images/generations", json={**SMALL, "seed": -1}, headers=headers).json()
        for _ in range(2)
    )
    assert first == again
    assert accepted(at) == before + 1
    assert at.client.post("/v1/images/generations", json=SMALL, headers=headers).status_code == 422
    headers = {"idempotency-key": "x" * 256}
    assert at.client.post("/v1/images/generations", json=SMALL, headers=headers).status_code == 400


def test_many_leave_and_nothing_stays(at: Live) -> None:
    """Report 3, in small."""
    for number in range(30):
        sent_by_hand(at, stream=number % 2 == 0).close()
    until(lambda: not at.server.jobs.counts().running + at.server.jobs.counts().queued)
    assert at.client.post("/v1/images/generations", json=SMALL).status_code == 200


# ── other clients ──────────────────────────────────────────────────────────────────────────────────


def test_open_webui(at: Live, pipe: Pipeline) -> None:
    """Its router of images: a model of its own list, base64, an api-version; edits are forms."""
    sent = {
        "model": "dall-e-2",
        "prompt": PROMPT,
        "n": 1,
        "size": "64x64",
        "response_format": "b64_json",
        **FEW,
    }
    headers = {"authorization": "Bearer none"}
    answer = at.client.post("/v1/images/generations?api-version=2025-04-01", json=sent, headers=headers)
    assert answer.headers["content-type"] == "application/json"
    wanted = pipe(PROMPT, width=64, height=64, **FEW).images[0]
    assert np.array_equal(pixels(answer.json()["data"][0]["b64_json"]), np.asarray(wanted))
    image = photo(64, 64)
    form = {"model": "gpt-image-1", "prompt": "7", "n": "1", "size": "64x64", "response_format": "b64_json"}
    form |= {"num_inference_steps": "3", "seed": "7", "strength": "0.5", "stream": "false"}
    wanted = pipe("7", image=image, strength=0.5, **FEW).images[0]
    for name in ("image", "image[]"):
        files = {name: ("image.png", file_of(image), "image/png")}
        answer = at.client.post("/v1/images/edits", data=form, files=files, headers=headers)
        assert np.array_equal(pixels(answer.json()["data"][0]["b64_json"]), np.asarray(wanted))
    two = [("image[]", ("image.png", file_of(image), "image/png"))] * 2
    refused = at.client.post("/v1/images/edits", data=form, files=two, headers=headers)
    assert refused.status_code == 400
    assert refused.json()["error"]["param"] == "image"


def test_librechat(at: Live) -> None:
    """Its tool for images has fixed fields, and reads `b64_json`; that of DALL-E reads `url`."""
    fixed = {
        "model": "gpt-image-1",
        "prompt": PROMPT,
        "n": 2,
        "background": "auto",
        "quality": "auto",
        "output_format": "webp",
        "output_compression": 80,
        "size": "auto",
        "num_inference_steps": 2,
    }
    answer = at.client.post("/v1/images/generations", json=fixed)
    assert answer.headers["x-latentrt-ignored"] == "quality"
    assert [decoded(one["b64_json"]).format for one in answer.json()["data"]] == ["WEBP"] * 2
    form = {name: str(value) for name, value in fixed.items()} | {"n": "1"}
    files = [("image[]", ("image.png", file_of(photo(64, 64)), "image/png"))]
    edited = at.client.post("/v1/images/edits", data=form, files=files).json()
    assert decoded(edited["data"][0]["b64_json"]).size == (64, 64)
    old = {"model": "dall-e-3", "prompt": PROMPT, "n": 1, "size": "64x64", "quality": "standard"}
    old |= {"style": "vivid", "response_format": "url", "num_inference_steps": 2}
    told = at.client.post("/v1/images/generations", json=old).json()
    assert httpx.get(told["data"][0]["url"]).status_code == 200
