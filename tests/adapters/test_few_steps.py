"""Few-step LoRAs: which files are known for one, and that their samplers visit the steps of their cards."""

from typing import Any

import diffusers
import numpy as np
import pytest

from latentrt.adapters.few_steps import FEW_STEPS, looks_like, named, said_by
from latentrt.engines.errors import UsageError
from latentrt.engines.package import Defaults
from latentrt.runtime.sampling.names import resolve
from latentrt.runtime.sampling.samplers import make_table

pytestmark = pytest.mark.filterwarnings("ignore:.*__array.*:DeprecationWarning")

# As the model card of stabilityai/stable-diffusion-xl-base-1.0 has it.
SDXL: dict[str, Any] = {
    "_class_name": "EulerDiscreteScheduler",
    "beta_start": 0.00085,
    "beta_end": 0.012,
    "beta_schedule": "scaled_linear",
    "steps_offset": 1,
    "timestep_spacing": "leading",
}
# Files as they were published, or as people call copies of them.
PUBLISHED = {
    "lcm-lora-sdv1-5": "lcm",
    "LCM_LoRA_Weights_SD15": "lcm",
    "TCD-SDXL-LoRA": "tcd",
    "dmd2_sdxl_4step_lora": "dmd2",
    "dmd2_sdxl_4step_lora_fp16": "dmd2",
    "sd_xl_turbo_lora_v1": "turbo",
    "Hyper-SDXL-1step-lora": "hyper-1",
    "Hyper-SDXL-8steps-lora": "hyper-8",
    "Hyper-SD15-4steps-lora": "hyper-4",
    "sdxl_lightning_2step_lora": "lightning-2",
    "sdxl_lightning_8step_lora": "lightning-8",
}
OTHERS = (
    "Hyper-SDXL-8steps-CFG-lora",  # which is drawn with guidance
    "lightning_strikes_v2",
    "hyperrealistic",
    "porsche_911_turbo",
    "talcmine",
    "",
)


def test_published_names_are_known() -> None:
    assert {name: looks_like(name) for name in PUBLISHED} == PUBLISHED
    assert {looks_like(name) for name in OTHERS} == {None}


def test_what_metadata_says() -> None:
    assert said_by({"ss_output_name": "sdxl_lightning_4step_lora"}) == "lightning-4"
    assert said_by({"modelspec.title": "Hyper SD 1.5, 8 steps"}) == "hyper-8"
    assert said_by({"modelspec.description": "made for lcm too", "format": "pt"}) is None


@pytest.mark.parametrize("name", FEW_STEPS)
def test_every_row_can_be_drawn_with(name: str) -> None:
    row = named(name)
    defaults = Defaults(**row.defaults)
    table = make_table(resolve(defaults.sampler, SDXL), defaults.num_inference_steps)
    assert len(table) == row.steps
    assert "arXiv" in row.source


@pytest.mark.parametrize(
    ("name", "scheduler", "options", "asked"),
    [
        ("lcm", "LCMScheduler", {}, {}),
        ("tcd", "TCDScheduler", {}, {}),
        ("dmd2", "LCMScheduler", {}, {"original_inference_steps": 4}),
        ("turbo", "EulerAncestralDiscreteScheduler", {"timestep_spacing": "trailing"}, {}),
        ("hyper-4", "DDIMScheduler", {"timestep_spacing": "trailing"}, {}),
        ("lightning-4", "EulerDiscreteScheduler", {"timestep_spacing": "trailing"}, {}),
    ],
)
def test_timesteps_are_those_of_diffusers(
    name: str, scheduler: str, options: dict[str, Any], asked: dict[str, Any]
) -> None:
    """With the scheduler and the options that the cards name."""
    theirs = getattr(diffusers, scheduler).from_config(SDXL, **options)
    theirs.set_timesteps(4, **asked)
    found = make_table(resolve(named(name).sampler, SDXL), 4).t
    np.testing.assert_allclose(found, theirs.timesteps.numpy())


def test_dmd2_visits_the_timesteps_of_its_card() -> None:
    table = make_table(resolve("dmd2", SDXL), 4)
    assert table.t.tolist() == [999, 749, 499, 249]


def test_an_unknown_kind_is_named() -> None:
    with pytest.raises(UsageError, match=r"called 'lightning'; .*Did you mean lightning-\d"):
        named("lightning")
    with pytest.raises(UsageError, match=r"Choose one of these"):
        named("a word")
