"""The pipeline with diffusers' call beside diffusers itself: one set of arguments for both."""

from __future__ import annotations

import inspect
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
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

from latentrt import CheckpointOptions, Pipeline, SamplerError, UsageError
from latentrt.hosts.diffusers import LatentrtPipeline
from latentrt.runtime.model import ADAPTERS
from latentrt.runtime.sampling.config import SCHEDULER_CLASSES
from latentrt.runtime.sampling.names import resolve
from latentrt.runtime.sampling.samplers import make_table
from tests.parity_pair import BAR, blob, photo, psnr
from tests.runtime.diffusers_oracle import SD, check, make_scheduler, set_steps, step_options

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


@contextmanager
def another_scheduler(
    ours: LatentrtPipeline, theirs: dict[str, Any], kind: str, **more: Any
) -> Iterator[None]:
    before = theirs["text"].scheduler
    assert type(ours.scheduler) is type(before)
    try:
        theirs["text"].scheduler = getattr(diffusers, kind).from_config(before.config, **more)
        ours.scheduler = getattr(diffusers, kind).from_config(ours.scheduler.config, **more)
        yield
    finally:
        theirs["text"].scheduler, ours._scheduler = before, None


@pytest.mark.parametrize(
    ("kind", "more"),
    [
        ("EulerAncestralDiscreteScheduler", {}),
        ("DPMSolverMultistepScheduler", {"use_karras_sigmas": True}),
        ("DDIMScheduler", {"clip_sample": False}),
        ("PNDMScheduler", {"skip_prk_steps": True}),
        ("UniPCMultistepScheduler", {}),
    ],
)
def test_another_scheduler(
    ours: LatentrtPipeline, theirs: dict[str, Any], kind: str, more: dict[str, Any]
) -> None:
    with another_scheduler(ours, theirs, kind, **more):
        wanted = theirs["text"](generator=generator(), **FAST)
        found = ours(generator=generator(), **FAST)
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


@pytest.mark.parametrize(
    ("kind", "factor"), [("EulerDiscreteScheduler", 0.98), ("HeunDiscreteScheduler", 1.0)]
)
def test_callbacks_see_latents_at_diffusers_scale(
    ours: LatentrtPipeline, theirs: dict[str, Any], kind: str, factor: float
) -> None:
    """Those of k-diffusion's samplers grow with the noise. (diffusers' Heun keeps a state of its own.)"""

    def after(pipe: Any, index: int, timestep: Any, state: dict[str, Any]) -> dict[str, Any]:
        told.append(state["latents"].std().item())
        return {"latents": state["latents"] * factor}

    with another_scheduler(ours, theirs, kind):
        told: list[float] = []
        wanted = theirs["text"](generator=generator(), callback_on_step_end=after, **FAST)
        expected, told = told, []
        found = ours(generator=generator(), callback_on_step_end=after, **FAST)
    assert expected[0] > 2
    np.testing.assert_allclose(told, expected, rtol=1e-3)
    assert psnr(pictures(wanted), pictures(found)) > BAR


@pytest.mark.parametrize("output_type", ["pil", "latent"])
@pytest.mark.parametrize("kind", ["DPMSolverMultistepScheduler", "EulerDiscreteScheduler"])
def test_a_callback_may_end_it(
    ours: LatentrtPipeline, theirs: dict[str, Any], kind: str, output_type: str
) -> None:
    """What is there is what comes back."""

    def after(pipe: Any, index: int, timestep: Any, state: dict[str, Any]) -> dict[str, Any]:
        pipe._interrupt = index == 2
        seen.append(index)
        return state

    seen: list[int] = []
    arguments = {"callback_on_step_end": after, "output_type": output_type, **FAST}
    with another_scheduler(ours, theirs, kind):
        wanted, found = (pipe(generator=generator(), **arguments) for pipe in (theirs["text"], ours))
        whole = ours(generator=generator(), **FAST)
    assert seen == [0, 1, 2] * 2
    if output_type == "latent":
        np.testing.assert_allclose(found.images, wanted.images, atol=0.01 * wanted.images.abs().max().item())
        return
    assert psnr(pictures(wanted), pictures(found)) > BAR
    assert psnr(pictures(whole), pictures(found)) < BAR


def test_an_interrupted_repainting_keeps_what_is_outside(
    ours: LatentrtPipeline, theirs: dict[str, Any]
) -> None:
    def after(pipe: Any, index: int, timestep: Any, state: dict[str, Any]) -> dict[str, Any]:
        pipe._interrupt = index == 3
        return state

    arguments = {**FAST, "image": photo(64, 64), "mask_image": blob(64, 64), "callback_on_step_end": after}
    wanted, found = (pipe(generator=generator(), **arguments) for pipe in (theirs["mask"], ours))
    inside = np.asarray(arguments["mask_image"]) >= 128
    expected = np.where(inside[..., None], pictures(wanted), np.asarray(arguments["image"]))
    assert psnr(expected, pictures(found)) > BAR


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


POSITIONS: dict[str, tuple[str, tuple[Any, ...]]] = {
    "text": ("text", (PROMPT, 64, 64, 6, None, None, 5.0, "a square", 1, 0.0)),
    "image": ("image", (PROMPT, photo(64, 64), 0.6, 6, None, None, 5.0)),
    "mask": ("mask", (PROMPT, photo(64, 64), blob(64, 64), None, 64, 64, None, 0.9, 6)),
}


@pytest.mark.parametrize("name", POSITIONS)
def test_positional_arguments(ours: LatentrtPipeline, theirs: dict[str, Any], name: str) -> None:
    kind, placed = POSITIONS[name]
    wanted, found = (pipe(*placed, generator=generator()) for pipe in (theirs[kind], ours))
    expected = pictures(wanted)
    if kind == "mask":
        expected = np.where(np.asarray(placed[2])[..., None] >= 128, expected, np.asarray(placed[1]))
    assert psnr(expected, pictures(found)) > BAR


def test_positional_arguments_of_xl(ours: LatentrtPipeline, monkeypatch: pytest.MonkeyPatch) -> None:
    """The second is the second text, as in diffusers' signature, whose names these are."""
    monkeypatch.setattr(LatentrtPipeline, "_xl", True)
    named = ours._named("a", ("b", 64, 32), {"eta": 0.5})
    assert named == ("a", {"prompt_2": "b", "height": 64, "width": 32, "eta": 0.5})
    image = photo(64, 64)
    named = ours._named("a", (None, image, 0.5), {})
    assert named == ("a", {"prompt_2": None, "image": image, "strength": 0.5})


def test_positional_arguments_that_are_none_of_them(ours: LatentrtPipeline) -> None:
    with pytest.raises(TypeError, match="height"):
        ours(PROMPT, 64, height=64)
    with pytest.raises(TypeError, match="too many positional arguments"):
        ours(PROMPT, *range(40))
    with pytest.raises(UsageError, match="the argument 'masked_image_latents'"):
        ours(PROMPT, photo(64, 64), blob(64, 64), torch.zeros(1, 4, 8, 8))


# ── what an application asks a pipeline for ────────────────────────────────────────────────────────

CHANGES_PICTURES = {"enable_freeu", "disable_freeu", "enable_lora", "disable_lora", "enable_lora_hotswap"}


def test_helpers_for_memory_do_nothing(ours: LatentrtPipeline) -> None:
    names = {name for name in dir(StableDiffusionPipeline) if name.startswith(("enable_", "disable_"))}
    assert len(names - CHANGES_PICTURES) > 5
    before = pictures(ours(generator=generator(), **FAST))
    for name in names - CHANGES_PICTURES:
        assert getattr(ours, name)() is None, name
        assert "Do nothing" in getattr(ours, name).__doc__
    np.testing.assert_array_equal(pictures(ours(generator=generator(), **FAST)), before)


def test_what_it_is(ours: LatentrtPipeline, theirs: dict[str, Any]) -> None:
    for name in ("device", "dtype"):
        assert getattr(ours, name) == getattr(theirs["text"], name), name
    assert set(theirs["text"].components) <= set(ours.components)
    assert [item.name for item in ours.components["unet"].inputs][:1] == ["latent"]
    assert ours.components["safety_checker"] is None
    wanted = theirs["text"].tokenizer(PROMPT, padding="max_length").input_ids
    assert ours.components["tokenizer"].encode([PROMPT]).ids.tolist() == [wanted]
    for name, value in theirs["text"].scheduler.config.items():
        if not name.startswith("_"):
            assert ours.scheduler.config[name] == value, name


def test_a_bar_of_progress(ours: LatentrtPipeline, capsys: pytest.CaptureFixture[str]) -> None:
    plain = pictures(ours(generator=generator(), **FAST))
    assert capsys.readouterr().err == "", "nobody has asked for one"
    ours.set_progress_bar_config(desc="drawing")
    try:
        shown = pictures(ours(generator=generator(), **FAST))
        assert "drawing: 100%" in (told := capsys.readouterr().err)
        assert "6/6" in told
        assert list(ours.progress_bar([1, 2], disable=True)) == [1, 2]
        ours.set_progress_bar_config(disable=True)
        ours(generator=generator(), **FAST)
        assert capsys.readouterr().err == ""
    finally:
        ours._bar = None
    np.testing.assert_array_equal(shown, plain)


def test_where_it_draws(ours: LatentrtPipeline) -> None:
    drawing = ours.pipe
    for where in (("cpu",), (torch.device("cpu"),), (torch.float32,), ("cpu", torch.float16), (None,)):
        assert ours.to(*where) is ours
    assert ours.to(device="cpu", dtype=torch.float32, silence_dtype_warnings=True) is ours
    assert ours.pipe is drawing, "a package keeps its arithmetic"
    with pytest.raises(UsageError, match="device is 'mps'"):
        ours.to("mps")
    with (
        Pipeline.open("demo") as pipe,
        pytest.raises(UsageError, match="an open pipeline that is to go to cu"),
    ):
        LatentrtPipeline(pipe).to("cuda:7")


def test_another_arithmetic_of_a_checkpoint(
    ours: LatentrtPipeline, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It is opened anew, with its other options; the demo stands for it, which is a package."""

    def opened(place: Any, device: str, checkpoint: CheckpointOptions | None = None) -> Any:
        asked.append((device, checkpoint))
        return ours.pipe

    asked: list[Any] = []
    own = CheckpointOptions(prediction_type="v_prediction")
    monkeypatch.setattr(Pipeline, "open", opened)
    monkeypatch.setattr(ours.pipe, "close", lambda: None)
    pipe = LatentrtPipeline.from_pretrained(tmp_path, checkpoint=own)
    assert pipe.to("cpu", torch.float32).pipe is ours.pipe
    assert asked == [("auto", own)], "it is there already"
    pipe.to(torch.float16)
    pipe.to(device="cuda:0")
    assert asked[1:] == [("cpu", half := replace(own, dtype="fp16")), ("cuda:0", half)]
    with pytest.raises(UsageError, match="dtype is 'bfloat16'"):
        pipe.to(torch.bfloat16)
    monkeypatch.setattr(ours.pipe, "load_textual_inversion", lambda *_: None)
    pipe.load_textual_inversion("zebra.safetensors")
    with pytest.raises(UsageError, match="a pipeline with adapters or words that is to go to cuda:1"):
        pipe.to("cuda:1")


@pytest.mark.parametrize(
    ("kind", "more", "words"),
    [
        ("DDIMScheduler", {"clip_sample": True}, r"clip_sample = True.*Set clip_sample to False"),
        ("PNDMScheduler", {"skip_prk_steps": False}, "skip_prk_steps = False.*Set skip_prk_steps to True"),
    ],
)
def test_schedulers_that_are_no_table_are_refused_where_they_are_assigned(
    ours: LatentrtPipeline, kind: str, more: dict[str, Any], words: str
) -> None:
    before = ours.scheduler
    with pytest.raises(SamplerError, match=words):
        ours.scheduler = getattr(diffusers, kind).from_config(before.config, **more)
    assert ours.scheduler is before


# scheduler_config.json of the models in circulation, as far as they differ from SD 1.5's.
CIRCULATING: dict[str, dict[str, Any]] = {
    "SD 1.5": {},
    "SD 2.1": {"_class_name": "DDIMScheduler", "prediction_type": "v_prediction"},
    "SDXL": {
        "_class_name": "EulerDiscreteScheduler",
        "interpolation_type": "linear",
        "prediction_type": "epsilon",
        "sample_max_value": 1.0,
        "timestep_spacing": "leading",
        "use_karras_sigmas": False,
    },
}


@pytest.mark.parametrize("by", ["DDIMScheduler", "EulerDiscreteScheduler"])
@pytest.mark.parametrize("model", CIRCULATING)
def test_schedulers_made_from_others_of_a_circulating_model(model: str, by: str) -> None:
    """Each class through another one, with what `from_config` leaves in its config, number by number."""
    config = {**SD, **CIRCULATING[model]}
    own = make_scheduler(config["_class_name"], config)
    for kind in SCHEDULER_CLASSES:
        scheduler = make_scheduler(kind, make_scheduler(by, own.config).config)
        set_steps(scheduler, 7)
        check(make_table(resolve({**scheduler.config}, config), 7), scheduler, **step_options(kind))
