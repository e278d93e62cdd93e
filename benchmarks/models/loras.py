"""LoRA files with random weights for any model: with the names, the targets and the types of sd-scripts."""

from __future__ import annotations

import re
from collections.abc import Mapping
from math import prod
from pathlib import Path

import numpy as np

from ...adapters.keys import flat
from ...adapters.names import FIRST, SECOND, UNET
from ...engines.net_weights import part_shapes
from ...engines.package import Package
from ...engines.safetensors_format import write_file
from ...engines.spec import Array

RANK = 16
# sd-scripts' default targets (networks/lora.py): every matrix of the UNet's transformers, of the text
# encoders' attention and of their feed-forward layers.
_TRANSFORMERS, _LAYERS = r"\.attentions\.", r"\.(self_attn|mlp)\."
# A file -> the weights that it changes, by component. "keys" is keys and values of the prompt alone, which no
# step computes again.
TARGETS: Mapping[str, Mapping[str, str]] = {
    "all": {UNET: _TRANSFORMERS, FIRST: _LAYERS, SECOND: _LAYERS},
    "keys": {UNET: r"\.attn2\.to_[kv]\."},
    "text": {FIRST: _LAYERS, SECOND: _LAYERS},
}
# Of `lora_up`, so that a change is about half as large as torch's initial weights: pictures of one step
# differ by more than sides may (keys alone: 35 dB on the demo model), and stay finite.
_CHANGE = 0.1


def write_lora(package: Package, name: str, path: Path, *, rank: int = RANK) -> None:
    """Write a file that changes the weights of `TARGETS[name]`, in fp16, its alphas equal to its rank.

    Raises:
        PackageError: a graph of the package cannot be read.
        OSError: the file cannot be written.
    """
    random, tensors = np.random.default_rng(0), dict[str, Array]()
    for component, pattern in TARGETS[name].items():
        for weight, shape in part_shapes(package, component).items():
            if weight.endswith(".weight") and len(shape) > 1 and re.search(pattern, weight):
                module = _prefix(package, component) + flat(weight.removesuffix(".weight"))
                down, up = (rank, *shape[1:]), (shape[0], rank, *(1 for _ in shape[2:]))
                fan_in = prod(shape[1:])
                tensors[f"{module}.lora_down.weight"] = random.normal(0, fan_in**-0.5, down)
                tensors[f"{module}.lora_up.weight"] = random.normal(0, _CHANGE, up)
                tensors[f"{module}.alpha"] = np.array(rank)
    write_file(
        path,
        {key: ("F16", array.shape) for key, array in tensors.items()},
        lambda key: tensors[key].astype("<f2").tobytes(),
    )


def _prefix(package: Package, component: str) -> str:
    """sd-scripts': text encoders have numbers where there are two."""
    if component == UNET:
        return "lora_unet_"
    several = {FIRST, SECOND} <= package.manifest.nets.keys()
    number = {FIRST: "1", SECOND: "2"}[component] if several else ""
    return f"lora_te{number}_"
