"""A tensor with adapters in it: always from the checkpoint's own numbers, so that nothing drifts.

Adapters change a tensor in the order in which a request names them, each what those before it left. Changes
that add to a weight commute; those that follow each other are summed in an order of their own, so that the
bits do not depend on the request's.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from itertools import groupby
from math import fsum
from typing import Any, cast

import numpy as np

from ..checkpoints.stored_types import convert
from ..engines.errors import AdapterError
from ..engines.spec import Array
from .kinds.change import Additive, Change, float64, row_blocks

# A change, and the strength that the user asked for.
Weighted = tuple[Change, float]


def merged(base: Array, changes: Sequence[Weighted]) -> Array:
    """A tensor with changes in it.

    Args:
        base: the tensor as the checkpoint has it, in its shape and in whatever type; not written to.
        changes: in the request's order. Those of strength 0 are left out. Additive changes of one file that
            is named twice are one, with the sum of its strengths.

    Returns:
        float32 of the shape of `base`, in the same order in memory where that is C's or Fortran's.
    """
    weight: Array | None = None
    for run in _runs(changes):
        if isinstance(run, list):
            weight = _sum(base if weight is None else weight, run)
        else:
            change, strength = run
            matrix = np.ascontiguousarray(_as_float32(base) if weight is None else weight)
            weight = np.reshape(change.applied(_matrix(matrix), strength), base.shape)
    return _as_float32(base) if weight is None else weight


def check_range(array: Array, dtype: np.dtype[Any], tensor: str) -> None:
    """Raise AdapterError where a merged tensor has numbers that a type cannot hold, or none at all.

    Args:
        array: the merged tensor.
        dtype: of what it will be kept in.
        tensor: its name, for the message.
    """
    import ml_dtypes

    limit = float(cast(Any, ml_dtypes.finfo(dtype)).max)
    peak = float(cast(Any, np.abs(array)).max(initial=0.0))
    if not peak <= limit:  # also for NaN
        raise AdapterError(
            f"{tensor} reaches {peak:g} with these adapters",
            expected=f"numbers within {limit:g}, which {dtype} can hold",
            fix="Lower the adapters' strengths, or export the model in float32: --dtype fp32",
        )


def _runs(changes: Sequence[Weighted]) -> Iterator[list[tuple[Additive, float]] | Weighted]:
    """Changes that are summed, as a list, and others one by one."""
    wanted = [(change, strength) for change, strength in changes if strength != 0]
    for additive, run in groupby(wanted, lambda one: isinstance(one[0], Additive)):
        if not additive:
            yield from run
            continue
        strengths: dict[str, list[float]] = {}
        named: dict[str, Additive] = {}
        for change, strength in run:
            assert isinstance(change, Additive)
            strengths.setdefault(change.source, []).append(strength)
            named[change.source] = change
        summed = [(named[source], fsum(strengths[source])) for source in sorted(named)]
        yield [(change, strength) for change, strength in summed if strength != 0]


def _sum(base: Array, run: Sequence[tuple[Additive, float]]) -> Array:
    """The base and the sum of deltas, in blocks that follow each other in memory."""
    opened = [(change.blocks(), change.columns, strength * change.scale) for change, strength in run]
    turned = base.ndim == 2 and not base.flags.c_contiguous and base.flags.f_contiguous
    merged = np.empty(base.shape, np.float32, order="F" if turned else "C")
    source, out = _matrix(base), _matrix(merged)
    rows, columns = out.shape
    for block in row_blocks(columns, rows) if turned else row_blocks(rows, columns):
        place = (slice(0, rows), block) if turned else (block, slice(0, columns))
        total = float64(source[place])
        for compute, width, factor in opened:
            changed = (place[0], slice(place[1].start, min(place[1].stop, width)))
            if changed[1].start < width:
                total[:, : changed[1].stop - place[1].start] += factor * compute(*changed)
        out[place] = total
    return merged


def _matrix(array: Array) -> Array:
    """A tensor as (out, …)."""
    return array if array.ndim == 2 else np.reshape(array, (len(array), -1))


def _as_float32(array: Array) -> Array:
    """A copy in float32."""
    converted = convert(array, "F32")
    return np.copy(converted, order="K") if converted is array else converted
