"""The samplers: one declaration each, and the tables they trace to.

Everything that the package knows of a sampler stands in its declaration. Spellings, AUTOMATIC1111's names and
the cuts of image to image are derived from it (`names.py`, `make_span`).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import KW_ONLY, dataclass, field
from functools import lru_cache
from types import MappingProxyType
from typing import Any

import numpy as np

from ...engines.errors import SamplerError, UsageError
from . import formulas
from .config import SamplerConfig
from .formulas import Formula
from .levels import lay_levels
from .table import Table, trace

__all__ = ["SAMPLERS", "Sampler", "SamplerConfig", "make_table"]


@dataclass(frozen=True)
class Sampler:
    """One sampler.

    Attributes:
        formula: the paper's update.
        history: what the formula's `predict` returns: "x0", "eps" or "output" (see `table.trace`).
        scheduler: the diffusers class whose options and noise levels it takes, a key of `SCHEDULER_CLASSES`.
        about: one line for listings.
        options: what it sets of that class's options; all others come from the model's scheduler config.
        calls: UNet calls per step; a step into sigma = 0 may need fewer.
        a1111: the name that AUTOMATIC1111 writes; None where it has no such sampler.
        a1111_grid: the one timestep spacing that it has for it; None where its schedule types count.
        aliases: further spellings, each with the options that it sets on top. Case, spaces and punctuation do
            not matter.
    """

    formula: Formula
    history: str
    scheduler: str
    about: str
    _: KW_ONLY
    options: Mapping[str, Any] = field(default_factory=dict[str, Any])
    calls: int = 1
    a1111: str | None = None
    a1111_grid: str | None = None
    aliases: Mapping[str, Mapping[str, Any]] = field(default_factory=dict[str, Mapping[str, Any]])


def _dpm(order: int, kind: str, algorithm: str, **names: Any) -> Sampler:
    """A DPM-Solver: `kind` is "m" for multistep, "s" for singlestep; `names` are `a1111` and `aliases`."""
    options: dict[str, Any] = {"solver_order": order, "algorithm_type": algorithm}
    if "++" not in algorithm:  # noise prediction divides by the final sigma
        options["final_sigmas_type"] = "sigma_min"
    word, formula = (
        ("multistep", formulas.dpm_multistep) if kind == "m" else ("singlestep", formulas.dpm_singlestep)
    )
    return Sampler(
        formula,
        "x0" if "++" in algorithm else "eps",
        f"DPMSolver{word.title()}Scheduler",
        f"{algorithm} of order {order}, {word}",
        options=options,
        **names,
    )


_PLMS: dict[str, Any] = {"skip_prk_steps": True}
_HEUN: dict[str, Any] = {"solver_type": "heun"}
_ORDERS: dict[str, Any] = {str(order): {"solver_order": order} for order in (2, 3)}
_UNIPC: dict[str, Any] = {f"unipc {name}": option for name, option in _ORDERS.items()} | {
    f"unipc {kind}": {"solver_type": kind} for kind in ("bh1", "bh2")
}

# The timesteps 999, 749, 499, 249 that DMD2 was distilled on (arXiv 2405.14867, and its model card).
_DMD2: dict[str, Any] = {"original_inference_steps": 4}

# fmt: off
_SAMPLERS = {
    "ddpm": Sampler(formulas.ddpm, "x0", "DDPMScheduler", "ancestral sampling, Ho et al. 2020"),
    "ddim": Sampler(formulas.ddim, "x0", "DDIMScheduler", "DDIM with eta, Song et al. 2021", a1111="DDIM",
        a1111_grid="leading"),
    "pndm": Sampler(formulas.plms, "output", "PNDMScheduler",
        "PNDM without Runge-Kutta steps, which is PLMS", options=_PLMS, a1111="PLMS", a1111_grid="leading"),
    "plms": Sampler(formulas.plms, "output", "PNDMScheduler",
        "pseudo linear multistep, Liu et al. 2022", options=_PLMS, a1111="PLMS", a1111_grid="leading"),
    "euler": Sampler(formulas.euler, "x0", "EulerDiscreteScheduler",
        "Euler in sigma, Karras et al. 2022", a1111="Euler"),
    "euler_a": Sampler(formulas.euler_ancestral, "x0", "EulerAncestralDiscreteScheduler",
        "Euler with ancestral noise, k-diffusion", a1111="Euler a", aliases={"euler ancestral": {}}),
    "heun": Sampler(formulas.heun, "eps", "HeunDiscreteScheduler",
        "Heun, two calls per step, Karras et al. 2022", calls=2, a1111="Heun"),
    "lms": Sampler(formulas.lms, "eps", "LMSDiscreteScheduler",
        "linear multistep of order 4, k-diffusion", a1111="LMS"),
    "dpm2": Sampler(formulas.dpm2, "eps", "KDPM2DiscreteScheduler",
        "midpoint in log sigma, two calls per step, k-diffusion", calls=2, a1111="DPM2"),
    "dpm2_a": Sampler(formulas.dpm2_ancestral, "eps", "KDPM2AncestralDiscreteScheduler",
        "dpm2 with ancestral noise, k-diffusion", calls=2, a1111="DPM2 a", aliases={"dpm2 ancestral": {}}),
    "dpm_solver_1m": _dpm(1, "m", "dpmsolver", aliases={"dpm solver 1": {}}),
    "dpm_solver_1s": _dpm(1, "s", "dpmsolver"),
    "dpm_solver_2m": _dpm(2, "m", "dpmsolver", aliases={"dpm solver 2": {}}),
    "dpm_solver_2s": _dpm(2, "s", "dpmsolver"),
    "dpm_solver_3m": _dpm(3, "m", "dpmsolver", aliases={"dpm solver 3": {}}),
    "dpm_solver_3s": _dpm(3, "s", "dpmsolver"),
    "dpmpp_1m": _dpm(1, "m", "dpmsolver++"),
    "dpmpp_1s": _dpm(1, "s", "dpmsolver++"),
    "dpmpp_2m": _dpm(2, "m", "dpmsolver++", a1111="DPM++ 2M",
        aliases={"dpm solver++": {}, "dpm solver multistep": {}, "dpm++ 2m heun": _HEUN}),
    "dpmpp_2s": _dpm(2, "s", "dpmsolver++", aliases={"dpm solver singlestep": {}}),
    "dpmpp_3m": _dpm(3, "m", "dpmsolver++"),
    "dpmpp_3s": _dpm(3, "s", "dpmsolver++"),
    # Singlestep solvers have no variant with noise: a stage's noise would have to be remembered.
    "dpmpp_1m_sde": _dpm(1, "m", "sde-dpmsolver++"),
    "dpmpp_2m_sde": _dpm(2, "m", "sde-dpmsolver++", a1111="DPM++ 2M SDE",
        aliases={"dpm++ 2m sde heun": _HEUN}),
    "dpmpp_3m_sde": _dpm(3, "m", "sde-dpmsolver++", a1111="DPM++ 3M SDE"),
    "dpm_solver_1m_sde": _dpm(1, "m", "sde-dpmsolver"),
    "dpm_solver_2m_sde": _dpm(2, "m", "sde-dpmsolver"),
    # Not in diffusers; it visits the levels of k-diffusion's other ancestral sampler.
    "dpmpp_2s_a": Sampler(formulas.dpmpp_2s_ancestral, "x0", "EulerAncestralDiscreteScheduler",
        "dpmpp_2s with ancestral noise, k-diffusion", calls=2, a1111="DPM++ 2S a",
        aliases={"dpm++ 2s ancestral": {}}),
    "deis": Sampler(formulas.deis, "eps", "DEISMultistepScheduler",
        "DEIS in log rho, Zhang & Chen 2023",
        aliases={f"deis {name}": option for name, option in _ORDERS.items()}),
    "unipc": Sampler(formulas.unipc, "x0", "UniPCMultistepScheduler",
        "UniPC predictor-corrector, Zhao et al. 2023", a1111="UniPC", a1111_grid="linspace",
        aliases=_UNIPC),
    "lcm": Sampler(formulas.lcm, "x0", "LCMScheduler",
        "latent consistency models, Luo et al. 2023", a1111="LCM",
        a1111_grid="leading", aliases={"dmd2": _DMD2}),
    "tcd": Sampler(formulas.tcd, "x0", "TCDScheduler",
        "trajectory consistency distillation, Zheng et al. 2024"),
}
# fmt: on

# A diffusers config that names a class means the first sampler of that class; for DPM-Solver's classes, the
# one of its order and algorithm.
SAMPLERS: Mapping[str, Sampler] = MappingProxyType(_SAMPLERS)


def make_table(
    config: SamplerConfig,
    num_inference_steps: int,
    *,
    timesteps: Sequence[float] | None = None,
    sigmas: Sequence[float] | None = None,
    start: int = 0,
) -> Table:
    """Trace a sampler to its table. Tables are immutable, and cached.

    Args:
        config: from `names.resolve`.
        num_inference_steps: steps as diffusers counts them; Heun and DPM2 make almost two UNet calls for
            each.
        timesteps: descending training timesteps, 0 to T-1, in place of the configured spacing; their number
            is the number of steps.
        sigmas: for `euler`, descending sigmas in place of the spacing, the final one (0) included.
        start: steps to leave out at the noisy end, for image to image. The first state is then
            sqrt(alpha_bar[0])*x0 + init*noise with the table's `alpha_bar` and `init`.

    Raises:
        SamplerError: a bad step count or start; timesteps or sigmas that the sampler does not take, or that
            are out of range or order; a combination of options that has no table.
    """
    timesteps, sigmas = _numbers("timesteps", timesteps), _numbers("sigmas", sigmas)
    steps = count_steps(num_inference_steps, timesteps, sigmas)
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
    return _trace(config, int(steps), timesteps, sigmas, start)


def count_steps(
    num_inference_steps: int, timesteps: Sequence[float] | None, sigmas: Sequence[float] | None
) -> int:
    """How many steps `make_table` makes: as many as it is given timesteps, or sigmas but the final one."""
    if timesteps is not None:
        return len(timesteps)
    return num_inference_steps if sigmas is None else len(sigmas) - 1


def _numbers(name: str, values: Sequence[float] | None) -> tuple[float, ...] | None:
    try:
        return None if values is None else tuple(float(value) for value in values)
    except (TypeError, ValueError) as error:
        raise SamplerError(
            f"{name} is {values!r:.80}", expected="a list of numbers", fix=f"Pass {name}=[…]."
        ) from error


@lru_cache(maxsize=64)
def _trace(
    config: SamplerConfig,
    count: int,
    timesteps: tuple[float, ...] | None,
    sigmas: tuple[float, ...] | None,
    start: int,
) -> Table:
    if config.name not in SAMPLERS:
        raise SamplerError(
            f"sampler {config.name!r}", expected=", ".join(SAMPLERS), fix="Choose one of these."
        )
    sampler = SAMPLERS[config.name]
    run = lay_levels(config, count, timesteps=timesteps, sigmas=sigmas, start=start)
    table = trace(
        lambda x, predict, noise: sampler.formula(x, predict, noise, run),
        name=config.name,
        history=sampler.history if config.predict_x0 else "eps",
        prediction_type=config.prediction_type,
        x_scale=run.x_scale,
    )
    # `make_span` cuts whole steps, so a declaration that disagrees with its formula must not pass.
    steps = len(run.steps)
    assert sampler.calls * (steps - 1) < len(table) <= sampler.calls * steps, f"calls of {config.name}"
    return table


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

    Image to image leaves out the noisy end (`strength`); a hand-over between two models cuts the schedule at
    a training timestep (`denoising_end`, `denoising_start`), so that their steps may differ.

    The numbers of steps are diffusers': `int(steps * strength)` for pictures, and for a hand-over the
    timesteps below, or from, `round(T - share * T)`. Of samplers with two UNet calls a step, whole steps are
    cut (diffusers may cut between the two calls).

    Args:
        config: the sampler; one with `grid_share` below 1 has its strength in its grid, and only timesteps in
            place of that are cut by it.
        num_inference_steps: steps of the whole schedule.
        timesteps, sigmas: see `make_table`.
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
    elif strength is not None and (config.grid_share == 1 or timesteps is not None):
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
