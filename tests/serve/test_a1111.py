"""AUTOMATIC1111's API: its own client's package, requests as other clients send them, and what they read."""

from __future__ import annotations

import base64
import io
import json
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from copy import copy
from typing import Any

import httpx
import hypothesis
import numpy as np
import pytest
import webuiapi
from hypothesis import strategies as st
from PIL import Image

from latentrt import Control, Pipeline
from latentrt.engines.errors import LatentrtError, UsageError
from latentrt.runtime.pictures.infotext import parse_infotext
from latentrt.runtime.pictures.write import read_metadata
from latentrt.runtime.sampling.a1111 import a1111_fields
from latentrt.runtime.sampling.names import resolve
from latentrt.runtime.second_pass import enlarge_latent
from latentrt.serve.a1111.controlnet import UNIT
from latentrt.serve.a1111.fields import FIELDS, SETTINGS, Route
from latentrt.serve.a1111.order import read_wanted
from latentrt.serve.a1111.samplers import choose
from latentrt.serve.a1111.start import fill_under
from latentrt.serve.answers import answer_to
from latentrt.serve.door.access import allow
from latentrt.serve.door.keys import keys_of_environment
from latentrt.serve.server import Options
from tests.parity_pair import photo
from tests.serve.live import Live, live, open_demo

PROMPT = "a red circle on a blue background"
SMALL: dict[str, Any] = {"prompt": PROMPT, "width": 64, "height": 64, "steps": 3, "seed": 7, "cfg_scale": 4.0}
KEYS = tuple(f"0123456789abcdef-{name}" for name in "ab")
IDLE = {
    "progress": 0.0,
    "eta_relative": 0.0,
    "state": {
        "skipped": False,
        "interrupted": False,
        "stopping_generation": False,
        "job": "",
        "job_count": 0,
        "job_timestamp": "0",
        "job_no": 0,
        "sampling_step": 0,
        "sampling_steps": 0,
    },
    "current_image": None,
    "textinfo": None,
}


@pytest.fixture(scope="module")
def pipe() -> Iterator[Pipeline]:
    with open_demo() as opened:
        opened.load_control("edges")
        yield opened


@pytest.fixture(scope="module")
def at(pipe: Pipeline) -> Iterator[Live]:
    with live(pipe) as made:
        yield made


@pytest.fixture(scope="module")
def api(at: Live) -> webuiapi.WebUIApi:
    return webuiapi.WebUIApi(baseurl=f"{at.url}/sdapi/v1", steps=3)


def draw(at: Live, route: str = "txt2img", **fields: Any) -> dict[str, Any]:
    answer = at.client.post(f"/sdapi/v1/{route}", json={**SMALL, **fields})
    assert answer.status_code == 200, answer.text
    return answer.json()


def refused(at: Live, status: int, route: str = "txt2img", **fields: Any) -> str:
    """The text of a refusal, in A1111's form, before a step is drawn."""
    before = at.server.jobs.counts().accepted
    answer = at.client.post(f"/sdapi/v1/{route}", json={**SMALL, **fields})
    assert answer.status_code == status, answer.text
    told = answer.json()
    assert set(told) == {"error", "detail", "body", "errors"}
    assert at.server.jobs.counts().accepted == before
    return told["detail"]


def shown(picture: str) -> np.ndarray:
    assert "," not in picture, "clients split at the first comma"
    return np.asarray(Image.open(io.BytesIO(base64.b64decode(picture))))


def encoded(image: Any) -> str:
    file = io.BytesIO()
    Image.fromarray(np.asarray(image)).save(file, "PNG")
    return base64.b64encode(file.getvalue()).decode()


def wait_for(found: Callable[[], Any]) -> Any:
    until = time.monotonic() + 30
    while time.monotonic() < until:
        if value := found():
            return value
        time.sleep(0.002)
    raise AssertionError("it did not come")


class Behind:
    """A request in a thread of its own."""

    def __init__(self, at: Live, route: str = "txt2img", headers: Any = None, **fields: Any) -> None:
        self.answer: httpx.Response | None = None

        def send() -> None:
            with httpx.Client(base_url=at.url, timeout=60, headers=headers) as client:
                self.answer = client.post(f"/sdapi/v1/{route}", json={**SMALL, **fields})

        self.thread = threading.Thread(target=send)
        self.thread.start()

    def end(self) -> httpx.Response:
        self.thread.join(60)
        assert self.answer is not None
        return self.answer


# ── its own client ─────────────────────────────────────────────────────────────────────────────────


def test_txt2img_of_its_client(api: webuiapi.WebUIApi, pipe: Pipeline) -> None:
    drawn = api.txt2img(
        prompt=PROMPT, width=64, height=64, seed=7, cfg_scale=4.0, batch_size=2, sampler_name="Euler a"
    )
    assert [image.size for image in drawn.images] == [(64, 64)] * 2
    for number, image in enumerate(drawn.images):
        wanted = pipe(
            PROMPT,
            width=64,
            height=64,
            seed=7 + number,
            guidance_scale=4.0,
            num_inference_steps=3,
            sampler="euler_a linspace",
        )
        np.testing.assert_array_equal(np.asarray(image), wanted.images[0])
        assert image.info["parameters"] == wanted.infotext() == drawn.info["infotexts"][number]
    assert drawn.info["all_seeds"] == [7, 8]
    assert drawn.info["sampler_name"] == "Euler a"
    assert drawn.info["ignored"] == ["eta"], "which Euler a has no choice of"
    assert drawn.parameters["hr_upscaler"] == "Latent"


def test_img2img_with_a_mask_of_its_client(api: webuiapi.WebUIApi, pipe: Pipeline) -> None:
    start = photo(64, 64)
    mask = Image.fromarray(np.pad(np.full((64, 32), 255, np.uint8), ((0, 0), (0, 32))))
    drawn = api.img2img(
        images=[start],
        mask_image=mask,
        inpainting_fill=1,
        inpaint_full_res=False,
        mask_blur=0,
        prompt=PROMPT,
        width=64,
        height=64,
        seed=7,
        cfg_scale=4.0,
        steps=4,
        denoising_strength=0.7,
    )
    wanted = pipe(
        PROMPT,
        image=start,
        mask_image=mask,
        strength=0.7,
        width=64,
        height=64,
        seed=7,
        guidance_scale=4.0,
        num_inference_steps=4,
        sampler="euler_a linspace",
    )
    np.testing.assert_array_equal(np.asarray(drawn.image), wanted.images[0])
    np.testing.assert_array_equal(np.asarray(drawn.image)[:, 32:], np.asarray(start)[:, 32:])
    assert drawn.info["denoising_strength"] == 0.7
    assert drawn.parameters["init_images"] is None
    default = api.img2img(
        images=[start], mask_image=mask, prompt=PROMPT, width=64, height=64, denoising_strength=0.7
    )
    assert default.image.size == (64, 64)


def test_options_make_the_round_trip(api: webuiapi.WebUIApi) -> None:
    options = api.get_options()
    assert options["sd_model_checkpoint"] == api.get_sd_models()[0]["title"] == api.util_get_current_model()
    assert len(options["sd_checkpoint_hash"]) == 64
    assert api.set_options({**options, "of_an_extension": None, "eta_noise_seed_delta": 31337}) is None
    assert api.get_options() == options
    api.util_set_model("demo")
    api.util_wait_for_ready(0.01)


def test_progress_and_interrupt_from_another_thread(at: Live, api: webuiapi.WebUIApi) -> None:
    assert api.get_progress() == IDLE
    request = Behind(at, steps=150, force_task_id="task(mine)")
    told = wait_for(lambda: (p := api.get_progress())["state"]["sampling_step"] > 10 and p)
    assert 0 < told["progress"] < 1
    assert told["state"]["job_count"] == 1
    assert told["state"]["sampling_steps"] == 150
    picture = wait_for(lambda: api.get_progress()["current_image"])
    assert Image.open(io.BytesIO(base64.b64decode(picture))).size[0] > 0
    assert at.client.get("/sdapi/v1/progress?skip_current_image=true").json()["current_image"] is None
    assert api.interrupt() == {}
    answer = request.end()
    assert answer.status_code == 200
    assert answer.json()["images"] == [], "no picture that is not finished"
    assert json.loads(answer.json()["info"])["infotexts"] == []
    assert api.get_progress() == IDLE


def test_png_info_regenerates_a_picture_to_the_byte(at: Live, api: webuiapi.WebUIApi) -> None:
    drawn = api.txt2img(
        prompt=f"{PROMPT}, <lora:gray:0.5>" if "gray" in names(at, "loras") else PROMPT,
        negative_prompt="green",
        width=64,
        height=64,
        steps=4,
        sampler_name="DPM++ 2M",
    )
    told = api.png_info(drawn.image)
    assert told.info == drawn.info["infotexts"][0]
    fields = parse_infotext(told.info)
    width, height = map(int, fields["Size"].split("x"))
    again = api.txt2img(
        prompt=fields["prompt"],
        negative_prompt=fields["negative_prompt"],
        width=width,
        height=height,
        steps=int(fields["Steps"]),
        seed=int(fields["Seed"]),
        cfg_scale=float(fields["CFG scale"]),
        sampler_name=fields["Sampler"],
        scheduler=fields["Schedule type"],
    )
    assert again.json["images"] == drawn.json["images"]
    assert told.parameters["Size-1"] == "64"
    assert told.parameters["Prompt"] == fields["prompt"]


def names(at: Live, route: str) -> list[str]:
    return [one["name"] for one in at.client.get(f"/sdapi/v1/{route}").json()]


def test_lists_of_its_client(at: Live, api: webuiapi.WebUIApi, pipe: Pipeline) -> None:
    assert "DPM++ 2M SDE" in api.util_get_sampler_names()
    assert "karras" in api.util_get_scheduler_names()
    assert api.get_latent_upscale_modes() == [{"name": "Latent"}]
    assert [one["name"] for one in api.get_upscalers()] == ["None", "Latent"]
    assert set(names(at, "loras")) == set(pipe.adapters.all_names())
    assert set(api.get_embeddings()["loaded"]) == set(pipe.embeddings.names())
    assert api.get_scripts() == {"txt2img": ["controlnet"], "img2img": ["controlnet"]}
    assert api.get_memory()["ram"]["total"] > 0
    assert api.get_cmd_flags() == {}
    assert api.refresh_checkpoints() is None
    for empty in (api.get_sd_vae, api.get_hypernetworks, api.get_face_restorers, api.get_prompt_styles):
        assert empty() == []
    model = api.get_sd_models()[0]
    assert model["filename"] == model["model_name"] == "demo"


def test_listed_samplers_are_what_pictures_say(at: Live, pipe: Pipeline) -> None:
    """By each of their names; those that A1111 does not have are called as they are here."""
    config = pipe.package.manifest.scheduler
    for sampler in at.client.get("/sdapi/v1/samplers").json():
        for name in (sampler["name"], *sampler["aliases"]):
            chosen = choose(name, None)
            assert chosen.name == sampler["name"]
            assert a1111_fields(resolve(chosen.spelling, config), 5)["Sampler"] == sampler["name"]
        assert json.loads(draw(at, sampler_name=name, steps=1)["info"])["sampler_name"] == sampler["name"]


def test_listed_schedules_are_what_pictures_say(at: Live, pipe: Pipeline) -> None:
    for schedule in at.client.get("/sdapi/v1/schedulers").json()[1:]:
        for name in (schedule["label"], schedule["name"], schedule["name"].title()):
            config = resolve(choose("Euler", name).spelling, pipe.package.manifest.scheduler)
            assert a1111_fields(config, 5)["Schedule type"] == schedule["label"]


def test_controlnet_units_of_its_client(api: webuiapi.WebUIApi, pipe: Pipeline) -> None:
    (net,) = pipe.controls.names
    assert api.controlnet_version() == 3
    assert api.controlnet_model_list() == [net]
    assert {"none", "canny", "tile_resample"} <= set(api.controlnet_module_list())
    unit = webuiapi.ControlNetUnit(
        image=photo(64, 64),
        module="canny",
        model=f"{net} [0123abcd]",
        weight=0.8,
        resize_mode="Just Resize",
        threshold_a=100,
        threshold_b=200,
        guidance_end=0.9,
        control_mode=1,
    )
    drawn = api.txt2img(
        prompt=PROMPT, width=64, height=64, seed=7, cfg_scale=4.0, steps=3, controlnet_units=[unit]
    )
    control = Control(
        model=net,
        image=photo(64, 64),
        strength=0.8,
        end=0.9,
        mode="prompt",
        preparation="canny",
        settings={"low": 100.0, "high": 200.0},
    )
    wanted = pipe(
        PROMPT,
        width=64,
        height=64,
        seed=7,
        guidance_scale=4.0,
        num_inference_steps=3,
        sampler="euler_a linspace",
        controls=[control],
    )
    np.testing.assert_array_equal(np.asarray(drawn.image), wanted.images[0])


# ── a second, larger pass ──────────────────────────────────────────────────────────────────────────


def test_two_passes(at: Live, pipe: Pipeline) -> None:
    drawn = draw(at, enable_hr=True, hr_scale=1.5, denoising_strength=0.7, hr_second_pass_steps=4)
    shared: dict[str, Any] = {"seed": 7, "guidance_scale": 4.0, "sampler": "euler linspace"}
    small = pipe(PROMPT, width=64, height=64, num_inference_steps=3, output_type="latent", **shared)
    wanted = pipe(
        PROMPT,
        image=enlarge_latent(small.images, 12, 12),
        strength=0.7,
        num_inference_steps=4,
        width=96,
        height=96,
        **shared,
    )
    np.testing.assert_array_equal(shown(drawn["images"][0]), wanted.images[0])
    text = parse_infotext(json.loads(drawn["info"])["infotexts"][0])
    assert (text["Size"], text["Steps"]) == ("64x64", "3")
    assert (text["Hires resize"], text["Hires steps"], text["Hires upscaler"]) == ("96x96", "4", "Latent")


@pytest.mark.parametrize(
    ("fields", "words"),
    [
        ({"hr_upscaler": "R-ESRGAN 4x+"}, "hr_upscaler is 'R-ESRGAN 4x+'"),
        ({"hr_sampler_name": "DDIM"}, "hr_sampler_name is 'DDIM'"),
        ({"hr_checkpoint_name": "other"}, "hr_checkpoint_name is 'other'"),
        ({"hr_prompt": "another"}, "hr_prompt is 'another'"),
        ({"hr_resize_x": 128, "hr_resize_y": 64}, "hr_resize_x and hr_resize_y are 128 x 64"),
        ({"hr_scale": 5}, "hr_scale is 5"),
        ({"denoising_strength": 0}, "none is left to run"),
        ({"hr_resize_x": -8}, "hr_resize_x is -8"),
    ],
)
def test_second_passes_that_are_refused(at: Live, fields: dict[str, Any], words: str) -> None:
    assert words in refused(at, 400, enable_hr=True, **fields)


def test_a_second_pass_as_clients_leave_it(at: Live) -> None:
    drawn = draw(
        at,
        enable_hr=True,
        hr_resize_x=96,
        hr_upscaler=None,
        hr_sampler_name="Use same sampler",
        hr_scheduler="automatic".title(),
        hr_prompt=PROMPT,
        hr_checkpoint_name="Use same checkpoint",
        denoising_strength=None,
    )
    assert shown(drawn["images"][0]).shape == (96, 96, 3)
    assert refused(at, 413, enable_hr=True, width=2048, height=2048, hr_scale=4)


# ── pictures to start from ─────────────────────────────────────────────────────────────────────────


def start(**fields: Any) -> dict[str, Any]:
    return {"init_images": [encoded(photo(64, 64))], "steps": 4, **fields}


def test_a_data_url_is_a_picture_too(at: Live) -> None:
    bare = draw(at, "img2img", **start())
    url = draw(at, "img2img", **start(init_images=[f"data:image/png;base64,{encoded(photo(64, 64))}"]))
    assert bare["images"] == url["images"]
    echoed = draw(at, "img2img", **start(include_init_images=True))
    assert echoed["parameters"]["init_images"] == start()["init_images"]


@pytest.mark.parametrize(("mode", "name"), [(0, "default"), (1, "crop"), (2, "fill")])
def test_resize_modes(at: Live, pipe: Pipeline, mode: int, name: Any) -> None:
    wide = photo(64, 128)
    drawn = draw(at, "img2img", **start(init_images=[encoded(wide)], resize_mode=mode))
    wanted = pipe(
        PROMPT,
        image=wide,
        resize_mode=name,
        strength=0.75,
        num_inference_steps=4,
        width=64,
        height=64,
        seed=7,
        guidance_scale=4.0,
        sampler="euler linspace",
    )
    np.testing.assert_array_equal(shown(drawn["images"][0]), wanted.images[0])
    masked = draw(
        at,
        "img2img",
        **start(
            init_images=[encoded(wide)], resize_mode=mode, mask=encoded(np.full((64, 128), 255, np.uint8))
        ),
        inpaint_full_res=False,
        inpainting_fill=1,
    )
    assert shown(masked["images"][0]).shape == (64, 64, 3)


def test_a_masks_surroundings_are_drawn_at_full_size(at: Live, pipe: Pipeline) -> None:
    large, mask = photo(128, 128), np.zeros((128, 128), np.uint8)
    mask[40:70, 50:80] = 255
    fields = start(
        init_images=[encoded(large)],
        mask=encoded(255 - mask),
        inpainting_mask_invert=1,
        inpainting_fill=1,
        inpaint_full_res_padding=8,
        mask_blur=2,
    )
    drawn = draw(at, "img2img", **fields)
    wanted = pipe(
        PROMPT,
        image=large,
        mask_image=Image.fromarray(mask),
        padding_mask_crop=8,
        mask_blur=2,
        strength=0.75,
        num_inference_steps=4,
        width=64,
        height=64,
        seed=7,
        guidance_scale=4.0,
        sampler="euler linspace",
    )
    np.testing.assert_array_equal(shown(drawn["images"][0]), wanted.images[0])
    assert shown(drawn["images"][0]).shape == (128, 128, 3)


def test_what_is_opaque_in_a_mask_is_drawn_anew(at: Live) -> None:
    painted = np.zeros((64, 64, 4), np.uint8)
    painted[:, :32, 3] = 255  # black strokes
    white = np.pad(np.full((64, 32), 255, np.uint8), ((0, 0), (0, 32)))
    one = draw(at, "img2img", **start(mask=encoded(painted)))
    other = draw(at, "img2img", **start(mask=encoded(white)))
    assert one["images"] == other["images"]


def test_colours_spread_under_a_mask() -> None:
    mask = np.zeros((96, 96), np.uint8)
    mask[30:60, 30:60] = 255
    flat = np.full((96, 96, 3), (200, 40, 90), np.uint8)
    flat[30:60, 30:60] = 0
    filled = np.asarray(fill_under(Image.fromarray(flat), Image.fromarray(mask)))
    assert np.abs(filled.astype(int) - (200, 40, 90)).max() <= 6, "one colour around is one colour under it"
    halves = np.zeros((96, 96, 3), np.uint8)
    halves[:, 48:] = 255
    filled = np.asarray(fill_under(Image.fromarray(halves), Image.fromarray(mask)))[..., 0]
    np.testing.assert_array_equal(filled[mask == 0], halves[..., 0][mask == 0])
    assert filled[45, 31] < 40, "near the left edge it is black"
    assert filled[45, 58] > 215
    whole = np.full((96, 96), 255, np.uint8)
    assert np.array_equal(fill_under(Image.fromarray(halves), Image.fromarray(whole)), halves)


START_REFUSED: list[tuple[dict[str, Any], int, str]] = [
    ({"init_images": None}, 404, "Init image not found"),
    ({"init_images": []}, 404, "Init image not found"),
    ({"init_images": [encoded(np.zeros((64, 64, 3), np.uint8))] * 2}, 400, "init_images has 2 pictures"),
    ({"init_images": ["http://127.0.0.1/a.png"]}, 400, "init_images is no base64"),
    ({"init_images": ["/etc/passwd"]}, 400, "init_images"),
    ({"init_images": [7]}, 400, "init_images is no text"),
    ({"init_images": "x"}, 422, "init_images is 'x'"),
    ({"mask": ["x"]}, 422, "mask is ['x']"),
    ({"mask": "x"}, 400, "mask is no base64"),
    ({"resize_mode": 3}, 400, "resize_mode is 3"),
    ({"latent_mask": "x"}, 400, "latent_mask is 'x'"),
    ({"denoising_strength": 1.5}, 400, "strength is 1.5"),
    ({"mask": encoded(np.full((64, 64), 255, np.uint8)), "inpainting_fill": 2}, 400, "inpainting_fill is 2"),
    ({"mask": encoded(np.full((64, 64), 255, np.uint8)), "mask_blur_x": 2}, 400, "mask_blur_x is 2"),
    ({"mask": encoded(np.zeros((64, 64), np.uint8))}, 400, "nothing to repaint"),
]


@pytest.mark.parametrize(("fields", "status", "words"), START_REFUSED)
def test_starts_that_are_refused(at: Live, fields: dict[str, Any], status: int, words: str) -> None:
    assert words in refused(at, status, "img2img", **{**start(), **fields})


# ── what is refused, and what is listed ────────────────────────────────────────────────────────────

REFUSED: list[tuple[dict[str, Any], int, str]] = [
    ({"sampler_name": "fast"}, 400, "'fast"),
    ({"sampler_name": "DPM++ SDE"}, 400, "more than one noise"),
    ({"scheduler": "Align Your Steps"}, 400, "the scheduler is 'Align Your Steps'"),
    ({"styles": ["photo"]}, 400, "styles is ('photo',)"),
    ({"styles": [7]}, 422, "styles is [7]"),
    ({"subseed_strength": 0.1}, 400, "subseed_strength is 0.1"),
    ({"seed_resize_from_w": 512}, 400, "seed_resize_from_w is 512"),
    ({"restore_faces": True}, 400, "restore_faces is True"),
    ({"tiling": True}, 400, "tiling is True"),
    ({"refiner_checkpoint": "xl"}, 400, "refiner_checkpoint is 'xl'"),
    ({"script_name": "x/y plot"}, 422, "script_name is 'x/y plot'"),
    ({"alwayson_scripts": {"ADetailer": {"args": [True, {}]}}}, 422, "alwayson_scripts has 'ADetailer'"),
    ({"alwayson_scripts": {"controlnet": {"args": [7]}}}, 422, "controlnet.0 is 7"),
    ({"alwayson_scripts": {"controlnet": {"args": [{"model": "pose"}]}}}, 400, "a control is 'pose'"),
    ({"alwayson_scripts": {"controlnet": {"args": [{"model": "edges"}]}}}, 400, "image is missing"),
    (
        {"alwayson_scripts": {"controlnet": {"args": [{"model": "edges", "image": 7}]}}},
        422,
        "controlnet.0.image is 7",
    ),
    (
        {"alwayson_scripts": {"controlnet": {"args": [{"model": "edges", "control_mode": True}]}}},
        422,
        "controlnet.0.control_mode is True",
    ),
    (
        {
            "alwayson_scripts": {
                "controlnet": {
                    "args": [
                        {"model": "edges", "image": encoded(photo(64, 64)), "resize_mode": "Stretch"},
                    ]
                }
            }
        },
        400,
        "controlnet.0.resize_mode is 'Stretch'",
    ),
    (
        {
            "alwayson_scripts": {
                "controlnet": {
                    "args": [{"model": "edges", "image": encoded(photo(64, 64)), "module": "depth_midas"}]
                }
            }
        },
        400,
        "takes a net",
    ),
    ({"override_settings": {"sd_vae": "other.pt"}}, 400, "override_settings.sd_vae is 'other.pt'"),
    ({"override_settings": {"samples_format": "bmp"}}, 400, "bmp"),
    ({"override_settings": {"randn_source": "TPU"}}, 400, "randn_source is 'TPU'"),
    ({"override_settings": {"CLIP_stop_at_last_layers": 13}}, 400, "CLIP_stop_at_last_layers is 13"),
    ({"override_settings": []}, 422, "override_settings is []"),
    ({"steps": "many"}, 422, "steps is 'many'"),
    ({"steps": 2.5}, 422, "steps is 2.5"),
    ({"steps": True}, 422, "steps is True"),
    ({"steps": 0}, 400, "steps is 0; expected an integer"),
    ({"steps": 151}, 413, "151 steps"),
    ({"width": 65}, 400, "width is 65"),
    ({"batch_size": 6, "n_iter": 2}, 400, "n_iter * batch_size is 12"),
    ({"seed": -2}, 400, "seed is -2"),
    ({"prompt": ["a"]}, 422, "prompt is ['a']"),
    ({"prompt": "a\0"}, 422, "none of them NUL"),
    ({"cfg_scale": "7"}, 422, "cfg_scale is '7'"),
    ({"send_images": "yes"}, 422, "send_images is 'yes'"),
    ({"prompt": "<lora:none:1>"}, 400, "none"),
]


@pytest.mark.parametrize(("fields", "status", "words"), REFUSED)
def test_what_is_refused_before_a_step(at: Live, fields: dict[str, Any], status: int, words: str) -> None:
    assert words in refused(at, status, **fields)
    assert at.client.get("/sdapi/v1/progress").json() == IDLE


def test_what_has_no_effect_is_listed(at: Live) -> None:
    drawn = draw(
        at,
        url="http://127.0.0.1:7860",
        clip_skip=2,
        s_churn=0.5,
        save_images=True,
        styles=["None", ""],
        hr_second_pass_steps=10.0,
        refiner_switch_at=0.8,
        alwayson_scripts={"ADetailer": {"args": [False]}},
        override_settings={"eta_noise_seed_delta": 31337, "sd_vae": "Automatic"},
    )
    info = json.loads(drawn["info"])
    assert set(info["ignored"]) == {
        "url",
        "clip_skip",
        "s_churn",
        "save_images",
        "override_settings.eta_noise_seed_delta",
    }
    assert "url" not in drawn["parameters"]


def test_settings_of_one_request(at: Live, pipe: Pipeline) -> None:
    title = at.client.get("/sdapi/v1/sd-models").json()[0]["title"]
    settings = {"sd_model_checkpoint": title, "randn_source": "GPU", "samples_format": "webp"}
    drawn = draw(at, sampler_index="k_euler_a", scheduler="karras", override_settings=settings)
    picture = Image.open(io.BytesIO(base64.b64decode(drawn["images"][0])))
    assert picture.format == "WEBP"
    text = json.loads(drawn["info"])["infotexts"][0]
    wanted = pipe(
        PROMPT,
        width=64,
        height=64,
        num_inference_steps=3,
        seed=7,
        guidance_scale=4.0,
        sampler="euler_a karras",
        rng="torch-cuda",
    )
    assert text == wanted.infotext()
    old = draw(at, sampler_name="DPM++ 2M Karras")
    new = draw(at, sampler_name="DPM++ 2M", scheduler="Karras")
    assert old["images"] == new["images"]


def test_noise_of_ddim_is_the_clients_choice(at: Live, pipe: Pipeline) -> None:
    drawn = draw(at, sampler_name="DDIM", eta=0.5)
    wanted = pipe(
        PROMPT,
        width=64,
        height=64,
        num_inference_steps=3,
        seed=7,
        guidance_scale=4.0,
        sampler="ddim leading",
        eta=0.5,
    )
    np.testing.assert_array_equal(shown(drawn["images"][0]), wanted.images[0])
    assert json.loads(drawn["info"])["ignored"] == []


def test_images_are_sent_only_where_they_are_wanted(at: Live) -> None:
    drawn = draw(at, send_images=False, n_iter=2)
    assert drawn["images"] == []
    assert json.loads(drawn["info"])["all_seeds"] == [7, 8]


def test_services_that_are_not_here(at: Live) -> None:
    for name in ("interrogate", "extra-single-image", "create/embedding", "train/hypernetwork"):
        answer = at.client.post(f"/sdapi/v1/{name}", json={})
        assert answer.status_code == 501
        assert name in answer.json()["detail"]
    assert at.client.post("/sdapi/v1/server-kill").status_code == 404
    assert set(at.client.post("/sdapi/v1/server-kill").json()) == {"error", "detail", "body", "errors"}


# ── fuzz ───────────────────────────────────────────────────────────────────────────────────────────

ODD = [None, True, 0, -1, 1.5, 1e300, 10**30, "", "x", "a\0b", "../../etc/passwd", [], [None], {}, {"a": []}]


def test_odd_values_are_never_a_failure_of_the_server(at: Live) -> None:
    for value in ODD:
        assert at.client.post("/sdapi/v1/options", json={"sd_model_checkpoint": value}).status_code < 500
        assert at.client.post("/sdapi/v1/options", json={"unknown": value}).json() is None
        assert at.client.post("/sdapi/v1/png-info", json={"image": value}).status_code in (400, 413)
        told = at.client.post("/internal/progress", json={"id_task": value, "id_live_preview": value})
        assert told.status_code in (200, 422)
    assert at.client.post("/sdapi/v1/options", json=[]).status_code == 400
    assert at.client.post("/sdapi/v1/options", content=b'{"a": NaN}').status_code == 400


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text() | st.sampled_from(ODD),
    lambda inside: st.lists(inside, max_size=2) | st.dictionaries(st.text(), inside, max_size=2),
    max_leaves=4,
)


def sent_to(route: Route) -> st.SearchStrategy[dict[str, Any]]:
    """A request of which some fields have any value."""
    settings = st.fixed_dictionaries({}, optional=dict.fromkeys(SETTINGS, JSON))
    return st.fixed_dictionaries(
        {}, optional={**dict.fromkeys(FIELDS[route], JSON), "override_settings": settings | JSON}
    )


@pytest.mark.parametrize("route", ["txt2img", "img2img"])
def test_odd_values_of_every_field(at: Live, pipe: Pipeline, route: Route) -> None:
    """Whatever is no typed error would be answered with 500."""

    @hypothesis.settings(max_examples=150, deadline=None, database=None, derandomize=True)
    @hypothesis.given(odd=sent_to(route), few=st.booleans())
    def read(odd: dict[str, Any], few: bool) -> None:
        first = dict(list(odd.items())[:1]) if few else odd  # many odd ones are refused at the first
        try:
            wanted = read_wanted(route, {**SMALL, **start(), **first}, at.server, None)
            wanted.order.passes(pipe)
        except LatentrtError as error:
            if answer_to(error).status >= 500:
                raise

    read()


@pytest.mark.parametrize("value", ODD)
def test_odd_values_of_a_unit(at: Live, value: Any) -> None:
    for name in UNIT:
        unit = {"model": "edges", "image": encoded(photo(64, 64)), name: value}
        fields = {"alwayson_scripts": {"controlnet": {"args": [unit]}}}
        with suppress(UsageError):
            read_wanted("txt2img", {**SMALL, **fields}, at.server, None)


# ── progress of one's own ──────────────────────────────────────────────────────────────────────────


def test_progress_is_idle_after_a_failure(at: Live, monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(*_: Any, **__: Any) -> Any:
        raise ZeroDivisionError("/secret/path")

    with monkeypatch.context() as patch:
        patch.setattr("latentrt.serve.worker.write_picture", broken)
        answer = at.client.post("/sdapi/v1/txt2img", json=SMALL)
    assert answer.status_code == 500
    assert "secret" not in answer.text
    assert set(answer.json()) == {"error", "detail", "body", "errors"}
    assert at.client.get("/sdapi/v1/progress").json() == IDLE
    draw(at)
    assert at.client.get("/sdapi/v1/progress").json() == IDLE


def task(at: Live, name: str, **more: Any) -> dict[str, Any]:
    return at.client.post("/internal/progress", json={"id_task": name, **more}).json()


def test_progress_of_one_task(at: Live) -> None:
    assert task(at, "task(one)")["textinfo"] == "Waiting..."
    assert not any(task(at, "task(one)")[name] for name in ("active", "queued", "completed"))
    request = Behind(at, steps=150, force_task_id="task(one)")
    told = wait_for(lambda: (t := task(at, "task(one)"))["live_preview"] and t)
    assert told["active"]
    assert not told["completed"]
    assert 0 < told["progress"] <= 1
    assert told["live_preview"].startswith("data:image/jpeg;base64,")
    same = task(at, "task(one)", id_live_preview=told["id_live_preview"])
    assert same["id_live_preview"] >= told["id_live_preview"]
    assert (same["live_preview"] is None) == (same["id_live_preview"] == told["id_live_preview"])
    assert task(at, "task(one)", live_preview=False)["live_preview"] is None
    assert at.client.post("/sdapi/v1/skip").json() is None
    request.end()
    assert task(at, "task(one)")["completed"]
    assert not task(at, "task(one)")["active"]


def test_tasks_that_wait(pipe: Pipeline) -> None:
    with live(pipe, start=False) as waiting:
        first = Behind(waiting, force_task_id="task(a)")
        wait_for(lambda: task(waiting, "task(a)")["queued"])
        second = Behind(waiting, force_task_id="task(b)")
        wait_for(lambda: task(waiting, "task(b)")["queued"])
        assert waiting.client.get("/internal/pending-tasks").json() == {
            "size": 2,
            "tasks": ["task(a)", "task(b)"],
        }
        assert task(waiting, "task(b)")["textinfo"] == "In queue: 2"
        told = waiting.client.get("/sdapi/v1/progress").json()
        assert told["state"]["job_count"] == 1
        assert told["textinfo"] == "Waiting..."
        assert waiting.client.post("/sdapi/v1/interrupt").json() == {}
        assert first.end().json()["images"] == [], "the oldest"
        assert task(waiting, "task(b)")["queued"]
        waiting.client.post("/sdapi/v1/interrupt")
        second.end()
        assert waiting.client.get("/sdapi/v1/progress").json() == IDLE


def test_nobody_sees_or_ends_anothers_job(pipe: Pipeline) -> None:
    keys = keys_of_environment("K", {"K": " ".join(KEYS)})
    with live(pipe, access=allow(keys=keys), start=False) as closed:
        mine, other = (webuiapi.WebUIApi(baseurl=f"{closed.url}/sdapi/v1") for _ in KEYS)
        for one, key in zip((mine, other), KEYS, strict=True):
            one.set_auth("anyone", key)
        basic = base64.b64encode(f"anyone:{KEYS[0]}".encode()).decode()
        request = Behind(closed, headers={"authorization": f"Basic {basic}"}, force_task_id="task(x)")
        wait_for(lambda: mine.get_progress()["state"]["job_count"])
        assert other.get_progress() == IDLE
        other.interrupt()
        other.skip()
        assert mine.get_progress()["state"]["job_count"] == 1
        told = other.session.post(f"{closed.url}/internal/progress", json={"id_task": "task(x)"}).json()
        assert not told["queued"]
        mine.interrupt()
        assert request.end().status_code == 200
        assert mine.get_progress() == IDLE
        refusal = closed.client.get("/sdapi/v1/options")
        assert refusal.status_code == 401
        assert set(refusal.json()) == {"error", "detail", "body", "errors"}


def test_the_model_is_each_callers_own_choice(pipe: Pipeline) -> None:
    keys = keys_of_environment("K", {"K": " ".join(KEYS)})
    with live(pipe, access=allow(keys=keys), options=Options(strict_models=True), start=False) as closed:
        mine, other = ({"x-api-key": key} for key in KEYS)

        def post(headers: Any, name: Any) -> int:
            sent = {"sd_model_checkpoint": name}
            return closed.client.post("/sdapi/v1/options", json=sent, headers=headers).status_code

        assert post(mine, "other") == 404
        closed.server.workers["second"] = second = copy(closed.server.workers["demo"])
        second.model = "second"
        closed.server.paces["second"] = closed.server.paces["demo"]
        assert post(mine, "second [0123456789]") == 200
        assert post(mine, None) == 200
        for headers, name in ((mine, "second"), (other, "demo")):
            told = closed.client.get("/sdapi/v1/options", headers=headers).json()
            assert told["sd_model_checkpoint"].startswith(f"{name} [")
        titles = [one["title"] for one in closed.client.get("/sdapi/v1/sd-models", headers=other).json()]
        assert told["sd_model_checkpoint"] == titles[0]
        request = Behind(closed, headers=mine)
        wait_for(lambda: closed.server.jobs.counts().queued)
        closed.client.post("/sdapi/v1/interrupt", headers=mine)
        assert json.loads(request.end().json()["info"])["sd_model_name"] == "second"


def test_who_hangs_up_wants_no_picture(at: Live) -> None:
    before = at.server.jobs.counts().cancelled
    with (
        httpx.Client(base_url=at.url, timeout=0.3) as client,
        suppress(httpx.ReadTimeout),
    ):
        client.post("/sdapi/v1/txt2img", json={**SMALL, "steps": 150, "n_iter": 8})
    wait_for(lambda: at.server.jobs.counts().cancelled == before + 1)
    wait_for(lambda: at.client.get("/sdapi/v1/progress").json() == IDLE)


def test_a_server_that_ends_says_so(pipe: Pipeline) -> None:
    with live(pipe, start=False) as going:
        request = Behind(going)
        wait_for(lambda: going.client.get("/sdapi/v1/progress").json()["state"]["job_count"])
        going.server.jobs.cancel_all("shutdown")
        answer = request.end()
        assert answer.status_code == 503
        assert answer.json()["error"] == "cancelled"


def test_many_at_once_have_their_own_pictures(at: Live) -> None:
    def one(seed: int) -> Any:
        api = webuiapi.WebUIApi(baseurl=f"{at.url}/sdapi/v1")
        return api.txt2img(prompt=f"{PROMPT} {seed}", seed=seed, width=64, height=64, steps=2 + seed % 3)

    with ThreadPoolExecutor(8) as threads:
        for seed, drawn in enumerate(threads.map(one, range(8))):
            assert drawn.info["seed"] == seed
            assert drawn.image.info["parameters"].startswith(f"{PROMPT} {seed}\n")
    assert at.client.get("/sdapi/v1/progress").json() == IDLE


# ── as other clients send it, and what they read ───────────────────────────────────────────────────


def test_sillytavern(at: Live) -> None:
    get = at.client.get
    assert get("/sdapi/v1/options").status_code == 200, "its ping"
    upscalers = [one["name"] for one in get("/sdapi/v1/upscalers").json()]
    modes = [one["name"] for one in get("/sdapi/v1/latent-upscale-modes").json()]
    assert {*upscalers, *modes} >= {"None", "Latent"}
    assert get("/sdapi/v1/sd-vae").json() == get("/sdapi/v1/sd-modules").json() == []
    samplers = [one["name"] for one in get("/sdapi/v1/samplers").json()]
    schedulers = [one["name"] for one in get("/sdapi/v1/schedulers").json()]
    title = get("/sdapi/v1/sd-models").json()[0]["title"]
    assert at.client.post("/sdapi/v1/options", json={"sd_model_checkpoint": title}).status_code == 200
    told = get("/sdapi/v1/progress").json()
    assert (told["progress"], told["state"]["job_count"]) == (0, 0), "else it waits for 20 s"
    drawn = draw(
        at,
        url=at.url,
        auth="",
        negative_prompt="blurry",
        sampler_name=samplers[samplers.index("Euler a")],
        scheduler=schedulers[0],
        restore_faces=False,
        enable_hr=False,
        hr_upscaler="Latent",
        hr_scale=2,
        hr_additional_modules=[],
        hr_second_pass_steps=0,
        denoising_strength=0.7,
        clip_skip=1,
        override_settings={"CLIP_stop_at_last_layers": 1, "sd_vae": None, "forge_additional_modules": []},
        override_settings_restore_afterwards=True,
        save_images=True,
        send_images=True,
        do_not_save_grid=False,
        do_not_save_samples=False,
    )
    assert shown(drawn["images"][0]).shape == (64, 64, 3)


def test_open_webui(at: Live) -> None:
    headers = {"authorization": ""}
    options = at.client.get("/sdapi/v1/options", headers=headers).json()
    models = at.client.get("/sdapi/v1/sd-models", headers=headers).json()
    assert {"title", "model_name"} <= set(models[0])
    options["sd_model_checkpoint"] = models[0]["title"]
    assert at.client.post("/sdapi/v1/options", json=options, headers=headers).status_code == 200
    sent = {"prompt": PROMPT, "batch_size": 2, "width": 64, "height": 64, "steps": 2}
    answer = at.client.post("/sdapi/v1/txt2img", json=sent, headers=headers).json()
    assert len([base64.b64decode(image) for image in answer["images"]]) == 2
    assert answer["info"]


def test_librechat(at: Live) -> None:
    fields = {"negative_prompt": "blurry", "cfg_scale": 4.5, "steps": 2, "width": 64, "height": 64}
    answer = at.client.post("/sdapi/v1/txt2img", json={"prompt": PROMPT, **fields}).json()
    picture = answer["images"][0].split(",", 1)[0]
    info = json.loads(answer["info"])
    assert (info["width"], info["height"]) == (64, 64)
    text = read_metadata(base64.b64decode(picture)).parameters
    assert text == info["infotexts"][0]
    assert f"Seed: {info['seed']}" in info["infotexts"][0]


def test_aiyabot(at: Live) -> None:
    get = at.client.get
    assert get("/sdapi/v1/cmd-flags").status_code == 200, "401 and 404 mean something to it"
    assert get("/sdapi/v1/version").json()["app"] == "latentrt"
    lists = (
        "samplers",
        "prompt-styles",
        "face-restorers",
        "hypernetworks",
        "upscalers",
        "sd-models",
        "loras",
    )
    assert all(isinstance(get(f"/sdapi/v1/{name}").json(), list) for name in lists)
    assert isinstance(get("/sdapi/v1/embeddings").json()["loaded"], dict)
    title = get("/sdapi/v1/sd-models").json()[0]["title"]
    at.client.post("/sdapi/v1/options", json={"sd_model_checkpoint": title})
    drawn = draw(
        at,
        sampler_index="DPM++ 2M",
        denoising_strength=None,
        tiling=False,
        styles=["None"],
        hr_second_pass_steps=2.0,
        enable_hr=None,
        hr_upscaler=None,
    )
    for image in drawn["images"]:
        sent = {"image": f"data:image/png;base64,{image}"}
        told = at.client.post("/sdapi/v1/png-info", json=sent).json()
        assert told["info"].startswith(PROMPT)
        assert "latentrt" in told["items"]


def test_a_picture_that_says_nothing(at: Live) -> None:
    told = at.client.post("/sdapi/v1/png-info", json={"image": encoded(photo(16, 16))}).json()
    assert told == {"info": "", "items": {}, "parameters": {}}


def test_an_api_of_its_own_in_the_document(at: Live) -> None:
    paths = at.client.get("/openapi.json").json()["paths"]
    ours = {path for path in paths if path.startswith(("/sdapi/", "/internal/"))}
    assert {"/sdapi/v1/txt2img", "/sdapi/v1/samplers", "/internal/progress"} <= ours
    assert not [path for path in ours if "server" in path]
