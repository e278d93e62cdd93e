"""The samplers, each as the formula of its paper, and the tables they trace to.

A formula walks along `plan.steps`, pairs of noise levels (s, t) with x = alpha*x0 + sigma*eps at each, and
calls `predict(x, s)` once per UNet evaluation. What comes back is the clean picture x0 or the noise eps, as
the sampler's `history` says. `noise()` is a fresh unit normal tensor. Every formula must be linear in x,
predictions and noise. In the k-diffusion family alpha = 1, so that x = x0 + sigma*eps.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from types import MappingProxyType
from typing import TypeAlias

import numpy as np

from ...engines.errors import SamplerError
from . import names as sampler_names
from .config import SamplerConfig
from .levels import Plan, plan
from .multistep import deis, dpm_multistep, dpm_singlestep, lms, plms, unipc
from .schedule import Level
from .table import Noise, Predict, Table, Vector, trace

__all__ = ["SAMPLERS", "Sampler", "SamplerConfig", "make_table", "resolve"]

PlannedFormula: TypeAlias = Callable[[Vector, Predict, Noise, Plan], Vector]

resolve = sampler_names.resolve


def ddpm(x: Vector, predict: Predict, noise: Noise, plan: Plan) -> Vector:
    """Sample the posterior of the forward process (Ho et al. 2020, eq. 6-7)."""
    for s, t in plan.steps:
        x0 = predict(x, s)
        alpha = s.alpha / t.alpha  # of the jump t -> s
        beta = 1 - alpha**2
        x = (t.alpha * beta * x0 + alpha * t.sigma**2 * x) / s.sigma**2
        if s.t > 0:
            deviation = math.sqrt(beta) if plan.config.variance_type == "fixed_large" else _posterior(s, t)
            x = x + deviation * noise()
    return x


def ddim(x: Vector, predict: Predict, noise: Noise, plan: Plan) -> Vector:
    """Song et al. 2021, eq. 12 and 16; eta = 0 is deterministic, eta = 1 has DDPM's noise."""
    eta = plan.config.eta
    for s, t in plan.steps:
        x0 = predict(x, s)
        eps = (x - s.alpha * x0) / s.sigma
        up = eta * _posterior(s, t)
        x = t.alpha * x0 + math.sqrt(t.sigma**2 - up**2) * eps
        if eta > 0:
            x = x + up * noise()
    return x


def _posterior(s: Level, t: Level) -> float:
    """Standard deviation of q(x_t | x_s, x0) (Ho et al. 2020, eq. 7)."""
    return t.sigma / s.sigma * math.sqrt(max(1 - (s.alpha / t.alpha) ** 2, 0))


def euler(x: Vector, predict: Predict, noise: Noise, plan: Plan) -> Vector:
    """Euler's method in sigma (Karras et al. 2022, Algorithm 1 without its second-order correction)."""
    del noise
    for s, t in plan.steps:
        d = (x - predict(x, s)) / s.sigma
        x = x + d * (t.sigma - s.sigma)
    return x


def euler_ancestral(x: Vector, predict: Predict, noise: Noise, plan: Plan) -> Vector:
    """Euler to sigma_down, then noise up to the next sigma (k-diffusion `sample_euler_ancestral`)."""
    for s, t in plan.steps:
        down, up = _ancestral(s, t)
        d = (x - predict(x, s)) / s.sigma
        x = x + d * (down - s.sigma) + up * noise()
    return x


def _ancestral(s: Level, t: Level) -> tuple[float, float]:
    """(sigma_down, sigma_up), whose squares sum to t.sigma^2: mean and noise of the posterior."""
    up = t.sigma * math.sqrt(max(1 - (t.sigma / s.sigma) ** 2, 0))
    return t.sigma**2 / s.sigma, up


def heun(x: Vector, predict: Predict, noise: Noise, plan: Plan) -> Vector:
    """Karras et al. 2022, Algorithm 1: trapezoidal rule, plain Euler into sigma = 0."""
    del noise
    for s, t in plan.steps:
        d = predict(x, s)
        dt = t.sigma - s.sigma
        end = x + d * dt
        x = end if t.sigma == 0 else x + (d + predict(end, t)) / 2 * dt
    return x


def dpm2(x: Vector, predict: Predict, noise: Noise, plan: Plan) -> Vector:
    """Midpoint rule, the middle taken in log sigma (k-diffusion `sample_dpm_2`; Lu et al. 2022, Alg. 1)."""
    del noise
    for s, t in plan.steps:
        d = predict(x, s)
        if t.sigma > 0:
            middle = _log_middle(plan, s, t.sigma)
            d = predict(x + d * (middle.sigma - s.sigma), middle)
        x = x + d * (t.sigma - s.sigma)
    return x


def dpm2_ancestral(x: Vector, predict: Predict, noise: Noise, plan: Plan) -> Vector:
    """`dpm2` down to sigma_down, then noise back up (k-diffusion `sample_dpm_2_ancestral`)."""
    for s, t in plan.steps:
        d = predict(x, s)
        if t.sigma == 0:
            return x - d * s.sigma
        down, up = _ancestral(s, t)
        middle = _log_middle(plan, s, down)
        d = predict(x + d * (middle.sigma - s.sigma), middle)
        x = x + d * (down - s.sigma) + up * noise()
    return x


def dpmpp_2s_ancestral(x: Vector, predict: Predict, noise: Noise, plan: Plan) -> Vector:
    """DPM-Solver++(2S) down to sigma_down, then noise back up (k-diffusion `sample_dpmpp_2s_ancestral`)."""
    for s, t in plan.steps:
        x0 = predict(x, s)
        if t.sigma == 0:
            return x0
        down, up = _ancestral(s, t)
        middle = _log_middle(plan, s, down)
        r = middle.sigma / s.sigma
        x0 = predict(r * x + (1 - r) * x0, middle)
        r = down / s.sigma
        x = r * x + (1 - r) * x0 + up * noise()
    return x


def _log_middle(plan: Plan, s: Level, sigma: float) -> Level:
    middle = math.sqrt(s.sigma * sigma)
    return Level(float(plan.config.noise.t_at(np.array(middle))), s.alpha, np.float64(middle))


def lcm(x: Vector, predict: Predict, noise: Noise, plan: Plan) -> Vector:
    """Latent consistency sampling (Luo et al. 2023, Algorithm 3): predict, then noise again; no noise at the
    end.

    c_skip and c_out are the boundary conditions of Song et al. 2023, eq. 25, with sigma_data = 0.5.
    Departure, diffusers': the timestep in them is scaled by 10, which makes c_skip vanish.
    """
    for i, (s, t) in enumerate(plan.steps):
        scaled = s.t * plan.config.timestep_scaling
        c_skip, c_out = 0.25 / (scaled**2 + 0.25), scaled / math.sqrt(scaled**2 + 0.25)
        x = c_out * predict(x, s) + c_skip * x
        if i < plan.remaining - 1:
            x = t.alpha * x + t.sigma * noise()
    return x


def tcd(x: Vector, predict: Predict, noise: Noise, plan: Plan) -> Vector:
    """Trajectory consistency (Zheng et al. 2024, Algorithm 2): jump below the target, then noise up to it."""
    for i, (s, t) in enumerate(plan.steps):
        x0 = predict(x, s)
        below = plan.config.noise.level(math.floor((1 - plan.config.eta) * t.t))
        x = below.alpha * x0 + below.sigma * (x - s.alpha * x0) / s.sigma
        if plan.config.eta > 0 and i < plan.remaining - 1:
            ratio = t.alpha / below.alpha
            x = ratio * x + math.sqrt(1 - ratio**2) * noise()
    return x


@dataclass(frozen=True, kw_only=True)
class Sampler:
    """A formula and what it needs to be traced.

    Args:
        formula: the sampler itself.
        history: what its `predict` returns: "x0", "eps" or "output" (see `table.trace`).
        about: one line for listings.
    """

    formula: PlannedFormula
    history: str
    about: str


def _dpm(order: int, kind: str, algorithm: str) -> Sampler:
    multistep = kind == "m"
    return Sampler(
        formula=dpm_multistep if multistep else dpm_singlestep,
        history="x0" if "++" in algorithm else "eps",
        about=f"{algorithm} of order {order}, {'multistep' if multistep else 'singlestep'}",
    )


_DPM_FAMILY: dict[str, Sampler] = {
    f"{family}_{order}{kind}{suffix}": _dpm(order, kind, algorithm)
    for family, suffix, algorithm, orders in (
        ("dpm_solver", "", "dpmsolver", (1, 2, 3)),
        ("dpmpp", "", "dpmsolver++", (1, 2, 3)),
        ("dpmpp", "_sde", "sde-dpmsolver++", (1, 2, 3)),
        ("dpm_solver", "_sde", "sde-dpmsolver", (1, 2)),
    )
    for order in orders
    for kind in ("m", "s")
    if not (suffix and kind == "s")  # a stage's noise would have to be remembered: outside the form
}

SAMPLERS: Mapping[str, Sampler] = MappingProxyType(
    {
        "ddpm": Sampler(formula=ddpm, history="x0", about="ancestral sampling, Ho et al. 2020"),
        "ddim": Sampler(formula=ddim, history="x0", about="DDIM with eta, Song et al. 2021"),
        "pndm": Sampler(
            formula=plms, history="output", about="PNDM without Runge-Kutta steps, which is PLMS"
        ),
        "plms": Sampler(formula=plms, history="output", about="pseudo linear multistep, Liu et al. 2022"),
        "euler": Sampler(formula=euler, history="x0", about="Euler in sigma, Karras et al. 2022"),
        "euler_a": Sampler(
            formula=euler_ancestral, history="x0", about="Euler with ancestral noise, k-diffusion"
        ),
        "heun": Sampler(formula=heun, history="eps", about="Heun, two calls per step, Karras et al. 2022"),
        "lms": Sampler(formula=lms, history="eps", about="linear multistep of order 4, k-diffusion"),
        "dpm2": Sampler(
            formula=dpm2, history="eps", about="midpoint in log sigma, two calls per step, k-diffusion"
        ),
        "dpm2_a": Sampler(
            formula=dpm2_ancestral, history="eps", about="dpm2 with ancestral noise, k-diffusion"
        ),
        **_DPM_FAMILY,
        "dpmpp_2s_a": Sampler(
            formula=dpmpp_2s_ancestral, history="x0", about="dpmpp_2s with ancestral noise, k-diffusion"
        ),
        "deis": Sampler(formula=deis, history="eps", about="DEIS in log rho, Zhang & Chen 2023"),
        "unipc": Sampler(formula=unipc, history="x0", about="UniPC predictor-corrector, Zhao et al. 2023"),
        "lcm": Sampler(formula=lcm, history="x0", about="latent consistency models, Luo et al. 2023"),
        "tcd": Sampler(
            formula=tcd, history="x0", about="trajectory consistency distillation, Zheng et al. 2024"
        ),
    }
)


def make_table(
    config: SamplerConfig,
    num_inference_steps: int,
    *,
    timesteps: Sequence[float] | None = None,
    sigmas: Sequence[float] | None = None,
    start: int = 0,
) -> Table:
    """Trace a sampler to its table; cached, tables being immutable.

    Args:
        config: from `resolve`.
        num_inference_steps: steps as diffusers counts them; Heun and DPM2 make almost two UNet calls for
            each.
        timesteps: descending timesteps in place of the configured spacing; they set the number of steps.
        sigmas: for `euler`, sigmas in place of the spacing, the final one (0) included.
        start: steps to leave out at the noisy end, for image-to-image. The first state is then
            sqrt(alpha_bar[0])*x0 + init*noise with the table's `alpha_bar` and `init`.

    Raises:
        SamplerError: a bad step count or start, custom timesteps the sampler does not take, or a combination
            of options that has no table.
    """
    custom = None if timesteps is None else tuple(float(t) for t in timesteps)
    given = None if sigmas is None else tuple(float(sigma) for sigma in sigmas)
    steps = num_inference_steps
    if custom is not None:
        steps = len(custom)
    elif given is not None:
        steps = len(given) - 1
    most = config.noise.num_train_timesteps
    if isinstance(steps, bool) or not isinstance(steps, int | np.integer) or not 1 <= steps <= most:
        raise SamplerError(
            f"num_inference_steps = {steps!r}", expected=f"a whole number from 1 to {most}", fix="Try 20."
        )
    if not 0 <= start < steps:
        raise SamplerError(
            f"a start at step {start} of {steps}",
            expected=f"0 to {steps - 1}",
            fix="Raise strength, or the step count.",
        )
    return _trace(config, int(steps), custom, given, start)


@lru_cache(maxsize=64)
def _trace(
    config: SamplerConfig,
    steps: int,
    custom: tuple[float, ...] | None,
    given: tuple[float, ...] | None,
    start: int,
) -> Table:
    if config.name not in SAMPLERS:
        raise SamplerError(
            f"sampler {config.name!r}", expected=", ".join(SAMPLERS), fix="Choose one of these."
        )
    sampler = SAMPLERS[config.name]
    layout = plan(config, steps, custom=custom, sigmas=given, start=start)
    return trace(
        lambda x, predict, noise: sampler.formula(x, predict, noise, layout),
        name=config.name,
        history=sampler.history if config.predict_x0 else "eps",
        prediction_type=config.prediction_type,
        x_scale=layout.x_scale,
    )
