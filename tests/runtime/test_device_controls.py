"""Controls on a device loop: the same pictures as on the host, and one graph of the UNet with and without."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import diffusers
import numpy as np
import pytest
import torch

from latentrt import Control, ImagePrompt
from latentrt.checkpoints.opened import Options, open_control
from latentrt.engines.backends import BACKENDS
from latentrt.engines.errors import BackendError, MemoryLimitError, UsageError
from latentrt.engines.package import Package
from latentrt.engines.spec import Array
from latentrt.export.architectures import Architecture
from latentrt.runtime.loop.device.loop import _need, _RememberedPlan
from latentrt.runtime.loop.device.memory_fallback import MemoryPlan
from latentrt.runtime.loop.job import Clock
from latentrt.runtime.pipeline import Pipeline
from latentrt.runtime.request.request import make_request
from tests.engines.host_device import HostDevice
from tests.parity_pair import photo
from tests.runtime.device_bench import device_pipeline
from tests.runtime.test_adapters import write
from tests.runtime.test_memory_fallback import Hungry
from tests.traced_graphs import make_archive

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
    adapter: Any = diffusers.T2IAdapter(
        in_channels=3, channels=[64, 96], num_res_blocks=1, downscale_factor=8, adapter_type="full_adapter"
    )
    adapter.save_pretrained(folder / "sketch")
    config = {name: value for name, value in net.config.items() if not name.startswith("_")}
    told = {**adapter.config, "_class_name": "T2IAdapter"}
    architectures = {
        "control": Architecture(parts={"controlnet": config}),
        "sketch": Architecture(parts={"t2i-adapter": told}),
    }
    make_archive(folder / "archive.zip", architectures, dtypes=["fp32"])
    return folder


def opened_package(made: Path, path: Path) -> Package:
    own = {"templates": made / "archive.zip"} if path.parent == made else {}
    options = Options(dtype="fp32", reads=BACKENDS["onnxruntime"].reads, **own)
    return open_control(path, options, store=made / "cache")


def opener(made: Path) -> Any:
    return lambda path, encoder: opened_package(made, path)


def draw(pipe: Pipeline, *controls: Control | ImagePrompt, **more: Any) -> Array:
    return pipe("a red circle on a blue background", controls=list(controls), **{**SMALL, **more}).images


def edges(**fields: Any) -> Control:
    return Control(model="edges", image=photo(64, 64), **fields)


def sketch(**fields: Any) -> Control:
    return Control(model="sketch", image=photo(64, 64), **fields)


def likeness(**fields: Any) -> ImagePrompt:
    return ImagePrompt(model="likeness", image=photo(64, 64), **fields)


@pytest.mark.parametrize("graphs", ["off", "on"])
def test_the_device_draws_what_the_host_draws(
    package: Package, made: Path, tmp_path: Path, graphs: Any
) -> None:
    """With a control, with a part of the steps, beside a LoRA; and without, by the same graph."""
    write(tmp_path / "loop.safetensors", "loop")
    requests: list[tuple[list[Control | ImagePrompt], dict[str, Any]]] = [
        ([edges()], {}),
        ([edges(end=0.5, mode="guess")], {}),
        ([], {}),
        ([edges(strength=0.7)], {"loras": ["loop"]}),
        ([], {"loras": ["loop"]}),
        ([edges()], {"guidance_interval": (0.0, 0.5), "guidance_scale": 5.0}),
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


def test_all_kinds_of_controls_draw_what_the_host_draws(package: Package, made: Path) -> None:
    """Several at once, in parts of the steps, and pictures without between them."""
    half = np.zeros((64, 64), np.uint8)
    half[:, :32] = 255
    requests: list[list[Control | ImagePrompt]] = [
        [sketch()],
        [likeness()],
        [],
        [sketch(strength=0.6, end=0.4), likeness(start=0.4, mask_image=half), edges(start=0.4)],
        [edges(strength=0.5), edges(strength=0.7, end=0.5)],
        [likeness(), likeness(strength=0.3, mask_image=half)],
        [edges()],
    ]
    files = (made / "edges", made / "sketch", CHECKPOINT.parent / "controls" / "likeness")
    with Pipeline.open(package.root, backend="onnxruntime") as host:
        host.controls._open_package = opener(made)
        for file in files:
            host.load_control(file)
        wanted = [draw(host, *controls) for controls in requests]
    assert len({picture.tobytes() for picture in wanted}) == len(wanted)
    with device_pipeline(package, HostDevice(), open_control=opener(made)) as (pipe, _):
        for file in files:
            pipe.load_control(file)
        for _ in range(2):
            for controls, host_picture in zip(requests, wanted, strict=True):
                assert np.abs(draw(pipe, *controls).astype(int) - host_picture).max() <= 1


def test_residuals_stay_on_the_device(package: Package, made: Path) -> None:
    """A picture waits once for each net that runs before its steps, however many steps there are."""
    device = HostDevice()
    with device_pipeline(package, device, open_control=opener(made)) as (pipe, _):
        pipe.load_control(made / "edges")
        for steps in (3, 6):
            draw(pipe, edges(), num_inference_steps=steps)
            before = device.synchronisations
            draw(pipe, edges(), num_inference_steps=steps)
            assert device.synchronisations == before + 4, "context, schedule, hint, and the picture"


@pytest.mark.parametrize("rows", [2, 1])
def test_a_net_runs_in_as_many_calls_as_the_unet(package: Package, made: Path, rows: int) -> None:
    """Where memory is short, each has fewer rows."""
    pictures = [photo(64, 64), photo(64, 64, seed=1)]
    request = make_request(
        package.manifest,
        ["a red circle", "a star"],
        controls=[Control(model="edges", image=pictures, mode="guess", end=0.7)],
        **{name: value for name, value in SMALL.items() if name != "output_type"},
    )
    with device_pipeline(package, HostDevice(), open_control=opener(made)) as (pipe, loop):
        pipe.load_control(made / "edges")
        job = pipe.prepare(request)
        wanted = loop.draw(job, Clock(), decode=False).latent
        loop._plans[_need(job, 8)] = _RememberedPlan(plan=MemoryPlan(rows=rows), requests_left=9)
        found = loop.draw(job, Clock(), decode=False).latent
    assert np.abs(found - wanted).max() < 1e-4 * np.abs(wanted).max()
    assert not np.array_equal(found[0], found[1])


def test_memory_of_controls_is_known(package: Package, made: Path) -> None:
    with device_pipeline(package, HostDevice(), open_control=opener(made)) as (pipe, loop):
        before = loop.describe_memory()
        pipe.load_control(made / "edges")
        assert {"unet", "edges: controlnet"} <= loop.ledger.keys()
        assert loop.ledger["edges: controlnet"].weights > 0
        assert loop.describe_memory() != before
        pipe.unload_controls()
        assert "edges: controlnet" not in loop.ledger


def drawn_within(package: Package, made: Path, limit: int) -> tuple[Array, list[str], int]:
    """Two steered pictures, what was given up for them, and the peak; a ControlNet claims 16 MB a call."""
    device, lines = HostDevice(limit), list[str]()
    wrap = lambda name, net: Hungry(net, 16_000) if name == "controlnet" else net  # noqa: E731
    more = {"wrap": wrap, "log": lines.append, "open_control": opener(made)}
    with device_pipeline(package, device, **more) as (pipe, _):
        pipe.load_control(made / "edges")
        found = draw(pipe, edges(), num_images_per_prompt=2)
    return found, [line.partition(": ")[2].partition(" -> ")[0] for line in lines], device.peak


def test_memory_that_a_net_of_a_control_lacks_is_given_up_elsewhere(package: Package, made: Path) -> None:
    """By the same ladder as for the UNet's, and the picture stays."""
    wanted, none, peak = drawn_within(package, made, 2**40)
    assert none == []
    found, fallbacks, low = drawn_within(package, made, peak - 7_000_000)
    assert fallbacks == ["free idle contexts", "split the batch"]
    assert low < peak
    assert np.abs(found.astype(int) - wanted).max() <= 1
    found, fallbacks, _ = drawn_within(package, made, peak - 11_000_000)
    assert fallbacks == ["free idle contexts", "split the batch", "run the CFG halves apart"]
    assert np.abs(found.astype(int) - wanted).max() <= 1


def test_weights_of_controls_are_in_the_numbers_of_a_refusal(package: Package, made: Path) -> None:
    """And what did not fit is drawn once there is room."""
    device = HostDevice()
    with device_pipeline(package, device, open_control=opener(made)) as (pipe, loop):
        of_model = sum(one.weights for one in loop.ledger.values())
        pipe.load_control(made / "edges")
        whole = sum(one.weights for one in loop.ledger.values())
        assert whole > 1.2 * of_model
        device.limit = 300_000
        with pytest.raises(
            MemoryLimitError, match=rf"1 x 64x64 does not fit.*weights {whole / 2**20:.0f} MiB"
        ):
            draw(pipe, edges())
        device.limit = 2**40
        assert draw(pipe, edges()).std() > 10


def test_a_control_that_is_unloaded_between_steps(package: Package, made: Path) -> None:
    """The graph of the UNet stays, as another control is loaded."""
    with device_pipeline(package, HostDevice(), open_control=opener(made)) as (pipe, _):
        pipe.load_control(made / "edges")
        pipe.load_control(made / "edges", "other")
        steps = pipe.stream("a", controls=[edges()], num_inference_steps=3, height=64, width=64)
        next(steps)
        pipe.unload_controls("edges")
        with pytest.raises(UsageError, match="unloaded before its last step"):
            next(steps)
        draw(pipe, Control(model="other", image=photo(64, 64)))
        request = make_request(package.manifest, "a", controls=[Control(model="other", image=photo(64, 64))])
        job = pipe.prepare(request)
        pipe.load_control(made / "edges")
        pipe.unload_controls("other")
        with pytest.raises(UsageError, match="unloaded before its last step"):
            pipe.loop.draw(job, Clock(), decode=False)
