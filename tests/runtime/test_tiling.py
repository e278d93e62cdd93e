"""Tiled decoding: exact where the decoder is local, and diffusers' `tiled_decode` where it is not."""

from __future__ import annotations

import math
import random
import tracemalloc
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from diffusers import AutoencoderKL
from diffusers.image_processor import VaeImageProcessor
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from latentrt.demo import shapes
from latentrt.engines.errors import UsageError
from latentrt.runtime.pictures.tiling import Decode, axis_tiles, decode_tiled, tile_stride

DEMO_VAE = Path(__file__).resolve().parents[2] / "demo" / "checkpoint" / "vae"


class Local:
    """A decoder without surroundings: a latent value becomes `scale` x `scale` pixels of its own."""

    def __init__(self, scale: int = 8) -> None:
        self.scale = scale
        self.calls: list[tuple[int, ...]] = []

    def __call__(self, latent: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        assert latent.flags.c_contiguous
        self.calls.append(latent.shape)
        ones = np.ones((1, 1, self.scale, self.scale))
        image = np.kron(latent[:, :3], ones).transpose(0, 2, 3, 1)
        pattern = np.arange(self.scale**2).reshape(self.scale, self.scale)  # so that pixels of a cell differ
        texture = np.tile(pattern, latent.shape[2:])[..., None]
        return (image.astype(np.uint8) ^ texture.astype(np.uint8)), latent[:, :3].mean(
            (1, 2, 3), dtype=np.float32
        )


def bytes_latent(*shape: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, shape).astype(np.float32)


def as_decoder(vae: Any) -> Decode:
    """The VAE, and diffusers' own conversion to uint8."""

    def decode(latent: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        with torch.no_grad():
            pixels = vae.decode(torch.from_numpy(latent)).sample
        return to_uint8(pixels), pixels.mean((1, 2, 3)).numpy()

    return decode


def to_uint8(pixels: torch.Tensor) -> np.ndarray:
    pictures = VaeImageProcessor().postprocess(pixels, output_type="pil")
    return np.stack([np.asarray(picture) for picture in pictures])


def diffusers_tiled(vae: Any, latent: np.ndarray, size: int, overlap: float = 0.25) -> np.ndarray:
    vae.enable_tiling()
    levels = len(vae.config.block_out_channels)
    vae.tile_sample_min_size, vae.tile_latent_min_size = size, size // 2 ** (levels - 1)
    vae.tile_overlap_factor = overlap
    try:
        with torch.no_grad():
            return to_uint8(vae.decode(torch.from_numpy(latent)).sample)
    finally:
        vae.disable_tiling()


def psnr(one: np.ndarray, other: np.ndarray) -> float:
    """dB over uint8; refuses pictures without contrast, which everything would resemble."""
    assert one.std() > 10
    error = float(((one.astype(float) - other) ** 2).mean())
    return math.inf if error == 0 else 10 * math.log10(255**2 / error)


@pytest.fixture(autouse=True, scope="module")
def _one_thread() -> Iterator[None]:
    """Nets this small gain nothing from threads, and lose much to them on a busy machine."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="module")
def demo() -> Any:
    return AutoencoderKL.from_pretrained(DEMO_VAE).eval()


@pytest.fixture(scope="module")
def tiny() -> Any:
    """Random weights, with 4 pixels per latent value."""
    torch.manual_seed(0)
    vae = AutoencoderKL(
        block_out_channels=(8, 16, 16),
        down_block_types=("DownEncoderBlock2D",) * 3,
        up_block_types=("UpDecoderBlock2D",) * 3,
        norm_num_groups=4,
        sample_size=32,
    ).eval()
    with torch.no_grad():  # nothing to clamp: diffusers clamps behind the blend
        vae.decoder.conv_out.weight /= 3
    return vae


def scene_latent(vae: Any, height: int, width: int) -> np.ndarray:
    """A star that crosses every border of tiles, encoded."""
    scene = shapes.Scene("red", "star", "blue", "large")
    drawn = Image.fromarray(shapes.render(scene, random.Random(3)))
    pixels = np.asarray(drawn.resize((width, height), Image.Resampling.BICUBIC), np.float32)
    with torch.no_grad():
        image = torch.from_numpy(pixels / 127.5 - 1).permute(2, 0, 1)[None]
        return vae.encode(image).latent_dist.mode().numpy()


# ── local decoders: exact ──────────────────────────────────────────────────────────────────────


@given(
    rows=st.integers(1, 19),
    columns=st.integers(1, 19),
    side=st.integers(2, 9),
    overlap=st.floats(0, 0.5),
    scale=st.sampled_from([1, 2, 8]),
    count=st.integers(1, 3),
)
@settings(max_examples=150, deadline=None)
def test_a_local_decoder_is_exact_at_every_size(
    rows: int, columns: int, side: int, overlap: float, scale: int, count: int
) -> None:
    latent, decode = bytes_latent(count, 4, rows, columns), Local(scale)
    wanted, _ = Local(scale)(latent)
    image, mean = decode_tiled(decode, latent, side * scale, scale, overlap)
    assert (image.dtype, mean.dtype, mean.shape) == (np.uint8, np.float32, (count,))
    np.testing.assert_array_equal(image, wanted)
    stride = int(side * (1 - overlap))
    tiles = [max(0, math.ceil((length - side) / stride)) + 1 for length in (rows, columns)]
    assert decode.calls == [(count, 4, min(rows, side), min(columns, side))] * math.prod(tiles)


@given(length=st.integers(1, 400), size=st.integers(1, 80), data=st.data())
@settings(deadline=None)
def test_weights_are_a_partition_of_unity(length: int, size: int, data: st.DataObject) -> None:
    stride = data.draw(st.integers(1, size))
    total = np.zeros(length)
    tiles = axis_tiles(length, size, stride)
    for start, weights in tiles:
        assert len(weights) == min(size, length)
        assert weights.dtype == np.float32
        assert weights.min() >= 0
        total[start : start + len(weights)] += weights
    np.testing.assert_allclose(total, 1, atol=1e-6)
    steps = np.diff([start for start, _ in tiles])
    assert (steps[:-1] == stride).all()
    assert ((steps > 0) & (steps <= stride)).all()


@pytest.mark.parametrize("size", [16, 64, 512])
def test_the_fade_is_that_of_diffusers(size: int) -> None:
    extent = size // 4
    one, other = torch.rand(2, 1, 1, 1, size, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    (first, before), (second, after) = axis_tiles(2 * size - extent, size, size - extent)
    found = np.zeros(2 * size - extent)
    found[first : first + size] += before * one[0, 0, 0].numpy()
    found[second : second + size] += after * other[0, 0, 0].numpy()
    faded = AutoencoderKL.blend_h(None, one, other.clone(), extent)[0, 0, 0].numpy()
    np.testing.assert_allclose(found[size - extent :], faded, atol=1e-6)
    np.testing.assert_allclose(found[: size - extent], one[0, 0, 0, : size - extent].numpy(), atol=1e-6)


@pytest.mark.parametrize(("rows", "columns"), [(14, 20), (15, 9), (13, 8), (5, 31)])
def test_no_seam_is_steeper_than_the_fade(rows: int, columns: int) -> None:
    calls = 0

    def black_or_white(latent: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        nonlocal calls
        calls += 1
        count, _, height, width = latent.shape
        image = np.full((count, height * 8, width * 8, 3), calls % 2 * 255, np.uint8)
        return image, np.zeros(count, np.float32)

    latent = bytes_latent(1, 4, rows, columns)
    image, _ = decode_tiled(black_or_white, latent, 64)
    assert calls > 1
    for axis in (1, 2):
        steps = np.abs(np.diff(image.astype(int), axis=axis))
        assert steps.max(initial=0) <= math.ceil(255 / 16) + 1  # the fade is 16 pixels or longer


def test_one_tile_is_passed_through() -> None:
    latent = bytes_latent(2, 4, 8, 5).astype(np.float16)
    answer = np.zeros((2, 64, 40, 3), np.uint8), np.zeros(2, np.float32)

    def decode(seen: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        assert seen.dtype == np.float16
        np.testing.assert_array_equal(seen, latent)
        return answer

    image, mean = decode_tiled(decode, latent, 64)
    assert image is answer[0]
    assert mean is answer[1]


def test_memory_is_one_picture_and_one_row_of_tiles() -> None:
    latent = bytes_latent(1, 4, 64, 128)
    tile = np.zeros((1, 64, 64, 3), np.uint8), np.zeros(1, np.float32)
    picture, row, float_tile = 512 * 1024 * 3, 64 * 1024 * 3 * 4, 64 * 64 * 3 * 4
    tracemalloc.start()
    try:
        decode_tiled(lambda _: tile, latent, 64)
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert peak < picture + row + 4 * float_tile


# ── the mean ───────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("position", [(0, 0), (6, 7), (12, 0), (12, 16)])
def test_one_tile_that_is_not_finite_shows(value: float, position: tuple[int, int]) -> None:
    latent = np.ones((2, 4, 13, 17), np.float32)
    latent[1, 0][position] = value

    def decode(tile: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        return np.zeros((2, tile.shape[2] * 8, tile.shape[3] * 8, 3), np.uint8), tile.mean((1, 2, 3))

    _, mean = decode_tiled(decode, latent, 64)
    assert np.isfinite(mean).tolist() == [True, False]


def test_infinities_of_two_signs_stay_not_finite() -> None:
    latent = np.zeros((1, 4, 8, 32), np.float32)
    latent[..., 0], latent[..., -1] = math.inf, -math.inf

    def decode(tile: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        return np.zeros((1, 64, 64, 3), np.uint8), tile.mean((1, 2, 3))

    assert np.isnan(decode_tiled(decode, latent, 64)[1]).all()


def test_the_mean_is_weighted_by_area() -> None:
    latent = bytes_latent(2, 4, 21, 30)
    latent += np.arange(30, dtype=np.float32)  # means of tiles that differ
    whole = latent[:, :3].mean((1, 2, 3))
    _, mean = decode_tiled(Local(), latent, 64, overlap=0)
    np.testing.assert_allclose(mean, whole, rtol=0.02)  # tiles overlap at the ends: close, not equal
    _, mean = decode_tiled(Local(), latent[:, :, :16, :24], 64, overlap=0)
    np.testing.assert_allclose(mean, latent[:, :3, :16, :24].mean((1, 2, 3)), rtol=1e-5)


# ── diffusers ──────────────────────────────────────────────────────────────────────────────────

# Sizes of one tile and whole strides: there our tiles are those of diffusers. It has one more at the right
# and one below, which change the last overlap; `common` leaves that out. In brackets: measured here.


@pytest.mark.parametrize(("height", "width"), [(32, 80), (56, 80), (104, 56)])
def test_a_random_vae_equals_diffusers(tiny: Any, height: int, width: int) -> None:
    latent = np.random.default_rng(1).standard_normal((2, 4, height // 4, width // 4)).astype(np.float32)
    reference = diffusers_tiled(tiny, latent, 32)
    common = np.s_[:, : height - 8, : width - 8]
    image, _ = decode_tiled(as_decoder(tiny), latent, 32, 4)
    assert psnr(reference[common], image[common]) >= 50  # [55.8 to 62.1]
    # what is left is the corners, where two fades meet: elsewhere it is the rounding
    fading_y, fading_x = (
        (np.arange(n) % 24 < 8) & (np.arange(n) >= 24) for n in (height - 8, width - 8)
    )  # stride 24, overlap 8
    corners = fading_y[:, None] & fading_x
    difference = np.abs(reference[common].astype(int) - image[common])
    assert difference[:, ~corners].max() <= 1
    other, _ = decode_tiled(as_decoder(tiny), latent, 32, 4, 0.5)
    assert psnr(reference[common], other[common]) < 40  # the control: another cut shows [31.3 to 32.7]


@pytest.mark.parametrize(
    ("height", "width", "size", "untiled"),
    [(112, 160, 64, 33), (224, 224, 128, 42)],  # [34.7], [44.3]
)
def test_the_demo_model_equals_diffusers(
    demo: Any, height: int, width: int, size: int, untiled: float
) -> None:
    latent = scene_latent(demo, height, width)
    reference = diffusers_tiled(demo, latent, size)
    common = np.s_[:, : height - size // 4, : width - size // 4]
    image, mean = decode_tiled(as_decoder(demo), latent, size)
    assert psnr(reference[common], image[common]) >= 50  # [58.1, 60.6]
    assert psnr(reference, image) >= 45  # [48.0, 52.5]
    # Against the decoder that sees everything no tiling is exact. Ours is as near as diffusers' [34.5, 43.4].
    whole, whole_mean = as_decoder(demo)(latent)
    assert psnr(whole, image) >= max(untiled, psnr(whole, reference) - 0.2)
    np.testing.assert_allclose(mean, whole_mean, atol=0.01)


def test_on_the_demo_model_the_fade_is_worth_its_work(demo: Any) -> None:
    latent = scene_latent(demo, 112, 160)
    whole, _ = as_decoder(demo)(latent)
    faded, cut = (decode_tiled(as_decoder(demo), latent, 64, overlap=overlap)[0] for overlap in (0.25, 0))
    assert psnr(whole, faded) >= psnr(whole, cut) + 1  # [34.7 against 32.3]


# ── errors ─────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize(("size", "fix"), [(100, "Use 96"), (8, "Use 16")])
def test_tiles_that_do_not_fit_the_scale(size: int, fix: str) -> None:
    with pytest.raises(UsageError, match=fix):
        tile_stride(size, 8)
    with pytest.raises(UsageError, match="a multiple of 8 pixels"):
        decode_tiled(Local(), bytes_latent(1, 4, 20, 20), size)


def test_strides() -> None:
    assert tile_stride(512, 8) == 384
    assert tile_stride(8, 8, 0) == 8
    assert tile_stride(16, 8) == 8


@pytest.mark.parametrize("rows", [8, 20])
@pytest.mark.parametrize(
    ("shape", "dtype", "means"),
    [((1, 64, 64, 3), np.uint8, 2), ((1, 64, 64, 3), np.float32, 1), ((1, 1, 1, 3), np.uint8, 1)],
)
def test_decoders_that_break_the_contract(rows: int, shape: tuple[int, ...], dtype: Any, means: int) -> None:
    answer = np.zeros(shape, dtype), np.zeros(means, np.float32)
    with pytest.raises(UsageError, match="the decoder gave"):
        decode_tiled(lambda _: answer, bytes_latent(1, 4, rows, 8), 64)
