"""Runs that are timed: with what, and for how long."""

from __future__ import annotations

import time
from collections.abc import Callable
from statistics import median

import numpy as np

from ..package import Package
from ..spec import DTYPES, Array
from .choice import measured_profile

LONG = 0.5  # seconds: of shorter runs the median of several is taken, the first left out
_MOST = 40
_SEED = 0


def measured_inputs(package: Package, net: str) -> dict[str, Array]:
    """Random inputs of `choice.measured_profile`'s shapes, the same every time.

    Raises PackageError for a symbol this release does not know.
    """
    shapes = {name: three[1] for name, three in measured_profile(package, net).shapes.items()}
    random = np.random.default_rng(_SEED)
    return {
        item.name: random.standard_normal(shapes[item.name]).astype(DTYPES[item.dtype])
        for item in package.manifest.nets[net].spec.inputs
    }


def milliseconds(run: Callable[[], object]) -> float:
    """What one run takes."""
    took = [_seconds(run)]
    if took[0] < LONG:
        took = [_seconds(run) for _ in range(min(round(LONG / took[0]), _MOST) + 1)]
    return 1000 * median(took)


def _seconds(run: Callable[[], object]) -> float:
    began = time.perf_counter()
    run()
    return time.perf_counter() - began
