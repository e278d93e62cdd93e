"""T2I-Adapters in every layout, against diffusers' class."""

import inspect
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from diffusers.models.adapter import T2IAdapter

from latentrt.checkpoints.controls.read import read_control
from latentrt.checkpoints.controls.t2i_adapter import DEFAULTS, t2i_adapter_shapes
from latentrt.checkpoints.files.component import read_tensors
from latentrt.engines.errors import CheckpointError
from tests.checkpoints.controls.control_files import T2I_ADAPTERS, t2i_adapter, to_tencent, write


def check(found: Any, module: Any) -> None:
    wanted, read = module.state_dict(), read_tensors(found.part.tensors)
    assert read.keys() == wanted.keys()
    for name, tensor in wanted.items():
        np.testing.assert_array_equal(read[name], tensor.numpy(), err_msg=name)
    config = dict(found.part.config)
    assert {key: config[key] for key in DEFAULTS} == {key: module.config[key] for key in DEFAULTS}


@pytest.mark.parametrize("layout", ["original", "diffusers", "folder"])
@pytest.mark.parametrize("name", T2I_ADAPTERS)
def test_every_layout(name: str, layout: str, tmp_path: Path) -> None:
    module = t2i_adapter(name)
    path = tmp_path / "t2iadapter_x.safetensors"
    if layout == "folder":
        path = tmp_path / "folder"
        module.save_pretrained(path)
    else:
        tensors = module.state_dict()
        write(path, to_tencent(tensors, module.config) if layout == "original" else tensors)
    found = read_control(path)
    check(found, module)
    assert (found.kind, found.family) == ("t2i-adapter", "sdxl" if name.startswith("xl") else "sd1")
    assert found.what == ("a T2I-Adapter (light)" if name == "light" else "a T2I-Adapter")
    channels = 1 if name.endswith("one channel") else 3
    assert f"reads a picture of {channels} channel{'s' * (channels > 1)}" in found.lines()


def test_the_defaults_are_those_of_diffusers() -> None:
    parameters: Any = inspect.signature(T2IAdapter.__init__).parameters
    assert {key: one.default for key, one in parameters.items() if key != "self"} == DEFAULTS


@pytest.mark.parametrize("kind", ["full_adapter", "full_adapter_xl", "light_adapter"])
@pytest.mark.parametrize("channels", [1, 3])
def test_the_shapes_of_published_sizes(kind: str, channels: int) -> None:
    options: dict[str, Any] = {"adapter_type": kind, "in_channels": channels}
    if kind == "full_adapter_xl":
        options["downscale_factor"] = 16
    if kind == "light_adapter":
        options |= {"channels": [320, 640, 1280], "num_res_blocks": 4}
    with torch.device("meta"):
        module: Any = T2IAdapter(**options)
    shapes = t2i_adapter_shapes({**DEFAULTS, **options})
    assert shapes == {name: tuple(tensor.shape) for name, tensor in module.state_dict().items()}


@pytest.mark.parametrize(
    ("changed", "words"),
    [
        ({"conv_in.weight": (32, 96, 3, 3)}, "reads 96 channels; expected 64, 192, 256, 768"),
        ({"body.3.block2.bias": None}, "lacks the tensor 'adapter.body.1.resnets.1.block2.bias'"),
        (
            {"body.2.in_conv.bias": (3,)},
            r"'adapter.body.1.in_conv.bias' of the shape \(3,\); expected \(64,\)",
        ),
        # of the older nets whose stages begin with convolutions
        ({"body.2.down_opt.op.weight": (3,)}, "has the tensor 'adapter.body.2.down_opt.op.weight' that"),
        ({"body.3.in_conv.weight": (3,)}, "has the tensor 'adapter.body.1.resnets.1.in_conv.weight' that"),
        (
            {"adapter.conv_in.bias": (32,)},
            "has 'adapter.conv_in.bias' and 'conv_in.bias', which are one tensor",
        ),
        ({"body.0.block2.weight": (32, 32, 3, 3)}, "'adapter.body.0.resnets.0.block2.weight' of the shape"),
    ],
)
def test_what_is_damaged(changed: dict[str, Any], words: str, tmp_path: Path) -> None:
    module = t2i_adapter("full")
    tensors = to_tencent(module.state_dict(), module.config)
    tensors |= {name: torch.zeros(shape) for name, shape in changed.items() if shape is not None}
    tensors = {name: tensor for name, tensor in tensors.items() if changed.get(name, ()) is not None}
    with pytest.raises(CheckpointError, match=words):
        read_control(write(tmp_path / "x.safetensors", tensors))


@pytest.mark.parametrize(
    ("changed", "words"),
    [
        ({"adapter_type": "other"}, 'adapter_type is "other"; expected full_adapter or'),
        ({"channels": []}, "channels is "),
        ({"channels": [32, 64]}, "has the tensor 'adapter.body.2"),
    ],
)
def test_a_config_that_is_no_adapters(changed: dict[str, Any], words: str, tmp_path: Path) -> None:
    t2i_adapter("full").save_pretrained(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps(config | changed))
    with pytest.raises(CheckpointError, match=words):
        read_control(tmp_path)
