"""The kinds of change: what each consists of, and what makes it of its parts."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import NoReturn

import numpy as np

from ...engines.spec import Array
from .change import Change, Delta, Scaling, Site
from .factored import Parts, hadamard, kronecker, low_rank
from .rotated import rotation
from .scaled import generalised, inner_scale, with_magnitude
from .whole import difference, full, norm, replaced


@dataclass(frozen=True, kw_only=True)
class Kind:
    """One kind of change to a weight.

    Attributes:
        needs: parts without which it is half: the name that a key has for it (`keys.py`) -> the name that
            `make` takes it by.
        may: parts that it may have besides, likewise.
        shared: parts of these that other kinds have too.
        make: makes the change.
        rank: what the alpha is divided by, of parts by the names of keys; None where nothing is, or a part
            is missing.
    """

    needs: Mapping[str, str]
    may: Mapping[str, str] = field(default_factory=dict[str, str])
    shared: frozenset[str] = frozenset()
    make: Callable[[Site, Parts, Scaling], Change]
    rank: Callable[[Parts], int | None] = lambda parts: None


def _first_of(*names: str) -> Callable[[Parts], int | None]:
    """The rank of the first of these factors (rank, …) that is there."""
    return lambda parts: next((parts[name].shape[0] for name in names if name in parts), None)


def _smaller_of_a1(parts: Parts) -> int | None:
    """GLoRA's rank: its layouts have it on either axis."""
    return min(parts["a1"].shape, default=None) if "a1" in parts else None


# Of alpha by rank: trainers write about 1. Where "full dimension" of LyCORIS makes an alpha of 1e10, both
# factors of a LoKr are whole, and nothing is scaled.
_LARGEST_SCALE = 1e6
MAGNITUDES = ("dora_scale", "magnitude")
_SCALED = frozenset({"alpha", "scalar", "reshape_weight", *MAGNITUDES})
KINDS: tuple[Kind, ...] = (
    Kind(
        needs={"up": "up", "down": "down"},
        may={"mid": "mid"},
        shared=_SCALED,
        make=low_rank,
        rank=_first_of("down"),
    ),
    Kind(
        needs={f"hada_w{which}": f"w{which}" for which in ("1_a", "1_b", "2_a", "2_b")},
        may={"hada_t1": "t1", "hada_t2": "t2"},
        shared=_SCALED,
        make=hadamard,
        rank=_first_of("hada_w1_b"),
    ),
    Kind(
        needs={},  # each factor whole or in two parts, which `kronecker` sees to
        may={
            **{f"lokr_{name}": name for name in ("w1", "w1_a", "w1_b", "w2", "w2_a", "w2_b")},
            "lokr_t2": "w2_core",
        },
        shared=_SCALED,
        make=kronecker,
        rank=_first_of("lokr_w1_b", "lokr_w2_b"),
    ),
    Kind(
        needs={name: name for name in ("a1", "a2", "b1", "b2")},
        may={"bm": "bm"},
        shared=_SCALED,
        make=generalised,
        rank=_smaller_of_a1,
    ),
    Kind(needs={"diff": "diff"}, shared=frozenset({"alpha", "scalar", "reshape_weight"}), make=full),
    Kind(needs={"w_norm": "diff"}, shared=frozenset({"alpha"}), make=norm),
    Kind(needs={"set_weight": "weight"}, make=replaced),
    Kind(needs={"weight": "weight", "on_input": "on_input"}, shared=frozenset({"alpha"}), make=inner_scale),
    Kind(needs={"oft_blocks": "blocks"}, shared=frozenset({"alpha", "rescale"}), make=rotation),
    Kind(needs={"oft_diag": "given"}, shared=frozenset({"alpha", "rescale"}), make=rotation),
)
# Parts that change the bias -> the kind of the change.
BIASES: Mapping[str, str] = {"diff_b": "full", "b_norm": "norm", "up_bias": "lora"}


def weight_change(site: Site, parts: Mapping[str, Array], scaling: Scaling) -> Change:
    """The change that a module's parts make to its weight.

    Raises:
        AdapterError: they are parts of two kinds, or half of one, or do not fit the tensor.
    """
    found = [kind for kind in KINDS if not parts.keys().isdisjoint({*kind.needs, *kind.may})]
    if not found:
        _refuse_parts(site, parts, "what they belong to")
    if len(found) > 1:
        _refuse_parts(site, parts, "one change of a tensor")
    (kind,) = found
    if missing := kind.needs.keys() - parts.keys():
        _refuse_parts(site, parts, f"{' and '.join(sorted(missing))} too")
    names = {**kind.needs, **kind.may}
    if other := parts.keys() - names.keys() - kind.shared:
        _refuse_parts(site, parts, f"no {' and '.join(sorted(other))} here")
    own = {names[name]: array for name, array in parts.items() if name in names}
    own |= {name: parts[name] for name in ("rescale",) if name in parts}
    _check_reshape(site, parts)
    change = kind.make(site, own, scaling)
    if fault := fault_of_scale(change.scale, change.rank or 1):
        site.refuse(*fault)
    return _with_magnitude(site, change, parts)


def rank_of(parts: Parts) -> int | None:
    """The rank that the alpha of a module's parts is divided by; None where none is, or a part is missing."""
    found = (kind.rank(parts) for kind in KINDS if not parts.keys().isdisjoint({*kind.needs, *kind.may}))
    return next((rank for rank in found if rank), None)


def fault_of_scale(scale: float, rank: int) -> tuple[str, str, str] | None:
    """What was found, what is expected, and the advice, where alpha by rank is out of range; else None."""
    if abs(scale) <= _LARGEST_SCALE:
        return None
    return (
        f"has an alpha of {scale * rank:.3g} for the rank {rank}",
        f"at most {_LARGEST_SCALE:.0g} times the rank",
        "Have the file written again by the program that trained it.",
    )


def _with_magnitude(site: Site, change: Change, parts: Mapping[str, Array]) -> Change:
    found = [name for name in MAGNITUDES if name in parts]
    if len(found) > 1:
        _refuse_parts(site, parts, "one magnitude")
    if not found or not isinstance(change, Delta):
        return change
    return with_magnitude(site, change, parts[found[0]], by_output=found[0] == "magnitude")


def _check_reshape(site: Site, parts: Mapping[str, Array]) -> None:
    """Raise AdapterError for an adapter that wants another shape: that of a graph is fixed."""
    if "reshape_weight" in parts:
        wanted = tuple(int(size) for size in np.array(parts["reshape_weight"], np.int64).ravel())
        if wanted != site.shape:
            site.refuse(f"makes a tensor of the shape {wanted[:8]}", "the shape that it has")


def bias_change(site: Site, name: str, part: Array, scale: float) -> Change:
    """The change that a part ("diff_b", "b_norm", "up_bias") makes to a bias; errors as `difference`."""
    return difference(site, part, BIASES[name], scale)


def _refuse_parts(site: Site, parts: Mapping[str, Array], expected: str) -> NoReturn:
    site.refuse(f"has {', '.join(sorted(parts))}", expected)
