"""What a control says, and what its ControlNet's outputs are multiplied with."""

from typing import Any

import numpy as np
import pytest

from latentrt import Control, ImagePrompt, Package
from latentrt.engines.errors import UsageError
from latentrt.runtime.model import SHIPPED
from latentrt.runtime.request.request import make_request

SHAPE: dict[str, Any] = {"steps": 10, "rows": 4, "outputs": 13, "guided": True, "pooled": False}


def scales(outputs: int = 13, **fields: Any) -> np.ndarray:
    return Control(model="canny", image="edges.png", **fields).scales(**{**SHAPE, "outputs": outputs})


@pytest.mark.parametrize(
    ("fields", "match"),
    [
        ({"model": ""}, "the model of a control is ''"),
        ({"model": None}, "the model of a control is None"),
        ({"strength": float("nan")}, "control_strength is nan"),
        ({"strength": 101}, "control_strength is 101"),
        ({"strength": "much"}, "control_strength is 'much'"),
        ({"start": -0.1}, "control_start is -0.1"),
        ({"end": 1.1}, "control_end is 1.1"),
        ({"start": 0.6, "end": 0.4}, "control_start 0.6 is not before control_end 0.4"),
        ({"start": 0.5, "end": 0.5}, "control_start 0.5 is not before control_end 0.5"),
        ({"mode": "strong"}, "control_mode is 'strong'"),
    ],
)
def test_what_no_control_can_be(fields: dict[str, Any], match: str) -> None:
    control = Control(**{"model": "canny", "image": "edges.png", **fields})
    with pytest.raises(UsageError, match=match):
        make_request(Package.open(SHIPPED["demo"]).manifest, "a house", controls=[control])


@pytest.mark.parametrize(
    ("fields", "match"),
    [
        ({"start": -0.1}, "ip_adapter_start is -0.1"),
        ({"end": 1.1}, "ip_adapter_end is 1.1"),
        (
            {"start": 0.6, "end": 0.4},
            "ip_adapter_start 0.6 is not before ip_adapter_end 0.4.*Exchange the two",
        ),
        ({"start": 0.5, "end": 0.5}, "ip_adapter_start 0.5 is not before .*Change ip_adapter_end"),
    ],
)
def test_what_no_image_prompt_can_be(fields: dict[str, Any], match: str) -> None:
    prompt = ImagePrompt(**{"model": "plus", "image": "face.png", **fields})
    with pytest.raises(UsageError, match=match):
        make_request(Package.open(SHIPPED["demo"]).manifest, "a house", controls=[prompt])


def test_balanced_is_one_number() -> None:
    assert (scales(strength=-0.5) == np.float32(-0.5)).all()
    assert not scales(strength=0.0).any()


@pytest.mark.parametrize(
    ("start", "end", "steps", "on"),
    [
        (0.0, 1.0, 20, range(20)),
        (0.0, 0.5, 20, range(10)),
        (0.0, 0.2, 20, range(4)),
        (0.0, 1.0, 7, range(7)),
        (0.0, 0.5, 7, range(3)),
        (0.0, 0.2, 7, [0]),
        (0.0, 1.0, 1, [0]),
        (0.0, 0.5, 1, []),
        (0.0, 0.2, 1, []),
        (0.25, 1.0, 4, [1, 2, 3]),
        (0.3, 0.8, 10, range(3, 8)),
    ],
)
def test_the_part_of_the_steps_is_diffusers(start: float, end: float, steps: int, on: Any) -> None:
    """T51: `1.0 - float(i / N < start or (i + 1) / N > end)`, as its pipelines have it."""
    keeps = [1.0 - float(i / steps < start or (i + 1) / steps > end) for i in range(steps)]
    assert [i for i, keep in enumerate(keeps) if keep] == list(on)
    found = Control(model="canny", image="x", start=start, end=end).scales(**{**SHAPE, "steps": steps})
    assert found[:, 0, 0].tolist() == keeps


def test_guess_grades_the_outputs_for_the_rows_with_the_prompt() -> None:
    found = scales(mode="guess", strength=0.8)
    assert not found[:, :2].any()
    np.testing.assert_allclose(found[0, 2], 0.8 * np.logspace(-1, 0, 13), rtol=1e-6)
    pooled = Control(model="c", image="x", mode="guess").scales(**{**SHAPE, "pooled": True})
    assert (pooled[:, 2:] == 1).all()
    for mode in ("balanced", "guess"):  # of averaged outputs the prompt's rows alone have any
        found = Control(model="c", image="x", mode=mode).scales(**{**SHAPE, "pooled": True})
        np.testing.assert_array_equal(found, pooled)
    alone = Control(model="c", image="x", mode="guess").scales(**{**SHAPE, "guided": False})
    assert alone.any(axis=2).all()


# The weights that sd-webui-controlnet computes (scripts/hook.py), as ComfyUI-Advanced-ControlNet lists them;
# SDXL's nets take the first ten.
SOFT = (
    0.09941396206337118,
    0.12050177219802567,
    0.14606275417942507,
    0.17704576264172736,
    0.214600924414215,
    0.26012233262329093,
    0.3152997971191405,
    0.3821815722656249,
    0.4632503906249999,
    0.561515625,
    0.6806249999999999,
    0.825,
    1.0,
)


@pytest.mark.parametrize("outputs", [13, 10])
def test_soft_weights_of_a1111(outputs: int) -> None:
    both, alone = scales(outputs, mode="prompt"), scales(outputs, mode="control", strength=2.0)
    np.testing.assert_allclose(both[0, 0], SOFT[:outputs], rtol=1e-6)
    assert (both[0, 0] == both[0, 3]).all()
    assert not alone[:, :2].any()
    np.testing.assert_allclose(alone[0, 2], 2 * np.array(SOFT[:outputs]), rtol=1e-6)
