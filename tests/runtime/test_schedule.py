import diffusers
import numpy as np
import pytest

from latentrt.engines.errors import SamplerError
from latentrt.engines.noise_schedule import BETA_SCHEDULES, ZERO_SNR_FLOOR, Level, NoiseSchedule
from latentrt.runtime.sampling.schedule import sigma_ramp, timesteps

SD = {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear"}


@pytest.mark.parametrize("beta_schedule", BETA_SCHEDULES)
@pytest.mark.parametrize("train", [1000, 77])
def test_alpha_bar_is_bit_equal_to_diffusers(beta_schedule: str, train: int) -> None:
    options = {"beta_schedule": beta_schedule, "num_train_timesteps": train}
    theirs = diffusers.DDIMScheduler(**options).alphas_cumprod.numpy()
    np.testing.assert_array_equal(NoiseSchedule(**options).alpha_bar, theirs.astype(np.float64))


@pytest.mark.parametrize("beta_schedule", BETA_SCHEDULES)
@pytest.mark.usefixtures("rounded_sqrt")
def test_zero_terminal_snr(beta_schedule: str) -> None:
    options = {"beta_schedule": beta_schedule, "rescale_betas_zero_snr": True}
    theirs = diffusers.DDIMScheduler(**options).alphas_cumprod.numpy()
    exact = NoiseSchedule(**options)
    np.testing.assert_array_equal(exact.alpha_bar, theirs.astype(np.float64))
    assert exact.alpha_bar[-1] == 0
    assert exact.level(999) == Level(999.0, 0.0, 1.0)
    assert np.isinf(exact.sigmas[-1])
    floored = NoiseSchedule(**options, zero_snr_floor=ZERO_SNR_FLOOR)
    assert floored.sigmas[-1] == pytest.approx(4096, rel=1e-6)


def test_trained_betas_win() -> None:
    betas = (0.1, 0.2, 0.3)
    schedule = NoiseSchedule(num_train_timesteps=3, trained_betas=betas, beta_schedule="whatever")
    np.testing.assert_allclose(schedule.alpha_bar, np.cumprod(1 - np.array(betas)), rtol=1e-6)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"beta_schedule": "sigmoid"}, "beta_schedule 'sigmoid'"),
        ({"num_train_timesteps": 0}, "0 betas"),
        ({"trained_betas": (0.1, 0.2)}, "2 betas between 0.1 and 0.2"),
        ({"beta_start": -0.1}, "1000 betas between -0.1"),
    ],
)
def test_bad_training_schedules_are_refused(options: dict, message: str) -> None:
    with pytest.raises(SamplerError, match=message):
        NoiseSchedule(**options)


@pytest.mark.parametrize("t", [-1, 1000])
def test_levels_beyond_the_schedule_are_refused(t: int) -> None:
    with pytest.raises(SamplerError, match=f"asks for timestep {t}"):
        NoiseSchedule(**SD).level(t)


def test_sigma_and_timestep_are_inverse() -> None:
    schedule = NoiseSchedule(**SD)
    t = np.array([0.0, 3.0, 500.0, 998.0, 999.0])
    np.testing.assert_allclose(schedule.t_at(schedule.sigma_at(t)), t, atol=1e-3)
    between = np.exp((np.log(schedule.sigmas[500]) + np.log(schedule.sigmas[501])) / 2)
    assert schedule.t_at(between) == pytest.approx(500.5, abs=1e-3)
    assert schedule.t_at(np.array(0.0)) == 0
    assert schedule.t_at(np.array(1e9)) == 999


def test_level_scales() -> None:
    level = NoiseSchedule(**SD).level(500)
    assert level.vp_scale == pytest.approx(1)
    exploding = Level(500.0, 1.0, level.sigma / level.alpha)
    assert exploding.vp_scale == pytest.approx(level.alpha)
    assert exploding.lam == pytest.approx(level.lam)


def test_arrays_are_read_only() -> None:
    schedule = NoiseSchedule(**SD)
    for values in (schedule.alpha_bar, schedule.sigmas, schedule.log_sigmas):
        with pytest.raises(ValueError, match="read-only"):
            values[0] = 1


@pytest.mark.parametrize(
    ("arguments", "options", "expected"),
    [
        (("leading", 4, 1000), {}, [750, 500, 250, 0]),
        (("leading", 4, 1000), {"offset": 1}, [751, 501, 251, 1]),
        (("leading", 3, 1000), {"drop": 1}, [750, 500, 250]),
        (("linspace", 4, 1000), {}, [999, 666, 333, 0]),
        (("linspace", 3, 1000), {"drop": 1}, [999, 666, 333]),
        (("linspace", 3, 1000), {"drop": 1, "last": 901}, [900, 600, 300]),
        (("trailing", 4, 1000), {}, [999, 749, 499, 249]),
        (("quadratic", 3, 1025), {}, [1024, 256, 0]),
        (("quadratic", 4, 1025), {"drop": 1}, [1024, 576, 256, 64]),
    ],
)
def test_spacings(arguments: tuple, options: dict, expected: list[int]) -> None:
    np.testing.assert_allclose(timesteps(*arguments, **options), expected, atol=1e-9)


def test_unknown_spacing_and_ramp_are_refused() -> None:
    with pytest.raises(SamplerError, match="timestep_spacing 'odd'"):
        timesteps("odd", 4, 1000)
    with pytest.raises(SamplerError, match="sigma schedule 'default'"):
        sigma_ramp("default", 10, 1, 4)


@pytest.mark.parametrize("schedule", ["karras", "exponential", "lu", "beta"])
def test_ramps_descend_between_their_ends(schedule: str) -> None:
    sigmas = sigma_ramp(schedule, 14.6, 0.03, 30)
    assert sigmas[0] == pytest.approx(14.6)
    assert sigmas[-1] == pytest.approx(0.03)
    assert (np.diff(sigmas) < 0).all()


def test_ramp_values() -> None:
    np.testing.assert_allclose(sigma_ramp("karras", 128.0, 1.0, 3)[1], 1.5**7)
    np.testing.assert_allclose(sigma_ramp("exponential", 100.0, 1.0, 3)[1], 10)
    # scipy.stats.beta.ppf([0.75, 0.5, 0.25], 0.6, 0.6)
    np.testing.assert_allclose(
        sigma_ramp("beta", 1.0, 0.0, 5)[1:4], [0.82431962134730502, 0.5, 0.17568037865269498], rtol=1e-12
    )
