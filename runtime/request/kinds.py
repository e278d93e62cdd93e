"""What values a parameter may take, and how a text on the command line becomes one.

NumPy is imported only where arrays are checked: the command line lists the parameters without it.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from numbers import Integral, Real
from typing import TYPE_CHECKING, Any, cast

from ...engines.errors import UsageError

if TYPE_CHECKING:
    from ...engines.package import Manifest
    from ...engines.spec import Array

Bound = int | Callable[["Manifest"], int]  # of every model, or of one


@dataclass(frozen=True, kw_only=True)
class Kind:
    """Values of one kind.

    Attributes:
        check: (parameter name, value, manifest) -> the value in its own type. Raises UsageError.
        text: the type of its text on the command line.
        read: text -> value, where it is more than that type. Raises ValueError.
        metavar: what `--help` calls the text.
    """

    check: Callable[[str, Any, Manifest], Any] = lambda name, value, manifest: value
    text: type = str
    read: Callable[[str], Any] | None = None
    metavar: str | None = None


ANY = Kind()

# ── the kinds ──────────────────────────────────────────────────────────────────────────────────────


def integer(low: int, high: Bound, metavar: str | None = None) -> Kind:
    """Whole numbers from `low` to `high`."""

    def check(name: str, value: Any, manifest: Manifest) -> int:
        return check_integer(name, value, low, high(manifest) if callable(high) else high)

    return Kind(check=check, text=int, metavar=metavar)


def number(low: float, high: float, metavar: str | None = None) -> Kind:
    """Numbers from `low` to `high`."""
    return Kind(
        check=lambda name, value, _: check_number(name, value, low, high), text=float, metavar=metavar
    )


def choice(names: Sequence[str]) -> Kind:
    """One of some names."""

    def check(name: str, value: Any, manifest: Manifest) -> str:
        if value not in names:
            raise UsageError(
                f"{name} is {value!r}", expected=f"one of {', '.join(names)}", fix=f"Change {name}."
            )
        return value

    return Kind(check=check)


def pixels() -> Kind:
    """Sides of a picture or a tile: a multiple of what the model's latents need."""

    def check(name: str, value: Any, manifest: Manifest) -> int:
        step = manifest.size_multiple
        side = check_integer(name, value, step, 16384)
        if side % step:
            lower, upper = side // step * step, (side // step + 1) * step
            raise UsageError(
                f"{name} is {side}", expected=f"a multiple of {step}", fix=f"Use {lower} or {upper}."
            )
        return side

    return Kind(check=check, text=int, metavar="PIXELS")


def size() -> Kind:
    """(height, width) in pixels; WIDTHxHEIGHT as text."""

    def read(text: str) -> tuple[int, int]:
        width, height = _integers(text, "x")
        return height, width

    return Kind(check=lambda name, value, _: _check_pair(name, value, 1), read=read, metavar="WIDTHxHEIGHT")


def offset() -> Kind:
    """(top, left) in pixels; LEFT,TOP as text."""

    def read(text: str) -> tuple[int, int]:
        left, top = _integers(text, ",")
        return top, left

    return Kind(check=lambda name, value, _: _check_pair(name, value, 0), read=read, metavar="LEFT,TOP")


def levels() -> Kind:
    """Descending timesteps or sigmas; what a sampler makes of them is checked where its table is made."""

    def check(name: str, value: Any, manifest: Manifest) -> tuple[float, ...]:
        found = items(value)
        if not found:
            raise UsageError(f"{name} is {value!r}", expected="a list of numbers", fix=f"Leave {name} out.")
        return tuple(check_number(name, item, 0.0, 1e6) for item in found)

    return Kind(check=check, read=lambda text: [float(part) for part in text.split(",")], metavar="N,N…")


def seeds() -> Kind:
    """An integer, or one for every picture; `check_seeds` settles them once the pictures are counted."""

    def read(text: str) -> int | list[int]:
        found = _integers(text, ",")
        return found[0] if len(found) == 1 else found

    return Kind(read=read, metavar="N[,N…]")


def latents() -> Kind:
    """An array, from a .npy file on the command line; `check_latents` checks it once its shape is known."""
    return Kind(read=_read_latents, metavar="FILE.npy")


def image() -> Kind:
    """A picture's path as it is, or latents; read by `source.load_images`."""
    return Kind(read=lambda text: _read_latents(text) if text.endswith(".npy") else text, metavar="FILE")


def _integers(text: str, separator: str) -> list[int]:
    parts = text.split(separator)
    if not all(part.strip().lstrip("-").isdigit() for part in parts):
        raise ValueError(text)
    return [int(part) for part in parts]


def _read_latents(text: str) -> Array:
    from ..pictures.read import read_latents

    return read_latents(text)


# ── checks of single values ────────────────────────────────────────────────────────────────────────


def check_integer(name: str, value: Any, low: int, high: int) -> int:
    """A whole number from `low` to `high`; neither a bool nor a float."""
    if isinstance(value, bool) or not isinstance(value, Integral) or not low <= int(value) <= high:
        raise UsageError(
            f"{name} is {value!r}", expected=f"an integer from {low} to {high}", fix=f"Change {name}."
        )
    return int(value)


def check_number(name: str, value: Any, low: float, high: float) -> float:
    """A number from `low` to `high`."""
    if isinstance(value, bool) or not isinstance(value, Real) or not low <= float(value) <= high:
        raise UsageError(
            f"{name} is {value!r}", expected=f"a number from {low:g} to {high:g}", fix=f"Change {name}."
        )
    return float(value)


def items(value: Any) -> list[Any] | None:
    """The items of a list, a tuple or an array; None for anything else."""
    plain = value.tolist() if hasattr(value, "tolist") else value
    return list(cast(Any, plain)) if isinstance(plain, (list, tuple)) else None


def _check_pair(name: str, value: Any, low: int) -> tuple[int, int]:
    found = items(value)
    if found is None or len(found) != 2:
        raise UsageError(f"{name} is {value!r}", expected="two integers", fix=f"Pass {name}=(1024, 1024).")
    first, second = (check_integer(name, item, low, 16384) for item in found)
    return first, second


# ── checks that need to know how many pictures there are ───────────────────────────────────────────


def check_texts(name: str, value: Any) -> list[str]:
    """One text or several, as a list."""
    found = (
        [value] if isinstance(value, str) else list(cast(Any, value)) if isinstance(value, Sequence) else []
    )
    if not found or not all(isinstance(text, str) for text in found):
        raise UsageError(f"{name} is {value!r}", expected="a text or a list of texts", fix="Pass a str.")
    return found


def check_texts_for(name: str, value: Any, prompts: int) -> list[str | None]:
    """One text for every prompt; None stands for itself."""
    if value is None:
        return [None] * prompts
    found = check_texts(name, value)
    if len(found) not in (1, prompts):
        raise UsageError(
            f"{name} has {len(found)} texts for {prompts} prompts",
            expected="one text, or as many as prompts",
            fix=f"Pass one {name} for all of them.",
        )
    return [*found] * prompts if len(found) == 1 else [*found]


def check_seeds(seed: Any, pictures: int) -> tuple[int, ...]:
    """An int seeds the first picture and counts up; a list has one seed per picture; None is random."""
    if seed is None:
        import secrets

        seed = secrets.randbelow(2**32)
    if isinstance(seed, Integral) and not isinstance(seed, bool):
        first = check_integer("seed", seed, -(2**63), 2**64 - pictures)
        return tuple(range(first, first + pictures))
    found: list[Any] = list(cast(Any, seed)) if isinstance(seed, Sequence) else []
    if len(found) != pictures or isinstance(seed, str):
        raise UsageError(
            f"seed is {seed!r} for {pictures} pictures",
            expected="an integer, or a list with one integer per picture",
            fix="Pass one integer: pictures get seed, seed + 1, …",
        )
    return tuple(check_integer("seed", value, -(2**63), 2**64 - 1) for value in found)


def check_latents(name: str, value: Any, shape: tuple[int, ...]) -> Array:
    """Finite float32 numbers of that shape."""
    import numpy as np

    try:
        array = np.asarray(value, np.float32)
    except (TypeError, ValueError):
        array = np.empty(0, np.float32)
    if array.shape != shape or not np.isfinite(array).all():
        raise UsageError(
            f"{name} have shape {array.shape}" + ("" if array.shape != shape else " and are not all finite"),
            expected=f"finite numbers of shape {shape}",
            fix="Pass numbers of that shape, or a seed.",
        )
    return array
