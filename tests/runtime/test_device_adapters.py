"""Sets of adapters on a device loop: what they share with the base, what they free for each other."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from latentrt.engines.device import DeviceNet
from latentrt.engines.errors import BackendError, MemoryLimitError
from latentrt.engines.package import Package
from latentrt.engines.spec import Array
from latentrt.runtime.loop.device.loop import DeviceLoop
from latentrt.runtime.pipeline import Pipeline
from tests.engines.host_device import HostDevice
from tests.runtime.device_bench import device_pipeline
from tests.runtime.test_adapters import write

PROMPT = "a red circle on a blue background"
SMALL: dict[str, Any] = {"num_inference_steps": 3, "height": 64, "width": 64, "seed": 3, "output_type": "np"}
SETS: list[list[Any]] = [["loop"], ["keys"], [], ["time", ("text", 0.5)], [("loop", -0.5), "keys"]]


@pytest.fixture(scope="module")
def loras(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("loras")
    for where in ("loop", "keys", "time", "text"):
        write(folder / f"{where}.safetensors", where)
    return folder


@pytest.fixture(scope="module")
def wanted(package: Package, loras: Path) -> list[Array]:
    with Pipeline.open(package.root, backend="onnxruntime", loras=loras) as host:
        return [draw(host, *chosen) for chosen in SETS]


def draw(pipe: Pipeline, *loras: Any, **more: Any) -> Array:
    return pipe(PROMPT, loras=list(loras), **{**SMALL, **more}).images


def adapted_loop(pipe: Pipeline, *loras: Any) -> DeviceLoop:
    """The loop of a set, which is open."""
    with pipe._adapted.use(pipe.adapters.chosen([(name, 1.0) for name in loras])) as adapted:
        assert isinstance(adapted.loop, DeviceLoop)
        return adapted.loop


@pytest.mark.parametrize("graphs", ["off", "on"])
def test_the_device_draws_what_the_host_draws(
    package: Package, loras: Path, wanted: list[Array], graphs: Any
) -> None:
    """Also in turns, and with their rows replayed; and each set's picture stays the same to the byte."""
    device, first = HostDevice(), list[Array]()
    with device_pipeline(package, device, graphs=graphs, loras=loras) as (pipe, _):
        for _ in range(3):
            found = [draw(pipe, *chosen) for chosen in SETS]
            for images, host in zip(found, wanted, strict=True):
                assert np.abs(images.astype(int) - host).max() <= 1
            first = first or found
        if graphs == "off":  # replayed rows may sum in another order
            for images, once in zip(found, first, strict=True):
                np.testing.assert_array_equal(images, once)
    assert bool(device.launches) == (graphs == "on")
    assert not device.graphs


def test_graphs_of_a_set_outlive_other_sets_unless_they_run_its_unet(package: Package, loras: Path) -> None:
    with device_pipeline(package, HostDevice(), graphs="on", loras=loras) as (pipe, base):
        for _ in range(2):
            draw(pipe, "loop")
        own = adapted_loop(pipe, "loop")
        assert own.nets["unet"] is not base.nets["unet"]
        for _ in range(2):
            draw(pipe)
        assert (own.replays, base.replays) == (True, True), "each has a net of its own"
        shared = adapted_loop(pipe, "time")
        assert shared.nets["unet"] is base.nets["unet"]
        draw(pipe, "time")
        assert (own.replays, base.replays) == (True, False), "the base's net has run for another program"
        draw(pipe, "time")
        assert shared.replays


def test_verdicts_on_the_base_say_nothing_of_other_weights(package: Package, loras: Path) -> None:
    """What runs with other weights may be another engine, with kernels of its own."""
    with device_pipeline(package, HostDevice(), graphs="on", loras=loras) as (pipe, base):
        for chosen in ([], ["loop"], ["time"]):
            for _ in range(2):
                draw(pipe, *chosen)
        shapes = list(base._verdicts._known)
        assert sorted(shape.endswith(", adapted") for shape in shapes) == [False, True]


# ── memory ───────────────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize(("idle", "drawn"), [([], ["loop"]), (["loop"], []), (["loop"], ["keys"])])
def test_what_is_idle_in_one_loop_makes_room_for_another(
    package: Package, loras: Path, idle: list[str], drawn: list[str]
) -> None:
    device, lines = HostDevice(), list[str]()
    large = {"height": 128, "width": 128}
    with device_pipeline(package, device, loras=loras, log=lines.append) as (pipe, base):
        wanted = draw(pipe, *drawn, **large)
        base.free_idle()
        draw(pipe, *idle, **large)
        device.limit = device.used + 1000
        np.testing.assert_array_equal(draw(pipe, *drawn, **large), wanted)
        assert lines
        assert all("free idle contexts" in line for line in lines), "nothing else was given up"


def test_a_net_that_is_in_use_elsewhere_is_not_released(package: Package, loras: Path) -> None:
    released = list[str]()

    def counted(name: str, net: DeviceNet) -> DeviceNet:
        net.release = lambda: released.append(name)  # type: ignore[method-assign]
        return net

    with device_pipeline(package, HostDevice(), loras=loras, wrap=counted) as (pipe, base):
        stream = pipe.stream(PROMPT, loras=["loop"], **{k: v for k, v in SMALL.items() if k != "output_type"})
        next(stream)
        draw(pipe)
        base.free_idle()
        assert (released, base.stream_weights()) == ([], 0), "the stream's rows may be a graph on shared nets"
        pipe.unload_lora_weights()
        list(stream)
        assert not released, "closing a set leaves shared nets alone"
        base.free_idle()
        assert sorted(released) == sorted(base.nets)


def failing_once(found: list[str]) -> Callable[[Package, str], DeviceNet]:
    def open_net(package: Package, name: str) -> DeviceNet:
        found.append(name)
        raise MemoryLimitError("full", expected="room", fix="", culprit=name)

    return open_net


def test_opening_a_sets_nets_frees_what_is_idle(package: Package, loras: Path) -> None:
    lines = list[str]()
    with device_pipeline(package, HostDevice(), loras=loras, log=lines.append) as (pipe, base):
        wanted, opened, calls = draw(pipe, "loop"), base._open_net, list[str]()
        assert opened is not None
        pipe.unload_lora_weights()
        draw(pipe)

        def once(package: Package, name: str) -> DeviceNet:
            return (opened if calls else failing_once(calls))(package, name)

        base._open_net = once
        np.testing.assert_array_equal(draw(pipe, "loop"), wanted)
        assert lines == ["out of memory (full): free idle contexts"]
        pipe.unload_lora_weights()
        base._open_net = failing_once(calls)
        with pytest.raises(MemoryLimitError, match="full"):
            draw(pipe, "loop")
        assert base._turns.loops == [base], "what could not be opened is gone"


# ── closing ──────────────────────────────────────────────────────────────────────────────────────────────


def test_closing_in_any_order(package: Package, loras: Path) -> None:
    for sets_first in (True, False):
        device = HostDevice()
        with device_pipeline(package, device, graphs="on", loras=loras) as (pipe, base):
            for chosen in SETS * 2:
                draw(pipe, *chosen)
            loops = base._turns.loops[1:]
            assert len(loops) == len(SETS) - 1
            for loop in [*loops, base] if sets_first else [base, *loops]:
                loop.close()
            assert (device.blocks, device.graphs, base._turns.loops) == ({}, set(), [])


def test_a_preview_outlives_its_set(package: Package, loras: Path) -> None:
    device = HostDevice()
    with device_pipeline(package, device, loras=loras) as (pipe, base):
        *_, last = pipe.stream(
            PROMPT, loras=["loop"], **{k: v for k, v in SMALL.items() if k != "output_type"}
        )
        pipe.unload_lora_weights()
        assert base._turns.loops == [base]
        np.testing.assert_array_equal(np.asarray(last.preview()[0]), draw(pipe, "loop")[0])


def test_a_loop_that_opens_nothing_else_has_no_sets(package: Package, loras: Path) -> None:
    with device_pipeline(package, HostDevice(), loras=loras) as (pipe, base):
        base._open_net = None
        with pytest.raises(BackendError, match="the engines' weights are fixed"):
            draw(pipe, "loop")
