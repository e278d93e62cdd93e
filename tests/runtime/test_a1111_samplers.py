"""What AUTOMATIC1111 makes of the sampler that a picture's text names: the noise levels that were drawn.

Its rules are transcribed from modules/sd_samplers.py, sd_samplers_kdiffusion.py, sd_samplers_timesteps.py and
sd_schedulers.py of release 1.10 and from k-diffusion's sampling.py and external.py.
"""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest

from latentrt.runtime.sampling.a1111 import a1111_fields, spelled_by_a1111
from latentrt.runtime.sampling.names import resolve
from latentrt.runtime.sampling.samplers import SAMPLERS, make_table

FOLDER: dict[str, Any] = {  # of stable-diffusion-v1-5
    "_class_name": "PNDMScheduler",
    "beta_start": 0.00085,
    "beta_end": 0.012,
    "beta_schedule": "scaled_linear",
    "num_train_timesteps": 1000,
    "set_alpha_to_one": False,
    "skip_prk_steps": True,
    "steps_offset": 1,
    "clip_sample": False,
}
XL: dict[str, Any] = {**FOLDER, "_class_name": "EulerDiscreteScheduler", "timestep_spacing": "leading"}
ALPHA_BAR = np.cumprod(1 - np.linspace(0.00085**0.5, 0.012**0.5, 1000) ** 2)
SIGMAS = np.sqrt((1 - ALPHA_BAR) / ALPHA_BAR)
# sd_samplers_kdiffusion.py: names, and the schedule that "Automatic" stands for.
K_SAMPLERS = {
    **dict.fromkeys(("DPM++ 2M", "DPM++ SDE", "DPM++ 2S a", "DPM2", "DPM2 a"), "Karras"),
    **dict.fromkeys(("DPM++ 2M SDE", "DPM++ 2M SDE Heun", "DPM++ 3M SDE"), "Exponential"),
    **dict.fromkeys(("Euler a", "Euler", "LMS", "Heun", "LCM")),
}
TIMESTEP_SAMPLERS = ("DDIM", "PLMS", "UniPC")
STEPS = 20


def sigma_at(t: Any) -> Any:
    """k-diffusion's DiscreteSchedule.t_to_sigma: log-linear between training timesteps."""
    return np.exp(np.interp(t, np.arange(1000), np.log(SIGMAS)))


def schedule(label: str, n: int, low: float, high: float) -> Any:
    """sd_schedulers.py, without the final zero."""
    if label == "Uniform":
        return sigma_at(np.linspace(999, 0, n))
    if label == "SGM Uniform":
        return sigma_at(np.linspace(999, 0, n + 1)[:-1])
    if label == "Karras":
        return (high ** (1 / 7) + np.linspace(0, 1, n) * (low ** (1 / 7) - high ** (1 / 7))) ** 7
    if label == "Exponential":
        return np.exp(np.linspace(math.log(high), math.log(low), n))
    assert label == "DDIM", label
    return SIGMAS[1 :: max(1000 // n, 1)][::-1]


def read_by_a1111(fields: dict[str, Any], n: int) -> Any:
    """The sigmas that it draws for a text, before the final zero; None for a sampler it does not have."""
    name = str(fields["Sampler"])
    if name in TIMESTEP_SAMPLERS:  # sd_samplers_timesteps.py, get_timesteps; UniPC takes uniform time
        steps = (
            np.linspace(999, 0, n + 1)[:-1] if name == "UniPC" else np.arange(0, 1000, 1000 // n)[::-1] + 1
        )
        return sigma_at(steps)
    if name not in K_SAMPLERS:
        return None
    label = fields.get("Schedule type", "Automatic")
    if label not in ("Automatic", "Uniform", "SGM Uniform", "Karras", "Exponential", "DDIM"):
        return None  # a word that it does not know claims nothing
    low, high = fields.get("Schedule min sigma", SIGMAS[0]), fields.get("Schedule max sigma", SIGMAS[-1])
    return schedule(K_SAMPLERS[name] or "Uniform" if label == "Automatic" else str(label), n, low, high)


def drawn(config: Any, n: int) -> Any:
    """The sigmas at the first call of each step; PLMS begins with two calls at its second."""
    table = make_table(config, n)
    alpha_bar = np.asarray(table.alpha_bar)[:: SAMPLERS[config.name].calls]
    alpha_bar = np.array(list(dict.fromkeys(alpha_bar)))
    return np.sqrt((1 - alpha_bar) / alpha_bar)


SUFFIXES = ("", "Karras", "Exponential", "SGM Uniform", "linspace", "leading")


@pytest.mark.parametrize("model", [FOLDER, XL], ids=["SD 1.5", "SDXL"])
def test_every_name_is_read_as_what_was_drawn(model: dict[str, Any]) -> None:
    known = 0
    for name in SAMPLERS:
        if name == "lcm":  # its own grid, which AUTOMATIC1111's CompVisDenoiser for LCM has too
            continue
        for suffix in SUFFIXES:
            try:
                config = resolve(f"{name} {suffix}", model)
                ours = drawn(config, STEPS)
            except Exception:  # this sampler has no such schedule
                continue
            theirs = read_by_a1111(a1111_fields(config, STEPS), STEPS)
            if theirs is None:
                continue
            known += 1
            # timesteps are whole numbers in diffusers, and sigmas ramps are rounded to one
            label = f"{name} {suffix}: {a1111_fields(config, STEPS)}"
            assert len(theirs) >= len(ours), label
            np.testing.assert_allclose(ours[:-1], theirs[: len(ours) - 1], rtol=0.03, err_msg=label)
    assert known > 50


@pytest.mark.parametrize(
    ("spelled", "written"),
    [
        ("DPM++ 2M", {"Sampler": "DPM++ 2M", "Schedule type": "SGM Uniform"}),
        ("DPM++ 2M SGM Uniform", {"Sampler": "DPM++ 2M", "Schedule type": "SGM Uniform"}),
        ("DPM++ 2M Karras", {"Sampler": "DPM++ 2M", "Schedule type": "Karras"}),
        ("Euler", {"Sampler": "Euler", "Schedule type": "Uniform"}),
        ("DPM++ 2M SDE Heun Exponential", {"Sampler": "DPM++ 2M SDE Heun", "Schedule type": "Exponential"}),
        ("DDIM", {"Sampler": "DDIM"}),
        ("ddim trailing", {"Sampler": "DDIM trailing"}),  # it has DDIM with leading timesteps alone
        ("uni_pc_bh2", {"Sampler": "UniPC", "UniPC variant": "bh2", "UniPC order": 2}),
        ("dpm_solver_2", {"Sampler": "dpm_solver_2m", "Schedule type": "SGM Uniform"}),
        ({"_class_name": "PNDMScheduler", "skip_prk_steps": True}, {"Sampler": "PLMS"}),
    ],
)
def test_what_is_written(spelled: Any, written: dict[str, Any]) -> None:
    assert a1111_fields(resolve(spelled, FOLDER), STEPS) == written


@pytest.mark.parametrize(
    ("fields", "spelled"),
    [
        ({"Sampler": "DPM++ 2M", "Schedule type": "Karras"}, "DPM++ 2M Karras"),
        ({"Sampler": "DPM++ 2M", "Schedule type": "Automatic", "Version": "v1.9.4"}, "DPM++ 2M Karras"),
        ({"Sampler": "DPM++ 2M", "Version": "v1.10.1-12-gabcdef0"}, "DPM++ 2M Karras"),
        ({"Sampler": "DPM++ 2M Karras", "Version": "v1.6.0"}, "DPM++ 2M Karras"),
        ({"Sampler": "DPM++ 2M SDE"}, "DPM++ 2M SDE Exponential"),
        ({"Sampler": "Euler a", "Version": "v1.8.0"}, "Euler a linspace"),
        ({"Sampler": "Euler a"}, "Euler a linspace"),
        ({"Sampler": "Euler", "Schedule type": "SGM Uniform"}, "Euler trailing"),
        ({"Sampler": "DDIM"}, "DDIM leading"),
        ({"Sampler": "UniPC"}, "unipc 3 linspace"),
        ({"Sampler": "UniPC", "UniPC variant": "bh2", "UniPC order": "2"}, "unipc bh2 linspace"),
    ],
)
def test_what_is_read(fields: dict[str, str], spelled: str) -> None:
    assert spelled_by_a1111(fields) == spelled
    resolve(spelled, FOLDER)


def test_text_and_back_is_the_same_sampler() -> None:
    for name, sampler in SAMPLERS.items():
        for suffix in SUFFIXES if sampler.a1111 else ():
            try:
                config = resolve(f"{name} {suffix}", XL)
            except Exception:  # this sampler has no such schedule
                continue
            fields = {key: str(value) for key, value in a1111_fields(config, STEPS).items()}
            if fields["Sampler"] not in (*K_SAMPLERS, *TIMESTEP_SAMPLERS):
                continue
            again = resolve(spelled_by_a1111(fields), XL)
            assert a1111_fields(again, STEPS) == a1111_fields(config, STEPS)
