"""Which part of a schedule is run, and the table of that part.

Image to image leaves out the noisy end (`strength`); a hand-over between two models cuts the schedule at a
training timestep (`denoising_end`, `denoising_start`), so that their steps may differ.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from ...engines.errors import UsageError
from .config import SamplerConfig
from .samplers import SAMPLERS, count_steps, make_table
from .table import Table


def make_span(
    config: SamplerConfig,
    num_inference_steps: int,
    *,
    timesteps: Sequence[float] | None = None,
    sigmas: Sequence[float] | None = None,
    strength: float | None = None,
    denoising_start: float | None = None,
    denoising_end: float | None = None,
) -> Table:
    """The rows of the sampler's table that are run, at least one.

    The numbers of steps are diffusers': `int(steps * strength)` for pictures, and for a hand-over the
    timesteps below, or from, `round(T - share * T)`. Of samplers with two UNet calls a step, whole steps are
    cut (diffusers may cut between the two calls).

    Args:
        config: the sampler; one with `grid_share` below 1 has its strength in its grid, and is not cut by it.
        num_inference_steps: steps of the whole schedule.
        timesteps: see `make_table`.
        sigmas: see `make_table`.
        strength: 0 to 1, how much of the schedule is run; None is all of it. Ignored beside
            `denoising_start`.
        denoising_start: share of the schedule, 0 to 1, that another model has done already.
        denoising_end: share of the schedule after which another model goes on.

    Raises:
        UsageError: nothing is left to run.
        SamplerError: as `make_table`.
    """
    whole = make_table(config, num_inference_steps, timesteps=timesteps, sigmas=sigmas)
    steps = count_steps(num_inference_steps, timesteps, sigmas)
    calls = SAMPLERS[config.name].calls
    visited = whole.t[::calls]  # PLMS has one more than there are steps, and cuts count it, as in diffusers
    train = config.noise.num_train_timesteps
    start, stop = 0, len(visited)
    if denoising_end is not None:
        stop = _steps_before(visited, denoising_end, train)
    if denoising_start is not None:
        start = _steps_before(visited, denoising_start, train)
    elif config.grid_share == 1 and strength is not None:
        start = steps - min(int(steps * strength), steps)
    if start >= stop:
        cuts = {"strength": strength, "denoising_start": denoising_start, "denoising_end": denoising_end}
        words = ", ".join(f"{name} {value:g}" for name, value in cuts.items() if value is not None)
        raise UsageError(
            f"{steps} steps, of which none is left to run ({words})",
            expected="at least one step",
            fix="Raise strength or num_inference_steps, or widen the part of the schedule.",
        )
    table = whole
    if start:
        table = make_table(config, num_inference_steps, timesteps=timesteps, sigmas=sigmas, start=start)
    return table if stop == len(visited) else table.head((stop - start) * calls)


def _steps_before(timesteps: np.ndarray, share: float, train: int) -> int:
    """How many steps come before a share of the schedule."""
    return int((timesteps >= round(train - share * train)).sum())
