"""T2I-Adapters: their names, their configs and the shapes of their tensors.

Three nets are called so, as in diffusers' `models/adapter.py`: the full one of 1.x, that of XL, which begins
at a sixteenth of the picture, and the light one, whose stages are narrow inside. Their own files
(TencentARC/T2I-Adapter) count a full net's residual blocks through, two a stage. The mapping is that of
diffusers' `scripts/convert_original_t2i_adapter.py`.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from ..files.component import Component, TensorHeader
from ..files.configs import check_config
from ..files.ldm_names import Tensors
from .control_file import T2I_ADAPTER, XL_ADAPTER, ControlFile
from .stored import Stored, layer, once

_FULL, _LIGHT = "full_adapter", "light_adapter"
# Channels of what the first convolution reads -> those of the picture, and the pixels a cell along one side.
_READ = {64: (1, 8), 192: (3, 8), 256: (1, 16), 768: (3, 16)}
_STAGE = 2  # residual blocks of a stage in the original full nets
_NARROWER = 4  # times that a light stage is inside
_WHAT = {_FULL: "a T2I-Adapter", XL_ADAPTER: "a T2I-Adapter", _LIGHT: "a T2I-Adapter (light)"}
# The defaults of T2IAdapter.
DEFAULTS: Mapping[str, Any] = {
    "in_channels": 3,
    "channels": [320, 640, 1280, 1280],
    "num_res_blocks": 2,
    "downscale_factor": 8,
    "adapter_type": _FULL,
}


def read_t2i_adapter(path: Path, tensors: Tensors, config: Mapping[str, Any] | None) -> ControlFile:
    """A T2I-Adapter of these tensors; arguments and errors are those of `controlnet.read_controlnet`."""
    stored = Stored(path=path, what="a T2I-Adapter", tensors=once(path, _renamed(tensors)))
    if config is None:
        found = _derived(stored)
    else:
        check_config(config, path / "config.json", T2I_ADAPTER)
        found = {**DEFAULTS, **config}
    stored.check(t2i_adapter_shapes(found))
    return ControlFile(
        root=path,
        kind=T2I_ADAPTER,
        family="sdxl" if found["adapter_type"] == XL_ADAPTER else "sd1",
        what=_WHAT[found["adapter_type"]],
        part=Component(name=T2I_ADAPTER, folder=path, config=found, tensors=stored.tensors),
    )


def feature_levels(config: Mapping[str, Any]) -> tuple[tuple[int, int], ...]:
    """The channels of each map that it makes, and how often the latent has been halved there."""
    widths: list[int] = list(config["channels"])
    if config["adapter_type"] == _LIGHT:
        widths.append(widths[-1])
    levels = (1, 1, 2, 2) if config["adapter_type"] == XL_ADAPTER else range(len(widths))
    return tuple(zip(widths, levels, strict=False))


def _renamed(stored: Tensors) -> Iterator[tuple[str, TensorHeader]]:
    """The tensors by T2IAdapter's names."""
    inside = any(re.match(r"(adapter\.)?body\.\d+\.(resnets|body)\.", name) for name in stored)

    def new(name: str) -> str:
        if inside:
            return re.sub(r"^(body\.\d{1,3}\.)body\.", r"\1resnets.", name)
        match = re.fullmatch(r"body\.(\d{1,3})\.(block[12]|in_conv)\.(weight|bias)", name)
        if match is None:
            return name
        stage, index = divmod(int(match[1]), _STAGE)
        if match[2] == "in_conv" and index == 0:
            return f"body.{stage}.in_conv.{match[3]}"
        return f"body.{stage}.resnets.{index}.{match[2]}.{match[3]}"

    for name, header in stored.items():
        yield f"adapter.{new(name.removeprefix('adapter.'))}", header


def _derived(stored: Stored) -> dict[str, Any]:
    """The config that names and shapes say.

    Raises:
        CheckpointError: a tensor that says it is missing, or what the first convolution reads is nothing that
            a picture becomes.
    """
    light = "adapter.conv_in.weight" not in stored.tensors
    first = "adapter.body.0.in_conv.weight" if light else "adapter.conv_in.weight"
    read = stored.shape(first, 4)[1]
    if read not in _READ:
        raise stored.refused(
            f"reads {read} channels", f"{', '.join(map(str, _READ))}: pixels of 8x8 or 16x16"
        )
    channels, factor = _READ[read]
    last = "out_conv" if light else "resnets.0.block1"
    stages = range(max(stored.count("adapter.body."), 1 + light))
    widths = [stored.shape(f"adapter.body.{stage}.{last}.weight", 4)[0] for stage in stages]
    return {
        "_class_name": "T2IAdapter",
        "in_channels": channels,
        "channels": widths[:-1] if light else widths,  # diffusers' light net repeats its last
        "num_res_blocks": stored.count("adapter.body.0.resnets."),
        "downscale_factor": factor,
        "adapter_type": _LIGHT if light else _FULL if factor == 8 else XL_ADAPTER,
    }


def t2i_adapter_shapes(config: Mapping[str, Any]) -> dict[str, tuple[int, ...]]:
    """The shapes of all tensors of a T2I-Adapter with this config."""
    widths: list[int] = config["channels"]
    read = int(config["in_channels"]) * int(config["downscale_factor"]) ** 2
    if config["adapter_type"] == _LIGHT:
        return _light_shapes([*widths, widths[-1]], read, int(config["num_res_blocks"]))
    shapes = layer("adapter.conv_in", widths[0], read, 3, 3)
    for stage, width in enumerate(widths):
        place = f"adapter.body.{stage}"
        before = widths[max(stage - 1, 0)]
        changes = before != width and (config["adapter_type"] == _FULL or stage in (1, 2))
        if changes:
            shapes |= layer(f"{place}.in_conv", width, before, 1, 1)
        for index in range(int(config["num_res_blocks"])):
            shapes |= layer(f"{place}.resnets.{index}.block1", width, width, 3, 3)
            shapes |= layer(f"{place}.resnets.{index}.block2", width, width, 1, 1)
    return shapes


def _light_shapes(widths: list[int], read: int, blocks: int) -> dict[str, tuple[int, ...]]:
    shapes: dict[str, tuple[int, ...]] = {}
    for stage, width in enumerate(widths):
        place, inner = f"adapter.body.{stage}", width // _NARROWER
        shapes |= layer(f"{place}.in_conv", inner, widths[stage - 1] if stage else read, 1, 1)
        shapes |= layer(f"{place}.out_conv", width, inner, 1, 1)
        for index in range(blocks):
            for name in ("block1", "block2"):
                shapes |= layer(f"{place}.resnets.{index}.{name}", inner, inner, 3, 3)
    return shapes
