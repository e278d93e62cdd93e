"""Deterministic DDIM (Song et al. 2021, eq. 12 with sigma 0), for the picture that ranges are measured on.

It computes in float32 and in the order of diffusers' DDIMScheduler, so that both give the same bits.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from ...engines.noise_schedule import NoiseSchedule
from ...engines.spec import Array

_BETAS = ("num_train_timesteps", "beta_start", "beta_end", "beta_schedule")


@dataclass(frozen=True, kw_only=True, eq=False)
class Ddim:
    """A run of few steps over all timesteps of a model.

    Attributes:
        alpha_bar: (T,) float32, by timestep.
        prediction_type: "epsilon", "v_prediction" or "sample".
        timesteps: descending, from T - 1 to 0: diffusers' spacing "linspace".
    """

    alpha_bar: Array
    prediction_type: str
    timesteps: tuple[int, ...]

    @classmethod
    def of(cls, scheduler: Mapping[str, Any], steps: int) -> Ddim:
        """The run with a checkpoint's betas and prediction type; `scheduler` is its `scheduler_config.json`.

        A terminal alpha_bar of zero (`rescale_betas_zero_snr`) is left out: DDIM would divide by it.

        Raises:
            SamplerError: betas that no schedule has.
        """
        kept = {key: scheduler[key] for key in _BETAS if scheduler.get(key) is not None}
        trained = scheduler.get("trained_betas")
        schedule = NoiseSchedule(**kept, trained_betas=None if trained is None else tuple(trained))
        visited: Array = np.round(np.linspace(0, schedule.num_train_timesteps - 1, steps))
        return cls(
            alpha_bar=schedule.alpha_bar.astype(np.float32),
            prediction_type=scheduler.get("prediction_type") or "epsilon",
            timesteps=tuple(map(int, visited[::-1])),
        )

    def step(self, output: Array, timestep: int, sample: Array) -> Array:
        """The sample of the next timestep, from the UNet's output for this one: all float32, of one shape."""
        before = timestep - len(self.alpha_bar) // len(self.timesteps)
        one = np.float32(1)
        here: Any = self.alpha_bar[timestep]
        there: Any = self.alpha_bar[before] if before >= 0 else one
        alpha, sigma = np.sqrt(here), np.sqrt(one - here)
        if self.prediction_type == "epsilon":
            noise, clean = output, (sample - sigma * output) / alpha
        elif self.prediction_type == "sample":
            noise, clean = (sample - alpha * output) / sigma, output
        else:
            noise, clean = alpha * output + sigma * sample, alpha * sample - sigma * output
        return np.sqrt(there) * clean + np.sqrt(one - there) * noise
