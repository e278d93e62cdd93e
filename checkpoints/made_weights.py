"""Weights that no file has: computed when they are wanted, and written one at a time."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

import numpy as np

from ..engines.safetensors_format import ITEM_SIZES, write_file
from ..engines.spec import Array
from .files.component import TensorHeader
from .stored_types import convert, seen_as

if TYPE_CHECKING:
    from .templates.archive import Dtype

_COMPUTED: Mapping[str, str] = {"fp16": "F16", "fp32": "F32"}
_NARROWEST = "F16"  # in 8 bits, rounding would undo most of what a change adds


@dataclass(frozen=True, kw_only=True)
class Weight:
    """A weight that is computed when it is wanted.

    Attributes:
        shape: its shape.
        dtype: safetensors' name of the widest type of what it is made of.
        read: gives it as float32; may raise what the reader of a file raises.
    """

    shape: tuple[int, ...]
    dtype: str
    read: Callable[[], Array]


def write_made(path: Path, weights: Mapping[str, Weight], dtype: Dtype) -> dict[str, TensorHeader]:
    """Compute weights and write them to a file, each rounded once. One is in memory at a time.

    Each has the type that a package of `dtype` stores it in, as `graphs.weights.stored_type` has it; what is
    made of 8 bits becomes float16.

    Returns:
        Where each is.

    Raises:
        OSError: the file cannot be written; and whatever `Weight.read` raises.
    """
    stored = {name: _stored_type(weight.dtype, dtype) for name, weight in weights.items()}

    def content(name: str) -> memoryview:
        flat = np.ravel(convert(weights[name].read(), stored[name]))
        return memoryview(cast(Any, seen_as(flat, np.uint8)))

    write_file(path, {name: (stored[name], weight.shape) for name, weight in weights.items()}, content)
    return {
        name: TensorHeader(file=path, name=name, dtype=stored[name], shape=weight.shape)
        for name, weight in weights.items()
    }


def wider(one: str, other: str) -> str:
    """The wider of two types by safetensors' names; of two that are as wide the first."""
    return max(one, other, key=lambda name: ITEM_SIZES[name])


def _stored_type(source: str, dtype: Dtype) -> str:
    narrower = min(_COMPUTED[dtype], source, key=lambda name: ITEM_SIZES[name])
    return narrower if ITEM_SIZES[narrower] >= ITEM_SIZES[_NARROWEST] else _NARROWEST
