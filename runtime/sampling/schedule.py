"""The noise levels that a run visits, of a model's training schedule (`engines/noise_schedule.py`)."""

from __future__ import annotations

import math

import numpy as np

from ...engines.errors import SamplerError
from ...engines.noise_schedule import Array

SPACINGS = ("leading", "linspace", "trailing", "quadratic")
SIGMA_SCHEDULES = ("default", "karras", "exponential", "beta", "lu")


def timesteps(
    spacing: str, count: int, train: int, *, offset: int = 0, last: int | None = None, drop: int = 0
) -> Array:
    """The timesteps of a run, descending, not yet rounded where they are fractional.

    Args:
        spacing: "leading" (multiples of T//n, plus `offset`), "linspace" (both ends), "trailing" (from T-1
            down in steps of T/n; Lin et al. 2024, Table 2) or "quadratic" (dense at low noise; DDIM's and
            DPM-Solver's time_quadratic).
        count: n, the number of timesteps wanted.
        train: T.
        offset: added in "leading".
        last: one past the highest usable timestep; T unless the low-SNR end is clipped.
        drop: 1 where the sampler lays n+1 points and leaves the lowest to its final sigma (DPM-Solver's
            family).

    Raises:
        SamplerError: an unknown spacing.
    """
    top = train if last is None else last
    points = count + drop
    if spacing == "linspace":
        return np.linspace(0, top - 1, points)[::-1][:count]
    if spacing == "quadratic":
        return np.square(np.linspace(0, math.sqrt(top - 1), points))[::-1][:count]
    if spacing == "leading":
        return np.linspace(0, (points - 1) * (top // points), points)[::-1][:count] + offset
    if spacing == "trailing":
        # The cut is a departure: at 61 steps and others, rounding gives diffusers one timestep more, -1.
        return np.round(np.arange(top, 0, -train / count))[:count] - 1
    raise _unknown("timestep_spacing", spacing, SPACINGS)


def sigma_ramp(schedule: str, high: float, low: float, count: int) -> Array:
    """(count,) sigmas from `high` down to `low`.

    Args:
        schedule: "karras" (Karras et al. 2022, eq. 5, rho = 7), "exponential" (uniform in log sigma), "lu"
            (the same numbers: uniform log-SNR, Lu et al. 2022) or "beta" (quantiles of Beta(0.6, 0.6); Lee et
            al. 2024).
        high: first sigma.
        low: last sigma.
        count: number of sigmas.

    Raises:
        SamplerError: an unknown schedule.
    """
    if schedule == "karras":
        ramp = np.linspace(0, 1, count)
        return np.power(high ** (1 / 7) + ramp * (low ** (1 / 7) - high ** (1 / 7)), 7.0)
    if schedule in ("exponential", "lu"):
        return np.exp(np.linspace(math.log(high), math.log(low), count))
    if schedule == "beta":
        return low + _beta_quantile(1 - np.linspace(0, 1, count), 0.6) * (high - low)
    raise _unknown("sigma schedule", schedule, SIGMA_SCHEDULES)


def _beta_quantile(p: Array, shape: float) -> Array:
    """Inverse distribution function of the symmetric Beta(shape, shape), by bisection of its power series.

    Series: DLMF 8.17.7 with a = b; it converges like 2^-k for x <= 1/2, and symmetry supplies the other half.
    """
    k = np.arange(60)
    terms = np.cumprod(np.concatenate([[1.0], (k[1:] - shape) / k[1:]])) / (shape + k)
    norm = math.gamma(2 * shape) / math.gamma(shape) ** 2
    wanted = np.minimum(p, 1 - p)
    low, high = np.zeros_like(p), np.full_like(p, 0.5)
    for _ in range(60):
        middle = (low + high) / 2
        below = norm * middle**shape * (middle[:, None] ** k @ terms) < wanted
        low, high = np.where(below, middle, low), np.where(below, high, middle)
    return np.where(p <= 0.5, high, 1 - high)


def _unknown(option: str, found: str, known: tuple[str, ...]) -> SamplerError:
    return SamplerError(
        f"{option} {found!r}", expected=" or ".join(known), fix="Correct the model's scheduler_config.json."
    )
