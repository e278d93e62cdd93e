"""ControlNets with random weights for any model: a diffusers folder, of an architecture whose graph ships."""

from __future__ import annotations

import json
from math import prod
from pathlib import Path
from typing import Any

import numpy as np

from ...checkpoints.controls.control_file import CONTROLNET
from ...checkpoints.controls.controlnet import DEFAULTS
from ...checkpoints.controls.controlnet_shapes import controlnet_shapes
from ...checkpoints.files.component import DIFFUSERS
from ...engines.errors import UsageError
from ...engines.package import Package
from ...engines.safetensors_format import write_file
from ...engines.spec import RESIDUAL, residuals
from ...export.architectures import ARCHITECTURES

# Those that are made: of published ones the whole nets, which attend where their UNet does.
NAMES = ("sd1-control", "sd2-control", "sdxl-control", "demo-control")
_KIND = "ControlNetModel"
# The deviation of weights, over that of unit outputs: as torch's initialisation, and of the convolutions that
# read the picture Kaiming's, as edges would be lost on their way through eight of them.
_TORCH, _KAIMING = 3**-0.5, 2**0.5
_HINT = "controlnet_cond_embedding."


def write_controlnet(package: Package, folder: Path) -> int:
    """Write one for a model, in fp16, into a folder that is there. The zero convolutions are random, too.

    Returns:
        The bytes of its weights at the width of the package's arithmetic.

    Raises:
        UsageError: none of NAMES fits the model's UNet.
        OSError: it cannot be written.
    """
    config = _config(package)
    shapes, random = controlnet_shapes(config), np.random.default_rng(0)

    def content(name: str) -> bytes:
        shape = shapes[name]
        base = 1.0 if len(shape) == 1 and "norm" in name and name.endswith("weight") else 0.0
        gain = _KAIMING if name.startswith(_HINT) else _TORCH
        spread = gain * prod(shape[1:]) ** -0.5 if len(shape) > 1 else 0.02
        values = base + spread * random.standard_normal(shape, np.float32)
        return values.astype("<f2").tobytes()

    write_file(
        folder / f"{DIFFUSERS}.safetensors", {name: ("F16", shape) for name, shape in shapes.items()}, content
    )
    (folder / "config.json").write_text(json.dumps(config), encoding="utf-8")
    return sum(map(prod, shapes.values())) * (2 if package.manifest.dtype == "fp16" else 4)


def _config(package: Package) -> dict[str, Any]:
    """What the config.json says of the one that fits a model. Raises UsageError."""
    manifest = package.manifest
    net = manifest.nets.get("unet_controlled")
    inputs = net.spec.inputs if net else ()
    taken = {item.name: item.shape[1] for item in inputs if item.name.startswith(RESIDUAL)}
    for name in NAMES:
        config = {**DEFAULTS[_KIND], **ARCHITECTURES[name].parts[CONTROLNET]}
        made = residuals(config["block_out_channels"], config["layers_per_block"])
        given = {f"{RESIDUAL}{number}": channels for number, (channels, _) in enumerate(made)}
        if given == taken and config["cross_attention_dim"] == manifest.context_width:
            return config
    raise UsageError(
        f"there is no ControlNet for the UNet of {manifest.name}",
        expected="a model of SD 1.x, 2.x or XL, or the one that ships, of a package of 2026-11-29 or later",
        fix="Measure another one: latentrt bench controls demo",
    )
