"""Pictures drawn again from their files: byte-equal whatever they started from, and other programs' texts."""

from __future__ import annotations

import logging
import re
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image, PngImagePlugin

from latentrt.engines.errors import UsageError
from latentrt.runtime.pictures.write import read_metadata
from latentrt.runtime.pipeline import Pipeline
from latentrt.runtime.redraw import redraw
from latentrt.runtime.refine import refine
from latentrt.runtime.result import Result

FAST: dict[str, Any] = {"num_inference_steps": 4, "height": 64, "width": 64}


@pytest.fixture(scope="module")
def pipe() -> Iterator[Pipeline]:
    with Pipeline.open("demo", threads=1) as opened:
        yield opened


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    shades = np.random.default_rng(0).integers(0, 256, (64, 64, 3), np.uint8)
    Image.fromarray(shades).save(tmp_path / "start.png")
    mask = np.zeros((64, 64), np.uint8)
    mask[16:48, 16:40] = 255
    Image.fromarray(mask).save(tmp_path / "mask.png")
    np.save(tmp_path / "noise.npy", np.random.default_rng(1).standard_normal((2, 4, 8, 8), np.float32))
    return tmp_path


def same(one: Result, other: Result, index: int = 0) -> bool:
    return bool(np.array_equal(np.asarray(one.images[0]), np.asarray(other.images[index])))


STARTS: dict[str, dict[str, Any]] = {
    "noise": {"negative_prompt": "blue", "sampler": "Euler a", "eta": 0.0},
    "another sampler": {"sampler": "ddim", "eta": 0.5, "guidance_rescale": 0.3},
    "a scheduler config": {"sampler": {"_class_name": "EulerDiscreteScheduler", "use_karras_sigmas": True}},
    "timesteps": {"sampler": "euler", "timesteps": [900, 600, 300, 1]},
    "a picture": {"image": "start.png", "strength": 0.7, "resize_mode": "crop"},
    "a mask": {"image": "start.png", "mask_image": "mask.png", "mask_blur": 1.5},
    "a region": {"image": "start.png", "mask_image": "mask.png", "padding_mask_crop": 4},
    "latents": {"latents": "noise.npy"},
    "tiles": {"tile": 64, "prompt_syntax": "plain", "rng": "torch-cuda"},
    "part of the schedule": {"denoising_end": 0.5},
    "guidance in a part": {"guidance_scale": 5.0, "guidance_interval": (0.0, 0.5)},
    "guidance of each step": {"guidance_scale": [5.0, 3.0, 1.0, 2.0]},
    "sigmas": {"sampler": "euler", "sigmas": [14.0, 3.0, 1.0, 0.0]},
    "published steps": {"sampler": "dpmpp_2m_ays"},
}


@pytest.mark.parametrize("start", STARTS)
@pytest.mark.parametrize("suffix", [".png", ".jpg", ".webp"])
def test_the_file_alone_draws_the_same(pipe: Any, folder: Path, start: str, suffix: str) -> None:
    chosen = {**FAST, **STARTS[start]}
    for name in ("image", "mask_image"):
        if name in chosen:
            chosen[name] = folder / chosen[name]
    if "latents" in chosen:
        chosen["latents"] = np.load(folder / chosen["latents"])
    if {"timesteps", "sigmas"} & chosen.keys():
        del chosen["num_inference_steps"]
    prompts = ["a red (circle:1.2)", "a green star"] if start != "a mask" else ["a red circle"]
    drawn = pipe(prompts, seed=[3, 8][: len(prompts)], **chosen)
    last = len(prompts) - 1
    drawn.save(folder / f"picture{suffix}", last)
    again = redraw(pipe, folder / f"picture{suffix}")
    assert same(again, drawn, last)
    assert again.record() == drawn.record(last)
    by_record = redraw(pipe, drawn.record(last), **_given(folder, chosen, last))
    assert same(by_record, drawn, last)


def _given(folder: Path, chosen: dict[str, Any], index: int) -> dict[str, Any]:
    """The inputs as a caller passes them: another file of the same pixels, or the whole array."""
    found: dict[str, Any] = {}
    for name in ("image", "mask_image"):
        if name in chosen:
            copy = folder / f"copy of {name}.webp"
            Image.open(chosen[name]).convert("RGB").save(copy, lossless=True)
            found[name] = copy
    if "latents" in chosen:
        found["latents"] = chosen["latents"][index : index + 1]
    return found


def test_several_pictures_to_start_from(pipe: Any, folder: Path) -> None:
    second = Image.open(folder / "start.png").rotate(90)
    second.save(folder / "second.png")
    drawn = pipe(["a", "b"], image=[folder / "start.png", folder / "second.png"], seed=1, **FAST)
    assert [drawn.record(i)["image"]["name"] for i in (0, 1)] == ["start.png", "second.png"]
    for index in (0, 1):
        drawn.save(folder / "picture.png", index)
        assert same(redraw(pipe, folder / "picture.png"), drawn, index)


def test_several_pictures_of_each_picture(pipe: Any, folder: Path) -> None:
    start = Image.open(folder / "start.png")
    start.transpose(Image.Transpose.ROTATE_180).save(folder / "second.png")
    images = [folder / "start.png", folder / "second.png"]
    drawn = pipe(["a", "b"], image=images, num_images_per_prompt=2, seed=[1, 2, 3, 4], **FAST)
    names = [drawn.record(i)["image"]["name"] for i in range(4)]
    assert names == ["start.png", "start.png", "second.png", "second.png"]
    for index in range(4):
        image = folder / names[index]
        assert same(redraw(pipe, drawn.record(index), image=image), drawn, index)


def test_a_refined_picture(pipe: Any, folder: Path) -> None:
    drawn = refine(pipe, pipe, "a red star", at=0.5, image=folder / "start.png", strength=1.0, seed=4, **FAST)
    drawn.save(folder / "refined.png")
    assert same(redraw(pipe, folder / "refined.png", refiner=pipe), drawn)
    with pytest.raises(UsageError, match="ended by the refiner 'demo'"):
        redraw(pipe, folder / "refined.png")
    text = read_metadata(folder / "refined.png").parameters or ""
    assert "Refiner: demo, Refiner switch at: 0.5" in text


def test_changes(pipe: Any, folder: Path) -> None:
    pipe("a red star", seed=4, **FAST).save(folder / "a.png")
    again = redraw(pipe, folder / "a.png", seed=5, prompt="a blue star")
    assert same(again, pipe("a blue star", seed=5, **FAST))


def test_inputs_are_found_by_what_they_show(pipe: Any, folder: Path) -> None:
    drawn = pipe("a", image=np.asarray(Image.open(folder / "start.png")), seed=1, **FAST)
    drawn.save(folder / "a.png")
    (folder / "start.png").rename(folder / "renamed.png")
    assert same(redraw(pipe, folder / "a.png"), drawn)
    (folder / "renamed.png").unlink()
    with pytest.raises(UsageError, match=r"the image that the picture started from is missing"):
        redraw(pipe, folder / "a.png")
    with pytest.raises(UsageError, match=r"image is not what the picture started from"):
        redraw(pipe, folder / "a.png", image=folder / "mask.png")
    with pytest.raises(UsageError, match=r"image is missing|started from is missing"):
        redraw(pipe, drawn.record())
    pipe("a", seed=1, **FAST).save(folder / "b.png")
    with pytest.raises(UsageError, match=r"mask_image for a picture that did not start from one"):
        redraw(pipe, folder / "b.png", mask_image=folder / "mask.png")


def test_another_model_is_named(pipe: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    drawn = pipe("a red star", seed=4, **FAST)
    heard: list[str] = []
    handler = logging.Handler()
    handler.emit = lambda record: heard.append(record.getMessage())  # type: ignore[method-assign]
    logging.getLogger("latentrt").addHandler(handler)
    try:
        redraw(pipe, {**drawn.record(), "model": "dreamshaper", "model_sha256": "0" * 64})
        redraw(pipe, drawn.record())
        given = {
            "vae": {"name": "its vae", "sha256": "12" * 32},
            "fused": [
                {"name": "fast.safetensors", "sha256": "34" * 32, "strength": 0.8},
                {
                    "name": "a: b",
                    "sha256": "56" * 32,
                    "strength": {"unet": 1.0, "text_encoder": {"down": 1.0}},
                },
                {"name": 5},
            ],
            "few_steps": "lcm",
            "prediction_type": "v_prediction",
            "dtype": 5,
        }
        redraw(pipe, {**drawn.record(), "model_sha256": "0" * 64, "opened_with": given})
        with monkeypatch.context() as patch:
            patch.setitem(vars(pipe), "package", replace(pipe.package, opened_with={"dtype": "fp32"}))
            redraw(pipe, {**drawn.record(), "model_sha256": "0" * 64, "opened_with": "no object"})
    finally:
        logging.getLogger("latentrt").removeHandler(handler)
    line, opened, without = heard
    assert "drawn with 'dreamshaper', sha256 000000000000; this is 'demo'" in line
    assert line.endswith("it may differ")
    options = (
        "--vae 'its vae' --prediction-type v_prediction --fuse-lora fast.safetensors:0.8 --fuse-lora 'a: b'"
        " --few-steps lcm"
    )
    hashes = "121212121212, 343434343434, 565656565656, None"
    assert opened.endswith(
        f"it may differ. It was opened with {options} (sha256 {hashes}); open it so:"
        f" latentrt generate --from PICTURE -m MODEL {options}"
    )
    assert without.endswith("it may differ. It was opened without --dtype fp32")


def _of_a1111(path: Path, text: str) -> Path:
    chunks = PngImagePlugin.PngInfo()
    chunks.add_text("parameters", text)
    Image.new("RGB", (64, 64)).save(path, pnginfo=chunks)
    return path


def test_a_picture_of_automatic1111(pipe: Any, folder: Path) -> None:
    text = (
        "a red (circle:1.2)\nNegative prompt: blue\nSteps: 4, Sampler: DPM++ 2M, Schedule type: Karras, "
        "CFG scale: 5, Seed: 17, Size: 64x72, Model hash: 6ce0161689, Model: v1-5, RNG: CPU, Clip skip: 1, "
        "Hires upscale: 2, Denoising strength: 0.7, Version: v1.10.1"
    )
    heard: list[str] = []
    handler = logging.Handler()
    handler.emit = lambda record: heard.append(record.getMessage())  # type: ignore[method-assign]
    logging.getLogger("latentrt").addHandler(handler)
    try:
        again = redraw(pipe, _of_a1111(folder / "theirs.png", text))
    finally:
        logging.getLogger("latentrt").removeHandler(handler)
    wanted = pipe(
        "a red (circle:1.2)", negative_prompt="blue", num_inference_steps=4, sampler="DPM++ 2M Karras",
        guidance_scale=5, seed=17, width=64, height=72,
    )  # fmt: skip
    assert same(again, wanted)
    (line,) = heard
    assert "Hires upscale: 2" in line
    assert "Denoising strength: 0.7" in line
    assert "Model: v1-5" in line


@pytest.mark.parametrize("read", [Path, Path.read_bytes, read_metadata])
def test_what_is_not_carried_over_is_one_short_line(
    pipe: Any, folder: Path, logged: list[str], read: Any
) -> None:
    """Whatever the picture was given as: its file, the content of it, or what was read from it."""
    text = f"{'a long prompt ' * 100}\nSteps: 4, Seed: 1, Size: 64x64, Hires upscale: 2, Sampler: Euler"
    source = read(_of_a1111(folder / "a.png", text))
    redraw(pipe, source)
    (line,) = (line for line in logged if "not carried over" in line)
    name = str(source) if isinstance(source, Path) else "the picture"
    assert line == f"not carried over from {name}: Hires upscale: 2"
    nothing = read(folder / "start.png")
    name = str(nothing) if isinstance(nothing, Path) else "the picture"
    with pytest.raises(UsageError, match=f"^{re.escape(name)} does not say how it was made"):
        redraw(pipe, nothing)


def test_a_sampler_that_is_not_here(pipe: Any, folder: Path) -> None:
    text = "a\nSteps: 4, Sampler: DPM++ SDE, Schedule type: Karras, Seed: 1, Size: 64x64, RNG: CPU"
    assert same(redraw(pipe, _of_a1111(folder / "a.png", text)), pipe("a", seed=1, **FAST))


def test_a_picture_that_says_nothing(pipe: Any, folder: Path) -> None:
    with pytest.raises(UsageError, match="does not say how it was made"):
        redraw(pipe, folder / "start.png")


def test_an_input_keeps_the_name_it_had(pipe: Any, folder: Path) -> None:
    drawn = pipe("a", image=folder / "start.png", seed=1, **FAST)
    drawn.save(folder / "a.png")
    (folder / "start.png").rename(folder / "renamed.png")
    assert redraw(pipe, folder / "a.png").to_bytes() == drawn.to_bytes()
    unnamed = pipe("a", image=np.asarray(Image.open(folder / "renamed.png")), seed=1, **FAST)
    unnamed.save(folder / "b.png")
    assert redraw(pipe, folder / "b.png").to_bytes() == unnamed.to_bytes()


def test_the_content_of_a_file(pipe: Any) -> None:
    drawn = pipe("a red star", seed=4, **FAST)
    assert redraw(pipe, drawn.to_bytes()).to_bytes() == drawn.to_bytes()


def test_a_change_displaces_its_rival(pipe: Any) -> None:
    drawn = pipe("a", seed=4, sampler="euler", **FAST)
    timed = redraw(pipe, drawn.record(), timesteps=[900, 500])
    assert same(redraw(pipe, timed.record(), num_inference_steps=4), drawn)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"grid": 4}, "4 pictures side by side"),
        ({"image": "s.png"}, "the record's image is"),
        ({"image": {"name": "s.png"}}, "the record's image is"),
        ({"prompt": ["a", "b"]}, "the record's prompt is"),
        ({"sampler": {"name": "euler", "scheduler": "FutureScheduler", "noise": {}}}, "FutureScheduler"),
        ({"sampler": {"name": None, "scheduler": "DDIMScheduler", "noise": {}}}, "has no None"),
    ],
)
def test_a_record_that_cannot_be_drawn(pipe: Any, change: dict[str, Any], message: str) -> None:
    record = pipe("a", seed=1, **FAST).record()
    with pytest.raises(UsageError, match=message):
        redraw(pipe, {**record, **change})


def test_a_refiner_that_had_no_part(pipe: Any) -> None:
    with pytest.raises(UsageError, match="a refiner for a picture that none ended"):
        redraw(pipe, pipe("a", seed=1, **FAST).record(), refiner=pipe)
