"""The pipeline with diffusers' call beside diffusers itself: one set of arguments for both."""

from __future__ import annotations

import inspect
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import diffusers
import numpy as np
import pytest
import torch
from diffusers import (
    StableDiffusionImg2ImgPipeline,
    StableDiffusionInpaintPipeline,
    StableDiffusionPipeline,
)
from diffusers.pipelines.stable_diffusion import StableDiffusionPipelineOutput

from latentrt import CancelledError, Pipeline, UsageError
from latentrt.hosts.diffusers import LatentrtPipeline
from latentrt.runtime.model import ADAPTERS
from tests.parity_pair import BAR, blob, photo, psnr

pytestmark = [
    pytest.mark.filterwarnings("ignore:.*__array.*:DeprecationWarning"),
    pytest.mark.filterwarnings("ignore:.*is deprecated:FutureWarning"),
]
DEMO = Path(__file__).resolve().parent.parent.parent / "demo"
PROMPT = "a red circle on a blue background"
KINDS = {
    "text": StableDiffusionPipeline,
    "image": StableDiffusionImg2ImgPipeline,
    "mask": StableDiffusionInpaintPipeline,
}
FAST: dict[str, Any] = {"prompt": PROMPT, "num_inference_steps": 6, "height": 64, "width": 64}


@pytest.fixture(scope="module")
def ours() -> Iterator[LatentrtPipeline]:
    usual = {"safety_checker": None, "requires_safety_checker": False, "use_safetensors": True}
    with LatentrtPipeline.from_pretrained("demo", torch_dtype=torch.float32, **usual) as opened:
        yield opened


def test_what_opening_has_no_counterpart_of() -> None:
    with pytest.raises(UsageError, match="the argument 'device_map'"):
        LatentrtPipeline.from_pretrained("demo", device_map="balanced")


@pytest.mark.parametrize("kind", ["tensor", "tensors", "list"])
def test_kinds_of_pictures(ours: LatentrtPipeline, kind: str) -> None:
    image, mask = photo(64, 64), blob(64, 64)
    pixels = torch.from_numpy(np.asarray(image).transpose(2, 0, 1).copy()) / 255
    given = {
        "tensor": {"image": pixels, "mask_image": torch.from_numpy(np.asarray(mask) / np.float32(255))},
        "tensors": {"image": pixels[None], "mask_image": [mask]},
        "list": {"image": [image], "mask_image": [mask]},
    }[kind]
    wanted = ours(image=image, mask_image=mask, generator=generator(), **FAST)
    np.testing.assert_array_equal(pictures(ours(generator=generator(), **given, **FAST)), pictures(wanted))


@pytest.fixture(scope="module")
def theirs() -> dict[str, Any]:
    made: dict[str, Any] = {}
    for kind, pipeline in KINDS.items():
        unsafe = {"safety_checker": None, "requires_safety_checker": False}
        made[kind] = pipeline.from_pretrained(DEMO / "checkpoint", torch_dtype=torch.float32, **unsafe)
        made[kind].set_progress_bar_config(disable=True)
    return made


def generator(seed: int = 7) -> torch.Generator:
    return torch.Generator("cpu").manual_seed(seed)


def pictures(answer: Any) -> np.ndarray:
    return np.stack([np.asarray(image) for image in answer.images])


CALLS: dict[str, tuple[str, dict[str, Any]]] = {
    "text": ("text", {}),
    "defaults": ("text", {"num_inference_steps": None, "height": None, "width": None}),
    "several": ("text", {"prompt": [PROMPT, "a green star"], "negative_prompt": ["a square", ""]}),
    "images per prompt": ("text", {"num_images_per_prompt": 2}),
    "without guidance": ("text", {"guidance_scale": 1.0}),
    "rescaled": ("text", {"guidance_rescale": 0.7}),
    "weights are letters": ("text", {"prompt": "a (red:1.5) circle"}),
    "timesteps": ("text", {"timesteps": [900, 600, 300, 1], "num_inference_steps": None}),
    "image": ("image", {"image": photo(64, 64), "strength": 0.6, "height": None, "width": None}),
    "image, defaults": ("image", {"image": photo(64, 64), "height": None, "width": None}),
    "mask": ("mask", {"image": photo(64, 64), "mask_image": blob(64, 64)}),
}


@pytest.mark.parametrize("name", CALLS)
def test_the_same_call_draws_the_same(ours: LatentrtPipeline, theirs: dict[str, Any], name: str) -> None:
    kind, more = CALLS[name]
    arguments = {key: value for key, value in {**FAST, **more}.items() if value is not None}
    known = inspect.signature(KINDS[kind].__call__).parameters
    arguments = {key: value for key, value in arguments.items() if key in known}
    count = len(arguments["prompt"]) if isinstance(arguments["prompt"], list) else 1
    count *= arguments.get("num_images_per_prompt", 1)
    wanted, found = (
        pipe(
            generator=[generator(3 + one) for one in range(count)] if count > 1 else generator(), **arguments
        )
        for pipe in (theirs[kind], ours)
    )
    assert isinstance(found, StableDiffusionPipelineOutput)
    assert found.nsfw_content_detected is None
    assert len(found.images) == count
    expected = pictures(wanted)
    if kind == "mask":  # what is not masked stays as it is here, as AUTOMATIC1111 does
        inside = np.asarray(arguments["mask_image"]) >= 128
        expected = np.where(inside[..., None], expected, np.asarray(arguments["image"]))
    assert psnr(expected, pictures(found)) > BAR


def test_one_generator_for_several(ours: LatentrtPipeline, theirs: dict[str, Any]) -> None:
    """diffusers draws one block of noise for all; and the generator goes on as there."""
    one, other = generator(), generator()
    for _ in range(2):
        wanted = theirs["text"](generator=one, num_images_per_prompt=2, **FAST)
        found = ours(generator=other, num_images_per_prompt=2, **FAST)
        assert psnr(pictures(wanted), pictures(found)) > BAR


def test_latents_that_are_passed(ours: LatentrtPipeline, theirs: dict[str, Any]) -> None:
    noise = torch.randn((1, 4, 8, 8), generator=generator())
    wanted = theirs["text"](latents=noise, **FAST)
    found = ours(latents=noise, **FAST)
    assert psnr(pictures(wanted), pictures(found)) > BAR


@pytest.mark.parametrize("output_type", ["np", "pt", "latent"])
def test_kinds_of_output(ours: LatentrtPipeline, theirs: dict[str, Any], output_type: str) -> None:
    wanted = theirs["text"](generator=generator(), output_type=output_type, **FAST).images
    found = ours(generator=generator(), output_type=output_type, **FAST).images
    assert type(found) is type(wanted)
    assert (found.shape, found.dtype) == (wanted.shape, wanted.dtype)
    assert abs(found - wanted).max() < 0.02
    images, unsafe = ours(generator=generator(), output_type=output_type, return_dict=False, **FAST)
    assert (abs(images - found).max(), unsafe) == (0, None)


@pytest.mark.parametrize("kind", ["EulerAncestralDiscreteScheduler", "DPMSolverMultistepScheduler"])
def test_another_scheduler(ours: LatentrtPipeline, theirs: dict[str, Any], kind: str) -> None:
    before = theirs["text"].scheduler
    assert type(ours.scheduler) is type(before)
    try:
        theirs["text"].scheduler = getattr(diffusers, kind).from_config(before.config)
        ours.scheduler = getattr(diffusers, kind).from_config(ours.scheduler.config)
        wanted = theirs["text"](generator=generator(), **FAST)
        found = ours(generator=generator(), **FAST)
    finally:
        theirs["text"].scheduler, ours._scheduler = before, None
    assert psnr(pictures(wanted), pictures(found)) > BAR


def test_callbacks_see_and_change_latents(ours: LatentrtPipeline, theirs: dict[str, Any]) -> None:
    def after(pipe: Any, index: int, timestep: Any, state: dict[str, Any]) -> dict[str, Any]:
        told.append((index, float(timestep), float(state["latents"].mean())))
        return {"latents": state["latents"] * 0.98}

    told: list[tuple[int, float, float]] = []
    wanted = theirs["text"](generator=generator(), callback_on_step_end=after, **FAST)
    expected, told = told, []
    found = ours(generator=generator(), callback_on_step_end=after, **FAST)
    np.testing.assert_allclose(told, expected, atol=1e-3)
    assert psnr(pictures(wanted), pictures(found)) > BAR


def test_a_callback_may_end_it(ours: LatentrtPipeline) -> None:
    def after(pipe: Any, index: int, timestep: Any, state: dict[str, Any]) -> dict[str, Any]:
        pipe._interrupt = index == 1
        seen.append(index)
        return state

    seen: list[int] = []
    with pytest.raises(CancelledError):
        ours(callback_on_step_end=after, **FAST)
    assert seen == [0, 1]


def test_adapters(ours: LatentrtPipeline) -> None:
    """As `Pipeline` draws with them, whose parity with PEFT is shown elsewhere."""
    file = next(ADAPTERS["demo"].glob("*.safetensors"))
    with Pipeline.open("demo") as pipe:
        name = pipe.load_lora_weights(file)
        parameters = {"seed": 7, "guidance_scale": 7.5, "prompt_syntax": "plain", **FAST}
        plain, half = (
            np.asarray(pipe(loras=[(name, strength)] if strength else [], **parameters).images[0])
            for strength in (0.0, 0.5)
        )
    ours.load_lora_weights(file.parent, weight_name=file.name, adapter_name="striped")
    found = ours(generator=generator(), cross_attention_kwargs={"scale": 0.5}, **FAST)
    np.testing.assert_array_equal(pictures(found)[0], half)
    ours.set_adapters("striped", 0.5)
    np.testing.assert_array_equal(pictures(ours(generator=generator(), **FAST))[0], half)
    ours.unload_lora_weights()
    np.testing.assert_array_equal(pictures(ours(generator=generator(), **FAST))[0], plain)


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ({"ip_adapter_image": photo(64, 64)}, "the argument 'ip_adapter_image'"),
        ({"prompt_embeds": torch.zeros(1, 77, 8)}, "the argument 'prompt_embeds'.*Leave prompt_embeds out"),
        ({"num_steps": 4}, "expected 'num_inference_steps'"),
        ({"output_type": "tensor"}, "output_type is 'tensor'"),
        ({"cross_attention_kwargs": {"gligen": {}}}, "cross_attention_kwargs with gligen"),
        ({"callback_on_step_end_tensor_inputs": ["prompt_embeds"]}, "callback_on_step_end_tensor_inputs is"),
        ({"generator": [torch.Generator(), torch.Generator()]}, "2 generators for 1 pictures"),
        ({"width": 60}, "width is 60"),
    ],
)
def test_what_has_no_counterpart_is_refused_by_name(
    ours: LatentrtPipeline, arguments: dict[str, Any], words: str
) -> None:
    with pytest.raises(UsageError, match=words):
        ours(**{**FAST, **arguments})


def test_where_it_draws(ours: LatentrtPipeline) -> None:
    assert ours.to("cpu") is ours
    ours.enable_attention_slicing()
    ours.set_progress_bar_config(disable=True)
    with Pipeline.open("demo") as pipe, pytest.raises(UsageError, match="an open pipeline"):
        LatentrtPipeline(pipe).to("cuda:7")
