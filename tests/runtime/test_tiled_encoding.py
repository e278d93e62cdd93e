"""Tiled encoding: exact where the encoder is local, and diffusers' `tiled_encode` where it is not."""

from __future__ import annotations

import math
import random
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from diffusers import AutoencoderKL
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from latentrt.demo import shapes
from latentrt.engines.errors import UsageError
from latentrt.runtime.pictures.tiling import Encode, axis_tiles, encode_tiled

DEMO_VAE = Path(__file__).resolve().parents[2] / "demo" / "checkpoint" / "vae"


@pytest.fixture(autouse=True, scope="module")
def _one_thread() -> Iterator[None]:
    """Nets this small gain nothing from threads, and lose much to them on a busy machine."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


class LocalEncoder:
    """An encoder without surroundings: a latent value is made of its own `scale` x `scale` pixels."""

    def __init__(self, scale: int) -> None:
        self.scale = scale
        self.calls: list[tuple[int, ...]] = []

    def __call__(self, image: np.ndarray, mask: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        assert image.flags.c_contiguous
        assert mask.flags.c_contiguous
        self.calls.append(image.shape)
        shown = np.where(mask > 127, 128, image).astype(np.float32)
        count, height, width, _ = shown.shape
        cells = shown.reshape(count, height // self.scale, self.scale, width // self.scale, self.scale, 3)
        mean, std = cells.mean((2, 4)), cells.std((2, 4))
        return mean.transpose(0, 3, 1, 2), std.transpose(0, 3, 1, 2)


def picture_and_mask(count: int, height: int, width: int) -> tuple[np.ndarray, np.ndarray]:
    generator = np.random.default_rng(0)
    image = generator.integers(0, 256, (count, height, width, 3), np.uint8)
    return image, generator.integers(0, 2, (count, height, width, 1), np.uint8) * np.uint8(255)


@given(
    rows=st.integers(1, 19),
    columns=st.integers(1, 19),
    side=st.integers(2, 9),
    overlap=st.floats(0, 0.5),
    scale=st.sampled_from([1, 2, 8]),
    count=st.integers(1, 3),
)
@settings(max_examples=60, deadline=None)
def test_a_local_encoder_is_exact_at_every_size(
    rows: int, columns: int, side: int, overlap: float, scale: int, count: int
) -> None:
    image, mask = picture_and_mask(count, rows * scale, columns * scale)
    encode = LocalEncoder(scale)
    found = encode_tiled(encode, image, mask, side * scale, scale, overlap)
    stride = int(side * (1 - overlap))
    tiles = [max(0, math.ceil((length - side) / stride)) + 1 for length in (rows, columns)]
    tile = (count, min(rows, side) * scale, min(columns, side) * scale, 3)
    assert encode.calls == [tile] * math.prod(tiles)
    fades = [
        np.isin(sum_of_ones(length, side, stride), 1, invert=True) for length in (rows, columns)
    ]  # where more than one tile has a share
    alone = ~(fades[0][:, None] | fades[1])
    for mine, wanted in zip(found, encode(image, mask), strict=True):
        assert (mine.dtype, mine.shape) == (np.float32, (count, 3, rows, columns))
        np.testing.assert_array_equal(mine[..., alone], wanted[..., alone])
        np.testing.assert_allclose(mine, wanted, rtol=1e-6, atol=1e-4)


def sum_of_ones(length: int, size: int, stride: int) -> np.ndarray:
    """How many tiles have a share in each place."""
    shares = np.zeros(length, int)
    for start, weights in axis_tiles(length, size, stride):
        shares[start : start + len(weights)] += weights > 0
    return shares


def test_one_tile_is_encoded_as_it_is() -> None:
    image, mask = picture_and_mask(2, 64, 40)
    answer = (np.zeros((2, 4, 8, 5), np.float32),)

    def encode(seen: np.ndarray, hidden: np.ndarray) -> tuple[np.ndarray, ...]:
        np.testing.assert_array_equal(seen, image)
        np.testing.assert_array_equal(hidden, mask)
        return answer

    assert encode_tiled(encode, image, mask, 64) is answer


def as_encoder(vae: Any) -> Encode:
    """Mean and standard deviation of the VAE's posterior."""

    def encode(image: np.ndarray, mask: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        assert not mask.any()
        with torch.no_grad():
            posterior = vae.encode(to_floats(image)).latent_dist
        return posterior.mean.numpy(), posterior.std.numpy()

    return encode


def to_floats(image: np.ndarray) -> torch.Tensor:
    return torch.from_numpy(image).permute(0, 3, 1, 2) / 127.5 - 1


@pytest.mark.parametrize(("height", "width"), [(32, 80), (56, 80), (104, 56)])
def test_a_random_encoder_equals_diffusers(height: int, width: int) -> None:
    torch.manual_seed(0)
    vae = AutoencoderKL(  # 4 pixels per latent value
        block_out_channels=(8, 16, 16),
        down_block_types=("DownEncoderBlock2D",) * 3,
        up_block_types=("UpDecoderBlock2D",) * 3,
        norm_num_groups=4,
        sample_size=32,
    ).eval()
    image, mask = picture_and_mask(2, height, width)
    whole, _ = as_encoder(vae)(image, mask * 0)
    vae.enable_tiling()  # tiles of 32, as in its config
    with torch.no_grad():
        reference = vae.encode(to_floats(image)).latent_dist
    vae.disable_tiling()
    mean, std = encode_tiled(as_encoder(vae), image, mask * 0, 32, 4)
    # diffusers has one tile more at the right and one below, which change the last overlap
    rows, columns = height // 4 - 2, width // 4 - 2
    fading_y, fading_x = ((np.arange(n) % 6 < 2) & (np.arange(n) >= 6) for n in (rows, columns))
    corners = fading_y[:, None] & fading_x
    seams = fading_y[:, None] | fading_x
    wanted = reference.mean.numpy()[..., :rows, :columns]
    mean, std = mean[..., :rows, :columns], std[..., :rows, :columns]
    assert wanted.std() > 0.05
    np.testing.assert_allclose(mean[..., ~corners], wanted[..., ~corners], atol=1e-5)
    np.testing.assert_allclose(mean, wanted, atol=0.5 * float(wanted.std()))  # corners: another mix of four
    deviation = reference.std.numpy()[..., :rows, :columns]
    np.testing.assert_allclose(std[..., ~seams], deviation[..., ~seams], rtol=1e-5)
    np.testing.assert_allclose(std, deviation, rtol=0.1)  # in the seams diffusers blends logarithms
    assert np.abs(whole[..., :rows, :columns] - wanted).max() > 1e-3  # the control: tiles are seen


def test_on_the_demo_model_tiles_encode_what_the_whole_does() -> None:
    demo = AutoencoderKL.from_pretrained(DEMO_VAE).eval()
    scene = shapes.render(shapes.Scene("red", "star", "blue", "large"), random.Random(3))
    image = np.array(Image.fromarray(scene).resize((160, 112), Image.Resampling.BICUBIC))[None]
    whole, _ = as_encoder(demo)(image, image[..., :1] * 0)
    errors: list[float] = []
    for overlap in (0.25, 0):
        tiled, _ = encode_tiled(as_encoder(demo), image, image[..., :1] * 0, 64, overlap=overlap)
        errors.append(float(np.sqrt(((tiled - whole) ** 2).mean()) / whole.std()))
    assert 0 < errors[0] < errors[1] < 0.15  # [0.091, 0.116]


@pytest.mark.parametrize("size", [64, 32])
@pytest.mark.parametrize(
    "answers",
    [
        (),
        (np.zeros((1, 4, 8, 8)),),
        (np.zeros((4, 8, 8), np.float32),),
        (np.zeros((1, 4, 8, 9), np.float32),),
        (np.zeros((1, 4, 8, 8), np.float32), np.zeros((2, 4, 8, 8), np.float32)),
    ],
)
def test_encoders_that_break_the_contract(size: int, answers: tuple[np.ndarray, ...]) -> None:
    image, mask = picture_and_mask(1, 64, 64)
    with pytest.raises(UsageError, match="the encoder gave"):
        encode_tiled(lambda *_: answers, image, mask, size)
