"""Published step lists: against diffusers' numbers, and the interpolation that their authors publish."""

from typing import Any

import numpy as np
import pytest
from diffusers.schedulers.scheduling_utils import AysSchedules

from latentrt.engines.errors import SamplerError
from latentrt.runtime.sampling.a1111 import a1111_fields, spelled_by_a1111
from latentrt.runtime.sampling.names import resolve
from latentrt.runtime.sampling.samplers import SAMPLERS, make_table
from latentrt.runtime.sampling.step_lists import list_of_model, listed_timesteps
from tests.runtime.diffusers_oracle import CLASSES, NUMPY2, SD, check, make_scheduler, set_steps

pytestmark = [
    pytest.mark.filterwarnings(f"ignore:{NUMPY2}:DeprecationWarning"),
    pytest.mark.filterwarnings("ignore:.*is deprecated:FutureWarning"),
]

LISTS = {"ays_sd": "StableDiffusion", "ays_sdxl": "StableDiffusionXL"}
ALPHA_BAR = np.cumprod(1 - np.linspace(0.00085**0.5, 0.012**0.5, 1000) ** 2)
WITHOUT = {"ddpm", "ddim", "pndm", "plms", "lcm", "tcd"}
TAKES_TIMESTEPS = [
    "euler",
    "heun",
    *(name for name in CLASSES if name.startswith("dpm") and "dpm2" not in name),
]


@pytest.mark.parametrize("listed", LISTS)
@pytest.mark.parametrize("name", TAKES_TIMESTEPS)
def test_ten_steps_are_those_of_diffusers(name: str, listed: str) -> None:
    scheduler_class, options = CLASSES[name]
    scheduler = make_scheduler(scheduler_class, SD, **options)
    set_steps(scheduler, None, timesteps=AysSchedules[f"{LISTS[listed]}Timesteps"])
    check(make_table(resolve(f"{name}_ays", SD, listed), 10), scheduler)


@pytest.mark.parametrize("steps", [4, 7, 15, 25])
@pytest.mark.parametrize("listed", LISTS)
def test_other_counts_are_interpolated_as_the_authors_do(listed: str, steps: int) -> None:
    """Their `loglinear_interp`, on the sigmas that they publish, which end at 0.029 where diffusers has 0."""
    sigmas = [*AysSchedules[f"{LISTS[listed]}Sigmas"][:-1], 0.029]
    along = np.interp(np.linspace(0, 1, steps + 1), np.linspace(0, 1, 11), np.log(sigmas[::-1]))
    wanted = np.exp(along[::-1])[:steps]
    known = np.log((1 - ALPHA_BAR) / ALPHA_BAR) / 2
    times = np.interp(np.log(wanted), known, np.arange(1000))
    # both are rounded by their authors: sigmas to three digits, timesteps to whole ones
    assert np.abs(np.array(listed_timesteps(listed, steps)) - times).max() <= 1


@pytest.mark.parametrize("name", sorted(set(SAMPLERS) - WITHOUT))
def test_every_sampler_with_a_schedule_visits_the_list(name: str) -> None:
    table = make_table(resolve(f"{name} ays", {**SD, "use_karras_sigmas": True}, "ays_sd"), 10)
    visited = table.t[:: SAMPLERS[name].calls]
    np.testing.assert_array_equal(visited, AysSchedules["StableDiffusionTimesteps"])


@pytest.mark.parametrize("name", sorted(WITHOUT))
def test_samplers_with_steps_of_their_own_have_no_list(name: str) -> None:
    with pytest.raises(SamplerError, match=f"{name} takes no other steps than its own"):
        resolve(f"{name} ays", SD, "ays_sd")


def test_which_list_a_model_has() -> None:
    xl = ("original_height", "original_width", "crop_top", "crop_left", "target_height", "target_width")
    assert list_of_model((), ()) == "ays_sd"
    assert list_of_model(("text_embeds", "time_ids"), xl) == "ays_sdxl"
    assert list_of_model(("text_embeds", "time_ids"), (*xl[:4], "aesthetic_score")) is None  # the refiner
    assert list_of_model(("timestep_cond",), ()) is None
    assert list_of_model(("class_labels",), ()) is None
    with pytest.raises(SamplerError, match="no steps were published for this model"):
        resolve("dpmpp_2m_ays", SD)


@pytest.mark.parametrize(("listed", "most"), [("ays_sd", 73), ("ays_sdxl", 59)])
def test_more_steps_than_timesteps(listed: str, most: int) -> None:
    listed_timesteps(listed, most)
    with pytest.raises(SamplerError, match="are at one timestep"):
        listed_timesteps(listed, most + 1)


@pytest.mark.parametrize("levels", [{"timesteps": [900, 100]}, {"sigmas": [9.0, 0.0]}])
def test_a_list_with_steps_of_the_callers(levels: dict[str, Any]) -> None:
    with pytest.raises(SamplerError, match="with the steps of ays_sd"):
        make_table(resolve("euler_ays", SD, "ays_sd"), 10, **levels)


def test_spellings_of_automatic1111() -> None:
    config = resolve("DPM++ 2M Align Your Steps", SD, "ays_sd")
    assert config == resolve("dpmpp_2m_ays", SD, "ays_sd")
    # It lays other levels under that name, so the text has a word that it does not know.
    fields = {name: str(value) for name, value in a1111_fields(config, 10).items()}
    assert fields == {"Sampler": "DPM++ 2M", "Schedule type": "AYS"}
    assert resolve(spelled_by_a1111(fields), SD, "ays_sd") == config
    theirs = {"Sampler": "Euler", "Schedule type": "Align Your Steps"}
    assert resolve(spelled_by_a1111(theirs), SD, "ays_sd") == resolve("euler_ays", SD, "ays_sd")
