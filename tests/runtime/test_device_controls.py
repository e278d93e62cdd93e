"""Controls on a device loop: the same pictures as on the host, and one graph of the UNet with and without."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import diffusers
import numpy as np
import pytest
import torch

from latentrt import Control
from latentrt.checkpoints.opened import Options, open_control
from latentrt.engines.backends import BACKENDS
from latentrt.engines.errors import BackendError
from latentrt.engines.package import Package
from latentrt.engines.spec import Array
from latentrt.export.architectures import Architecture
from latentrt.export.templates import make_archive
from latentrt.runtime.pipeline import Pipeline
from tests.engines.host_device import HostDevice
from tests.parity_pair import photo
from tests.runtime.device_bench import device_pipeline
from tests.runtime.test_adapters import write

SMALL: dict[str, Any] = {"num_inference_steps": 3, "height": 64, "width": 64, "seed": 3, "output_type": "np"}
CHECKPOINT = Path(__file__).parents[2] / "demo" / "checkpoint"


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a ControlNet for the demo's UNet, its own layers random, and an archive of graphs."""
    folder = tmp_path_factory.mktemp("control")
    unet: Any = diffusers.UNet2DConditionModel.from_pretrained(CHECKPOINT / "unet", torch_dtype=torch.float32)
    torch.manual_seed(0)
    net: Any = diffusers.ControlNetModel.from_unet(unet, conditioning_embedding_out_channels=(8, 8, 8, 8))
    with torch.no_grad():
        for weight in net.parameters():
            if not weight.any():
                weight.normal_(0, 0.2)
    net.save_pretrained(folder / "edges")
    config = {name: value for name, value in net.config.items() if not name.startswith("_")}
    architecture = Architecture(parts={"controlnet": config})
    make_archive(folder / "archive.zip", {"control": architecture}, dtypes=["fp32"])
    return folder


def opened_package(made: Path, path: Path) -> Package:
    options = Options(dtype="fp32", reads=BACKENDS["onnxruntime"].reads, templates=made / "archive.zip")
    return open_control(path, options, store=made / "cache")


def opener(made: Path) -> Any:
    return lambda path, encoder: opened_package(made, path)


def draw(pipe: Pipeline, *controls: Control, **more: Any) -> Array:
    return pipe("a red circle on a blue background", controls=list(controls), **{**SMALL, **more}).images


def edges(**fields: Any) -> Control:
    return Control(model="edges", image=photo(64, 64), **fields)


@pytest.mark.parametrize("graphs", ["off", "on"])
def test_the_device_draws_what_the_host_draws(
    package: Package, made: Path, tmp_path: Path, graphs: Any
) -> None:
    """With a control, with a part of the steps, beside a LoRA; and without, by the same graph."""
    write(tmp_path / "loop.safetensors", "loop")
    requests: list[tuple[list[Control], dict[str, Any]]] = [
        ([edges()], {}),
        ([edges(end=0.5, mode="guess")], {}),
        ([], {}),
        ([edges(strength=0.7)], {"loras": ["loop"]}),
        ([], {"loras": ["loop"]}),
    ]
    with Pipeline.open(package.root, backend="onnxruntime", loras=tmp_path) as host:
        host.controls._open_package = opener(made)
        plain = draw(host)
        host.load_control(made / "edges")
        wanted = [draw(host, *controls, **more) for controls, more in requests]
        assert np.array_equal(wanted[2], plain), "one graph draws with and without"
    assert not np.array_equal(wanted[0], plain)
    with device_pipeline(package, HostDevice(), graphs=graphs, loras=tmp_path, open_control=opener(made)) as (
        pipe,
        loop,
    ):
        draw(pipe)
        first = loop.nets["unet"]
        pipe.load_control(made / "edges")
        assert loop.unet == "unet_controlled"
        assert loop.nets["unet"] is not first
        for _ in range(2):
            for (controls, more), host_picture in zip(requests, wanted, strict=True):
                found = draw(pipe, *controls, **more)
                assert np.abs(found.astype(int) - host_picture).max() <= 1
        pipe.unload_controls()
        assert loop.unet == "unet"
        assert np.abs(draw(pipe).astype(int) - plain).max() <= 1


def test_controls_are_not_loaded_while_a_picture_is_drawn(package: Package, made: Path) -> None:
    with device_pipeline(package, HostDevice(), open_control=opener(made)) as (pipe, loop):
        steps = pipe.stream("a", **{name: value for name, value in SMALL.items() if name != "output_type"})
        next(steps)
        with pytest.raises(BackendError, match="cannot take controls now: a picture is drawn"):
            pipe.load_control(made / "edges")
        steps.close()
        assert pipe.controls.names == ()
        pipe.load_control(made / "edges")
        assert loop.unet == "unet_controlled"


def test_engines_that_are_fixed_take_no_controls(package: Package, made: Path) -> None:
    with device_pipeline(package, HostDevice(), open_control=opener(made)) as (pipe, loop):
        loop._open_net = None
        with pytest.raises(BackendError, match="the engines are fixed, and a control has its own"):
            pipe.load_control(made / "edges")
