"""A picture to draw after, through an IP-Adapter, and how much it counts in each of the UNet's layers."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, cast

import numpy as np

from ...engines.errors import UsageError
from ...engines.spec import Array
from .control import steps_on

LayerStrength = float | Mapping[str, Any]


@dataclass(frozen=True, kw_only=True)
class ImagePrompt:
    """A picture, or several, that a request is drawn after through an IP-Adapter.

    Attributes:
        model: the name of one that was loaded.
        image: a picture, or a list of them, as in `Control`; every picture of the request sees all of them.
        strength: 1 as the adapter was trained; or as in diffusers' `set_ip_adapter_scale` a mapping of
            "down", "mid" and "up" to a number, or to one for each block ("block_2"), or for each of its
            transformers. What a mapping leaves out is 0.
        start, end: the part of the steps that it is in, as in `Control`.
        mask_image: white where the picture counts: one for all, or one for each. None is everywhere.
    """

    model: str
    image: Any
    strength: LayerStrength = 1.0
    start: float = 0.0
    end: float = 1.0
    mask_image: Any = None

    def on(self, steps: int) -> Array:
        """(S,) bool: in which of the steps it is."""
        return steps_on(steps, self.start, self.end)

    def strengths(self, attentions: Sequence[str]) -> list[float]:
        """One for each cross-attention, by the names of their modules.

        Raises:
            UsageError: a block that the UNet does not have, or another number of transformers.
        """
        if not isinstance(self.strength, Mapping):
            return [float(self.strength)] * len(attentions)
        places = [_place(name) for name in attentions]
        found = dict.fromkeys(places, 0.0)
        for side, value in self.strength.items():
            blocks = dict.fromkeys(block for one, block, _ in places if one == side)
            for block, number in _each_block(side, list(blocks), value):
                ours = list(dict.fromkeys(place for place in places if place[:2] == (side, block)))
                several = _numbers(number, len(ours))
                if len(several) != len(ours):
                    raise _refused(
                        f"{side}.{block} has {len(several)} numbers", f"{len(ours)}, one for each transformer"
                    )
                found.update(zip(ours, several, strict=True))
        return [found[place] for place in places]


def numbers_of(strength: object) -> list[object]:
    """Everything in a strength that has to be a number."""
    if isinstance(strength, Mapping):
        strength = list(cast("Mapping[str, object]", strength).values())
    if not isinstance(strength, (list, tuple)):
        return [strength]
    parts = cast("Sequence[object]", strength)
    return [number for part in parts for number in numbers_of(part)]


def _each_block(side: str, blocks: list[str], value: Any) -> list[tuple[str, Any]]:
    """The blocks of a side, and the number or numbers of each."""
    if not blocks:
        raise _refused(f"names {side!r}", "some of down, mid and up")
    if not isinstance(value, Mapping):
        return [(block, value) for block in blocks]
    named = list(cast("Mapping[str, Any]", value).items())
    for name, _ in named:
        if name not in blocks:
            raise _refused(f"names {side}.{name}", f"{side} with {', '.join(blocks)}")
    return named


def _numbers(value: Any, count: int) -> list[float]:
    """One number for all, or those that there are."""
    if isinstance(value, (list, tuple)):
        return list(map(float, cast("Sequence[Any]", value)))
    return [float(value)] * count


def _refused(found: str, expected: str) -> UsageError:
    return UsageError(
        f"the strength of an image prompt {found}", expected=expected, fix="Change it, or pass one number."
    )


def _place(attention: str) -> tuple[str, str, int]:
    """The side, the block and the number of the transformer that an attention is in."""
    parts = attention.split(".")
    if parts[0] == "mid_block":
        return "mid", "block_0", int(parts[2])
    return parts[0].partition("_")[0], f"block_{parts[1]}", int(parts[3])


def shrunk_mask(mask: Array, height: int, width: int) -> Array:
    """A mask, (H, W) of 0 and 1, at a level of the UNet: (height, width) float32.

    As `torch.nn.functional.interpolate` of mode "bicubic": the nearest 4 x 4 pixels, Keys' kernel of -0.75.
    """
    rows = _along(mask.astype(np.float64), height)
    return np.transpose(_along(np.transpose(rows), width)).astype(np.float32)


def _along(rows: Array, count: int) -> Array:
    """Resample the first axis."""
    size = len(rows)
    where = (np.arange(count) + 0.5) * size / count - 0.5
    first = np.floor(where).astype(int)
    total = np.zeros((count, rows.shape[1]))
    for offset in (-1, 0, 1, 2):
        weight = _keys(np.abs(where - (first + offset)))
        nearest = np.minimum(np.maximum(first + offset, 0), size - 1)
        total += weight[:, None] * rows[nearest]
    return total


def _keys(distance: Array) -> Array:
    """Keys' cubic kernel, 1981, eq. 15, with the parameter -0.75."""
    a = -0.75
    near = ((a + 2) * distance - (a + 3)) * distance**2 + 1
    far = a * (((distance - 5) * distance + 8) * distance - 4)
    return np.where(distance <= 1, near, far)
