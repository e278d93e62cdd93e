"""Every option that diffusers' schedulers have and a table can hold, at 20 steps; see diffusers_oracle.py."""

import itertools
from collections.abc import Iterator

import pytest

from latentrt.engines.errors import SamplerError
from latentrt.runtime.sampling.names import resolve
from latentrt.runtime.sampling.samplers import make_table
from tests.runtime.diffusers_oracle import SD, check, make_scheduler, set_steps, step_options
from tests.sizes import EVERY_TENTH


def product(**axes):
    """All combinations of option values; None leaves a key out."""
    for values in itertools.product(*axes.values()):
        yield {key: value for key, value in zip(axes, values, strict=True) if value is not None}


PREDICTIONS = ["epsilon", "v_prediction", "sample"]
TWO_PREDICTIONS = PREDICTIONS[:2]
SPACINGS = ["leading", "linspace", "trailing"]
RAMPS = [{}, *({f"use_{ramp}_sigmas": True} for ramp in ("karras", "exponential", "beta"))]
BETAS = ["linear", "squaredcos_cap_v2"]


def ramped(options):
    return [{**option, **ramp} for option in options for ramp in RAMPS]


def variants() -> Iterator[tuple[str, dict]]:
    """(class, options) of every variant that is compared; sizes stay sane by crossing only what interacts."""
    basic = list(product(prediction_type=PREDICTIONS, timestep_spacing=SPACINGS))
    two = list(product(prediction_type=TWO_PREDICTIONS, timestep_spacing=SPACINGS))
    offsets = list(product(timestep_spacing=["leading"], steps_offset=[0, 1], beta_schedule=[*BETAS, None]))
    zero_snr = list(
        product(
            prediction_type=["v_prediction"],
            timestep_spacing=SPACINGS,
            rescale_betas_zero_snr=[True],
            beta_schedule=["scaled_linear", *BETAS],
        )
    )
    dpm = list(
        product(
            algorithm_type=["dpmsolver++", "dpmsolver"],
            solver_order=[1, 2, 3],
            solver_type=["midpoint", "heun"],
            lower_order_final=[True, False],
            final_sigmas_type=["sigma_min", "zero"],
        )
    )
    dpm = [o for o in dpm if (o["algorithm_type"], o["final_sigmas_type"]) != ("dpmsolver", "zero")]
    sde = list(
        product(
            algorithm_type=["sde-dpmsolver++", "sde-dpmsolver"],
            solver_order=[1, 2],
            solver_type=["midpoint", "heun"],
            euler_at_final=[True, False],
            final_sigmas_type=["sigma_min"],
        )
    )
    unipc = list(
        product(
            solver_order=[1, 2, 3],
            solver_type=["bh1", "bh2"],
            predict_x0=[True, False],
            final_sigmas_type=["sigma_min"],
            lower_order_final=[True, False],
        )
    )
    table: dict[str, list[dict]] = {
        "DDPMScheduler": [
            *basic,
            *offsets,
            *zero_snr,
            *product(variance_type=["fixed_small", "fixed_small_log", "fixed_large"]),
        ],
        "DDIMScheduler": [*basic, *offsets, *zero_snr, *product(set_alpha_to_one=[True, False])],
        "PNDMScheduler": [*two, *offsets, *product(set_alpha_to_one=[True, False])],
        "EulerDiscreteScheduler": [
            *ramped(basic),
            *offsets,
            *zero_snr,
            *ramped(product(final_sigmas_type=["sigma_min"], interpolation_type=["linear", "log_linear"])),
            *product(
                prediction_type=PREDICTIONS, timestep_type=["continuous"], interpolation_type=["log_linear"]
            ),
            *ramped(product(sigma_min=[0.1], sigma_max=[10.0])),
        ],
        "EulerAncestralDiscreteScheduler": [*two, *offsets, *zero_snr],
        "HeunDiscreteScheduler": [*ramped(basic), *offsets],
        "LMSDiscreteScheduler": [*ramped(basic), *offsets],
        "KDPM2DiscreteScheduler": [*ramped(two), *offsets],
        "KDPM2AncestralDiscreteScheduler": [*ramped(two), *offsets],
        "DPMSolverMultistepScheduler": [
            *ramped(basic),
            *offsets,
            *zero_snr,
            *dpm,
            *sde,
            *product(use_lu_lambdas=[True], beta_schedule=["scaled_linear", *BETAS]),
            *product(lambda_min_clipped=[-2.0], timestep_spacing=SPACINGS),
            *product(solver_type=["logrho"], algorithm_type=["deis"], final_sigmas_type=["sigma_min"]),
            *ramped(product(sigma_min=[0.1], sigma_max=[10.0])),
        ],
        "DPMSolverSinglestepScheduler": [
            *ramped(product(prediction_type=PREDICTIONS)),
            *dpm,
            *product(lambda_min_clipped=[-2.0]),
        ],
        "DEISMultistepScheduler": [
            *ramped(basic),
            *offsets,
            *product(solver_order=[1, 2, 3], lower_order_final=[True, False]),
        ],
        "UniPCMultistepScheduler": [
            *ramped(basic),
            *ramped(product(final_sigmas_type=["sigma_min"])),
            *offsets,
            *zero_snr,
            *unipc,
            *product(disable_corrector=[[0, 2]]),
        ],
        "LCMScheduler": [
            *product(prediction_type=PREDICTIONS),
            *zero_snr,
            *product(original_inference_steps=[100]),
        ],
        "TCDScheduler": [*product(prediction_type=PREDICTIONS), *zero_snr],
    }
    for cls, options in table.items():
        for option in options:
            yield cls, option


@EVERY_TENTH
@pytest.mark.usefixtures("rounded_sqrt")
@pytest.mark.parametrize("cls", sorted({cls for cls, _ in variants()}))
def test_variants_at_twenty_steps(cls: str, every: int) -> None:
    failures = []
    for options in [options for name, options in variants() if name == cls][::every]:
        config = {**SD, **options, "_class_name": cls}
        scheduler = make_scheduler(cls, config)
        set_steps(scheduler, 20)
        try:
            check(make_table(resolve(None, config), 20), scheduler, **step_options(cls))
        except (AssertionError, SamplerError) as error:
            failures.append((options, str(error)[:300]))
    assert not failures
