from collections.abc import Iterator
from typing import Any
from unittest.mock import Mock

import numpy as np
import pytest
import torch
from diffusers.pipelines.stable_diffusion.pipeline_stable_diffusion import rescale_noise_cfg
from PIL import Image

from latentrt import Control, Pipeline
from latentrt.engines.errors import UsageError
from latentrt.runtime.loop.denoise import guide, guided_batch
from latentrt.runtime.loop.job import Clock, UNetCall
from latentrt.runtime.request.guidance import RunRows, scales_of_rows
from latentrt.runtime.request.parameters import GUIDANCE, read_parameters
from tests.parity_pair import photo


def rows(count: int, dtype: type = np.float32) -> np.ndarray:
    return np.random.default_rng(0).standard_normal((count, 4, 5, 7)).astype(dtype)


def test_layout_is_unconditional_first() -> None:
    latent = rows(3)
    np.testing.assert_array_equal(guided_batch(latent, guided=True), np.concatenate([latent, latent]))
    assert guided_batch(latent, guided=False) is latent


@pytest.mark.parametrize("rescale", [0.0, 0.3, 1.0])
@pytest.mark.parametrize("dtype", [np.float32, np.float16])
def test_combine_equals_diffusers(rescale: float, dtype: type) -> None:
    prediction = rows(6, dtype)
    text = torch.from_numpy(prediction[3:].astype(np.float32))
    uncond = torch.from_numpy(prediction[:3].astype(np.float32))
    expected = uncond + 7.5 * (text - uncond)
    if rescale:
        expected = rescale_noise_cfg(expected, text, guidance_rescale=rescale)
    found = guide(prediction, 7.5, rescale, guided=True)
    assert found.dtype == np.float32
    np.testing.assert_allclose(found, expected.numpy(), rtol=2e-6, atol=2e-6)


def test_guidance_off_returns_the_rows() -> None:
    prediction = rows(2, np.float16)
    np.testing.assert_array_equal(guide(prediction, 1.0, 0.5, guided=False), prediction.astype(np.float32))


# ── which rows are guided ──────────────────────────────────────────────────────────────────────────


def rows_of(count: int, **changes: Any) -> RunRows:
    usual = {"to_end": count, "whole": count, "calls": 1, "steps": count, "continues": False}
    return RunRows(count=count, **{**usual, **changes})


def test_an_interval_is_that_of_a_control() -> None:
    """diffusers' rule of `control_guidance_start` and `_end`, as its pipelines write it."""
    for count in (1, 4, 7, 20):
        for start, end in ((0.0, 0.5), (0.2, 1.0), (0.25, 0.75), (0.0, 1.0)):
            on = [not (i / count < start or (i + 1) / count > end) for i in range(count)]
            if any(on):
                found = scales_of_rows(6.0, (start, end), rows_of(count))
                np.testing.assert_array_equal(found, np.where(on, 6.0, 1.0))


def test_scales_below_one_are_off() -> None:
    np.testing.assert_array_equal(scales_of_rows([5.0, 0.0, 0.5, 2.0], None, rows_of(4)), [5, 1, 1, 2])


def test_both_calls_of_a_step_have_its_scale() -> None:
    found = scales_of_rows([5.0, 4.0, 3.0], None, rows_of(5, calls=2, steps=3))
    np.testing.assert_array_equal(found, [5, 5, 4, 4, 3])


def test_plms_asks_twice_in_its_first_step() -> None:
    np.testing.assert_array_equal(scales_of_rows([5.0, 4.0], None, rows_of(3, steps=2)), [5, 5, 4])


def test_steps_that_are_left_out_keep_their_scales() -> None:
    late = rows_of(2, whole=4, steps=4)
    np.testing.assert_array_equal(scales_of_rows([5.0, 4.0, 3.0, 2.0], None, late), [3, 2])
    np.testing.assert_array_equal(scales_of_rows(6.0, (0.0, 0.5), late), [6, 1])  # a share of the run


def test_two_models_share_an_interval() -> None:
    first, second = rows_of(4, to_end=8, whole=8, steps=8), rows_of(4, whole=8, steps=8, continues=True)
    np.testing.assert_array_equal(scales_of_rows(6.0, (0.25, 0.75), first), [1, 1, 6, 6])
    np.testing.assert_array_equal(scales_of_rows(6.0, (0.25, 0.75), second), [6, 6, 1, 1])


def test_refused() -> None:
    with pytest.raises(UsageError, match="guidance_scale has 2 numbers for 4 steps"):
        scales_of_rows([5.0, 4.0], None, rows_of(4))
    with pytest.raises(UsageError, match=r"guidance_interval is 0\.3 to 0\.4, with none of 4 calls"):
        scales_of_rows(5.0, (0.3, 0.4), rows_of(4))


@pytest.fixture(scope="module")
def pipe() -> Iterator[Pipeline]:
    with Pipeline.open(backend="onnxruntime", device="cpu") as opened:
        opened.load_control("edges")
        yield opened


SMALL: dict[str, Any] = {"prompt": "a red circle", "seed": 1, "height": 64, "width": 64}


def test_rows_without_guidance_are_half_a_call(pipe: Pipeline) -> None:
    """The UNet's, and those of a ControlNet, which is asked for the rows that it adds to alone."""
    hint = Image.fromarray(np.asarray(photo(64, 64)))
    steered = [Control(model="edges", image=hint, preparation="canny")]
    request = pipe.request_of(
        {**SMALL, "num_inference_steps": 4, "guidance_interval": (0.0, 0.5), "controls": steered}
    )
    job = pipe.prepare(request)
    asked: list[int] = []
    for item in pipe.loop.unet_calls(job, Clock(), None):
        if isinstance(item, UNetCall):
            asked.append(item.rows)
            item.answer(item.run(**item.inputs)["prediction"])
    assert asked == [2, 2, 1, 1]
    (net,) = job.steering.controlnets
    assert (net.scales.any(axis=2) == [[True, True], [True, True], [False, True], [False, True]]).all()


def test_the_rest_of_a_run_is_that_without_guidance(pipe: Pipeline) -> None:
    """From the same state on, a row outside the interval is that of a run that was never guided."""
    parameters = {**SMALL, "num_inference_steps": 4, "sampler": "ddim"}
    whole = list(pipe.stream(**parameters, guidance_interval=(0.0, 0.5)))
    handed = pipe(
        **parameters, denoising_start=0.5, guidance_scale=1.0, image=whole[1].latent, output_type="latent"
    )
    np.testing.assert_array_equal(handed.images, whole[-1].latent)


def test_models_that_take_the_scale_have_no_interval(pipe: Pipeline) -> None:
    manifest = pipe.package.manifest
    lcm = Mock(wraps=manifest, vectors={"timestep_cond": 256}, defaults=manifest.defaults)
    with pytest.raises(UsageError, match=r"guidance_interval.*has no use for it"):
        read_parameters(lcm, {"guidance_interval": (0.0, 0.5)})
    with pytest.raises(UsageError, match=r"guidance_scale is .*expected one number"):
        read_parameters(lcm, {"guidance_scale": [3.0, 2.0]})
    assert GUIDANCE.schema(lcm)["type"] == "number"
