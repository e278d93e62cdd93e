"""The tiles that a large picture is drawn in: what follows from the parameters that were given."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from ...engines.errors import UsageError
from ...engines.package import Manifest
from ..pictures.tiling import OVERLAP

# The share of the schedule that runs on an enlarged picture: with more, a tile draws the whole prompt anew.
UPSCALED_STRENGTH = 0.35


def tiled(manifest: Manifest, values: Mapping[str, Any]) -> dict[str, Any]:
    """The checked parameters, with those that tiles give a value where none was passed.

    A picture that is enlarged is drawn in tiles of the model's own size; a quarter of a tile is shared; what
    is drawn in tiles is encoded and decoded in tiles as large, so that every net is called with one shape.

    Raises:
        UsageError: an overlap without tiles, or one larger than half a tile.
    """
    side, overlap, defaults = values["draw_tile"], values["draw_overlap"], manifest.defaults
    if side is None and values["upscale"] is not None:
        side = min(defaults.height, defaults.width)
    if side is None:
        if overlap is not None:
            raise UsageError(
                "draw_overlap without tiles",
                expected="draw_tile, or upscale",
                fix="Pass draw_tile=… (--draw-tile), or leave draw_overlap out.",
            )
        return {**values}
    step = manifest.size_multiple
    if overlap is None:
        overlap = int(side * OVERLAP) // step * step
    if overlap * 2 > side:
        raise UsageError(
            f"draw_overlap is {overlap} of tiles of {side} pixels",
            expected="at most half of a tile",
            fix=f"Use {side // 2 // step * step}, or larger tiles.",
        )
    more = {"draw_tile": side, "draw_overlap": overlap}
    more["tile"] = side if values["tile"] is None else values["tile"]
    if values["upscale"] is not None and values["strength"] is None:
        more["strength"] = UPSCALED_STRENGTH
    return {**values, **more}
