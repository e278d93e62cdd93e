"""Whatever a header says, a control is read or refused with a CheckpointError."""

import json
import random
import struct
from collections.abc import Mapping
from functools import cache
from math import prod
from pathlib import Path
from typing import Any

import pytest

from latentrt.checkpoints.controls.read import read_control
from latentrt.engines.errors import CheckpointError
from tests.checkpoints.controls.control_files import controlnet, t2i_adapter, to_cldm, to_tencent
from tests.checkpoints.controls.test_ip_adapters import ip_layers, joined, projection, unet_of
from tests.checkpoints.controls.test_with_base import control_lora, whole

Shapes = dict[str, tuple[int, ...]]


@cache
def shapes(kind: str) -> Shapes:
    if kind.startswith("ip"):
        tensors = joined(projection(kind.split()[1], 768), ip_layers(unet_of("sd1")))
    elif kind.startswith("t2i"):
        module = t2i_adapter(kind.split()[1])
        tensors = to_tencent(module.state_dict(), module.config)
    elif kind == "control-LoRA":
        module = whole("sd1")
        tensors = to_cldm(control_lora(module.state_dict())[0], module.config)
    else:
        module = controlnet(kind)
        tensors = to_cldm(module.state_dict(), module.config) if kind == "sd1" else module.state_dict()
    found = {name: tuple(tensor.shape) for name, tensor in tensors.items()}
    return found | ({"lora_controlnet": (0,)} if kind == "control-LoRA" else {})


def damaged(found: Shapes, dice: random.Random) -> Shapes:
    """Some tensors less, under other names, or of other shapes."""
    found = dict(found)
    for _ in range(dice.choice((1, 3, 40))):
        name = dice.choice(list(found))
        shape = found[name]
        change = dice.randrange(6)
        if change < 2:
            del found[name]
        elif change == 2:
            found[name.replace(dice.choice("0123456789"), dice.choice(("", "0", "7", "99999", "x")))] = shape
        elif change == 3:
            found[name] = shape[dice.randrange(len(shape) + 1) :]
        elif change == 4:
            found[name] = (*shape, dice.choice((0, 1, 5)))
        else:
            found[name] = tuple(dice.choice((0, 1, extent, 2 * extent, 2**20)) for extent in shape)
        if not found:
            break
    starts = {name[: name.find(".")] for name in found}
    if dice.random() < 0.2 and starts:  # a whole part
        start = dice.choice(sorted(starts))
        found = {name: shape for name, shape in found.items() if not name.startswith(start)}
    return found


def write_headers(path: Path, found: Mapping[str, tuple[int, ...]]) -> bool:
    """A file whose tensors are a hole; False where they would be too many bytes."""
    header: dict[str, Any] = {}
    position = 0
    for name, shape in found.items():
        end = position + 2 * prod(shape)
        header[name] = {"dtype": "F16", "shape": shape, "data_offsets": [position, end]}
        position = end
    text = json.dumps(header).encode()
    if position > 2**40:
        return False
    with path.open("wb") as stream:
        stream.write(struct.pack("<Q", len(text)) + text)
        stream.truncate(8 + len(text) + position)
    return True


KINDS = [
    "sd1",
    "sdxl-mid",
    "promax",
    "control-LoRA",
    "t2i full",
    "t2i light",
    "ip plain",
    "ip full",
    "ip plus",
]


@pytest.mark.parametrize("kind", KINDS)
def test_it_is_read_or_refused(kind: str, tmp_path: Path) -> None:
    dice = random.Random(kind)
    path = tmp_path / "x.safetensors"
    write_headers(path, shapes(kind))
    read_control(path)
    refused = 0
    for _ in range(60):
        if not write_headers(path, damaged(shapes(kind), dice)):
            continue
        try:
            read_control(path)
        except CheckpointError:
            refused += 1
    assert refused > 30
