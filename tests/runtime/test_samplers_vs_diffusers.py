"""Our tables and our loop against diffusers' schedulers and loops; the method is in diffusers_oracle.py."""

import dataclasses
import inspect
import math
from collections.abc import Callable

import diffusers
import numpy as np
import pytest
import torch

from latentrt.runtime.sampling.config import SCHEDULER_CLASSES
from latentrt.runtime.sampling.names import resolve
from latentrt.runtime.sampling.samplers import SAMPLERS, make_span, make_table
from tests.runtime.diffusers_oracle import (
    CLASSES,
    SD,
    TOLERANCE,
    check,
    loop,
    make_scheduler,
    noise_from,
    probe,
    row_error,
    run,
    set_steps,
    step_options,
    unroll,
)


@pytest.mark.parametrize("steps", [8, 20, 50])
@pytest.mark.parametrize("name", CLASSES)
def test_table_of_a_named_sampler(name: str, steps: int) -> None:
    cls, options = CLASSES[name]
    scheduler = make_scheduler(cls, SD, **options)
    set_steps(scheduler, steps)
    check(make_table(resolve(name, SD), steps), scheduler, **step_options(name))


@pytest.mark.parametrize("name", CLASSES)
def test_table_of_few_steps(name: str) -> None:
    cls, options = CLASSES[name]
    # its second stage is next to sigma = 0, and diffusers takes the logarithm in float32
    fractional = 1e-2 if name == "dpm2_a" else 5e-4
    for steps in range(1, 6):
        scheduler = make_scheduler(cls, SD, **options)
        set_steps(scheduler, steps)
        check(make_table(resolve(name, SD), steps), scheduler, fractional=fractional, **step_options(name))


@pytest.mark.parametrize("steps", range(1, 6))
@pytest.mark.parametrize("name", sorted(set(SAMPLERS) - set(CLASSES)))
def test_few_steps_of_samplers_that_diffusers_has_not(name: str, steps: int) -> None:
    table = make_table(resolve(name, SD), steps)
    assert len(table) >= steps
    assert np.isfinite(unroll(table)).all()


def test_every_sampler_is_compared() -> None:
    """The two left out differ from diffusers, or are not in it; they have tests of their own below."""
    assert set(CLASSES) == set(SAMPLERS) - {"dpmpp_3m_sde", "dpmpp_2s_a"}


@pytest.mark.parametrize("name", CLASSES)
def test_float32_loop_on_a_nonlinear_model(name: str) -> None:
    """Our loop in float32 against diffusers' own, schedule and arithmetic untouched, same noise."""
    cls, options = CLASSES[name]
    rng = np.random.default_rng(0)
    mix = (rng.standard_normal((64, 64)) / 8).astype(np.float32)
    draws = rng.standard_normal((60, 64)).astype(np.float32)

    def model(x, t):
        return np.tanh(mix @ x + np.float32(t) / np.float32(1000))

    scheduler = make_scheduler(cls, SD, **options)
    set_steps(scheduler, 20)
    theirs = iter(torch.from_numpy(draws).reshape(60, 1, 64, 1, 1))
    with noise_from(scheduler, lambda _: next(theirs)):
        _, _, final = run(
            scheduler,
            next(theirs) * scheduler.init_noise_sigma,
            lambda y, t: torch.from_numpy(model(y.numpy().ravel(), t)).reshape(1, 64, 1, 1),
            **step_options(name),
        )
    table = make_table(resolve(name, SD), 20)
    ours = iter(draws)
    states = loop(table, next(ours), model, lambda: next(ours), np.float32)
    assert states[-1].dtype == np.float32
    expected = final.numpy().ravel()
    assert np.abs(states[-1] - expected).max() <= TOLERANCE * np.abs(expected).max()


@pytest.mark.parametrize("eta", [0.5, 1.0])
@pytest.mark.parametrize("spacing", ["leading", "linspace", "trailing"])
@pytest.mark.parametrize("name", ["ddim", "tcd"])
def test_eta(name: str, spacing: str, eta: float) -> None:
    config = {**SD, "timestep_spacing": spacing}
    scheduler = make_scheduler(CLASSES[name][0], config)
    set_steps(scheduler, 20)
    check(make_table(dataclasses.replace(resolve(name, config), eta=eta), 20), scheduler, eta=eta)


# diffusers' LMS gives the outputs it lacks after a late start a weight all the same
@pytest.mark.parametrize("name", sorted(set(CLASSES) - {"lms"}))
def test_late_start_for_image_to_image(name: str) -> None:
    cls, options = CLASSES[name]
    for start in (2, 7, 19):
        scheduler = make_scheduler(cls, SD, **options)
        set_steps(scheduler, 20)
        check(make_table(resolve(name, SD), 20, start=start), scheduler, start=start, **step_options(name))


AYS = [999, 850, 736, 645, 545, 455, 343, 233, 124, 24]  # Align Your Steps, Sabour et al. 2024


@pytest.mark.parametrize(
    "name", ["ddpm", "euler", "heun", "dpmpp_2m", "dpmpp_2s", "dpm_solver_3m", "lcm", "tcd"]
)
def test_custom_timesteps(name: str) -> None:
    cls, options = CLASSES[name]
    scheduler = make_scheduler(cls, SD, **options)
    set_steps(scheduler, None, timesteps=AYS)
    check(make_table(resolve(name, SD), 10, timesteps=AYS), scheduler, **step_options(name))


@pytest.mark.parametrize("strength", [0.3, 0.5, 1.0])
def test_custom_timesteps_of_a_latent_consistency_model_after_a_late_start(strength: float) -> None:
    """diffusers noises the last result again there, since it counts the steps that it leaves out."""
    scheduler = make_scheduler("LCMScheduler", SD)
    set_steps(scheduler, None, timesteps=[999, 759, 499, 259], strength=strength)
    config = dataclasses.replace(resolve("lcm", SD), grid_share=strength)
    table = make_span(config, 50, timesteps=[999, 759, 499, 259], strength=strength)
    np.testing.assert_array_equal(table.t, scheduler.timesteps.numpy())
    assert not table.draws[-1]


def test_every_class_takes_what_diffusers_class_takes() -> None:
    """Sigmas go into Euler alone: UniPC has the argument for flow matching, and raises without."""
    for name, facts in SCHEDULER_CLASSES.items():
        arguments = inspect.signature(getattr(diffusers, name).set_timesteps).parameters
        assert facts.custom_timesteps == ("timesteps" in arguments), name
        assert ("sigmas" in arguments) == (name in ("EulerDiscreteScheduler", "UniPCMultistepScheduler")), (
            name
        )
    with pytest.raises(ValueError, match="only supported when `use_flow_sigmas=True`"):
        make_scheduler("UniPCMultistepScheduler", SD).set_timesteps(sigmas=[9.0, 1.0])


def test_custom_sigmas() -> None:
    sigmas = [14.615, 6.475, 3.861, 2.697, 1.886, 1.396, 0.963, 0.652, 0.399, 0.152, 0.0]
    scheduler = make_scheduler("EulerDiscreteScheduler", SD)
    set_steps(scheduler, None, sigmas=sigmas)
    check(make_table(resolve("euler", SD), 10, sigmas=sigmas), scheduler)


@pytest.mark.parametrize("order", [1, 2, 3])
def test_unipc_bh1_reaches_sigma_zero(order: int) -> None:
    """diffusers multiplies B(h) = -infinity by 0 in the last step and returns NaN.

    All before must agree. A first-order step into sigma = 0 returns the predicted x0 (Zhao et al. 2023, eq.
    3).
    """
    config = {**SD, "solver_order": order, "solver_type": "bh1"}
    scheduler = make_scheduler("UniPCMultistepScheduler", config)
    set_steps(scheduler, 20)
    _, theirs, _ = probe(scheduler)
    table = make_table(resolve("UniPCMultistepScheduler", config), 20)
    ours = unroll(table)
    assert np.isnan(theirs[-1]).any()
    assert row_error(ours[:-1], theirs[:-1]) <= TOLERANCE
    x0 = ours[-2].copy()
    x0[20] -= math.sqrt(1 - table.alpha_bar[-1])  # coordinate of the last output
    assert row_error(ours[-1:], x0[None] / math.sqrt(table.alpha_bar[-1])) <= TOLERANCE


def karras_levels(steps: int) -> tuple[np.ndarray, Callable[[np.ndarray, float], np.ndarray], np.ndarray]:
    """Sigmas of SD's schedule after Karras et al. 2022, eq. 5, a model x0(x, sigma) and unit noises."""
    rng = np.random.default_rng(0)
    mix = rng.standard_normal((16, 16)) / 4
    betas = np.linspace(SD["beta_start"] ** 0.5, SD["beta_end"] ** 0.5, 1000) ** 2
    alpha_bar = np.cumprod(1 - betas)
    low, high = np.sqrt(1 / alpha_bar[[0, -1]] - 1) ** (1 / 7)
    sigmas = np.append((high + np.linspace(0, 1, steps) * (low - high)) ** 7, 0.0)
    return (
        sigmas,
        lambda x, sigma: np.tanh(mix @ x / np.hypot(sigma, 1)),
        rng.standard_normal((steps + 1, 16)),
    )


def table_result(name: str, steps: int) -> np.ndarray:
    """What our loop makes of the model and the noises of `karras_levels`."""
    _, denoise, noises = karras_levels(steps)
    config = dataclasses.replace(resolve(name, SD), prediction_type="sample")
    table = make_table(config, steps)
    sigmas = iter(np.sqrt(1 / table.alpha_bar - 1))
    draws = iter(noises)

    def model(y: np.ndarray, _: float) -> np.ndarray:
        sigma = next(sigmas)
        return denoise(y * np.hypot(sigma, 1), sigma)

    return loop(table, next(draws), model, lambda: next(draws))[-1]


def test_sde_of_order_three() -> None:
    """k-diffusion's `sample_dpmpp_3m_sde`, eta = 1, in its own variables.

    diffusers' third-order SDE update weighs the second difference with phi3 - 1 in place of phi3, which does
    not vanish with the step.
    """
    sigmas, denoise, noises = karras_levels(20)
    x = noises[0] * np.hypot(sigmas[0], 1)
    old: list[tuple[np.ndarray, float]] = []
    for i in range(20):
        denoised = denoise(x, sigmas[i])
        if sigmas[i + 1] == 0:
            x = denoised
            break
        h = math.log(sigmas[i] / sigmas[i + 1])
        x = math.exp(-2 * h) * x - math.expm1(-2 * h) * denoised
        phi2 = math.expm1(-2 * h) / (2 * h) + 1
        if len(old) == 1:  # the second-order start uses the midpoint weight, as in the multistep family
            x = x - 0.5 * math.expm1(-2 * h) * (denoised - old[0][0]) / (old[0][1] / h)
        elif len(old) > 1:
            r0, r1 = old[0][1] / h, old[1][1] / h
            d1_0, d1_1 = (denoised - old[0][0]) / r0, (old[0][0] - old[1][0]) / r1
            d2 = (d1_0 - d1_1) / (r0 + r1)
            x = x + phi2 * (d1_0 + d2 * r0) - (phi2 / (2 * h) - 0.5) * d2
        x = x + noises[i + 1] * sigmas[i + 1] * math.sqrt(-math.expm1(-2 * h))
        old = [(denoised, h), *old[:1]]
    np.testing.assert_allclose(
        table_result("dpmpp_3m_sde karras", 20), x, rtol=0, atol=1e-5 * np.abs(x).max()
    )


def test_euler_ancestral_with_karras_sigmas() -> None:
    """diffusers' class has no such option; AUTOMATIC1111's "Euler a Karras" is this loop of k-diffusion's."""
    sigmas, denoise, noises = karras_levels(20)
    x = noises[0] * sigmas[0]
    for i in range(20):
        up = sigmas[i + 1] * math.sqrt(1 - (sigmas[i + 1] / sigmas[i]) ** 2)
        down = math.sqrt(sigmas[i + 1] ** 2 - up**2)
        slope = (x - denoise(x, sigmas[i])) / sigmas[i]
        x = x + slope * (down - sigmas[i]) + noises[i + 1] * up
    np.testing.assert_allclose(table_result("Euler a Karras", 20), x, rtol=0, atol=1e-5 * np.abs(x).max())


def test_dpmpp_2s_ancestral() -> None:
    """k-diffusion's `sample_dpmpp_2s_ancestral`, eta = 1; diffusers has no such class."""
    sigmas, denoise, noises = karras_levels(20)
    x = noises[0] * sigmas[0]
    for i in range(20):
        if sigmas[i + 1] == 0:
            x = denoise(x, sigmas[i])
            break
        up = sigmas[i + 1] * math.sqrt(1 - (sigmas[i + 1] / sigmas[i]) ** 2)
        down = math.sqrt(sigmas[i + 1] ** 2 - up**2)
        h = math.log(sigmas[i] / down)
        middle = math.exp(-h / 2) * x - math.expm1(-h / 2) * denoise(x, sigmas[i])
        x = math.exp(-h) * x - math.expm1(-h) * denoise(middle, sigmas[i] * math.exp(-h / 2))
        x = x + noises[i + 1] * up
    np.testing.assert_allclose(table_result("DPM++ 2S a Karras", 20), x, rtol=0, atol=1e-5 * np.abs(x).max())


def test_trailing_spacing_makes_the_steps_asked_for() -> None:
    """For 61 steps and some others, diffusers' rounding appends a timestep of -1."""
    t = make_table(resolve("ddim_trailing", SD), 61).t
    assert len(t) == 61
    assert t[0] == 999
    assert t[-1] > 0
