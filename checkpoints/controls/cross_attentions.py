"""The cross-attentions of a UNet in the order in which IP-Adapters number their layers."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any


def cross_attentions(unet: Mapping[str, Any]) -> tuple[str, ...]:
    """The modules' names (`down_blocks.0.attentions.0.transformer_blocks.0.attn2`), by a UNet's config.

    Down blocks come first, then up blocks, and the middle last: the order of `attn_processors` in diffusers'
    UNet2DConditionModel, by which the layers of an IP-Adapter were saved. Many are of equal shape, so that
    another order would exchange them unnoticed.
    """
    down, up = list(unet["down_block_types"]), list(unet["up_block_types"])
    depths = _each(unet.get("transformer_layers_per_block", 1), len(down))
    going_up = unet.get("reverse_transformer_layers_per_block")
    back = depths[::-1] if going_up is None else _each(going_up, len(up))
    layers = int(unet.get("layers_per_block", 2))
    names = [
        *_side("down_blocks", down, depths, layers),
        *_side("up_blocks", up, back, layers + 1),
    ]
    if unet.get("mid_block_type", "UNetMidBlock2DCrossAttn") == "UNetMidBlock2DCrossAttn":
        names += _blocks("mid_block.attentions.0", int(depths[-1]))
    return tuple(names)


def _each(value: Any, count: int) -> list[Any]:
    """One value for each level."""
    return [value] * count if isinstance(value, int) else list(value)


def _side(side: str, types: list[str], depths: list[Any], layers: int) -> Iterator[str]:
    for level, kind in enumerate(types):
        if kind.startswith("CrossAttn"):
            for index, depth in enumerate(_each(depths[level], layers)):
                yield from _blocks(f"{side}.{level}.attentions.{index}", int(depth))


def _blocks(place: str, depth: int) -> list[str]:
    return [f"{place}.transformer_blocks.{index}.attn2" for index in range(depth)]
