"""Changes whose parts are as large as the tensor: differences of weights, norms and biases, and new weights.

Names and formulas are those of LyCORIS (`lycoris/modules/full.py`, `norms.py`); for new weights, ComfyUI's.
"""

from __future__ import annotations

from dataclasses import dataclass
from math import prod

import numpy as np

from ...engines.spec import Array
from .change import Additive, Blocks, Change, Scaling, Site, matrix, squeezed
from .factored import Parts


@dataclass(frozen=True, kw_only=True, eq=False)
class Difference(Additive):
    """W' = W + m · scale · diff."""

    def blocks(self) -> Blocks:
        """As in `Additive`."""
        diff = matrix(self.arrays["diff"])
        return lambda rows, columns: diff[rows, columns]


@dataclass(frozen=True, kw_only=True, eq=False)
class Replaced(Change):
    """W' = the part, at any strength but 0."""

    def applied(self, weight: Array, strength: float) -> Array:
        """As in `Change`."""
        return np.array(np.reshape(self.arrays["weight"], weight.shape), np.float32)


def difference(site: Site, diff: Array, kind: str, scale: float = 1.0) -> Difference:
    """A difference of a weight, or of a bias. Raises AdapterError for another shape than the tensor's."""
    shape = squeezed(diff.shape)
    narrow = site.takes_more and shape == squeezed((site.rows, *site.latents))
    if shape != squeezed(site.shape) and not narrow:
        site.refuse(f"has a difference of the shape {diff.shape}", "the tensor's shape")
    columns = prod(site.latents) if narrow else site.columns
    return Difference(kind=kind, arrays={"diff": diff}, scale=scale, columns=columns, **site.place)


def replaced(site: Site, parts: Parts, scaling: Scaling) -> Replaced:
    """A new weight. Raises AdapterError for another shape than the tensor's."""
    if squeezed(parts["weight"].shape) != squeezed(site.shape):
        site.refuse(f"has a weight of the shape {parts['weight'].shape}", "the tensor's shape")
    return Replaced(kind="set", arrays=parts, **site.place)


def full(site: Site, parts: Parts, scaling: Scaling) -> Difference:
    """The difference of a whole weight; no alpha scales it."""
    return difference(site, parts["diff"], "full", scaling.scalar)


def norm(site: Site, parts: Parts, scaling: Scaling) -> Difference:
    """The difference of a normalisation's weight."""
    return difference(site, parts["diff"], "norm")
