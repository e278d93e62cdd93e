"""Resizing to the request's size and to CLIP's, against diffusers and transformers, to the bit."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from diffusers.image_processor import VaeImageProcessor
from PIL import Image
from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil

from latentrt.engines.errors import PackageError, UsageError
from latentrt.runtime.pictures.resize import clip_pixels, resize

# (H, W): square, both orientations, odd, smaller and larger than the target, slim
SIZES = [(64, 64), (48, 80), (80, 48), (33, 57), (57, 33), (200, 131), (7, 61), (61, 7), (1, 1), (3, 2)]
TARGETS = [(64, 64), (40, 72), (72, 40), (16, 128)]


def noise(height: int, width: int) -> np.ndarray:
    return np.random.default_rng(height * 1000 + width).integers(0, 256, (height, width, 3), np.uint8)


@pytest.mark.parametrize("mode", ["default", "fill", "crop"])
@pytest.mark.parametrize("size", SIZES)
def test_resize_is_diffusers(size: tuple[int, int], mode: str) -> None:
    pixels = noise(*size)
    for height, width in TARGETS:
        wanted = VaeImageProcessor().preprocess(Image.fromarray(pixels), height, width, resize_mode=mode)
        found = resize(pixels, height, width, mode)
        assert (found.shape, found.dtype) == ((height, width, 3), np.uint8)
        floats = 2 * torch.from_numpy(found.astype(np.float32) / 255) - 1
        assert torch.equal(floats.permute(2, 0, 1)[None], wanted), (height, width)


@pytest.mark.parametrize("mode", ["fill", "crop"])
@pytest.mark.parametrize("size", [(5000, 1), (1, 5000)])
def test_slim_pictures_take_no_memory(size: tuple[int, int], mode: str) -> None:
    with pytest.raises(UsageError, match=r"pixels become .* at the same aspect ratio"):
        resize(noise(*size), 1024, 1024, mode)


CONFIGS: list[dict[str, Any]] = [
    {},
    {"size": {"shortest_edge": 224}, "crop_size": {"height": 224, "width": 224}, "resample": 3},
    {"size": 64, "crop_size": 64, "resample": 2},
    {"size": {"shortest_edge": 70}, "crop_size": {"height": 33, "width": 64}, "resample": 1},
]


@pytest.mark.parametrize("config", CONFIGS)
def test_clip_pixels_are_those_of_transformers(config: dict[str, Any]) -> None:
    processor = CLIPImageProcessorPil(**config, do_rescale=False, do_normalize=False)
    for size in [*SIZES, (224, 224), (225, 224), (513, 301), (299, 768)]:
        pixels = noise(*size)
        (wanted,) = processor(Image.fromarray(pixels), return_tensors="np").pixel_values
        found = clip_pixels(pixels, config)
        assert found.dtype == np.uint8
        np.testing.assert_array_equal(found, wanted.transpose(1, 2, 0))


@pytest.mark.parametrize(
    "config",
    [
        {"size": {"height": 224, "width": 224}},
        {"size": "224"},
        {"size": 100},
        {"crop_size": 0},
        {"crop_size": {"height": 225, "width": 1}},
        {"resample": 9},
        {"do_resize": False},
        {"do_center_crop": False},
    ],
)
def test_image_processors_of_another_kind(config: dict[str, Any]) -> None:
    with pytest.raises(PackageError) as caught:
        clip_pixels(noise(8, 8), config)
    assert str(config) in caught.value.found


def test_clip_pixels_of_slim_pictures_take_no_memory() -> None:
    with pytest.raises(UsageError, match="1 x 5000 pixels become 224 x 1120000"):
        clip_pixels(noise(5000, 1), {})
