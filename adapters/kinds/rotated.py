"""Rotations of the outputs: OFT and BOFT.

OFT (arXiv 2306.07280) rotates each block of outputs, BOFT (2311.06243) in stages, with the outputs shuffled
between them. The conventions are those of LyCORIS (`lycoris/functional/diag_oft.py`, `boft.py`, 4.1.3) and of
sd-scripts' `networks/oft.py`: R = (I + Q) (I - Q)^-1 with Q = B - B^T, and OFT applies the transpose of R to
rows, BOFT R itself. The strength m makes I + m · (R - I) of each R; `rescale` multiplies the outputs last,
and has no strength.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from ...engines.spec import Array
from .change import Change, Scaling, Site, float64, squeezed
from .factored import Parts


@dataclass(frozen=True, kw_only=True, eq=False)
class Rotation(Change):
    """OFT: `blocks` is (blocks, size, size).

    Attributes:
        constraint: the largest norm of Q; 0 for any.
        given: whether the blocks are R already.
    """

    constraint: float
    given: bool

    def applied(self, weight: Array, strength: float) -> Array:
        """As in `Change`."""
        turned = _moves(self, strength)
        size = turned.shape[1]
        for number, move in enumerate(turned):
            rows = slice(number * size, (number + 1) * size)
            weight[rows] += np.transpose(move) @ float64(weight[rows])
        return _rescaled(self, weight)


@dataclass(frozen=True, kw_only=True, eq=False)
class Butterfly(Change):
    """BOFT: `blocks` is (stages, blocks, size, size). `constraint` as in `Rotation`."""

    constraint: float
    given: bool = False

    def applied(self, weight: Array, strength: float) -> Array:
        """As in `Change`."""
        moves = _moves(self, strength)
        size, columns = moves.shape[-1], weight.shape[1]
        values = float64(weight)
        for stage, move in enumerate(moves):
            half = 2**stage * size // 2
            shuffled = np.swapaxes(np.reshape(values, (-1, 2, half, columns)), 1, 2)
            blocks = np.reshape(shuffled, (-1, size, columns))
            blocks = blocks + move @ blocks
            values = np.reshape(np.swapaxes(np.reshape(blocks, (-1, half, 2, columns)), 1, 2), weight.shape)
        weight[:] = values
        return _rescaled(self, weight)


def rotation(site: Site, parts: Parts, scaling: Scaling) -> Change:
    """An OFT or BOFT; "given" in place of "blocks" for rotations that are stored as such.

    The alpha is the constraint of Q's norm, for each output.

    Raises:
        AdapterError: the blocks do not divide the outputs, or there is a factor for another number of them.
    """
    given = "given" in parts
    blocks = parts["given" if given else "blocks"]
    size = blocks.shape[-1] if blocks.ndim > 2 else 0
    stages = blocks.shape[0] if blocks.ndim == 4 else 1
    whole = (
        blocks.ndim in (3, 4 - given) and blocks.shape[-2] == size and blocks.shape[-3] * size == site.rows
    )
    # A stage shuffles within 2^stage blocks.
    if not whole or (
        blocks.ndim == 4 and (size % 2 or stages > 32 or site.rows % (size * 2 ** (stages - 1)))
    ):
        site.refuse(f"has blocks of the shape {blocks.shape}", f"blocks that divide {site.rows} outputs")
    if "rescale" in parts and squeezed(parts["rescale"].shape) != (site.rows,):
        site.refuse(f"rescales with the shape {parts['rescale'].shape}", f"({site.rows}, 1, …)")
    constraint = 0.0 if scaling.alpha is None else scaling.alpha * site.rows
    kind, made = ("boft", Butterfly) if blocks.ndim == 4 else ("oft", Rotation)
    arrays = {"blocks": blocks, **{name: parts[name] for name in ("rescale",) if name in parts}}
    return made(kind=kind, arrays=arrays, constraint=constraint, given=given, **site.place)


def _moves(change: Rotation | Butterfly, strength: float) -> Array:
    """m · (R - I) of each block, float64."""
    stored = float64(change.arrays["blocks"])
    one = np.eye(stored.shape[-1])
    if change.given:
        return strength * (stored - one)
    skew = stored - np.swapaxes(stored, -1, -2)
    norm = float(np.linalg.norm(skew)) + 1e-8
    if 0 < change.constraint < norm:
        skew *= change.constraint / norm
    return strength * (np.linalg.solve(one - skew, one + skew) - one)


def _rescaled(change: Change, weight: Array) -> Array:
    if "rescale" in change.arrays:
        weight *= np.reshape(float64(change.arrays["rescale"]), (-1, 1))
    return weight
