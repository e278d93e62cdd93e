"""What a parameter of a request may be: a check returns the value in its own type, or says what is wrong."""

from __future__ import annotations

import secrets
from collections.abc import Sequence
from numbers import Real
from typing import Any, cast

import numpy as np

from ...engines.errors import UsageError
from ...engines.spec import Array


def texts(name: str, value: str | Sequence[str]) -> list[str]:
    """One text or several, as a list."""
    found = [value] if isinstance(value, str) else list(value) if isinstance(value, Sequence) else []
    if not found or not all(isinstance(text, str) for text in found):
        raise UsageError(f"{name} is {value!r}", expected="a text or a list of texts", fix="Pass a str.")
    return found


def texts_for(name: str, value: str | Sequence[str] | None, prompts: int) -> list[str | None]:
    """One text for every prompt; None stands for itself."""
    if value is None:
        return [None] * prompts
    found = texts(name, value)
    if len(found) not in (1, prompts):
        raise UsageError(
            f"{name} has {len(found)} texts for {prompts} prompts",
            expected="one text, or as many as prompts",
            fix=f"Pass one {name} for all of them.",
        )
    return [*found] * prompts if len(found) == 1 else [*found]


def integer(name: str, value: int, low: int, high: int) -> int:
    """A whole number from `low` to `high`; neither a bool nor a float."""
    if (
        isinstance(value, (bool, float))
        or not isinstance(value, (int, np.integer))
        or not low <= value <= high
    ):
        raise UsageError(
            f"{name} is {value!r}", expected=f"an integer from {low} to {high}", fix=f"Change {name}."
        )
    return int(value)


def number(name: str, value: float, low: float, high: float) -> float:
    """A number from `low` to `high`."""
    if isinstance(value, bool) or not isinstance(value, Real) or not low <= value <= high:
        raise UsageError(
            f"{name} is {value!r}", expected=f"a number from {low:g} to {high:g}", fix=f"Change {name}."
        )
    return float(value)


def choice(name: str, value: str, choices: Sequence[str]) -> str:
    """One of `choices`."""
    if value not in choices:
        raise UsageError(
            f"{name} is {value!r}", expected=f"one of {', '.join(choices)}", fix=f"Change {name}."
        )
    return value


def side(name: str, value: int, multiple: int) -> int:
    """Pixels: a multiple of `multiple`."""
    value = integer(name, value, multiple, 16384)
    if value % multiple:
        lower, upper = value // multiple * multiple, (value // multiple + 1) * multiple
        raise UsageError(
            f"{name} is {value}", expected=f"a multiple of {multiple}", fix=f"Use {lower} or {upper}."
        )
    return value


def pair(name: str, value: Sequence[int], low: int = 0) -> tuple[int, int]:
    """Two whole numbers: (height, width), or (top, left)."""
    items: Any = cast(Any, value).tolist() if isinstance(value, np.ndarray) else value
    if isinstance(items, (str, bytes)) or not isinstance(items, Sequence) or len(cast(Any, items)) != 2:
        raise UsageError(f"{name} is {value!r}", expected="two integers", fix=f"Pass {name}=(1024, 1024).")
    first, second = (integer(name, item, low, 16384) for item in cast(Any, items))
    return first, second


def seeds(seed: int | Sequence[int] | None, pictures: int) -> tuple[int, ...]:
    """An int seeds the first picture and counts up; a list has one seed per picture; None is random."""
    if seed is None:
        seed = secrets.randbelow(2**32)
    if isinstance(seed, (int, np.integer)) and not isinstance(seed, bool):
        first = integer("seed", seed, -(2**63), 2**64 - pictures)
        return tuple(range(first, first + pictures))
    found = list(seed) if isinstance(seed, Sequence) else []
    if len(found) != pictures or isinstance(seed, str):
        raise UsageError(
            f"seed is {seed!r} for {pictures} pictures",
            expected="an integer, or a list with one integer per picture",
            fix="Pass one integer: pictures get seed, seed + 1, …",
        )
    return tuple(integer("seed", value, -(2**63), 2**64 - 1) for value in found)


def latents(name: str, value: Array | None, shape: tuple[int, ...]) -> Array | None:
    """Finite float32 numbers of that shape."""
    if value is None:
        return None
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
