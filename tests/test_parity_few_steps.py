"""Few-step models and picture variations, against diffusers' own pipelines, fp32."""

from typing import Any

import numpy as np
import pytest

from tests.parity_pair import BAR, PROMPTS, Pair, drawn, exported, ours, photo, psnr

pytestmark = [
    pytest.mark.filterwarnings("ignore:.*__array.*:DeprecationWarning"),
    pytest.mark.filterwarnings("ignore:.*is deprecated:FutureWarning"),
]

SIZE = {"height": 40, "width": 56}


@pytest.fixture(scope="module")
def lcm(tmp_path_factory: pytest.TempPathFactory) -> Pair:
    return Pair(exported(tmp_path_factory, "lcm-tiny"))


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Pair:
    return Pair(exported(tmp_path_factory, "xl-tiny"))


@pytest.fixture(scope="module", params=["unclip-tiny", "unclip-l-tiny"])
def unclip(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Pair:
    return Pair(exported(tmp_path_factory, request.param))


@pytest.mark.parametrize("steps", [1, 4, 8])
@pytest.mark.parametrize("scale", [8.5, 1.0])
def test_latent_consistency(lcm: Pair, steps: int, scale: float) -> None:
    parameters = {"prompt": PROMPTS[:2], "num_inference_steps": steps, "guidance_scale": scale, **SIZE}
    wanted = drawn(lcm.reference("LatentConsistencyModelPipeline"), [1, 2], **parameters)
    assert psnr(wanted, ours(lcm.ours, [1, 2], **parameters)) >= BAR


def test_latent_consistency_from_a_picture(lcm: Pair) -> None:
    parameters = {"prompt": PROMPTS[0], "num_inference_steps": 4, "guidance_scale": 8.5, "strength": 0.6}
    reference = lcm.reference("LatentConsistencyModelImg2ImgPipeline")
    wanted = drawn(reference, [1], image=photo(40, 56), **parameters)
    assert psnr(wanted, ours(lcm.ours, [1], image=photo(40, 56), **parameters)) >= BAR


@pytest.mark.parametrize(
    ("sampler", "scheduler", "options", "steps"),
    [
        ("turbo", "EulerAncestralDiscreteScheduler", {"timestep_spacing": "trailing"}, 1),
        ("turbo", "EulerAncestralDiscreteScheduler", {"timestep_spacing": "trailing"}, 4),
        ("lightning", "EulerDiscreteScheduler", {"timestep_spacing": "trailing"}, 2),
        ("lightning", "EulerDiscreteScheduler", {"timestep_spacing": "trailing"}, 8),
        ("hyper", "DDIMScheduler", {"timestep_spacing": "trailing", "clip_sample": False}, 4),
        ("hyper-1", "TCDScheduler", {}, 1),
        ("hyper-8", "TCDScheduler", {}, 8),
    ],
)
def test_trailing_schedules_without_guidance(
    base: Pair, sampler: str, scheduler: str, options: dict[str, Any], steps: int
) -> None:
    reference = base.reference("StableDiffusionXLPipeline", scheduler, **options)
    parameters = {"prompt": PROMPTS[0], "num_inference_steps": steps, "guidance_scale": 0.0, **SIZE}
    config = {**reference.scheduler.config, "_class_name": scheduler}
    eta = {"eta": 0.3} if scheduler == "TCDScheduler" else {}
    wanted = drawn(reference, [9], **parameters, **eta)
    assert psnr(wanted, ours(base.ours, [9], sampler=config, **parameters, **eta)) >= BAR


@pytest.mark.slow
@pytest.mark.parametrize("prompt", ["", PROMPTS[0]])
@pytest.mark.parametrize("noise_level", [0, 400])
def test_a_picture_is_varied(unclip: Pair, prompt: str, noise_level: int) -> None:
    parameters = {"prompt": prompt, "num_inference_steps": 6, "guidance_scale": 5.0, **SIZE}
    parameters |= {"noise_level": noise_level, "image": photo(90, 70)}
    wanted = drawn(unclip.reference("StableUnCLIPImg2ImgPipeline"), [6], **parameters)
    assert psnr(wanted, ours(unclip.ours, [6], **parameters)) >= BAR


@pytest.mark.slow
def test_a_variation_without_guidance(unclip: Pair) -> None:
    parameters = {
        "prompt": "",
        "num_inference_steps": 6,
        "guidance_scale": 1.0,
        "image": photo(64, 64),
        **SIZE,
    }
    wanted = drawn(unclip.reference("StableUnCLIPImg2ImgPipeline"), [6], **parameters)
    assert psnr(wanted, ours(unclip.ours, [6], **parameters)) >= BAR


@pytest.mark.slow
def test_pictures_of_a_batch_do_not_depend_on_each_other(unclip: Pair) -> None:
    parameters = {"num_inference_steps": 4, "guidance_scale": 5.0, "noise_level": 200, **SIZE}
    both = ours(
        unclip.ours, [6, 7], prompt=["", ""], image=[photo(64, 64, 1), photo(64, 64, 2)], **parameters
    )
    alone = ours(unclip.ours, [7], prompt="", image=photo(64, 64, 2), **parameters)
    assert np.abs(both[1].astype(int) - alone[0]).max() <= 1
