"""Whole pictures against diffusers: same weights, seeds, scheduler and text, in fp32.

Two models have random weights of odd shapes: they draw noise-like pictures, so a wrong coefficient, layout or
draw of noise shows everywhere. The third is the shipped one. `test_another_seed_is_another_picture` is the
negative control of the measure.
"""

from pathlib import Path
from typing import Any

import diffusers
import numpy as np
import pytest
import torch
from diffusers import StableDiffusionPipeline

from latentrt.runtime import Pipeline
from tests.parity_pair import PROMPTS, exported, psnr

# torch tensors lack keywords that NumPy 2 asks for when diffusers' schedulers call np.array(tensor); and
# diffusers announces that DPM-Solver's algorithms will move
pytestmark = [
    pytest.mark.filterwarnings("ignore:.*__array.*:DeprecationWarning"),
    pytest.mark.filterwarnings("ignore:.*is deprecated:FutureWarning"),
]

DEMO = Path(__file__).resolve().parent.parent / "demo"
MODELS = [pytest.param("tiny1", marks=pytest.mark.slow), "tiny2", "demo"]
BAR = 45.0  # dB
NEGATIVE = ["square", "", "a yellow background, small"]
SIZE = {"height": 40, "width": 56}  # latents that are odd at some level of every model

# our name -> diffusers' class and the options that make the same sampler
SAMPLERS: dict[str, tuple[str, dict[str, Any]]] = {
    "ddim": ("DDIMScheduler", {"clip_sample": False}),
    "ddpm": ("DDPMScheduler", {"clip_sample": False}),
    "plms": ("PNDMScheduler", {"skip_prk_steps": True}),
    "euler": ("EulerDiscreteScheduler", {}),
    "Euler a": ("EulerAncestralDiscreteScheduler", {}),
    "heun": ("HeunDiscreteScheduler", {}),
    "lms": ("LMSDiscreteScheduler", {}),
    "dpm2": ("KDPM2DiscreteScheduler", {}),
    "dpm2_a": ("KDPM2AncestralDiscreteScheduler", {}),
    "dpmpp_2m": ("DPMSolverMultistepScheduler", {}),
    "dpmpp_3m": ("DPMSolverMultistepScheduler", {"solver_order": 3}),
    "dpmpp_2s": ("DPMSolverSinglestepScheduler", {}),
    "DPM++ 2M Karras": ("DPMSolverMultistepScheduler", {"use_karras_sigmas": True}),
    "dpmpp_2m_sde": ("DPMSolverMultistepScheduler", {"algorithm_type": "sde-dpmsolver++"}),
    "deis": ("DEISMultistepScheduler", {}),
    "unipc": ("UniPCMultistepScheduler", {}),
    "lcm": ("LCMScheduler", {}),
}


class Pair:
    """The same weights twice: diffusers' pipeline, and ours on the exported package."""

    def __init__(self, folder: Path) -> None:
        self.reference = StableDiffusionPipeline.from_pretrained(
            folder / "checkpoint", dtype=torch.float32, safety_checker=None, requires_safety_checker=False
        )
        self.reference.set_progress_bar_config(disable=True)
        self.own_scheduler = self.reference.scheduler
        self.ours = Pipeline.open(folder / "package")

    def draw(self, sampler: str | None, seeds: list[int], **parameters: Any) -> tuple[np.ndarray, np.ndarray]:
        """(diffusers' pictures, ours), both (N, H, W, 3) uint8."""
        self.reference.scheduler = self.own_scheduler
        if sampler is not None:
            kind, options = SAMPLERS[sampler]
            self.reference.scheduler = getattr(diffusers, kind).from_config(
                self.own_scheduler.config, **options
            )
        generators = [torch.Generator("cpu").manual_seed(seed) for seed in seeds]
        pictures = self.reference(generator=generators, output_type="pil", **parameters).images
        ours = self.ours(
            seed=seeds, sampler=sampler, output_type="np", prompt_syntax="plain", **parameters
        ).images
        return np.stack([np.asarray(picture) for picture in pictures]), np.asarray(ours)


@pytest.fixture(scope="module", params=MODELS)
def pair(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Pair:
    return Pair(DEMO if request.param == "demo" else exported(tmp_path_factory, request.param))


@pytest.mark.parametrize("sampler", SAMPLERS)
def test_every_sampler(pair: Pair, sampler: str) -> None:
    wanted, found = pair.draw(
        sampler,
        [1, 2, 3],
        prompt=PROMPTS,
        negative_prompt=NEGATIVE,
        num_inference_steps=6,
        guidance_scale=5.0,
        **SIZE,
    )
    assert psnr(wanted, found) >= BAR


@pytest.mark.parametrize("sampler", [None, "ddim", "Euler a", "dpmpp_2m"])
def test_guidance_off(pair: Pair, sampler: str | None) -> None:
    wanted, found = pair.draw(
        sampler, [7], prompt=PROMPTS[0], num_inference_steps=8, guidance_scale=1.0, height=64, width=24
    )
    assert psnr(wanted, found) >= BAR


def test_the_checkpoints_own_scheduler_rescale_and_a_long_prompt(pair: Pair, logged: list[str]) -> None:
    parameters = {"num_inference_steps": 10, "guidance_scale": 7.5, "guidance_rescale": 0.7, **SIZE}
    wanted, found = pair.draw(None, [2**33], prompt="a star and " * 60, **parameters)
    assert "is too long; dropped: " in "".join(logged)
    assert psnr(wanted, found) >= BAR


def test_eta(pair: Pair) -> None:
    wanted, found = pair.draw(
        "ddim", [5], prompt=PROMPTS[0], num_inference_steps=8, guidance_scale=5.0, eta=0.6, **SIZE
    )
    assert psnr(wanted, found) >= BAR


@pytest.mark.parametrize(
    ("sampler", "levels"),
    [
        ("dpmpp_2m", {"timesteps": [999, 850, 545, 343, 124, 24]}),
        ("euler", {"sigmas": [14.615, 6.475, 1.886, 0.652, 0.152, 0.0]}),
    ],
    ids=["timesteps", "sigmas"],
)
def test_steps_from_outside(pair: Pair, sampler: str, levels: dict[str, list[float]]) -> None:
    """Parts of published lists (Align Your Steps, arXiv 2404.14507)."""
    wanted, found = pair.draw(sampler, [4], prompt=PROMPTS[0], guidance_scale=5.0, **levels, **SIZE)
    assert psnr(wanted, found) >= BAR


def test_another_seed_is_another_picture(pair: Pair) -> None:
    wanted, _ = pair.draw("ddim", [1], prompt=PROMPTS[0], num_inference_steps=4, guidance_scale=5.0, **SIZE)
    _, found = pair.draw("ddim", [2], prompt=PROMPTS[0], num_inference_steps=4, guidance_scale=5.0, **SIZE)
    assert psnr(wanted, found) < 30
