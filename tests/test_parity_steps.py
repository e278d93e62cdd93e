"""Steps of the caller's own and published ones, against diffusers' pipelines: same weights and seed, fp32."""

from typing import Any

import numpy as np
import pytest
import torch
from diffusers.schedulers.scheduling_utils import AysSchedules

from tests.parity_pair import BAR, PROMPTS, Pair, blob, drawn, exported, ours, photo, psnr
from tests.runtime.diffusers_oracle import CLASSES, NUMPY2

pytestmark = [
    pytest.mark.filterwarnings(f"ignore:{NUMPY2}:DeprecationWarning"),
    pytest.mark.filterwarnings("ignore:.*is deprecated:FutureWarning"),
]

H, W = 40, 56
SIZE = {"height": H, "width": W}
TEXT: dict[str, Any] = {"prompt": PROMPTS[0], "guidance_scale": 5.0}
STARTS: dict[str, dict[str, Any]] = {
    "": SIZE,
    "Img2Img": {"image": photo(H, W), "strength": 0.6},
    "Inpaint": {"image": photo(H, W), "mask_image": blob(H, W), "strength": 0.7, **SIZE},
}
# Uneven, so that neither a spacing nor a wrong cut has the same.
LEVELS: dict[str, dict[str, Any]] = {
    "timesteps": {"timesteps": [999, 850, 736, 545, 343, 233, 24]},
    "sigmas": {"sigmas": [14.6, 6.4, 3.8, 1.9, 0.9, 0.4, 0.15, 0.0]},
}


@pytest.fixture(scope="module", params=["tiny2", "xl-tiny"])
def pair(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Pair:
    return Pair(exported(tmp_path_factory, request.param))


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Pair:
    return Pair(exported(tmp_path_factory, "xl-tiny"))


def reference(pair: Pair, start: str, sampler: str) -> Any:
    scheduler, options = CLASSES[sampler]
    kind = "XL" if pair.ours.package.manifest.time_ids else ""
    return pair.reference(f"StableDiffusion{kind}{start}Pipeline", scheduler, **options)


@pytest.mark.parametrize("sampler", ["dpmpp_2m", "euler"])
def test_published_steps(pair: Pair, sampler: str) -> None:
    of_family = "StableDiffusionXL" if pair.ours.package.manifest.time_ids else "StableDiffusion"
    steps = {"timesteps": AysSchedules[f"{of_family}Timesteps"]}
    wanted = drawn(reference(pair, "", sampler), [3], **TEXT, **steps, **SIZE)
    found = ours(pair.ours, [3], sampler=f"{sampler}_ays", num_inference_steps=10, **TEXT, **SIZE)
    assert psnr(wanted, found) >= BAR


@pytest.mark.parametrize(
    ("sampler", "levels", "start"),
    [
        *(("dpmpp_2m", "timesteps", start) for start in STARTS),
        *(("euler", "sigmas", start) for start in STARTS),
        ("euler", "timesteps", ""),
        # With a picture diffusers counts the calls of heun as steps here, and leaves out twice as many.
        ("heun", "timesteps", ""),
    ],
)
def test_steps_of_the_callers_own(pair: Pair, sampler: str, levels: str, start: str) -> None:
    """With a picture to start from the noisy end is left out, as diffusers' `get_timesteps` does."""
    parameters = {**TEXT, **STARTS[start], **LEVELS[levels]}
    wanted = drawn(reference(pair, start, sampler), [4], **parameters)
    if start == "Inpaint":  # of what is outside the mask diffusers makes a picture too
        inside = np.asarray(parameters["mask_image"])[..., None] >= 128
        wanted = np.where(inside, wanted, np.asarray(parameters["image"]))
    assert psnr(wanted, ours(pair.ours, [4], sampler=sampler, **parameters)) >= BAR


def test_a_hand_over_between_steps_of_the_callers_own(base: Pair) -> None:
    """Both parts of the run have the same list; what they share is a timestep."""
    levels = {**TEXT, **LEVELS["timesteps"]}
    generator = torch.Generator("cpu").manual_seed(5)
    first = reference(base, "", "dpmpp_2m")
    half = first(**levels, **SIZE, denoising_end=0.5, output_type="latent", generator=generator).images
    second = reference(base, "Img2Img", "dpmpp_2m")
    wanted = drawn(second, [5], **levels, image=half, denoising_start=0.5)
    left = base.ours(
        **levels, **SIZE, denoising_end=0.5, seed=5, sampler="dpmpp_2m", output_type="latent"
    ).images
    found = ours(base.ours, [5], **levels, image=np.asarray(left), denoising_start=0.5, sampler="dpmpp_2m")
    assert psnr(wanted, found) >= BAR


def test_a_latent_consistency_model_takes_timesteps(tmp_path_factory: pytest.TempPathFactory) -> None:
    lcm = Pair(exported(tmp_path_factory, "lcm-tiny"))
    parameters = {"prompt": PROMPTS[0], "guidance_scale": 8.5, "timesteps": [999, 659, 339, 19], **SIZE}
    wanted = drawn(lcm.reference("LatentConsistencyModelPipeline"), [2], **parameters)
    assert psnr(wanted, ours(lcm.ours, [2], **parameters)) >= BAR


# ── guidance ───────────────────────────────────────────────────────────────────────────────────────

STEPS = 8
STRONG = 30.0  # random weights answer weakly to a prompt
CONDITIONS = ("prompt_embeds", "add_text_embeds", "add_time_ids")


def drawn_by_scales(pipe: Any, scales: list[float], **parameters: Any) -> np.ndarray:
    """diffusers' picture with another guidance scale in each step; without guidance it runs half of the rows.

    The first is more than 1, as the pipeline reads both prompts for it.
    """
    whole: dict[str, torch.Tensor] = {}

    def choose(pipe: Any, step: int, _: Any, given: dict[str, Any]) -> dict[str, Any]:
        pipe._guidance_scale = scales[min(step + 1, len(scales) - 1)]
        found = {name: given[name] for name in CONDITIONS if name in given}
        whole.update(found if not whole else {})
        guided = pipe.do_classifier_free_guidance
        return {name: value if guided else value[len(value) // 2 :] for name, value in whole.items()}

    tensors = [name for name in CONDITIONS if name in pipe._callback_tensor_inputs]
    return drawn(
        pipe,
        [6],
        guidance_scale=scales[0],
        num_inference_steps=len(scales),
        callback_on_step_end=choose,
        callback_on_step_end_tensor_inputs=tensors,
        **parameters,
    )


@pytest.mark.parametrize("rescale", [0.0, 0.6])
@pytest.mark.parametrize("sampler", ["euler_a", "dpmpp_2m"])
def test_guidance_ends_early(pair: Pair, sampler: str, rescale: float) -> None:
    parameters = {"prompt": PROMPTS[0], "negative_prompt": "square", "guidance_rescale": rescale, **SIZE}
    scales = [STRONG] * 4 + [1.0] * 4
    wanted = drawn_by_scales(reference(pair, "", sampler), scales, **parameters)
    parameters |= {"sampler": sampler, "num_inference_steps": STEPS, "guidance_scale": STRONG}
    found = ours(pair.ours, [6], guidance_interval=(0.0, 0.5), **parameters)
    assert psnr(wanted, found) >= BAR
    assert psnr(wanted, ours(pair.ours, [6], **parameters)) < BAR  # with guidance to the end


def test_a_scale_for_each_step(pair: Pair) -> None:
    scales = [30.0, 20.0, 1.0, 25.0, 15.0, 0.5, 12.0, 1.0]
    parameters = {"prompt": PROMPTS[0], "negative_prompt": "square", **SIZE}
    wanted = drawn_by_scales(reference(pair, "", "dpmpp_2m"), scales, **parameters)
    parameters |= {"sampler": "dpmpp_2m", "num_inference_steps": STEPS, "guidance_scale": scales}
    assert psnr(wanted, ours(pair.ours, [6], **parameters)) >= BAR


@pytest.mark.parametrize("start", ["", "Img2Img"])
def test_guidance_begins_late(pair: Pair, start: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """diffusers cannot leave the first step out, so its UNet predicts the same for both prompts there."""
    pipe = reference(pair, start, "heun")
    forward, calls = pipe.unet.forward, 2 * STEPS - 1 if not start else 2 * 4 - 1

    def predict(*inputs: Any, **named: Any) -> Any:
        (rows,) = forward(*inputs, **named)
        row = len(seen)
        seen.append(row)
        if row / calls < 0.25 or (row + 1) / calls > 0.8:
            rows[: len(rows) // 2] = rows[len(rows) // 2 :]
        return (rows,)

    seen: list[int] = []
    monkeypatch.setattr(pipe.unet, "forward", predict)
    parameters = {**TEXT, **STARTS[start], "num_inference_steps": STEPS, "guidance_scale": STRONG}
    parameters |= {"guidance_rescale": 0.5}
    parameters |= {"strength": 0.5} if start else {}
    if pair.ours.package.manifest.time_ids == () and start:
        del parameters["guidance_rescale"]  # that pipeline of diffusers has none
    wanted = drawn(pipe, [2], **parameters)
    assert len(seen) == calls
    found = ours(pair.ours, [2], sampler="heun", guidance_interval=(0.25, 0.8), **parameters)
    assert psnr(wanted, found) >= BAR
