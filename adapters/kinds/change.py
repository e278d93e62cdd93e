"""What all kinds of change have in common: where they go, how strong they are, and how they are computed."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from math import prod, sqrt
from pathlib import Path
from typing import Any, NoReturn

import numpy as np

from ...engines.errors import AdapterError, command
from ...engines.spec import Array

# Numbers that are computed together. They stay in a processor's cache, and BLAS takes one thread for them:
# on cores that others use too, its threads waited for each other forty times as long as they computed.
_BLOCK = 2**15
# (rows, columns) of the tensor as a matrix -> the delta there. It is float64, which is as fast as float32 at
# usual ranks, and is rounded once.
Blocks = Callable[[slice, slice], Array]
# The first convolution of a UNet may take more than the four channels of a noisy picture: 9 for inpainting, 8
# for InstructPix2Pix. An adapter that was trained without them leaves their weights as they are.
_CONV_IN, _LATENT_CHANNELS, _WIDER = "conv_in.weight", 4, (8, 9)


@dataclass(frozen=True, kw_only=True)
class Site:
    """Where a change of a file goes.

    Attributes:
        file: the adapter.
        key: the changed module as the file spells it.
        tensor: the tensor, by the checkpoint's name.
        shape: the tensor's shape in the checkpoint.
        source: which change of which file this is: equal for the same change of two files of one content.
        made_for: the base that the file seems to be made for; for messages.
    """

    file: Path
    key: str
    tensor: str
    shape: tuple[int, ...]
    source: str
    made_for: str = ""

    @property
    def rows(self) -> int:
        """How many outputs there are."""
        return self.shape[0]

    @property
    def inputs(self) -> int:
        """How many numbers, or channels, a layer reads; 1 for a bias."""
        return self.shape[1] if len(self.shape) > 1 else 1

    @property
    def columns(self) -> int:
        """How many numbers an output has."""
        return prod(self.shape[1:])

    @property
    def latents(self) -> tuple[int, ...]:
        """What an output of the first convolution has for the channels of a noisy picture alone."""
        return (_LATENT_CHANNELS, *self.shape[2:])

    @property
    def takes_more(self) -> bool:
        """Whether this is a first convolution that takes more than those."""
        return self.tensor.endswith(_CONV_IN) and len(self.shape) == 4 and self.shape[1] in _WIDER

    @property
    def place(self) -> dict[str, Any]:
        """What every change has from here, by the names of `Change`'s attributes."""
        return {"shape": self.shape, "source": self.source}

    def refuse(self, found: str, expected: str, fix: str = "") -> NoReturn:
        """Raise the AdapterError for parts that do not fit the tensor or each other."""
        raise AdapterError(
            found_at(self.file, self.key, found, self.made_for),
            expected=f"{expected}, for {self.tensor} of the shape {self.shape}",
            fix=fix
            or f"Use an adapter that was made for this model: {command('latentrt', 'inspect', self.file)}",
        )


def found_at(file: Path, key: str, found: str, made_for: str) -> str:
    """What an error says of a module as the file spells it; `made_for` is as in `Site`."""
    base = f" (the file is made for {made_for})" if made_for else ""
    return f"{file}: {key} {found}{base}"


@dataclass(frozen=True, kw_only=True)
class Scaling:
    """What a delta is multiplied with besides the strength.

    Attributes:
        alpha: as stored; None where nothing is, which means the rank.
        stabilised: divide by the root of the rank (rsLoRA).
        scalar: LyCORIS' trained factor.
    """

    alpha: float | None = None
    stabilised: bool = False
    scalar: float = 1.0

    def of(self, rank: int) -> float:
        """The factor for a rank, which is that of the module's own tensors."""
        if self.alpha is None:
            return self.scalar
        return self.scalar * self.alpha / (sqrt(rank) if self.stabilised else rank)


@dataclass(frozen=True, kw_only=True, eq=False)
class Change(ABC):
    """What a file does to one tensor. Nothing is computed before it is merged.

    Attributes:
        kind: "lora", "loha", "lokr", "glora", "ia3", "oft", "boft", "full", "norm", "set"; with a magnitude
            (DoRA) "lora-dora" and so on.
        arrays: its parts as the file has them, read when they are computed with, by our names of them ("up",
            "down", …).
        shape: the shape of the tensor.
        source: as in `Site`.
        rank: of a factored change, else None.
        scale: alpha by rank; 1 where there is none.
    """

    kind: str
    arrays: Mapping[str, Array] = field(repr=False)
    shape: tuple[int, ...]
    source: str
    rank: int | None = None
    scale: float = 1.0

    @abstractmethod
    def applied(self, weight: Array, strength: float) -> Array:
        """W' of a matrix W (out, …) of float32, which may be overwritten."""


@dataclass(frozen=True, kw_only=True, eq=False)
class Delta(Change):
    """W' = W + m · delta(W).

    Attributes:
        columns: how many columns of W as a matrix (out, …) change, from the first on: all of them, or those
            of the first channels of an input that has more than the adapter knows.
    """

    columns: int

    @abstractmethod
    def deltas(self, weight: Array) -> Callable[[slice], Array]:
        """Read the parts, and return what computes rows of the delta of W: float64, with the scale in it."""

    def applied(self, weight: Array, strength: float) -> Array:
        """As in `Change`."""
        deltas = self.deltas(weight)
        for rows in row_blocks(*weight.shape):
            weight[rows, : self.columns] += strength * deltas(rows)
        return weight


@dataclass(frozen=True, kw_only=True, eq=False)
class Additive(Delta):
    """A delta that is the same for every W: W' = W + m · scale · blocks."""

    @abstractmethod
    def blocks(self) -> Blocks:
        """Read the parts, and return what computes blocks of the delta, without strength and scale."""

    def deltas(self, weight: Array) -> Callable[[slice], Array]:
        """As in `Delta`."""
        blocks, columns = self.blocks(), slice(0, self.columns)
        return lambda rows: self.scale * blocks(rows, columns)


def float64(array: Array) -> Array:
    """A copy of the numbers as float64, in which deltas are computed."""
    return np.array(array, np.float64)


def matrix(array: Array) -> Array:
    """A part as float64 (first axis, the others)."""
    return np.reshape(float64(array), (len(array), -1))


def squeezed(shape: tuple[int, ...]) -> tuple[int, ...]:
    """A shape without the axes of size 1 at its end: that of a 1x1 convolution is a linear layer's."""
    while len(shape) > 1 and shape[-1] == 1:
        shape = shape[:-1]
    return shape


def row_blocks(rows: int, columns: int) -> Iterator[slice]:
    """Slices of rows that are computed together."""
    step = max(_BLOCK // max(columns, 1), 1)
    return (slice(begin, min(begin + step, rows)) for begin in range(0, rows, step))


def scalar_of(array: Array) -> float:
    """The number in an array of one, of whatever type."""
    return float(np.reshape(float64(array), ()))
