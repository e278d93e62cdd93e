"""Gaussian noise whose seeds mean what users of torch and of AUTOMATIC1111 think, without torch.

``torch-cpu`` is ``torch.randn(shape, generator=torch.Generator("cpu").manual_seed(seed))``: MT19937 words
turned into normals by torch's own route (ATen ``DistributionTemplates.h``, torch 2.13). On x86 with AVX2,
where torch computes ``log`` and ``sincos`` by the Cephes polynomials of its ``avx_mathfun.h`` in fused single
precision, the numbers here are the same to the bit, on every machine; torch's kernels for other processors
differ from that one, and so from us, by up to 2e-6.

``torch-cuda`` is AUTOMATIC1111's default: its model of CUDA's ``torch.randn`` (``modules/rng_philox.py``)
gives every element a Philox counter of its own and advances the offset once a draw. Real CUDA agrees while
one draw fits the launch grid (196,608 elements on an RTX 4090, three times a 1024-pixel latent); beyond it
we stay with AUTOMATIC1111.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

Reals = npt.NDArray[np.floating[Any]]
Words = npt.NDArray[np.uint64]

# Philox counters worked on at once: the temporaries stay in the processor's second-level cache
_CHUNK = 16384
_LOW_32 = np.uint64(0xFFFFFFFF)
_SHIFT_32 = np.uint64(32)

# Cephes 2.8 single precision (Moshier), as used by avx_mathfun.h: logf.c, and sinf.c with cosf.
# fmt: off
_LOG_POLYNOMIAL = (
    7.0376836292e-2, -1.1514610310e-1, 1.1676998740e-1, -1.2420140846e-1, 1.4249322787e-1,
    -1.6668057665e-1, 2.0000714765e-1, -2.4999993993e-1, 3.3333331174e-1,
)
# fmt: on
_LN2_PARTS = (-2.12194440e-4, 0.693359375)
_SIN_POLYNOMIAL = (-1.9515295891e-4, 8.3321608736e-3, -1.6666654611e-1)
_COS_POLYNOMIAL = (2.443315711809948e-5, -1.388731625493765e-3, 4.166664568298827e-2)
_QUARTER_PI_PARTS = (0.78515625, 2.4187564849853515625e-4, 3.77489497744594108e-8)

# Salmon, Moraes, Dror, Shaw: "Parallel random numbers: as easy as 1, 2, 3" (SC11), philox4x32.
_PHILOX_MULTIPLIERS = (np.uint64(0xD2511F53), np.uint64(0xCD9E8D57))
_PHILOX_WEYL = (0x9E3779B9, 0xBB67AE85)


class NoiseSource:
    """One independent generator per image, so a picture does not depend on the batch it is made in.

    Successive draws continue each image's stream, as successive ``torch.randn`` calls with one generator do.
    The object has state: give each request its own.

    Args:
        seeds: one whole number per image, -2**63 to 2**64 - 1; negative ones wrap to 64 bits as in torch, and
            ``torch-cpu`` uses the low 32 bits only, as torch does.
        rng: "torch-cpu" or "torch-cuda".
    """

    def __init__(self, seeds: Sequence[int], rng: str = "torch-cpu") -> None:
        self.rng = rng
        self.seeds = tuple(int(seed) for seed in seeds)
        self._streams = [_STREAMS[rng](seed % 2**64) for seed in self.seeds]

    def fork(self) -> NoiseSource:
        """An independent source that will draw what this one would."""
        return copy.deepcopy(self)

    def draw(self, shape: tuple[int, ...]) -> Reals:
        """Draw standard normals for every image.

        Args:
            shape: of one image, without the batch axis, e.g. ``(4, H / 8, W / 8)``.

        Returns:
            ``(B, *shape)`` float32, B being the number of seeds.
        """
        count = math.prod(shape)
        noise: Reals = np.empty((len(self.seeds), count), np.float32)
        for row, stream in zip(noise, self._streams, strict=True):
            if count:
                row[:] = stream.normal(count)
        return np.reshape(noise, (len(self.seeds), *shape))


class _TorchCpu:
    """``torch.Generator("cpu")``: MT19937, and the second normal of a pair, kept for the next small draw."""

    def __init__(self, seed: int) -> None:
        # the legacy RandomState, frozen by NumPy's compatibility policy, seeds MT19937 the way torch does
        self._words = np.random.RandomState(seed & 0xFFFFFFFF)
        self._spare: float | None = None

    def normal(self, count: int) -> Reals:
        if count < 16:
            return np.array([self._one() for _ in range(count)], np.float32)
        tail = count % 16
        used = self._uniform(count)  # torch writes a uniform to every element first, the tail's too
        noise = np.empty(count, np.float32)
        noise[: count - tail] = _box_muller_16(used[: count - tail])
        if tail:
            noise[-16:] = _box_muller_16(self._uniform(16))
        return noise

    def _uniform(self, count: int) -> Reals:
        words = self._words.randint(0, 2**32, count, np.uint32)
        return (words & np.uint32(0xFFFFFF)).astype(np.float32) * np.float32(2.0**-24)

    def _one(self) -> float:
        """One normal in double precision, as ATen's ``normal_distribution<double>``."""
        if self._spare is not None:
            value, self._spare = self._spare, None
            return value
        high0, low0, high1, low1 = (int(word) for word in self._words.randint(0, 2**32, 4, np.uint32))
        angle, length = (
            ((high << 32 | low) & (2**53 - 1)) * 2.0**-53 for high, low in ((high0, low0), (high1, low1))
        )
        radius = math.sqrt(-2.0 * math.log1p(-length))
        self._spare = radius * math.sin(2.0 * math.pi * angle)
        return radius * math.cos(2.0 * math.pi * angle)


def _box_muller_16(uniform: Reals) -> Reals:
    """Turn blocks of 16 uniforms into 16 normals: 8 radii, 8 angles -> 8 cosines, 8 sines."""
    pairs = np.reshape(uniform, (-1, 2, 8))
    radius = np.sqrt(_log(1 - pairs[:, 0]) * np.float32(-2))  # the logarithm of (0, 1]
    sine, cosine = _sine_cosine(pairs[:, 1] * np.float32(2 * math.pi))
    return np.stack([radius * cosine, radius * sine], axis=1).ravel()


def _fused(a: Reals, b: Reals | np.float32, c: Reals | np.float32) -> Reals:
    """``a * b + c`` rounded once to fp32: the product of two fp32 numbers is exact in fp64."""
    return (np.multiply(a, b, dtype=np.float64) + c).astype(np.float32)


def _polynomial(x: Reals, coefficients: Sequence[float]) -> Reals:
    value = np.full_like(x, coefficients[0])
    for coefficient in coefficients[1:]:
        value = _fused(value, x, np.float32(coefficient))
    return value


def _log(x: Reals) -> Reals:
    """Natural logarithm of normal positive fp32 numbers."""
    mantissa, binary_exponent = np.frexp(x)
    below = mantissa < np.float32(math.sqrt(0.5))
    exponent = binary_exponent.astype(np.float32) - below
    x = (mantissa - np.float32(1)) + np.where(below, mantissa, np.float32(0))
    square = x * x
    low, high = (np.float32(part) for part in _LN2_PARTS)
    value = _fused(_polynomial(x, _LOG_POLYNOMIAL) * x, square, exponent * low)
    return _fused(exponent, high, x + (value - square * np.float32(0.5)))


def _sine_cosine(x: Reals) -> tuple[Reals, Reals]:
    """Sine and cosine of fp32 angles in [0, 2 pi]."""
    octant = ((x * np.float32(4 / math.pi)).astype(np.int32) + 1) & ~1
    turns = octant.astype(np.float32)
    for part in _QUARTER_PI_PARTS:  # x - octant * pi / 4, in extended precision
        x = _fused(turns, np.float32(-part), x)
    square = x * x
    cosine = _fused(
        _polynomial(square, _COS_POLYNOMIAL) * square, square, -square * np.float32(0.5)
    ) + np.float32(1)
    sine = _fused(_polynomial(square, _SIN_POLYNOMIAL) * square, x, x)
    swap = (octant & 2) != 0
    sine, cosine = np.where(swap, cosine, sine), np.where(swap, sine, cosine)
    return np.where(octant & 4, -sine, sine), np.where((octant + 2) & 4, -cosine, cosine)


class _TorchCuda:
    """AUTOMATIC1111's model of ``torch.Generator("cuda")``."""

    def __init__(self, seed: int) -> None:
        self._key = (seed & 0xFFFFFFFF, seed >> 32)
        self._offset = 0

    def normal(self, count: int) -> Reals:
        counter = np.zeros((4, count), np.uint64)
        counter[0] = self._offset & 0xFFFFFFFF
        counter[2] = np.arange(count, dtype=np.uint64)
        self._offset += 1
        length, angle, _, _ = philox4x32_10(counter, self._key)
        # curand's fp32 constants, 2**-32 and 2 pi * 2**-32, in fp64 arithmetic as NumPy gives AUTOMATIC1111
        turn = float(np.float32(2 * math.pi)) * 2.0**-32
        radius = np.sqrt(-2.0 * np.log(length * 2.0**-32 + 2.0**-33))
        return (radius * np.sin(angle * turn + turn / 2)).astype(np.float32)


def philox4x32_10(counter: Words, key: tuple[int, int]) -> Words:
    """Ten rounds of Philox 4x32 on 32-bit words held in uint64, where their products fit.

    Args:
        counter: ``(4, N)`` uint64, each below 2**32.
        key: two words below 2**32, the same for every column.

    Returns:
        ``(4, N)`` uint64, each below 2**32.
    """
    words = np.array(counter)
    for start in range(0, words.shape[1], _CHUNK):
        _philox_rounds(words[:, start : start + _CHUNK], key)
    return words


def _philox_rounds(words: Words, key: tuple[int, int]) -> None:
    """Ten rounds in place: the lanes are too many for fresh arrays at every operation."""
    c0, c1, c2, c3 = words
    product0, product2 = np.empty_like(c0), np.empty_like(c2)
    for index in range(10):
        np.multiply(c0, _PHILOX_MULTIPLIERS[0], out=product0)
        np.multiply(c2, _PHILOX_MULTIPLIERS[1], out=product2)
        k0, k1 = ((k + index * step) & 0xFFFFFFFF for k, step in zip(key, _PHILOX_WEYL, strict=True))
        np.right_shift(product2, _SHIFT_32, out=c0)
        np.bitwise_xor(c0, c1, out=c0)
        np.bitwise_xor(c0, np.uint64(k0), out=c0)
        np.right_shift(product0, _SHIFT_32, out=c2)
        np.bitwise_xor(c2, c3, out=c2)
        np.bitwise_xor(c2, np.uint64(k1), out=c2)
        np.bitwise_and(product2, _LOW_32, out=c1)
        np.bitwise_and(product0, _LOW_32, out=c3)


_STREAMS: dict[str, type[_TorchCpu | _TorchCuda]] = {"torch-cpu": _TorchCpu, "torch-cuda": _TorchCuda}
