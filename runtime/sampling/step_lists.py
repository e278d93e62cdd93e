"""Steps that were published for a family of models, asked for by name, as in "dpmpp_2m_ays".

Align Your Steps (Sabour et al. 2024, arXiv 2404.14507) chooses the timesteps of few steps by minimising a
bound on the error, once per model. Its lists have ten; other counts come from interpolating the logarithms of
their sigmas, as its authors publish it (research.nvidia.com/labs/toronto-ai/AlignYourSteps/howto.html).
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass
from functools import lru_cache
from types import MappingProxyType

import numpy as np

from ...engines.errors import SamplerError
from ...engines.noise_schedule import NoiseSchedule

# Of Stable Diffusion 1.x and SDXL, with which the lists were made. On other schedules the timesteps are the
# same, as there the first sigma may be infinite.
_NOISE = NoiseSchedule(beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear")


@dataclass(frozen=True)
class StepList:
    """A published list.

    Attributes:
        made_for: the models, for people.
        timesteps: descending; the run ends at sigma = 0 behind the last one.
    """

    made_for: str
    timesteps: tuple[int, ...]


# The numbers are those of diffusers' AysSchedules.
STEP_LISTS: Mapping[str, StepList] = MappingProxyType(
    {
        "ays_sd": StepList("Stable Diffusion 1.x", (999, 850, 736, 645, 545, 455, 343, 233, 124, 24)),
        "ays_sdxl": StepList("SDXL", (999, 845, 730, 587, 443, 310, 193, 116, 53, 13)),
    }
)


def list_of_model(vectors: Collection[str], time_ids: Collection[str]) -> str | None:
    """The list that fits a model, a key of `STEP_LISTS`, by what its UNet is told; None if there is none.

    Stable Diffusion 2.x, which is told as little as 1.x, has that one's, as in AUTOMATIC1111.

    Args:
        vectors: the names of what joins the time embedding (`spec.VECTORS`).
        time_ids: what the numbers of the vector `time_ids` are.
    """
    if not vectors:
        return "ays_sd"
    return "ays_sdxl" if "target_height" in time_ids and set(vectors) == {"text_embeds", "time_ids"} else None


@lru_cache(maxsize=64)
def listed_timesteps(name: str, count: int) -> tuple[float, ...]:
    """The descending whole timesteps of a list for so many steps.

    With n published timesteps and the end of the schedule, n + 1 sigmas, `count` + 1 are interpolated
    log-linearly in their index; the last of these is where the run steps to zero instead.

    Raises:
        SamplerError: so many steps that two of them would be at one timestep.
    """
    published = STEP_LISTS[name].timesteps
    log_sigmas = np.log(_NOISE.sigma_at(np.array([*published, 0], np.float64)))
    places = np.linspace(0, len(published), count + 1)[:-1]
    sigmas = np.exp(np.interp(places, np.arange(len(log_sigmas)), log_sigmas))
    found = np.round(_NOISE.t_at(sigmas))
    if len(set(found.tolist())) < count:
        raise SamplerError(
            f"{count} steps of the list {name}, of which some are at one timestep",
            expected=f"few steps: the list has {len(published)}",
            fix="Use at most 50 steps, or the sampler without `ays`.",
        )
    return tuple(found.tolist())
