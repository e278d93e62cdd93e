"""Changes in proportion to the weight: IA3, GLoRA, and the magnitudes of DoRA."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

from ...engines.spec import Array
from .change import Change, Delta, Scaling, Site, float64, row_blocks, scalar_of, squeezed
from .factored import Parts, low_rank

_EPSILON = float(np.finfo(np.float32).eps)  # LyCORIS and A1111 add that of the type they compute in


@dataclass(frozen=True, kw_only=True, eq=False)
class InnerScale(Change):
    """IA3 (arXiv 2205.05638): W' = W · (1 + m · w), w for each input (`on_input`) or each output."""

    on_input: bool

    def applied(self, weight: Array, strength: float) -> Array:
        """As in `Change`."""
        scale: Array = 1 + strength * np.ravel(float64(self.arrays["weight"]))
        if not self.on_input:
            weight *= np.reshape(scale, (-1, 1))
        else:
            by_input = _by_input(weight, len(scale))  # a view
            by_input *= np.reshape(scale, (-1, 1))
        return weight


@dataclass(frozen=True, kw_only=True, eq=False)
class Generalised(Delta):
    """GLoRA (arXiv 2306.07967): delta = scale · (b + W a), with a and b of low rank."""

    addend: Delta

    def deltas(self, weight: Array) -> Callable[[slice], Array]:
        """As in `Delta`."""
        outer = _matrix(self.arrays["a_outer"])
        inner = _matrix(self.arrays["a_inner"])
        added = self.addend.deltas(weight)

        def delta(rows: slice) -> Array:
            before = np.swapaxes(_by_input(float64(weight[rows]), len(outer)), 1, 2)  # (rows, kernel, in)
            inputs: Array = np.swapaxes(before @ outer @ inner, 1, 2)
            return added(rows) + self.scale * np.reshape(inputs, (len(before), -1))

        return delta


@dataclass(frozen=True, kw_only=True, eq=False)
class Magnitude(Change):
    """DoRA (arXiv 2402.09353): V = W + delta; W' = W + m · (magnitude · V / norm of V - W).

    The strength interpolates, as in A1111 and ComfyUI: at 0 it is W. PEFT has it inside of V, and LyCORIS on
    the ratio of magnitudes; at 1 all are equal. The norm is that of an output's numbers, or of an input's.
    """

    of: Delta
    on_input: bool

    def applied(self, weight: Array, strength: float) -> Array:
        """As in `Change`."""
        deltas, columns = self.of.deltas(weight), self.of.columns
        blocks = list(row_blocks(*weight.shape))

        def moved(rows: slice) -> Array:
            both = float64(weight[rows])
            both[:, :columns] += deltas(rows)
            return both

        ratio = self._ratio(moved, blocks, weight)
        for rows in blocks:
            after = moved(rows)
            each = ratio if self.on_input else ratio[rows]
            after = np.reshape(_by_input(after, ratio.shape[1]) * each, after.shape)
            before = float64(weight[rows])
            weight[rows] = before + strength * (after - before)
        return weight

    def _ratio(self, moved: Callable[[slice], Array], blocks: list[slice], weight: Array) -> Array:
        """The magnitude by the norm of what has moved, (out, 1, 1) or (1, in, 1)."""
        magnitude = np.ravel(float64(self.arrays["magnitude"]))
        shape = (1, len(magnitude), 1) if self.on_input else (len(magnitude), 1, 1)
        squares = np.zeros(shape)
        for rows in blocks:
            found = np.sum(_by_input(np.square(moved(rows)), shape[1]), axis=2, keepdims=True)
            if self.on_input:
                squares += np.sum(found, axis=0, keepdims=True)
            else:
                squares[rows] = found
        return np.reshape(magnitude, shape) / (np.sqrt(squares) + _EPSILON)


def inner_scale(site: Site, parts: Parts, scaling: Scaling) -> InnerScale:
    """An IA3. Raises AdapterError for another number of factors than the tensor has inputs or outputs."""
    on_input = scalar_of(parts["on_input"]) != 0
    wanted = site.inputs if on_input else site.rows
    if parts["weight"].size != wanted:
        where = "inputs" if on_input else "outputs"
        site.refuse(f"scales {parts['weight'].size} {where}", f"{wanted} {where}")
    return InnerScale(kind="ia3", arrays=parts, on_input=on_input, **site.place)


def generalised(site: Site, parts: Parts, scaling: Scaling) -> Generalised:
    """A GLoRA, of LyCORIS' layout now (a1 a2, b1 b2) or of its former one (a2 a1, b2 b1), told by shapes.

    Raises:
        AdapterError: the parts fit the tensor in neither.
    """
    a1, a2, b1, b2 = (parts[name] for name in ("a1", "a2", "b1", "b2"))
    shapes = ", ".join(str(array.shape) for array in (a1, a2, b1, b2))
    if any(array.ndim < 2 for array in (a1, a2, b1, b2)):
        site.refuse(f"has factors of the shapes {shapes}", "matrices")
    rank = a1.shape[1]
    now = a2.shape[0] == b1.shape[1] == b2.shape[0] == rank and a1.shape[0] == site.inputs
    outer, inner, up, down = (a1, a2, b1, b2) if now else (a2, a1, b2, b1)
    rank = inner.shape[0]
    fits = squeezed(outer.shape) in ((site.inputs, rank), squeezed((site.inputs, rank)))
    fits = fits and squeezed(inner.shape) in ((rank, site.inputs), squeezed((rank, site.inputs)))
    if not fits or up.shape[1] != rank or down.shape[0] != rank:
        site.refuse(f"has factors of the shapes {shapes}", "four factors of one rank")
    core = {"mid": parts["bm"]} if "bm" in parts else {}
    addend = low_rank(site, {"up": up, "down": down, **core}, scaling)
    if addend.columns != site.columns:
        site.refuse(f"has factors of the shapes {shapes}", f"{site.inputs} inputs")
    arrays = {"a_outer": outer, "a_inner": inner, **addend.arrays}
    return Generalised(
        kind="glora",
        arrays=arrays,
        rank=rank,
        scale=addend.scale,
        columns=site.columns,
        addend=addend,
        **site.place,
    )


def with_magnitude(site: Site, change: Delta, magnitude: Array, *, by_output: bool) -> Magnitude:
    """A delta whose sum with the weight gets another magnitude.

    Args:
        site: where.
        change: the delta.
        magnitude: of each output, or of each input where only that fits the shape: (1, in, …).
        by_output: whether it is of each output whatever its shape says: PEFT's is, and has the shape
            (1, out, 1, 1) for a convolution.

    Raises:
        AdapterError: it fits neither.
    """
    shape = squeezed(magnitude.shape)
    on_input = not by_output and shape != (site.rows,) and shape == squeezed((1, site.inputs))
    if not on_input and shape not in ((site.rows,), *([squeezed((1, site.rows))] if by_output else [])):
        site.refuse(
            f"has a magnitude of the shape {magnitude.shape}", f"({site.rows}, 1, …) or (1, {site.inputs}, …)"
        )
    return Magnitude(
        kind=f"{change.kind}-dora",
        arrays={**change.arrays, "magnitude": magnitude},
        rank=change.rank,
        scale=change.scale,
        of=change,
        on_input=on_input,
        **site.place,
    )


def _by_input(weight: Array, inputs: int) -> Array:
    """Rows of a tensor as (rows, in, kernel); `inputs` may be 1, for a row as a whole."""
    return np.reshape(weight, (len(weight), inputs, -1))


def _matrix(array: Array) -> Array:
    return np.reshape(float64(array), array.shape[:2])
