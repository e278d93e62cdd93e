"""The samplers: one declaration each, and the tables they trace to.

Everything that the package knows of a sampler stands in its declaration. Spellings, AUTOMATIC1111's names and
the cuts of image to image are derived from it (`names.py`, `span.py`).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import lru_cache
from types import MappingProxyType
from typing import Any

import numpy as np

from ...engines.errors import SamplerError
from . import formulas
from .config import SamplerConfig
from .formulas import Formula
from .levels import lay_levels
from .table import Table, trace

__all__ = ["SAMPLERS", "Sampler", "SamplerConfig", "make_table"]


@dataclass(frozen=True, kw_only=True)
class Sampler:
    """One sampler.

    Attributes:
        formula: the paper's update.
        history: what the formula's `predict` returns: "x0", "eps" or "output" (see `table.trace`).
        scheduler: the diffusers class whose options and noise levels it takes, a key of `SCHEDULER_CLASSES`.
        options: what it sets of that class's options; all others come from the model's scheduler config.
        calls: UNet calls per step; a step into sigma = 0 may need fewer.
        about: one line for listings.
        a1111: the name that AUTOMATIC1111 writes; None where it has no such sampler.
        aliases: further spellings, each with the options that it sets on top. Case, spaces and punctuation do
            not matter.
    """

    formula: Formula
    history: str
    scheduler: str
    about: str
    options: Mapping[str, Any] = field(default_factory=dict[str, Any])
    calls: int = 1
    a1111: str | None = None
    aliases: Mapping[str, Mapping[str, Any]] = field(default_factory=dict[str, Mapping[str, Any]])


def _dpm(order: int, kind: str, algorithm: str, **names: Any) -> Sampler:
    """A DPM-Solver: `kind` is "m" for multistep, "s" for singlestep; `names` are `a1111` and `aliases`."""
    options: dict[str, Any] = {"solver_order": order, "algorithm_type": algorithm}
    if "++" not in algorithm:  # noise prediction divides by the final sigma
        options["final_sigmas_type"] = "sigma_min"
    word = "multistep" if kind == "m" else "singlestep"
    return Sampler(
        formula=formulas.dpm_multistep if kind == "m" else formulas.dpm_singlestep,
        history="x0" if "++" in algorithm else "eps",
        scheduler=f"DPMSolver{word.title()}Scheduler",
        options=options,
        about=f"{algorithm} of order {order}, {word}",
        **names,
    )


_PNDM: dict[str, Any] = {
    "formula": formulas.plms,
    "history": "output",
    "scheduler": "PNDMScheduler",
    "options": {"skip_prk_steps": True},
}

# A diffusers config that names a class means the first sampler of that class; for DPM-Solver's classes, the
# one of its order and algorithm.
SAMPLERS: Mapping[str, Sampler] = MappingProxyType(
    {
        "ddpm": Sampler(
            formula=formulas.ddpm,
            history="x0",
            scheduler="DDPMScheduler",
            about="ancestral sampling, Ho et al. 2020",
        ),
        "ddim": Sampler(
            formula=formulas.ddim,
            history="x0",
            scheduler="DDIMScheduler",
            about="DDIM with eta, Song et al. 2021",
            a1111="DDIM",
        ),
        "pndm": Sampler(**_PNDM, about="PNDM without Runge-Kutta steps, which is PLMS"),
        "plms": Sampler(**_PNDM, about="pseudo linear multistep, Liu et al. 2022", a1111="PLMS"),
        "euler": Sampler(
            formula=formulas.euler,
            history="x0",
            scheduler="EulerDiscreteScheduler",
            about="Euler in sigma, Karras et al. 2022",
            a1111="Euler",
        ),
        "euler_a": Sampler(
            formula=formulas.euler_ancestral,
            history="x0",
            scheduler="EulerAncestralDiscreteScheduler",
            about="Euler with ancestral noise, k-diffusion",
            a1111="Euler a",
            aliases={"euler ancestral": {}},
        ),
        "heun": Sampler(
            formula=formulas.heun,
            history="eps",
            scheduler="HeunDiscreteScheduler",
            calls=2,
            about="Heun, two calls per step, Karras et al. 2022",
            a1111="Heun",
        ),
        "lms": Sampler(
            formula=formulas.lms,
            history="eps",
            scheduler="LMSDiscreteScheduler",
            about="linear multistep of order 4, k-diffusion",
            a1111="LMS",
        ),
        "dpm2": Sampler(
            formula=formulas.dpm2,
            history="eps",
            scheduler="KDPM2DiscreteScheduler",
            calls=2,
            about="midpoint in log sigma, two calls per step, k-diffusion",
            a1111="DPM2",
        ),
        "dpm2_a": Sampler(
            formula=formulas.dpm2_ancestral,
            history="eps",
            scheduler="KDPM2AncestralDiscreteScheduler",
            calls=2,
            about="dpm2 with ancestral noise, k-diffusion",
            a1111="DPM2 a",
            aliases={"dpm2 ancestral": {}},
        ),
        "dpm_solver_1m": _dpm(1, "m", "dpmsolver", aliases={"dpm solver 1": {}}),
        "dpm_solver_1s": _dpm(1, "s", "dpmsolver"),
        "dpm_solver_2m": _dpm(2, "m", "dpmsolver", aliases={"dpm solver 2": {}}),
        "dpm_solver_2s": _dpm(2, "s", "dpmsolver"),
        "dpm_solver_3m": _dpm(3, "m", "dpmsolver", aliases={"dpm solver 3": {}}),
        "dpm_solver_3s": _dpm(3, "s", "dpmsolver"),
        "dpmpp_1m": _dpm(1, "m", "dpmsolver++"),
        "dpmpp_1s": _dpm(1, "s", "dpmsolver++"),
        "dpmpp_2m": _dpm(
            2,
            "m",
            "dpmsolver++",
            a1111="DPM++ 2M",
            aliases={
                "dpm solver++": {},
                "dpm solver multistep": {},
                "dpm++ 2m heun": {"solver_type": "heun"},
            },
        ),
        "dpmpp_2s": _dpm(2, "s", "dpmsolver++", aliases={"dpm solver singlestep": {}}),
        "dpmpp_3m": _dpm(3, "m", "dpmsolver++"),
        "dpmpp_3s": _dpm(3, "s", "dpmsolver++"),
        # Singlestep solvers have no variant with noise: a stage's noise would have to be remembered.
        "dpmpp_1m_sde": _dpm(1, "m", "sde-dpmsolver++"),
        "dpmpp_2m_sde": _dpm(
            2,
            "m",
            "sde-dpmsolver++",
            a1111="DPM++ 2M SDE",
            aliases={"dpm++ 2m sde heun": {"solver_type": "heun"}},
        ),
        "dpmpp_3m_sde": _dpm(3, "m", "sde-dpmsolver++", a1111="DPM++ 3M SDE"),
        "dpm_solver_1m_sde": _dpm(1, "m", "sde-dpmsolver"),
        "dpm_solver_2m_sde": _dpm(2, "m", "sde-dpmsolver"),
        "dpmpp_2s_a": Sampler(
            formula=formulas.dpmpp_2s_ancestral,
            history="x0",
            # not in diffusers; it visits the levels of k-diffusion's other ancestral sampler
            scheduler="EulerAncestralDiscreteScheduler",
            calls=2,
            about="dpmpp_2s with ancestral noise, k-diffusion",
            a1111="DPM++ 2S a",
            aliases={"dpm++ 2s ancestral": {}},
        ),
        "deis": Sampler(
            formula=formulas.deis,
            history="eps",
            scheduler="DEISMultistepScheduler",
            about="DEIS in log rho, Zhang & Chen 2023",
            aliases={f"deis {order}": {"solver_order": order} for order in (2, 3)},
        ),
        "unipc": Sampler(
            formula=formulas.unipc,
            history="x0",
            scheduler="UniPCMultistepScheduler",
            about="UniPC predictor-corrector, Zhao et al. 2023",
            a1111="UniPC",
            aliases={
                **{f"unipc {order}": {"solver_order": order} for order in (2, 3)},
                **{f"unipc {kind}": {"solver_type": kind} for kind in ("bh1", "bh2")},
            },
        ),
        "lcm": Sampler(
            formula=formulas.lcm,
            history="x0",
            scheduler="LCMScheduler",
            about="latent consistency models, Luo et al. 2023",
            a1111="LCM",
        ),
        "tcd": Sampler(
            formula=formulas.tcd,
            history="x0",
            scheduler="TCDScheduler",
            about="trajectory consistency distillation, Zheng et al. 2024",
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
    # `span` cuts tables after whole steps, so a declaration that disagrees with its formula must not pass.
    steps = len(run.steps)
    assert sampler.calls * (steps - 1) < len(table) <= sampler.calls * steps, f"calls of {config.name}"
    return table
