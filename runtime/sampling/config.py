"""A sampler's options, and what diffusers' scheduler classes make of them.

diffusers' `XScheduler.from_config(config)` keeps the keys that class X knows, gives the others X's defaults
and drops the rest (`names.py`). The defaults are facts of diffusers 0.42 and are listed here as data, so that
the runtime needs no diffusers.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from ...engines.errors import SamplerError
from ...engines.noise_schedule import NoiseSchedule
from .schedule import SIGMA_SCHEDULES, SPACINGS
from .step_lists import STEP_LISTS
from .table import PREDICTION_TYPES


@dataclass(frozen=True, kw_only=True)
class SamplerConfig:
    """A sampler with all of its options; hashable. The field names are those of diffusers.

    Args:
        name: short name, a key of `samplers.SAMPLERS`.
        scheduler: the diffusers class whose schedule conventions hold.
        noise: the model's training schedule.
        prediction_type: "epsilon", "v_prediction" or "sample".
        timestep_spacing: see `schedule.timesteps`.
        steps_offset: added to timesteps in "leading" spacing.
        step_list: a published list in place of the spacing, a key of `step_lists.STEP_LISTS`.
        sigma_schedule: "default" (the timesteps' own sigmas), or see `schedule.sigma_ramp`.
        sigma_min: end of the sigma ramp; the schedule's own when None.
        sigma_max: start of the sigma ramp; the schedule's own when None.
        final_sigmas_type: "zero", or "sigma_min" to stop at the lowest training sigma.
        set_alpha_to_one: whether the last DDIM, PNDM or LCM target is alpha_bar = 1 instead of alpha_bar[0].
        interpolation_type: "linear", or "log_linear" for Euler's uniform log-sigma grid.
        timestep_type: "discrete", or "continuous" for t = log(sigma)/4 (EDM-style v-prediction models).
        lambda_min_clipped: half log-SNR below which DPM-Solver does not start.
        eta: DDIM's and TCD's amount of noise, 0 to 1.
        solver_order: 1, 2 or 3.
        algorithm_type: "dpmsolver", "dpmsolver++", "sde-dpmsolver" or "sde-dpmsolver++".
        solver_type: "midpoint" or "heun" (DPM-Solver), "bh1" or "bh2" (UniPC).
        lower_order_final: fall back to low order at the end of short runs.
        euler_at_final: first order in the last step.
        predict_x0: UniPC on data instead of noise predictions.
        disable_corrector: UniPC steps whose result is not corrected.
        variance_type: DDPM's noise, "fixed_small", "fixed_small_log" or "fixed_large".
        original_inference_steps: the grid on which LCM and TCD were distilled.
        grid_share: how much of that grid, from its clean end, steps are chosen from.
        timestep_scaling: of LCM's boundary conditions.

    Raises:
        SamplerError: a value outside those listed.
    """

    name: str
    scheduler: str
    noise: NoiseSchedule
    prediction_type: str = "epsilon"
    timestep_spacing: str = "leading"
    steps_offset: int = 0
    step_list: str | None = None
    sigma_schedule: str = "default"
    sigma_min: float | None = None
    sigma_max: float | None = None
    final_sigmas_type: str = "zero"
    set_alpha_to_one: bool = True
    interpolation_type: str = "linear"
    timestep_type: str = "discrete"
    lambda_min_clipped: float = -math.inf
    eta: float = 0.0
    solver_order: int = 2
    algorithm_type: str = "dpmsolver++"
    solver_type: str = "midpoint"
    lower_order_final: bool = True
    euler_at_final: bool = False
    predict_x0: bool = True
    disable_corrector: tuple[int, ...] = ()
    variance_type: str = "fixed_small"
    original_inference_steps: int = 50
    grid_share: float = 1.0
    timestep_scaling: float = 10.0

    def __post_init__(self) -> None:
        """Check the values."""
        for option, allowed in _ALLOWED.items():
            if getattr(self, option) not in allowed:
                raise refusal(self.name, option, getattr(self, option), allowed)
        if not 0 <= self.eta <= 1:
            raise SamplerError(
                f"eta = {self.eta:g}", expected="0 (deterministic) to 1", fix="Pass an eta in that range."
            )


_ALLOWED: dict[str, tuple[Any, ...]] = {
    "prediction_type": PREDICTION_TYPES,
    "timestep_spacing": SPACINGS,
    "step_list": (None, *STEP_LISTS),
    "sigma_schedule": SIGMA_SCHEDULES,
    "final_sigmas_type": ("zero", "sigma_min"),
    "interpolation_type": ("linear", "log_linear"),
    "timestep_type": ("discrete", "continuous"),
    "solver_order": (1, 2, 3),
    "algorithm_type": ("dpmsolver", "dpmsolver++", "sde-dpmsolver", "sde-dpmsolver++"),
    "solver_type": ("midpoint", "heun", "bh1", "bh2"),
    "variance_type": ("fixed_small", "fixed_small_log", "fixed_large"),
}


@dataclass(frozen=True, kw_only=True)
class SchedulerClass:
    """Facts about one diffusers scheduler class.

    Attributes:
        defaults: its constructor's keys and defaults, as far as they bear on the table.
        levels: how it lays its noise levels, "k" or a key of `levels._VP_STEPS`.
        solver_types: the values of `solver_type` that it knows, its own default first.
        without: fields of `SamplerConfig` that have no meaning on it.
        custom_timesteps: whether it takes timesteps of the caller's.
        no_sample_prediction: it has no prediction_type "sample".
    """

    defaults: Mapping[str, Any]
    levels: str
    solver_types: tuple[str, ...] = ()
    without: tuple[str, ...] = ()
    custom_timesteps: bool = False
    no_sample_prediction: bool = False


_TRAINING: dict[str, Any] = {
    "num_train_timesteps": 1000,
    "beta_start": 0.0001,
    "beta_end": 0.02,
    "beta_schedule": "linear",
    "trained_betas": None,
    "prediction_type": "epsilon",
}
_K_TRAINING = _TRAINING | {"beta_start": 0.00085, "beta_end": 0.012}
_LCM_TRAINING = _K_TRAINING | {"beta_schedule": "scaled_linear"}
_LEADING = {"timestep_spacing": "leading", "steps_offset": 0}
_LINSPACE = {"timestep_spacing": "linspace", "steps_offset": 0}
_CLIPPED = {"clip_sample": True, "thresholding": False, "rescale_betas_zero_snr": False}
_RAMPS = {"use_karras_sigmas": False, "use_exponential_sigmas": False, "use_beta_sigmas": False}
_RAMPED = _TRAINING | _LINSPACE | _RAMPS
_FLOW = {"use_flow_sigmas": False, "use_dynamic_shifting": False}
_SOLVER = {"solver_order": 2, "thresholding": False}
_DPM_FAMILY = _RAMPED | _FLOW | _SOLVER
_DPM: dict[str, Any] = {
    "algorithm_type": "dpmsolver++",
    "solver_type": "midpoint",
    "final_sigmas_type": "zero",
    "lambda_min_clipped": -math.inf,
    "variance_type": None,
}
_LCM = {"original_inference_steps": 50, "timestep_scaling": 10.0, "set_alpha_to_one": True}
_DISTILLED: dict[str, Any] = {
    "defaults": _LCM_TRAINING | _LEADING | _CLIPPED | {"clip_sample": False} | _LCM,
    "levels": "lcm",
    "without": ("step_list", "sigma_schedule", "timestep_spacing"),
    "custom_timesteps": True,
}

_UNRAMPED = ("step_list", "sigma_schedule")
_ZERO_SNR = {"rescale_betas_zero_snr": False}

# fmt: off
SCHEDULER_CLASSES: dict[str, SchedulerClass] = {
    "DDPMScheduler": SchedulerClass(
        levels="ddpm", without=_UNRAMPED, custom_timesteps=True,
        defaults=_TRAINING | _LEADING | _CLIPPED | {"variance_type": "fixed_small"}),
    "DDIMScheduler": SchedulerClass(
        levels="ddim", without=_UNRAMPED,
        defaults=_TRAINING | _LEADING | _CLIPPED | {"set_alpha_to_one": True}),
    "PNDMScheduler": SchedulerClass(
        levels="plms", without=_UNRAMPED, no_sample_prediction=True,
        defaults=_TRAINING | _LEADING | {"set_alpha_to_one": False, "skip_prk_steps": False}),
    "LMSDiscreteScheduler": SchedulerClass(levels="k", defaults=_RAMPED),
    "EulerDiscreteScheduler": SchedulerClass(
        levels="k", custom_timesteps=True,
        defaults=_RAMPED | _ZERO_SNR
        | {"interpolation_type": "linear", "timestep_type": "discrete", "final_sigmas_type": "zero"}),
    "EulerAncestralDiscreteScheduler": SchedulerClass(
        levels="k", no_sample_prediction=True, defaults=_TRAINING | _LINSPACE | _ZERO_SNR),
    "HeunDiscreteScheduler": SchedulerClass(
        levels="k", custom_timesteps=True,
        defaults=_K_TRAINING | _LINSPACE | _RAMPS | {"clip_sample": False}),
    "KDPM2DiscreteScheduler": SchedulerClass(
        levels="k", no_sample_prediction=True, defaults=_K_TRAINING | _LINSPACE | _RAMPS),
    "KDPM2AncestralDiscreteScheduler": SchedulerClass(
        levels="k", no_sample_prediction=True, defaults=_K_TRAINING | _LINSPACE | _RAMPS),
    "DPMSolverMultistepScheduler": SchedulerClass(
        levels="dpm", solver_types=("midpoint", "heun"), custom_timesteps=True,
        defaults=_DPM_FAMILY | _DPM | _ZERO_SNR
        | {"lower_order_final": True, "euler_at_final": False, "use_lu_lambdas": False}),
    "DPMSolverSinglestepScheduler": SchedulerClass(
        levels="dpm", solver_types=("midpoint", "heun"), without=("timestep_spacing",), custom_timesteps=True,
        defaults=_TRAINING | _RAMPS | _FLOW | _SOLVER | _DPM | {"lower_order_final": False}),
    "DEISMultistepScheduler": SchedulerClass(
        levels="dpm", defaults=_DPM_FAMILY | {"lower_order_final": True}),
    "UniPCMultistepScheduler": SchedulerClass(
        levels="dpm", solver_types=("bh2", "bh1"),
        defaults=_DPM_FAMILY | _ZERO_SNR
        | {"solver_type": "bh2", "predict_x0": True, "lower_order_final": True, "disable_corrector": (),
           "solver_p": None, "shift_terminal": None, "final_sigmas_type": "zero"}),
    "LCMScheduler": SchedulerClass(**_DISTILLED),
    "TCDScheduler": SchedulerClass(**_DISTILLED),
}
# fmt: on


def refusal(owner: str, option: str, found: object, allowed: tuple[Any, ...]) -> SamplerError:
    """The error for an option of a sampler or of a scheduler class."""
    expected = " or ".join(str(value) for value in allowed)
    return SamplerError(
        f"{owner} with {option} = {found!r}", expected=expected, fix=f"Set {option} to one of these."
    )
