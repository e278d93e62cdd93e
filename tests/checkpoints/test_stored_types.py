"""Conversion between the types of weights, against torch's, bit for bit."""

from typing import Any

import ml_dtypes
import numpy as np
import pytest
import torch

from latentrt.checkpoints.stored_types import convert, numpy_type

TYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2": torch.float8_e5m2,
}
Numbers = np.ndarray[Any, Any]


def bits(numbers: Numbers) -> Numbers:
    return numbers.view(f"u{numbers.itemsize}")


def by_torch(numbers: Numbers, source: str, target: str) -> Numbers:
    found = torch.from_numpy(numbers.view(f"i{numbers.itemsize}")).view(TYPES[source]).to(TYPES[target])
    integers = {1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64}
    return found.view(integers[found.itemsize]).numpy().view(numpy_type(target))


def numbers_of(name: str) -> Numbers:
    """Every number of a narrow type. Of a wide one: random bits, and each narrow type's numbers and ties."""
    kind = numpy_type(name)
    if kind.itemsize <= 2:
        return np.arange(256**kind.itemsize, dtype=f"u{kind.itemsize}").view(kind)
    random = np.random.default_rng(0)
    found = [random.integers(0, 2 ** (8 * kind.itemsize), 200_000, f"u{kind.itemsize}").view(kind)]
    found.append((random.standard_normal(200_000) * 2.0 ** random.uniform(-40, 20, 200_000)).astype(kind))
    found.append(np.array([0.0, -0.0, np.inf, -np.inf, np.nan], kind))
    for narrow in ("F16", "BF16", "F8_E4M3", "F8_E5M2"):
        exact = np.sort(numbers_of(narrow).astype(np.float64))
        exact = exact[np.isfinite(exact)]
        ties = ((exact[1:] + exact[:-1]) / 2).astype(kind)
        found += [
            exact.astype(kind),
            ties,
            np.nextafter(ties, kind.type(9)),
            np.nextafter(ties, kind.type(-9)),
        ]
    # Halfway between two numbers of fp16 once float64 has been rounded to float32, and not before.
    found.append(np.array([1 + 2.0**-11 + 2.0**-40, 1 + 3 * 2.0**-11 - 2.0**-40], kind))
    return np.concatenate(found)


@pytest.mark.parametrize("target", TYPES)
@pytest.mark.parametrize("source", TYPES)
@pytest.mark.filterwarnings("ignore:overflow encountered:RuntimeWarning")  # of the numbers made here
@pytest.mark.filterwarnings("ignore:invalid value encountered:RuntimeWarning")
def test_every_bit_is_torchs(source: str, target: str) -> None:
    numbers = numbers_of(source)
    if target == "F8_E4M3":  # beyond 448 releases of torch differ
        numbers = numbers[np.abs(numbers.astype(np.float64)) <= 448]
    found, wanted = convert(numbers, target), by_torch(numbers, source, target)
    assert found.dtype == wanted.dtype == numpy_type(target)
    nan = np.isnan(wanted.astype(np.float64))
    assert np.array_equal(np.isnan(found.astype(np.float64)), nan)
    assert np.array_equal(bits(found)[~nan], bits(wanted)[~nan])


def test_shapes_and_views_are_kept() -> None:
    array = np.arange(6, dtype=np.float32).reshape(2, 3)
    assert convert(array, "F32") is array
    for stored in ("BF16", "F8_E5M2"):
        narrow = convert(array.T, stored)
        assert np.array_equal(convert(narrow, "F16"), array.T)
    scalar = np.array(2.5, ml_dtypes.float8_e4m3fn)
    assert convert(scalar, "F32").shape == ()


def test_a_type_of_no_weight() -> None:
    with pytest.raises(KeyError):
        numpy_type("I64")
