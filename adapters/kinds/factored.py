"""Deltas that are products of small factors: LoRA and LoCon, LoHa, LoKr.

The formulas are those of LyCORIS (`lycoris/functional/locon.py`, `loha.py`, `lokr.py`, 4.1.3; LoRA:
arXiv 2106.09685, LoHa: 2108.06098 and 2309.14859, LoKr: 2309.14859). A convolution's W is taken as a matrix
(out, in · height · width).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from math import prod
from typing import cast

import numpy as np

from ...engines.spec import Array
from .change import Additive, Blocks, Scaling, Site, float64, matrix, squeezed

Parts = Mapping[str, Array]
RANK_LIMIT = 4096


@dataclass(frozen=True, kw_only=True, eq=False)
class LowRank(Additive):
    """LoRA: up @ down; with a core in between (tucker, `mid`) sum over p, q of up[·,p] mid[p,q] down[q,·]."""

    def blocks(self) -> Blocks:
        """As in `Additive`."""
        up, down = matrix(self.arrays["up"]), _inner(self.arrays["down"], self.arrays.get("mid"))
        return lambda rows, columns: up[rows] @ down[:, columns]


@dataclass(frozen=True, kw_only=True, eq=False)
class Hadamard(Additive):
    """LoHa: (w1_a @ w1_b) times (w2_a @ w2_b), number by number; tucker: with a core in each factor."""

    def blocks(self) -> Blocks:
        """As in `Additive`."""
        a1, b1 = self._factors("1")
        a2, b2 = self._factors("2")
        return lambda rows, columns: (a1[rows] @ b1[:, columns]) * (a2[rows] @ b2[:, columns])

    def _factors(self, which: str) -> tuple[Array, Array]:
        outer, core = matrix(self.arrays[f"w{which}_a"]), self.arrays.get(f"t{which}")
        # With a core, the first factor is (rank, out).
        return outer if core is None else np.transpose(outer), _inner(self.arrays[f"w{which}_b"], core)


@dataclass(frozen=True, kw_only=True, eq=False)
class Kronecker(Additive):
    """LoKr: the Kronecker product of w1 and w2, each whole or a product of factors."""

    def blocks(self) -> Blocks:
        """As in `Additive`."""
        first = _whole(self.arrays, "w1")
        second = _whole(self.arrays, "w2")
        height, width = second.shape

        def block(rows: slice, columns: slice) -> Array:
            r = cast(Array, np.arange(rows.start, rows.stop))[:, None]
            c = cast(Array, np.arange(columns.start, columns.stop))[None]
            return first[r // height, c // width] * second[r % height, c % width]

        return block


def low_rank(site: Site, parts: Parts, scaling: Scaling) -> LowRank:
    """A LoRA or LoCon: "up" and "down", perhaps "mid". Raises AdapterError if they do not fit."""
    up, down, core = parts["up"], parts["down"], parts.get("mid")
    rank = _rank(site, down)
    if squeezed(up.shape) not in ((site.rows, rank), squeezed((site.rows, rank))):
        site.refuse(
            f"has factors of the shapes {up.shape} and {down.shape}", f"({site.rows}, rank) and (rank, …)"
        )
    columns = _columns(site, _tail(site, down, core, rank))
    scale = scaling.of(rank)
    return LowRank(kind="lora", arrays=parts, rank=rank, scale=scale, columns=columns, **site.place)


def hadamard(site: Site, parts: Parts, scaling: Scaling) -> Hadamard:
    """A LoHa. Raises AdapterError if the parts do not fit the tensor or each other."""
    if ("t1" in parts) != ("t2" in parts):
        site.refuse("has one of hada_t1 and hada_t2", "both or none")
    columns: list[int] = []
    for which in "12":
        a, b, core = parts[f"w{which}_a"], parts[f"w{which}_b"], parts.get(f"t{which}")
        rank = _rank(site, b)
        wanted = (site.rows, rank) if core is None else (rank, site.rows)
        if squeezed(a.shape) not in (wanted, squeezed(wanted)):
            site.refuse(f"has hada_w{which}_a of the shape {a.shape}", str(wanted))
        columns.append(_columns(site, _tail(site, b, core, rank)))
    if columns[0] != columns[1]:
        site.refuse("has factors for inputs of two sizes", "one size")
    rank = _rank(site, parts["w1_b"])
    scale = scaling.of(rank)
    return Hadamard(kind="loha", arrays=parts, rank=rank, scale=scale, columns=columns[0], **site.place)


def kronecker(site: Site, parts: Parts, scaling: Scaling) -> Kronecker:
    """A LoKr. The scale is alpha by rank where a factor is decomposed, and 1 where both are whole.

    Raises:
        AdapterError: a factor is there twice or half, or they do not fit the tensor.
    """
    first_rank, (a, *first) = _kronecker_factor(site, parts, "w1")
    second_rank, (c, *second) = _kronecker_factor(site, parts, "w2")
    width = first[0]
    channels, rest = divmod(site.shape[1], width) if len(site.shape) > 1 and width else (0, 1)
    if prod(first) != width or a * c != site.rows or rest or not _fits(second, (channels, *site.shape[2:])):
        site.refuse(f"is the Kronecker product of {(a, *first)} and {(c, *second)}", "a product")
    # w1's rank goes before w2's, as in LyCORIS; ComfyUI takes w2's.
    rank = first_rank or second_rank
    scale = scaling.scalar if rank is None else scaling.of(rank)
    columns = site.columns
    return Kronecker(kind="lokr", arrays=parts, rank=rank, scale=scale, columns=columns, **site.place)


def _kronecker_factor(site: Site, parts: Parts, name: str) -> tuple[int | None, tuple[int, ...]]:
    """A factor's rank, None for a whole one, and its shape (out, in, …)."""
    a, b, core = parts.get(f"{name}_a"), parts.get(f"{name}_b"), parts.get(f"{name}_core")
    whole = parts.get(name)
    if whole is not None:
        if a is not None or b is not None or core is not None:
            site.refuse(f"has lokr_{name} whole and in factors", "one of them")
        if whole.ndim < 2:
            site.refuse(f"has lokr_{name} of the shape {whole.shape}", "(out, in, …)")
        return None, whole.shape
    if a is None or b is None:
        site.refuse(f"has no lokr_{name}, or half of it", f"lokr_{name}, or lokr_{name}_a and lokr_{name}_b")
    rank = _rank(site, b)
    tail = _tail(site, b, core, rank)
    axis = int(core is None)  # of the rank in `a`, which a core turns
    if a.ndim != 2 or a.shape[axis] != rank:
        site.refuse(f"has lokr_{name}_a and _b of the shapes {a.shape} and {b.shape}", "factors of one rank")
    return rank, (a.shape[1 - axis], *tail)


def _rank(site: Site, inner: Array) -> int:
    """The rank of a factor (rank, in, …). Raises AdapterError where it has none, or more than any adapter."""
    if inner.ndim < 2 or not 0 < inner.shape[0] <= RANK_LIMIT:
        site.refuse(
            f"has a factor of the shape {inner.shape}", f"(rank, in, …), a rank of at most {RANK_LIMIT}"
        )
    return inner.shape[0]


def _tail(site: Site, inner: Array, core: Array | None, rank: int) -> tuple[int, ...]:
    """The shape of a factor (rank, in, …) behind its rank, with the kernel that its core has."""
    if core is None:
        return inner.shape[1:]
    if core.ndim < 3 or core.shape[:2] != (rank, rank):
        site.refuse(f"has a core of the shape {core.shape}", f"({rank}, {rank}, height, width)")
    return (*inner.shape[1:], *core.shape[2:])


def _columns(site: Site, tail: tuple[int, ...]) -> int:
    """How many columns a factor (rank, *tail) changes. Raises AdapterError if it does not fit."""
    wanted = site.shape[1:]
    if wanted and _fits(tail, wanted):
        return prod(wanted)
    if site.takes_more and _fits(tail, site.latents):
        return prod(site.latents)
    return site.refuse(f"has a factor for an input of the shape {tail}", f"an input of {wanted}")


def _fits(tail: Sequence[int], wanted: tuple[int, ...]) -> bool:
    """Whether a shape (in, …) is the wanted one: without axes of size 1, or with all in one axis."""
    return _packed(tail) == _packed(wanted) or (len(tail) == 1 and tail[0] == prod(wanted))


def _packed(tail: Sequence[int]) -> tuple[int, ...]:
    return (*tail[:1], *(size for size in tail[1:] if size != 1))


def _inner(inner: Array, core: Array | None) -> Array:
    """A factor (rank, in, …) with its core (rank, rank, …) as a matrix (rank, in · …)."""
    if core is None:
        return matrix(inner)
    small = np.reshape(float64(core), (*core.shape[:2], -1))  # (p, q, kernel)
    product: Array = np.tensordot(small, matrix(inner), axes=(1, 0))  # (p, kernel, in)
    return np.reshape(np.swapaxes(product, 1, 2), (len(core), -1))


def _whole(parts: Parts, name: str) -> Array:
    """A factor of a Kronecker product, (out, in · …)."""
    if name in parts:
        return matrix(parts[name])
    a, core = matrix(parts[f"{name}_a"]), parts.get(f"{name}_core")
    return (a if core is None else np.transpose(a)) @ _inner(parts[f"{name}_b"], core)
