"""Strengths of an adapter, against diffusers' `set_adapters`."""

from __future__ import annotations

from typing import Any

import pytest
from diffusers.loaders.unet_loader_utils import _maybe_expand_lora_scales

from latentrt.adapters.sets import Strength
from latentrt.engines.errors import UsageError
from tests.adapters.tiny import modules, targets

FAMILIES = ("sd1", "sdxl")


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize(
    "scales",
    [
        {"down": 0.5},
        {"mid": 0.25, "up": {"block_1": 0.5}},
        {"mid": [0.25]},
        {"down": {"block_1": [0.5, 0.75]}},
        {"up": {"block_1": [0.5]}, "down": 0.0},
        {"up": [0.5], "down": [0.25, 0.5]},
    ],
)
def test_strengths_of_blocks_are_diffusers(family: str, scales: dict[str, Any]) -> None:
    unet, shapes = modules(family)["unet"], targets(family)
    (wanted,) = _maybe_expand_lora_scales(unet, [scales])
    found = Strength.parse({"unet": scales}, shapes)
    seen = set()
    for weight in shapes["unet"]:
        for layer, value in wanted.items():
            if weight.startswith(f"{layer}."):
                assert found.of("unet", weight) == value, weight
                seen.add(layer)
    assert seen == set(wanted)


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize(
    ("scales", "what"),
    [
        ({"up": {"block_1": [1, 1]}}, "2 strengths for up.block_1, which has 3 layers"),
        ({"down": {"block_1": [1.0] * 6}}, "6 strengths for down.block_1, which has 2 layers"),
        ({"down": [1, 1, 1]}, "3 strengths for down.block_0, which has 2 layers"),
        ({"up": {"block_1": []}}, "0 strengths for up.block_1, which has 3 layers"),
        ({"mid": [1, 1]}, ""),
    ],
)
def test_lists_of_another_length_are_refused_as_diffusers_does(
    family: str, scales: dict[str, Any], what: str
) -> None:
    with pytest.raises(ValueError, match="Expected"):
        _maybe_expand_lora_scales(modules(family)["unet"], [scales])
    with pytest.raises(UsageError) as caught:
        Strength.parse({"unet": scales}, targets(family))
    assert what in caught.value.found


@pytest.mark.parametrize(
    ("scales", "what"),
    [
        ({"down": {"block_9": 0}}, "no block 'block_9' of 'down': it has block_0, block_1"),
        ({"down": {"block_00": 0}}, "no block 'block_00'"),
        ({"down": {"0": 0}}, "no block '0'"),
        ({"down": {0: 0}}, "no block 0"),
        ({"mid": {"block_0": 1}}, "'block_0'"),
        ({"down": ["x"]}, "'x'"),
        ({"left": 1}, "no section 'left'"),
    ],
)
def test_blocks_that_are_not_there(scales: dict[str, Any], what: str) -> None:
    """Which diffusers passes over, in part: they would be drawn at full strength."""
    with pytest.raises(UsageError) as caught:
        Strength.parse({"unet": scales}, targets("sd1"))
    assert what in caught.value.found
    if scales.keys() != {"down"} or "x" in scales["down"]:
        with pytest.raises(UsageError):  # before the model is known, too
            Strength.parse({"unet": scales})
    assert Strength.parse({"unet": {"down": [0.5, 1], "up": {"block_7": 1}}}).parts
