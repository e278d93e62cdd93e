"""Which noise levels a sampler visits: from a configuration and a step count to a `Run`.

The conventions differ between diffusers' classes and decide the picture, so each is followed: where the
timesteps lie, whether they are rounded, what the last target is. "k" below is the k-diffusion family (Euler,
Heun, LMS, DPM2), which lives in the variance-exploding form (alpha = 1); "DPM" is DPM-Solver, DEIS and UniPC.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, TypeAlias

import numpy as np
from numpy.typing import NDArray

from ...engines.errors import SamplerError
from ...engines.noise_schedule import Array, Level
from .config import SCHEDULER_CLASSES, SamplerConfig
from .schedule import sigma_ramp, timesteps
from .step_lists import listed_timesteps

Step: TypeAlias = tuple[Level, Level]
Custom: TypeAlias = Sequence[float] | None

_LOG_ROUNDING = 1e-9  # of a timestep that went through log and exp in float64
_NOWHERE = math.nan  # timestep of a level at which no model is asked


@dataclass(frozen=True, kw_only=True)
class Run:
    """What a formula walks along.

    Args:
        steps: (from, to) pairs of levels, high noise first. `to` is the next `from` in most samplers; DDIM
            and PNDM aim at t - T//N instead.
        start: how many steps of the schedule are left out before the first (image-to-image); 0 otherwise.
        total: steps of the whole schedule; rules such as "below 15 steps" count these.
        x_scale: standard deviation of the first state.
        config: the sampler's options.
    """

    steps: tuple[Step, ...]
    start: int
    total: int
    x_scale: float
    config: SamplerConfig


def lay_levels(
    config: SamplerConfig, count: int, *, timesteps: Custom = None, sigmas: Custom = None, start: int = 0
) -> Run:
    """Lay the levels of a run; the arguments are those of `samplers.make_table`, already validated.

    Raises:
        SamplerError: the sampler takes no such timesteps or sigmas, or the schedule leaves the training
            range.
    """
    _check_custom(config, timesteps, sigmas)
    if config.step_list is not None:
        timesteps = listed_timesteps(config.step_list, count)
    layer = SCHEDULER_CLASSES[config.scheduler].levels
    if layer == "k":
        levels, x_scale = _k_levels(config, count, timesteps, sigmas)
        steps = list(itertools.pairwise(levels))
    else:
        steps, x_scale = _VP_STEPS[layer](config, count, timesteps), 1.0
    run = _cut_plms(config, steps, start) if layer == "plms" else tuple(steps[start:])
    if start and run:  # image to image starts from an image with this much noise added
        x_scale = run[0][0].sigma
    return Run(steps=run, start=start, total=len(steps), x_scale=float(x_scale), config=config)


def _check_custom(config: SamplerConfig, timesteps: Custom, sigmas: Custom) -> None:
    for name, values in (("timesteps", timesteps), ("sigmas", sigmas)):
        if values is not None and config.step_list is not None:
            raise SamplerError(
                f"custom {name} for sampler {config.name} with the steps of {config.step_list}",
                expected="one of them",
                fix=f"Drop {name}, or `ays` from the sampler's name.",
            )
    if sigmas is not None:
        own = config.sigma_schedule == "default"
        if timesteps is not None or config.scheduler != "EulerDiscreteScheduler" or not own:
            raise SamplerError(
                f"custom sigmas for sampler {config.name} with {config.sigma_schedule} sigmas",
                expected="sampler 'euler' with default sigmas, without timesteps",
                fix="Drop sigmas.",
            )
        _check_order("sigmas", sigmas, math.inf)
    if timesteps is None:
        return
    facts = SCHEDULER_CLASSES[config.scheduler]
    if not facts.custom_timesteps or config.sigma_schedule != "default":
        raise SamplerError(
            f"custom timesteps for sampler {config.name} with {config.sigma_schedule} sigmas",
            expected="default sigmas and one of ddpm, euler, heun, lcm, tcd, dpm_solver, dpmpp",
            fix="Drop timesteps, or choose one of these samplers.",
        )
    if config.timestep_type == "continuous" and config.prediction_type == "v_prediction":
        raise SamplerError(
            f"custom timesteps for {config.name} of a model that is told log(sigma) / 4 as its timestep",
            expected="sigmas",
            fix="Pass sigmas in place of timesteps.",
        )
    _check_order("timesteps", timesteps, config.noise.num_train_timesteps - 1)


def _check_order(name: str, values: Sequence[float], highest: float) -> None:
    """Refuse an order that no run has; written so that NaN is refused too."""
    descending = all(earlier > later for earlier, later in itertools.pairwise(values))
    if not (descending and values[-1] >= 0 and values[0] <= highest and math.isfinite(values[0])):
        raise SamplerError(
            f"custom {name} {list(values)}",
            expected=f"finite numbers from {highest:g} down to 0, each below the one before",
            fix="Pass each once, the largest first, and none beyond these.",
        )


def _spaced(config: SamplerConfig, count: int, *, last: int | None = None, drop: int = 0) -> Array:
    train = config.noise.num_train_timesteps
    return timesteps(config.timestep_spacing, count, train, offset=config.steps_offset, last=last, drop=drop)


# --- the k-diffusion family -------------------------------------------------------------------------------


def _k_levels(
    config: SamplerConfig, count: int, custom: Custom, custom_sigmas: Custom
) -> tuple[list[Level], float]:
    """Variance-exploding levels, the final one included, and the standard deviation of the first x."""
    noise = config.noise
    if custom_sigmas is not None:
        sigmas = np.asarray(custom_sigmas, dtype=np.float64)
        t = noise.t_at(sigmas[:-1])
    else:
        t = _spaced(config, count) if custom is None else np.asarray(custom, dtype=np.float64)
        t = t.astype(np.float32).astype(np.float64)
        sigmas = noise.sigma_at(t)
        if config.interpolation_type == "log_linear":
            # N+1 sigmas for N timesteps: the run ends on the lowest of them, and the final sigma is never
            # reached.
            sigmas = sigma_ramp("exponential", float(noise.sigmas[-1]), float(noise.sigmas[0]), count + 1)
        if config.sigma_schedule != "default":
            sigmas = _ramp(config, sigmas, count)
            t = noise.t_at(sigmas)
            if config.sigma_schedule == "karras" and config.scheduler.startswith("KDPM2"):
                t = np.round(t)
        last = noise.sigmas[0] if config.final_sigmas_type == "sigma_min" else 0.0
        sigmas = np.append(sigmas, last)
    sigmas = sigmas.astype(np.float32).astype(np.float64)
    if config.timestep_type == "continuous" and config.prediction_type == "v_prediction":
        t = 0.25 * np.log(sigmas[:-1])
    levels = [Level(float(time), np.float64(1), sigma) for time, sigma in zip(t, sigmas, strict=False)]
    levels.append(Level(_NOWHERE, np.float64(1), sigmas[len(t)]))
    top = float(np.max(sigmas))
    # "leading" leaves signal in the first state, so its noise is scaled to full variance; the others start
    # from pure noise of standard deviation sigma_max.
    return levels, top if config.timestep_spacing in ("linspace", "trailing") else math.hypot(top, 1)


def _ramp(config: SamplerConfig, ends: Array, count: int) -> Array:
    """Sigmas of the configured ramp; `ends` descends from the default first sigma to the default last one."""
    high = config.sigma_max if config.sigma_max is not None else float(ends[0])
    low = config.sigma_min if config.sigma_min is not None else float(ends[-1])
    return sigma_ramp(config.sigma_schedule, high, low, count)


# --- DPM-Solver, DEIS, UniPC ------------------------------------------------------------------------------


def _dpm_steps(config: SamplerConfig, count: int, custom: Custom) -> list[Step]:
    noise = config.noise
    t = _dpm_timesteps(config, count) if custom is None else np.asarray(custom, dtype=np.float64)
    t = np.trunc(t)
    sigmas = noise.sigma_at(t)
    if config.sigma_schedule != "default":
        # "lu" starts from the logarithms, as they are kept
        ends = np.exp(noise.log_sigmas) if config.sigma_schedule == "lu" else noise.sigmas
        sigmas = _ramp(config, ends[::-1], count)
        t = noise.t_at(sigmas)
        # diffusers converts these timesteps to integers by truncation, except where it rounded them first
        rounded = config.sigma_schedule in ("karras", "lu") and not _keeps_cosine_fractions(config)
        t = np.round(t) if rounded else np.trunc(t + _LOG_ROUNDING)
    sigmas = np.append(sigmas, _dpm_final_sigma(config, sigmas)).astype(np.float32).astype(np.float64)
    alphas = 1 / np.sqrt(sigmas**2 + 1)
    times = np.append(t, _NOWHERE)
    levels = [Level(float(times[i]), alphas[i], sigmas[i] * alphas[i]) for i in range(len(sigmas))]
    return list(itertools.pairwise(levels))


def _dpm_timesteps(config: SamplerConfig, count: int) -> Array:
    train = config.noise.num_train_timesteps
    lambdas = -np.log(config.noise.sigmas)  # descending in t
    last = train - int(np.searchsorted(lambdas[::-1], config.lambda_min_clipped))
    if config.scheduler == "DPMSolverSinglestepScheduler":  # knows no spacing
        return np.round(timesteps("linspace", count, train, last=last, drop=1))
    return np.round(_spaced(config, count, last=last, drop=1))


def _keeps_cosine_fractions(config: SamplerConfig) -> bool:
    return (
        config.scheduler == "DPMSolverMultistepScheduler"
        and config.noise.beta_schedule == "squaredcos_cap_v2"
    )


def _dpm_final_sigma(config: SamplerConfig, sigmas: Array) -> float:
    ramped = config.sigma_schedule != "default"
    if config.scheduler == "DEISMultistepScheduler":  # never 0; on a ramp the last step stands still
        return sigmas[-1] if ramped else config.noise.sigmas[0]
    if config.final_sigmas_type == "zero":
        return 0.0
    return sigmas[-1] if ramped and config.scheduler == "UniPCMultistepScheduler" else config.noise.sigmas[0]


# --- DDPM, DDIM, PNDM, LCM, TCD ---------------------------------------------------------------------------


def _final_level(config: SamplerConfig) -> Level:
    if config.set_alpha_to_one:
        return Level(_NOWHERE, np.float64(1), np.float64(0))
    return config.noise.level(0)


def _whole(values: NDArray[Any]) -> list[int]:
    return [int(value) for value in values]


def _next_steps(config: SamplerConfig, t: Sequence[int], final: Level) -> list[Step]:
    """Each timestep aims at the next one of the list."""
    return list(itertools.pairwise([*(config.noise.level(time) for time in t), final]))


def _ddpm_steps(config: SamplerConfig, count: int, custom: Custom) -> list[Step]:
    t = np.round(_spaced(config, count)) if custom is None else np.asarray(custom)
    return _next_steps(config, _whole(t), Level(_NOWHERE, np.float64(1), np.float64(0)))


def _ddim_steps(config: SamplerConfig, count: int, custom: Custom) -> list[Step]:
    """Each timestep aims at t - T//N, which in "linspace" and "trailing" spacing need not be the next one.

    Custom timesteps were refused before.
    """
    stride = config.noise.num_train_timesteps // count
    pairs = [(time, time - stride) for time in _whole(np.round(_spaced(config, count)))]
    return [
        (config.noise.level(time), config.noise.level(target) if target >= 0 else _final_level(config))
        for time, target in pairs
    ]


def _cut_plms(config: SamplerConfig, steps: list[Step], start: int) -> tuple[Step, ...]:
    """PLMS asks the model twice for its first step: again at the second timestep, to repeat the step with an
    average.

    So the second timestep is listed twice, and a schedule has one UNet call more than steps. After a late
    start (image-to-image) the list is cut but the second call still repeats the first step, so that one step
    is skipped: a quirk of diffusers, kept because PNDM is the scheduler of SD 1.x and its pictures are what
    users compare with.
    """
    run = [*steps[:2], *steps[1:]][start:]
    if len(run) > 1:
        stride = config.noise.num_train_timesteps // len(steps)
        second = run[1][0]
        run[1] = (config.noise.level(int(second.t) + stride), second)
    return tuple(run)


def _lcm_steps(config: SamplerConfig, count: int, custom: Custom) -> list[Step]:
    """A subset of the grid of `original_inference_steps` timesteps on which the model was distilled."""
    train, whole = config.noise.num_train_timesteps, config.original_inference_steps
    original = int(whole * config.grid_share)
    if custom is not None:
        t = _whole(np.asarray(custom))
    elif not (count <= original and whole <= train):
        raise SamplerError(
            f"{count} steps on a distillation grid of {original}",
            expected=f"steps <= original_inference_steps <= {train}",
            fix=f"Use at most {original} steps (such models want 1 to 8).",
        )
    else:
        grid = (np.arange(1, original + 1) * (train // whole) - 1)[::-1]
        t = _whole(grid[np.floor(np.linspace(0, original, count, endpoint=False)).astype(np.int64)])
    # LCM's last result is not noised again; TCD's last target is timestep 0.
    return _next_steps(config, t, config.noise.level(0))


# A diffusers class's `levels` -> its steps; "k" is `_k_levels`.
_VP_STEPS: dict[str, Callable[[SamplerConfig, int, Custom], list[Step]]] = {
    "ddpm": _ddpm_steps,
    "ddim": _ddim_steps,
    "plms": _ddim_steps,
    "lcm": _lcm_steps,
    "dpm": _dpm_steps,
}
