import dataclasses
from typing import Any

import numpy as np
import pytest

from latentrt.engines.errors import SamplerError, UsageError
from latentrt.engines.package import Defaults, Manifest
from latentrt.runtime.request.parameters import PARAMETERS
from latentrt.runtime.request.request import latent_shape, make_request

MANIFEST = Manifest(
    name="m",
    family="sd1",
    dtype="fp32",
    latent_channels=4,
    context_width=8,
    scheduler={"_class_name": "DDIMScheduler", "beta_schedule": "scaled_linear", "clip_sample": False},
    nets={},
    defaults=Defaults(num_inference_steps=7, guidance_scale=3.0, sampler="euler", height=64, width=96),
    size_multiple=16,
)


def test_defaults_are_the_packages() -> None:
    request = make_request(MANIFEST, "a")
    assert (request.height, request.width, request.num_inference_steps) == (64, 96, 7)
    assert request.guidance_scale == 3.0
    assert request.guided
    assert request.sampler.name == "euler"
    assert request.negative_prompts == (None,)
    assert latent_shape(MANIFEST, 64, 96) == (4, 8, 12)


def test_pictures_are_prompts_times_count_each_with_its_seed() -> None:
    request = make_request(MANIFEST, ["a", "b"], num_images_per_prompt=2, seed=5, negative_prompt=["x", "y"])
    assert request.prompts == ("a", "a", "b", "b")
    assert request.negative_prompts == ("x", "x", "y", "y")
    assert request.seeds == (5, 6, 7, 8)
    assert make_request(MANIFEST, ["a", "b"], seed=[9, 3]).seeds == (9, 3)
    assert make_request(MANIFEST, "a", seed=np.int64(3)).seeds == (3,)


def test_minus_one_is_random_as_in_other_programs() -> None:
    found = {make_request(MANIFEST, "a", seed=seed).seeds for seed in (-1, np.int64(-1), [-1]) * 3}
    assert len(found) > 1
    assert all(seed >= 0 for (seed,) in found)
    assert make_request(MANIFEST, ["a", "b"], seed=[-1, 5]).seeds[1] == 5
    assert make_request(MANIFEST, "a", seed=-2).seeds == (-2,)  # as torch takes it


def test_a_missing_seed_is_random_and_recorded() -> None:
    assert len({make_request(MANIFEST, "a").seeds for _ in range(8)}) > 1


@pytest.mark.parametrize("scale", [1.0, 0.5, 0.0])
def test_guidance_off(scale: float) -> None:
    assert not make_request(MANIFEST, "a", guidance_scale=scale).guided


def test_a_default_passes_its_own_check() -> None:
    plain = make_request(MANIFEST, "a", seed=1)
    said = {name: parameter.default for name, parameter in PARAMETERS.items() if name != "seed"}
    assert make_request(MANIFEST, "a", seed=1, **said) == plain


@pytest.mark.parametrize(
    ("parameters", "match"),
    [
        ({"steps": 3}, "there is no parameter 'steps'; expected 'num_inference_steps'"),
        ({"generator": 3}, "expected 'seed'"),
        ({"guidance_scal": 3}, "expected 'guidance_scale'"),
        ({"zzz": 3}, "expected one of negative_prompt, "),
    ],
)
def test_another_name_is_answered_with_the_right_one(parameters: dict[str, Any], match: str) -> None:
    with pytest.raises(UsageError, match=match):
        make_request(MANIFEST, "a", **parameters)


def test_timesteps_and_sigmas_set_the_number_of_steps() -> None:
    assert make_request(MANIFEST, "a", timesteps=[900, 500, 100]).num_inference_steps == 3
    assert make_request(MANIFEST, "a", timesteps=range(900, 0, -100)).num_inference_steps == 9
    request = make_request(MANIFEST, "a", sigmas=np.array([10.0, 1.0, 0.0]))
    assert (request.num_inference_steps, request.sigmas) == (2, (10.0, 1.0, 0.0))


@pytest.mark.parametrize(
    ("parameters", "match"),
    [
        ({"prompt": []}, "prompt is"),
        ({"prompt": 3}, "prompt is"),
        ({"prompt": ["a", 3]}, "prompt is"),
        ({"negative_prompt": 3}, "negative_prompt is 3"),
        ({"negative_prompt": ["a", "b"]}, "2 texts for 1 prompts"),
        ({"num_images_per_prompt": 0}, "num_images_per_prompt is 0"),
        ({"height": 40}, "height is 40; expected a multiple of 16. Use 32 or 48"),
        ({"height": 0}, "height is 0"),
        ({"width": -8}, "width is -8"),
        ({"width": 64.0}, "width is 64.0"),
        ({"height": 16384, "width": 16384}, "megapixels"),
        ({"num_inference_steps": 0}, "num_inference_steps is 0"),
        ({"num_inference_steps": 2.5}, "num_inference_steps is 2.5"),
        ({"num_inference_steps": True}, "num_inference_steps is True"),
        ({"guidance_scale": -1}, "guidance_scale is -1"),
        ({"guidance_scale": float("nan")}, "guidance_scale is nan"),
        ({"guidance_scale": "7"}, "guidance_scale is '7'"),
        ({"guidance_scale": []}, r"guidance_scale is \[\]; expected one number"),
        ({"guidance_scale": [3, "x"]}, "guidance_scale is 'x'"),
        ({"guidance_interval": 0.5}, "guidance_interval is 0.5; expected two shares"),
        ({"guidance_interval": (0, 2)}, "guidance_interval is 2"),
        ({"guidance_interval": (0.5, 0.5)}, "guidance_interval begins at 0.5 and ends at 0.5"),
        ({"guidance_rescale": 2}, "guidance_rescale is 2"),
        ({"eta": 2}, "eta is 2"),
        ({"eta": None}, "eta is None"),
        ({"timesteps": []}, r"timesteps is \[\]; expected a list of 1 numbers"),
        ({"sigmas": [1]}, r"sigmas is \[1\]; expected a list of 2 numbers or more"),
        ({"timesteps": "900"}, "timesteps is '900'"),
        ({"timesteps": [900, "x"]}, "timesteps is 'x'"),
        ({"timesteps": [900], "sigmas": [1.0, 0.0]}, "timesteps with sigmas"),
        ({"timesteps": [900], "num_inference_steps": 3}, "num_inference_steps with timesteps"),
        ({"rng": "numpy"}, "rng is 'numpy'; expected one of torch-cpu, torch-cuda"),
        ({"output_type": "pt"}, "output_type is 'pt'"),
        ({"seed": [1, 2]}, r"seed is \[1, 2\] for 1 pictures"),
        ({"seed": "7"}, "seed is '7'"),
        ({"seed": 1.5}, "seed is 1.5"),
        ({"seed": True}, "seed is True"),
        ({"seed": 2**64}, "seed is 18446744073709551616; expected an integer from"),
        ({"seed": [2**70]}, "seed is"),
        ({"latents": np.zeros((1, 4, 8, 8), np.float32)}, r"shape \(1, 4, 8, 8\)"),
        ({"latents": "x"}, "latents have shape"),
        ({"latents": np.full((1, 4, 8, 12), np.nan, np.float32)}, "not all finite"),
    ],
)
def test_bad_parameters_are_named(parameters: dict[str, Any], match: str) -> None:
    with pytest.raises(UsageError, match=match) as caught:
        make_request(MANIFEST, **{"prompt": "a", **parameters})
    assert caught.value.exit_code == 2


@pytest.mark.parametrize(
    "sampler", [5, [1], {"_class_name": "EulerDiscreteScheduler", "num_train_timesteps": "x"}]
)
def test_sampler_of_a_wrong_type(sampler: Any) -> None:
    with pytest.raises(SamplerError, match="expected a sampler's name"):
        make_request(MANIFEST, "a", sampler=sampler)


@pytest.mark.parametrize("change", [{"beta_start": "x"}, {"trained_betas": 5}, {"steps_offset": []}])
def test_a_models_damaged_scheduler_config(change: dict[str, Any]) -> None:
    damaged = dataclasses.replace(MANIFEST, scheduler={**MANIFEST.scheduler, **change})
    with pytest.raises(SamplerError, match="scheduler"):
        make_request(damaged, "a", sampler="ddim")


def test_unknown_sampler() -> None:
    with pytest.raises(SamplerError, match="eulr"):
        make_request(MANIFEST, "a", sampler="eulr")
