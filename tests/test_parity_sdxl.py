"""SDXL base and refiner, against diffusers' own pipelines: same weights, seed and scheduler, fp32."""

from collections import Counter
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
import torch

from latentrt import Control
from latentrt.engines.errors import UsageError
from latentrt.runtime.refine import refine
from tests.parity_pair import BAR, PROMPTS, Pair, blob, drawn, exported, ours, photo, psnr
from tests.steered_pair import SEEN, Steered

pytestmark = [
    pytest.mark.filterwarnings("ignore:.*__array.*:DeprecationWarning"),
    pytest.mark.filterwarnings("ignore:.*is deprecated:FutureWarning"),
]

H, W = 40, 56
SIZE = {"height": H, "width": W}
TEXT = {"prompt": PROMPTS[0], "num_inference_steps": 6, "guidance_scale": 5.0}
MASKED = {"image": photo(H, W), "mask_image": blob(H, W)}


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Pair:
    return Pair(exported(tmp_path_factory, "xl-tiny"))


@pytest.fixture(scope="module")
def refiner(tmp_path_factory: pytest.TempPathFactory) -> Pair:
    return Pair(exported(tmp_path_factory, "refiner-tiny"))


@pytest.fixture(scope="module")
def steered_base(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Steered]:
    found = Steered(exported(tmp_path_factory, "xl-tiny"), tmp_path_factory.mktemp("controls"))
    yield found
    found.ours.close()


@pytest.mark.parametrize(
    "more",
    [
        {},
        {"negative_prompt": ""},
        {"negative_prompt": "square", "prompt_2": "a star", "negative_prompt_2": "a ring"},
        {"guidance_scale": 1.0},
        {"guidance_rescale": 0.6},
        {"clip_skip": 1, "guidance_scale": 1.0},  # diffusers leaves it out of the negative prompt
        {"original_size": (512, 640), "crops_coords_top_left": (16, 40), "target_size": (96, 48)},
        {
            "negative_original_size": (16, 24),
            "negative_crops_coords_top_left": (5, 6),
            "negative_target_size": (320, 8),
        },
        {"height": 24, "width": 72},
    ],
    ids=[
        "plain",
        "empty-negative",
        "two-texts",
        "unguided",
        "rescale",
        "clip-skip",
        "sizes",
        "negative-sizes",
        "odd",
    ],
)
def test_text_to_image(base: Pair, more: dict[str, Any]) -> None:
    parameters = {**TEXT, **SIZE, **more}
    wanted = drawn(base.reference("StableDiffusionXLPipeline"), [11], **parameters)
    assert psnr(wanted, ours(base.ours, [11], **parameters)) >= BAR


@pytest.mark.parametrize(
    ("sampler", "scheduler"),
    [("euler_a", "EulerAncestralDiscreteScheduler"), ("dpmpp_2m", "DPMSolverMultistepScheduler")],
)
def test_a_batch_of_prompts_and_seeds(base: Pair, sampler: str, scheduler: str) -> None:
    parameters = {**TEXT, **SIZE, "prompt": PROMPTS, "negative_prompt": ["square", "", "small"]}
    wanted = drawn(base.reference("StableDiffusionXLPipeline", scheduler), [1, 2, 3], **parameters)
    assert psnr(wanted, ours(base.ours, [1, 2, 3], sampler=sampler, **parameters)) >= BAR


def test_image_to_image(base: Pair) -> None:
    parameters = {**TEXT, "image": photo(H, W), "strength": 0.5}
    wanted = drawn(base.reference("StableDiffusionXLImg2ImgPipeline"), [4], **parameters)
    assert psnr(wanted, ours(base.ours, [4], **parameters)) >= BAR


@pytest.mark.parametrize("strength", [0.6, 1.0])
def test_inpainting(base: Pair, strength: float) -> None:
    parameters = {**TEXT, **SIZE, **MASKED, "strength": strength}
    wanted = drawn(base.reference("StableDiffusionXLInpaintPipeline"), [4], **parameters)
    inside = np.asarray(MASKED["mask_image"])[None, ..., None] >= 128
    pasted = np.where(inside, wanted, np.asarray(MASKED["image"]))
    assert psnr(pasted, ours(base.ours, [4], **parameters)) >= BAR


def test_the_refiner_on_a_picture(refiner: Pair) -> None:
    parameters = {**TEXT, "image": photo(H, W), "strength": 0.5, "aesthetic_score": 7.0}
    parameters |= {"negative_aesthetic_score": 1.5, "negative_prompt": "square"}
    wanted = drawn(refiner.reference("StableDiffusionXLImg2ImgPipeline"), [4], **parameters)
    assert psnr(wanted, ours(refiner.ours, [4], **parameters)) >= BAR


@pytest.mark.parametrize(
    ("scheduler", "options"),
    [
        ("EulerDiscreteScheduler", {}),
        ("DDIMScheduler", {"clip_sample": False}),
        ("DPMSolverMultistepScheduler", {}),
    ],
)
@pytest.mark.parametrize("at", [0.5, 0.8])
def test_the_base_hands_over_to_the_refiner(
    base: Pair, refiner: Pair, scheduler: str, options: dict[str, Any], at: float
) -> None:
    first = base.reference("StableDiffusionXLPipeline", scheduler, **options)
    second = refiner.reference("StableDiffusionXLImg2ImgPipeline", scheduler, **options)
    shared = {"num_inference_steps": 10, "negative_prompt": "square", "guidance_scale": 5.0}
    generator = torch.Generator("cpu").manual_seed(5)
    latents = first(
        PROMPTS[0], **shared, **SIZE, denoising_end=at, output_type="latent", generator=generator
    ).images
    wanted = drawn(second, [5], prompt=PROMPTS[0], **shared, image=latents, denoising_start=at)
    sampler = {**second.scheduler.config, "_class_name": scheduler}
    found = refine(
        base.ours,
        refiner.ours,
        PROMPTS[0],
        at=at,
        seed=5,
        sampler=sampler,
        output_type="np",
        **shared,
        **SIZE,
    )
    assert psnr(wanted, np.asarray(found.images)) >= BAR
    assert found.record()["base"] == base.ours.package.manifest.name


@pytest.mark.parametrize(("start", "end", "steered"), [(0.0, 1.0, 6), (0.2, 0.5, 3), (0.6, 1.0, 0)])
def test_the_base_is_steered_and_the_refiner_is_not(
    steered_base: Steered, refiner: Pair, start: float, end: float, steered: int
) -> None:
    """Shares of the steps are of all ten, of which the base draws six."""
    base, hint, at = steered_base, photo(H, W, 3), 0.6
    first = base.steered("StableDiffusionXLControlNetPipeline")
    second = refiner.reference("StableDiffusionXLImg2ImgPipeline")
    shared = {"num_inference_steps": 10, "guidance_scale": 5.0}
    latents = first(
        PROMPTS[0],
        **{**shared, **SIZE, "denoising_end": at, "output_type": "latent"},
        image=hint,
        control_guidance_start=start,
        control_guidance_end=end,
        controlnet_conditioning_scale=1.0,
        generator=torch.Generator("cpu").manual_seed(5),
    ).images
    wanted = drawn(second, [5], prompt=PROMPTS[0], **shared, image=latents, denoising_start=at)
    control = Control(model=base.names[0], image=hint, start=start, end=end)
    whole = {**shared, **SIZE, "at": at, "seed": 5, "output_type": "np"}
    with pytest.MonkeyPatch.context() as patch:
        calls = Counter[str]()
        opened = base.ours.controls._loaded[base.names[0]]  # pyright: ignore[reportPrivateUsage]
        call = opened.loop.call
        patch.setattr(opened.loop, "call", lambda net, **given: calls.update([net]) or call(net, **given))
        found = refine(base.ours, refiner.ours, PROMPTS[0], controls=[control], **whole)
    assert psnr(wanted, np.asarray(found.images)) >= BAR
    assert calls["controlnet"] == steered
    assert "ControlNet 0: " in found.infotext()
    plain = refine(base.ours, refiner.ours, PROMPTS[0], **whole)
    assert (psnr(wanted, np.asarray(plain.images)) < SEEN) == (steered > 0)


def test_t49_in_guess_mode_a_controlnet_reads_the_conditional_half(steered_base: Steered) -> None:
    """Also of pooled texts and sizes; the two halves have others."""
    base, hint = steered_base, photo(H, W, 3)
    halves = {"negative_original_size": (16, 24), "negative_target_size": (320, 8)}
    given = {**TEXT, **SIZE, **halves, "negative_prompt": "square"}
    pipe = base.steered("StableDiffusionXLControlNetPipeline")
    wanted = drawn(pipe, [5], image=hint, guess_mode=True, controlnet_conditioning_scale=1.0, **given)
    control = Control(model=base.names[0], image=hint, mode="guess")
    with pytest.MonkeyPatch.context() as patch:
        vectors: list[dict[str, Any]] = []
        opened = base.ours.controls._loaded[base.names[0]]  # pyright: ignore[reportPrivateUsage]
        call = opened.loop.call

        def heard(net: str, **arrays: Any) -> Any:
            vectors.extend([arrays] if net == "controlnet" else [])
            return call(net, **arrays)

        patch.setattr(opened.loop, "call", heard)
        found = ours(base.ours, [5], controls=[control], **given)
    assert psnr(wanted, found) >= BAR
    assert {len(one["latent"]) for one in vectors} == {1}
    assert psnr(wanted, ours(base.ours, [5], **given)) < SEEN


@pytest.mark.parametrize("at", [0.0, 1.0, True, "half"])
def test_a_hand_over_outside_the_schedule(base: Pair, refiner: Pair, at: Any) -> None:
    with pytest.raises(UsageError, match="the refiner begins at"):
        refine(base.ours, refiner.ours, "a", at=at)


def test_a_mask_is_not_handed_over(base: Pair, refiner: Pair) -> None:
    with pytest.raises(UsageError, match="a mask with a refiner"):
        refine(base.ours, refiner.ours, "a", **MASKED)


def test_other_sizes_are_another_picture(base: Pair) -> None:
    wanted = ours(base.ours, [11], **TEXT, **SIZE)
    assert psnr(wanted, ours(base.ours, [11], **TEXT, **SIZE, crops_coords_top_left=(256, 512))) < 55
