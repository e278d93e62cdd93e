"""Which sampler runs, with which options: names, diffusers configs, refusals."""

import dataclasses
import inspect
import math

import diffusers
import numpy as np
import pytest

from latentrt.engines.errors import SamplerError
from latentrt.engines.noise_schedule import NoiseSchedule
from latentrt.runtime.sampling import samplers
from latentrt.runtime.sampling.config import SCHEDULER_CLASSES, SamplerConfig
from latentrt.runtime.sampling.names import resolve
from latentrt.runtime.sampling.samplers import SAMPLERS, make_table

SD15 = {
    "_class_name": "PNDMScheduler",
    "_diffusers_version": "0.6.0",
    "beta_end": 0.012,
    "beta_schedule": "scaled_linear",
    "beta_start": 0.00085,
    "num_train_timesteps": 1000,
    "set_alpha_to_one": False,
    "skip_prk_steps": True,
    "steps_offset": 1,
    "trained_betas": None,
    "clip_sample": False,
}
BARE = {"_class_name": "DPMSolverMultistepScheduler", "beta_schedule": "scaled_linear"}


@pytest.mark.parametrize("name", SCHEDULER_CLASSES)
def test_class_defaults_are_those_of_diffusers(name: str) -> None:
    signature = inspect.signature(getattr(diffusers, name).__init__).parameters
    for key, value in SCHEDULER_CLASSES[name].defaults.items():
        default = signature[key].default
        assert (tuple(default) if isinstance(default, list) else default) == value, key


@pytest.mark.parametrize("name", SCHEDULER_CLASSES)
def test_no_key_of_a_class_is_overlooked(name: str) -> None:
    """All but those that do nothing while clipping and flow matching are off, or that are read apart."""
    beside = {"self", "dynamic_thresholding_ratio", "sample_max_value", "clip_sample_range", "flow_shift"}
    beside |= {"time_shift_type", "sigma_min", "sigma_max"}
    ignored = {  # by the class itself
        "LCMScheduler": set(),
        "TCDScheduler": set(),
        "DEISMultistepScheduler": {"algorithm_type", "solver_type"},
    }
    keys = set(inspect.signature(getattr(diffusers, name).__init__).parameters)
    if name == "HeunDiscreteScheduler":
        beside |= {"thresholding"}
    assert keys - beside - ignored.get(name, set()) <= set(SCHEDULER_CLASSES[name].defaults)


@pytest.mark.parametrize(
    ("spelled", "name", "fields"),
    [
        ("euler_a", "euler_a", {}),
        ("Euler a", "euler_a", {}),
        ("euler_ancestral", "euler_a", {}),
        ("k_euler_a", "euler_a", {}),
        ("Euler a Karras", "euler_a", {"sigma_schedule": "karras"}),
        ("Euler", "euler", {"sigma_schedule": "default"}),
        ("LMS Karras", "lms", {"sigma_schedule": "karras"}),
        ("DPM2 a Karras", "dpm2_a", {"sigma_schedule": "karras"}),
        ("dpm_2_ancestral", "dpm2_a", {}),
        ("DPM++ 2M", "dpmpp_2m", {"sigma_schedule": "default", "solver_order": 2}),
        ("DPM++ 2M Karras", "dpmpp_2m", {"sigma_schedule": "karras"}),
        ("dpm++2m", "dpmpp_2m", {}),
        ("dpm++2s_a", "dpmpp_2s_a", {}),
        ("DPM++ 2M SDE Exponential", "dpmpp_2m_sde", {"sigma_schedule": "exponential"}),
        ("DPM++ 2M SDE Heun Karras", "dpmpp_2m_sde", {"sigma_schedule": "karras", "solver_type": "heun"}),
        ("DPM++ 3M SDE", "dpmpp_3m_sde", {"solver_order": 3}),
        ("DPM++ 2M SGM Uniform", "dpmpp_2m", {"timestep_spacing": "trailing"}),
        ("DPM++ 2M Beta", "dpmpp_2m", {"sigma_schedule": "beta"}),
        ("dpm_solver_2", "dpm_solver_2m", {"final_sigmas_type": "sigma_min"}),
        ("DDIM", "ddim", {"timestep_spacing": "leading", "steps_offset": 1}),
        ("ddim_trailing", "ddim", {"timestep_spacing": "trailing"}),
        ("PLMS", "plms", {}),
        ("UniPC", "unipc", {"solver_type": "bh2"}),
        ("uni_pc_bh1", "unipc", {"solver_type": "bh1"}),
        ("unipc 3", "unipc", {"solver_order": 3}),
        ("LCM", "lcm", {}),
        ("EulerDiscreteScheduler", "euler", {}),
        ("DPMSolverSinglestepScheduler", "dpmpp_2s", {}),
    ],
)
def test_spellings(spelled: str, name: str, fields: dict) -> None:
    config = resolve(spelled, SD15)
    assert config.name == name
    assert {field: getattr(config, field) for field in fields} == fields
    assert config.noise.beta_schedule == "scaled_linear"
    assert len(make_table(config, 8)) >= 8


def test_none_is_the_models_own_scheduler() -> None:
    assert resolve(None, SD15).name == "pndm"
    config = resolve(
        None, {**BARE, "algorithm_type": "sde-dpmsolver++", "use_karras_sigmas": True, "solver_order": 3}
    )
    assert (config.name, config.sigma_schedule) == ("dpmpp_3m_sde", "karras")
    assert (
        resolve(None, {**BARE, "algorithm_type": "dpmsolver", "final_sigmas_type": "sigma_min"}).name
        == "dpm_solver_2m"
    )


def test_defaults_marked_as_such_are_not_carried_over() -> None:
    """diffusers saves which values were only defaults; another class then uses its own."""
    config = {**SD15, "timestep_spacing": "leading", "_use_default_values": ["timestep_spacing"]}
    assert resolve("euler", config).timestep_spacing == "linspace"
    assert resolve("euler", {**SD15, "timestep_spacing": "leading"}).timestep_spacing == "leading"


def test_options_of_the_model_survive_a_change_of_sampler() -> None:
    config = {
        **SD15,
        "prediction_type": "v_prediction",
        "rescale_betas_zero_snr": True,
        "timestep_spacing": "trailing",
    }
    for name in ("ddim", "euler", "dpmpp_2m", "unipc"):
        resolved = resolve(name, config)
        assert resolved.prediction_type == "v_prediction"
        assert resolved.noise.rescale_betas_zero_snr
        assert resolved.timestep_spacing == "trailing"
    assert resolve("ddim", config).noise.zero_snr_floor == 0
    assert resolve("euler", config).noise.zero_snr_floor == 2**-24


def test_a_scheduler_dict_takes_what_it_lacks_about_training_from_the_model() -> None:
    config = resolve({"_class_name": "EulerDiscreteScheduler", "use_karras_sigmas": True}, SD15)
    assert (config.name, config.sigma_schedule, config.steps_offset) == ("euler", "karras", 0)
    assert config.noise == NoiseSchedule(
        beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear", zero_snr_floor=2**-24
    )
    own = resolve({"_class_name": "EulerDiscreteScheduler", "beta_schedule": "linear"}, SD15)
    assert own.noise.beta_schedule == "linear"


def test_latent_models_do_not_clip_unless_they_say_so() -> None:
    assert resolve("ddim", BARE).name == "ddim"
    for sampler, config in (
        ("ddim", {**BARE, "clip_sample": True}),
        (None, {"_class_name": "DDIMScheduler"}),
        ("DDIMScheduler", BARE),
        ({"_class_name": "DDPMScheduler"}, BARE),
    ):
        with pytest.raises(SamplerError, match="clip_sample = True"):
            resolve(sampler, config)


@pytest.mark.parametrize(
    ("sampler", "options", "message"),
    [
        ("dpmpp_2m", {"thresholding": True}, "thresholding = True"),
        ("dpmpp_2m", {"use_flow_sigmas": True}, "use_flow_sigmas = True"),
        ("unipc", {"use_dynamic_shifting": True}, "use_dynamic_shifting = True"),
        ("unipc", {"solver_p": {}}, "solver_p = {}"),
        ("unipc", {"shift_terminal": 0.1}, "shift_terminal = 0.1"),
        ("heun", {"clip_sample": True}, "clip_sample = True"),
        ("dpmpp_2m", {"prediction_type": "flow_prediction"}, "prediction_type = 'flow_prediction'"),
        ("dpmpp_2m", {"variance_type": "learned_range"}, "variance_type = 'learned_range'"),
        ("ddpm", {"variance_type": "learned"}, "variance_type = 'learned'"),
        ("ddpm", {"variance_type": "fixed_large_log"}, "variance_type = 'fixed_large_log'"),
        ("plms", {"prediction_type": "sample"}, "prediction_type = 'sample'"),
        ("dpmpp_2m", {"use_karras_sigmas": True, "use_beta_sigmas": True}, "karras and beta at once"),
        ("dpmpp_2m", {"solver_type": "bh3"}, "solver_type = 'bh3'"),
        ("dpmpp_2m", {"final_sigmas_type": "none"}, "final_sigmas_type = 'none'"),
        ("euler", {"timestep_spacing": "odd"}, "timestep_spacing = 'odd'"),
        ("euler", {"interpolation_type": "odd"}, "interpolation_type = 'odd'"),
        ("unipc", {"solver_order": 4}, "solver_order = 4"),
        ("ddim", {"beta_schedule": "sigmoid"}, "beta_schedule 'sigmoid'"),
        (None, {"skip_prk_steps": False}, "skip_prk_steps = False"),
        (
            None,
            {"_class_name": "DPMSolverMultistepScheduler", "algorithm_type": "dpmsolver"},
            "final_sigmas_type = 'zero'",
        ),
        (
            None,
            {"_class_name": "DPMSolverMultistepScheduler", "algorithm_type": "deiss"},
            "algorithm_type = 'deiss'",
        ),
        (None, {"_class_name": "DPMSolverSDEScheduler"}, "more than one noise"),
        (
            None,
            {"_class_name": "FlowMatchEulerDiscreteScheduler"},
            "scheduler class 'FlowMatchEulerDiscreteScheduler'",
        ),
        (None, {"_class_name": None}, "scheduler class 'None'"),
        ("dpm++ sde karras", {}, "more than one noise"),
        ("DPM adaptive", {}, "chooses its steps"),
        ("Restart", {}, "more than one noise"),
        ("DDIM CFG++", {}, "unconditional"),
        ("DDIM Karras", {}, "ddim takes no other sigmas than its own"),
        ("LCM SGM Uniform", {}, "lcm takes no other spacing than its own"),
        (
            {"_class_name": "DPMSolverSinglestepScheduler", "algorithm_type": "sde-dpmsolver++"},
            {},
            "remember the noise of a stage",
        ),
    ],
)
def test_refusals_name_the_option(sampler, options: dict, message: str) -> None:
    with pytest.raises(SamplerError, match=message):
        resolve(sampler, {**SD15, **options})


def test_unknown_names_get_close_matches() -> None:
    with pytest.raises(SamplerError, match=r"Did you mean dpmpp_2m"):
        resolve("dpmp_2m", SD15)
    with pytest.raises(SamplerError, match=r"Choose one of these"):
        resolve("zzzzzz", SD15)


def test_eta_and_unknown_formulas_are_checked() -> None:
    with pytest.raises(SamplerError, match=r"eta = 1.5"):
        SamplerConfig(name="ddim", scheduler="DDIMScheduler", noise=NoiseSchedule(), eta=1.5)
    stray = SamplerConfig(name="stray", scheduler="DDIMScheduler", noise=NoiseSchedule())
    with pytest.raises(SamplerError, match="sampler 'stray'"):
        make_table(stray, 8)


@pytest.mark.parametrize("name", SAMPLERS)
def test_declared_calls_are_those_of_the_formula(name: str) -> None:
    """Cuts of image to image and hand-overs count on them; a declaration that is wrong must not be traced."""
    declared = SAMPLERS[name]
    wrong = dataclasses.replace(declared, calls=3 - declared.calls)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(samplers, "SAMPLERS", {name: wrong})
        with pytest.raises(AssertionError, match=f"calls of {name}"):
            make_table(resolve(name, SD15), 13)  # a step count of no other test: tables are cached


@pytest.mark.parametrize("steps", [0, -1, 1001, 2.5, "20", None, True])
def test_bad_step_counts(steps) -> None:
    with pytest.raises(SamplerError, match="num_inference_steps = "):
        make_table(resolve("ddim", SD15), steps)


def test_step_counts_may_be_numpys() -> None:
    assert len(make_table(resolve("ddim", SD15), np.int64(8))) == 8


@pytest.mark.parametrize("name", SAMPLERS)
def test_a_state_without_noise_stays_on_the_clean_latent(name: str) -> None:
    """Where eps is 0 everywhere the ODE's solution is x = alpha * x0, and so is the mean of every SDE's.

    All solvers are exact there, with any number of steps. LCM's boundary conditions are only nearly so.
    """
    for steps in (1, 2, 3, 4, 5):
        table = make_table(resolve(name, SD15), steps)
        y, history = np.sqrt(table.alpha_bar[0]), []
        for row, alpha_bar in zip(table.rows(), [*table.alpha_bar[1:], None], strict=True):
            history = [row.p * y, *history[: table.history - 1]]
            y = row.a * y + sum(b * h for b, h in zip(row.b, history, strict=False))
            # the last level is the lowest of the training schedule, or has no noise at all
            levels = [alpha_bar] if alpha_bar else [1, resolve(name, SD15).noise.alpha_bar[0]]
            assert min(abs(y - np.sqrt(level)) for level in levels) <= 1e-5


@pytest.mark.parametrize(
    ("name", "kwargs", "message"),
    [
        ("ddim", {"timesteps": [900, 100]}, "custom timesteps for sampler ddim"),
        ("dpmpp_2m_karras", {"timesteps": [900, 100]}, "with karras sigmas"),
        ("euler", {"timesteps": [100, 900]}, r"custom timesteps \[100.0, 900.0\]"),
        ("euler", {"timesteps": []}, "num_inference_steps = 0"),
        ("dpmpp_2m", {"sigmas": [10.0, 1.0, 0.0]}, "custom sigmas for sampler dpmpp_2m"),
        ("euler", {"sigmas": [10.0, 1.0, 0.0], "timesteps": [900, 100]}, "custom sigmas"),
        ("euler", {"start": 20}, "a start at step 20 of 20"),
        ("euler", {"start": -1}, "a start at step -1"),
        ("ddpm", {"timesteps": [1200, 100]}, r"custom timesteps \[1200.0, 100.0\]"),
        ("euler", {"timesteps": [900, -1]}, "custom timesteps"),
        ("euler", {"timesteps": [900, math.nan, 100]}, "custom timesteps"),
        ("euler", {"timesteps": ["a"]}, r"timesteps is \['a'\]"),
        ("euler", {"timesteps": 900}, "timesteps is 900"),
        ("euler", {"sigmas": [1.0, 10.0, 0.0]}, "custom sigmas"),
        ("euler karras", {"sigmas": [10.0, 1.0, 0.0]}, "custom sigmas for sampler euler with karras sigmas"),
        ("euler", {"sigmas": [math.inf, 1.0, 0.0]}, "custom sigmas"),
        ("euler", {"sigmas": [10.0, 1.0, -1.0]}, "custom sigmas"),
        ("euler", {"sigmas": [0.0]}, "num_inference_steps = 0"),
    ],
)
def test_bad_custom_schedules(name: str, kwargs: dict, message: str) -> None:
    with pytest.raises(SamplerError, match=message):
        make_table(resolve(name, SD15), 20, **kwargs)


def test_continuous_timesteps_are_not_the_callers() -> None:
    config = {**SD15, "timestep_type": "continuous", "prediction_type": "v_prediction"}
    with pytest.raises(SamplerError, match="is told log"):
        make_table(resolve("euler", config), 2, timesteps=[900, 100])


def test_lcm_keeps_to_its_distillation_grid() -> None:
    with pytest.raises(SamplerError, match="51 steps on a distillation grid of 50"):
        make_table(resolve("lcm", SD15), 51)


def test_epsilon_at_zero_terminal_snr_is_refused() -> None:
    config = {**SD15, "rescale_betas_zero_snr": True, "timestep_spacing": "trailing"}
    with pytest.raises(SamplerError, match="prediction_type 'epsilon' at alpha_bar = 0"):
        make_table(resolve("ddim", config), 20)
    assert len(make_table(resolve("ddim", {**config, "prediction_type": "v_prediction"}), 20)) == 20
    assert len(make_table(resolve("euler", config), 20)) == 20  # lifted to 2^-24, as diffusers does


def test_steps_that_leave_the_training_range_are_refused() -> None:
    with pytest.raises(SamplerError, match="asks for timestep 1000"):
        make_table(resolve("ddim", SD15), 1000)  # leading, plus an offset of 1


def test_coinciding_levels_are_refused() -> None:
    config = {**SD15, "solver_order": 3, "lower_order_final": False}
    with pytest.raises(SamplerError, match="divides by zero"):
        make_table(resolve("UniPCMultistepScheduler", config), 20)


def test_tables_are_shared() -> None:
    assert make_table(resolve("euler", SD15), 20) is make_table(resolve("Euler", dict(SD15)), 20)
