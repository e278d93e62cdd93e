"""Which part of a schedule a request runs, and the table of that part.

Image to image leaves out the noisy end (`strength`); a hand-over between two models cuts the schedule at a
training timestep (`denoising_end`, `denoising_start`), so that their steps may differ.
"""

from __future__ import annotations

from functools import partial

import numpy as np

from ...engines.errors import UsageError
from ..request.request import Request
from .samplers import make_table
from .table import Table

_TWO_CALLS = ("heun", "dpm2", "dpm2_a", "dpmpp_2s_a")  # UNet calls of a step


def make_span(request: Request) -> Table:
    """The rows of the sampler's table that are run, at least one.

    The numbers of steps are diffusers': `int(steps * strength)` for pictures, and for a hand-over the
    timesteps below, or from, `round(T - share * T)`. Of samplers with two UNet calls a step, whole steps are
    cut (diffusers may cut between the two calls).

    Raises:
        UsageError: nothing is left to run.
        SamplerError: as `make_table`.
    """
    steps = request.num_inference_steps
    table_from = partial(
        make_table, request.sampler, steps, timesteps=request.timesteps, sigmas=request.sigmas
    )
    whole = table_from()
    calls = 2 if request.sampler.name in _TWO_CALLS else 1
    timesteps = whole.t[::calls]  # PLMS has one more than there are steps, and cuts count it, as in diffusers
    train = request.sampler.noise.num_train_timesteps
    start, stop = 0, len(timesteps)
    if request.denoising_end is not None:
        stop = _before(timesteps, request.denoising_end, train)
    if request.denoising_start is not None:
        start = _before(timesteps, request.denoising_start, train)
    elif request.sampler.grid_share == 1 and (strength := _strength(request)) is not None:
        start = steps - min(int(steps * strength), steps)
    if start >= stop:
        raise UsageError(
            f"{steps} steps, of which none is left to run ({_words(request)})",
            expected="at least one step",
            fix="Raise strength or num_inference_steps, or widen the part of the schedule.",
        )
    table = table_from(start=start) if start else whole
    return table if stop == len(timesteps) else table.head((stop - start) * calls)


def _before(timesteps: np.ndarray, share: float, train: int) -> int:
    """How many steps stand before a share of the schedule."""
    return int((timesteps >= round(train - share * train)).sum())


def _strength(request: Request) -> float | None:
    """Of what the run starts from, if it starts from anything but noise."""
    return getattr(request.source, "strength", None)


def _words(request: Request) -> str:
    parts = {
        "strength": _strength(request),
        "denoising_start": request.denoising_start,
        "denoising_end": request.denoising_end,
    }
    return ", ".join(f"{name} {value:g}" for name, value in parts.items() if value is not None)
