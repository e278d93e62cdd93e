"""Pictures as a start, against diffusers' own pipelines: same weights, seed and scheduler, fp32."""

from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from PIL import Image

from latentrt.engines.errors import UsageError
from tests.parity_pair import BAR, PROMPTS, Pair, blob, drawn, exported, ours, photo, psnr

pytestmark = [
    pytest.mark.filterwarnings("ignore:.*__array.*:DeprecationWarning"),
    pytest.mark.filterwarnings("ignore:.*is deprecated:FutureWarning"),
]

H, W = 40, 56
SCHEDULERS = {
    "ddim": ("DDIMScheduler", {"clip_sample": False}),
    "euler": ("EulerDiscreteScheduler", {}),
    "euler_a": ("EulerAncestralDiscreteScheduler", {}),
    "dpmpp_2m": ("DPMSolverMultistepScheduler", {}),
    "heun": ("HeunDiscreteScheduler", {}),
    "plms": ("PNDMScheduler", {"skip_prk_steps": True}),
}


@pytest.fixture(scope="module", params=[pytest.param("tiny1", marks=pytest.mark.slow), "tiny2"])
def pair(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Pair:
    return Pair(exported(tmp_path_factory, request.param))


@pytest.fixture(scope="module")
def inpaint(tmp_path_factory: pytest.TempPathFactory) -> Pair:
    return Pair(exported(tmp_path_factory, "inpaint-tiny"))


def compare(
    pair: Pair, kind: str, sampler: str, seeds: list[int], theirs: dict[str, Any] | None = None, **shared: Any
) -> tuple[np.ndarray, np.ndarray]:
    name, options = SCHEDULERS[sampler]
    shared = {"prompt": PROMPTS[: len(seeds)], "num_inference_steps": 8, "guidance_scale": 5.0, **shared}
    wanted = drawn(pair.reference(kind, name, **options), seeds, **shared, **(theirs or {}))
    return wanted, ours(pair.ours, seeds, sampler=sampler, **shared)


@pytest.mark.parametrize("sampler", SCHEDULERS)
@pytest.mark.parametrize("strength", [0.5, 1.0])
def test_image_to_image(pair: Pair, sampler: str, strength: float) -> None:
    wanted, found = compare(
        pair, "StableDiffusionImg2ImgPipeline", sampler, [7], image=photo(H, W), strength=strength
    )
    assert psnr(wanted, found) >= BAR


def test_every_prompt_with_a_picture_of_its_own_and_guidance_off(pair: Pair) -> None:
    wanted, found = compare(
        pair,
        "StableDiffusionImg2ImgPipeline",
        "euler_a",
        [1, 2],
        image=[photo(H, W, 3), photo(H, W, 4)],
        strength=0.7,
        guidance_scale=1.0,
    )
    assert psnr(wanted, found) >= BAR


def test_a_picture_of_another_size(pair: Pair) -> None:
    large = photo(43, 61)
    small = large.resize((56, 40), Image.Resampling.LANCZOS)  # diffusers goes to multiples of the VAE's scale
    kind = "StableDiffusionImg2ImgPipeline"
    wanted, _ = compare(pair, kind, "ddim", [5], image=small, strength=0.6)
    _, found = compare(pair, kind, "ddim", [5], image=large, strength=0.6)
    assert found.shape == (1, 40, 56, 3)
    assert psnr(wanted, found) >= BAR


def check_inpainting(pair: Pair, sampler: str, strength: float) -> None:
    """Inside the mask as diffusers, which puts nothing back; outside it exactly the picture."""
    image, mask = photo(H, W), blob(H, W)
    shared = {"image": image, "mask_image": mask, "strength": strength}
    kind, size = "StableDiffusionInpaintPipeline", {"height": H, "width": W}
    wanted, found = compare(pair, kind, sampler, [3], size, **shared)
    inside = np.asarray(mask) >= 128
    assert psnr(np.where(inside[..., None], wanted, np.asarray(image)), found) >= BAR
    np.testing.assert_array_equal(found[0][~inside], np.asarray(image)[~inside])


@pytest.mark.parametrize("sampler", ["ddim", "euler_a", "dpmpp_2m"])
@pytest.mark.parametrize("strength", [0.6, 1.0])
def test_inpainting_with_any_model(pair: Pair, sampler: str, strength: float) -> None:
    check_inpainting(pair, sampler, strength)


@pytest.mark.parametrize("sampler", ["ddim", "euler_a"])
@pytest.mark.parametrize("strength", [0.6, 1.0])
def test_an_inpainting_model(inpaint: Pair, sampler: str, strength: float) -> None:
    check_inpainting(inpaint, sampler, strength)


def test_inpainting_a_part_at_full_size(pair: Pair) -> None:
    image, mask = photo(120, 96), blob(120, 96)
    wanted, found = compare(
        pair,
        "StableDiffusionInpaintPipeline",
        "ddim",
        [3],
        image=image,
        mask_image=mask,
        height=H,
        width=W,
        padding_mask_crop=6,
        strength=0.9,
    )
    assert psnr(wanted, found) >= BAR


def test_layers_left_out(pair: Pair) -> None:
    kind = "StableDiffusionPipeline"
    if not pair.ours.package.manifest.max_clip_skip:  # an encoder of one layer
        with pytest.raises(UsageError, match="clip_skip is 1"):
            pair.ours("a", clip_skip=1)
        return
    encoder = pair.reference(kind).text_encoder
    # diffusers 0.42 looks for the norm where transformers 5 no longer has it
    object.__setattr__(encoder, "text_model", SimpleNamespace(final_layer_norm=encoder.final_layer_norm))
    # diffusers leaves it out of the negative prompt, AUTOMATIC1111 and we do not
    shared = {"height": H, "width": W, "guidance_scale": 1.0}
    wanted, found = compare(pair, kind, "ddim", [3], **shared, clip_skip=1)
    assert psnr(wanted, found) >= BAR
    _, all_layers = compare(pair, kind, "ddim", [3], **shared)
    assert psnr(wanted, all_layers) < 55, "the last layer matters here"


def test_another_picture_is_another_result(pair: Pair) -> None:
    wanted, _ = compare(
        pair, "StableDiffusionImg2ImgPipeline", "ddim", [7], image=photo(H, W, 1), strength=0.5
    )
    _, found = compare(
        pair, "StableDiffusionImg2ImgPipeline", "ddim", [7], image=photo(H, W, 2), strength=0.5
    )
    assert psnr(wanted, found) < 50
