"""latentrt's own side on a device, for real on host memory: the host's outputs, timed, nothing left."""

import json
from collections import Counter
from collections.abc import Generator
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path
from time import perf_counter
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from latentrt.benchmarks import process
from latentrt.benchmarks.case import WORKLOADS, Case
from latentrt.benchmarks.sides import ours
from latentrt.benchmarks.sides.contract import OpenSide, Task, Work
from latentrt.benchmarks.sides.ours import BETWEEN
from latentrt.benchmarks.sides.ours_device import device_side
from latentrt.engines.device import Addresses, DeviceNet, Shapes
from latentrt.engines.errors import MemoryLimitError
from latentrt.engines.onnxruntime.nets import CPU, open_onnxruntime_net
from latentrt.engines.package import Package
from latentrt.runtime.loop.device.loop import DeviceLoop
from latentrt.runtime.loop.device.verdicts import Graphs, Verdicts
from latentrt.runtime.model import SHIPPED
from latentrt.runtime.pipeline import Pipeline
from tests.benchmarks.gpu_stand_in import Hungry
from tests.engines.host_device import DEVICE_NETS, HostDevice, HostStopwatch
from tests.runtime.device_bench import device_pipeline

PACKAGE = Package.open(SHIPPED["demo"])
GUIDED = Case.of(PACKAGE.manifest, width=64, height=64, steps=4)
PLAIN = Case.of(PACKAGE.manifest, width=48, height=64, steps=3, guidance_scale=1.0, pictures=2)
NOISY = Case.of(PACKAGE.manifest, width=64, height=64, steps=4, sampler="euler_a", pictures=2)
KIB = 1024


class Spied(Hungry):
    """Claims as much scratch memory for every call, and counts its runs under its name."""

    def __init__(self, name: str, net: DeviceNet, runs: Counter[str], size: int) -> None:
        super().__init__(net, 0)
        self.name, self.runs, self.size = name, runs, size

    def scratch(self, shapes: Shapes) -> int:
        return self.size

    def bind(self, shapes: Shapes, addresses: Addresses, scratch: int) -> Any:
        assert scratch, "bound without the scratch memory it asked for"
        bound = super().bind(shapes, addresses, scratch)

        def enqueue() -> None:
            self.runs[self.name] += 1
            bound.enqueue()

        return SimpleNamespace(enqueue=enqueue, close=bound.close, capturable=True, profile="spied")


@dataclass
class Bench:
    device: HostDevice
    side: OpenSide
    pipe: Pipeline
    loop: DeviceLoop
    runs: Counter[str]


@pytest.fixture(scope="module")
def opened() -> Generator[Bench]:
    device, runs = HostDevice(), Counter[str]()
    nets: dict[str, Any] = {}
    for place, name in enumerate(DEVICE_NETS, start=1):
        net = open_onnxruntime_net(PACKAGE, name, device, provider=CPU, submit=device.submit, threads=1)
        nets[name] = Spied(name, net, runs, place * KIB)
    loop = DeviceLoop(device, nets, PACKAGE.manifest)
    pipe = Pipeline.over(PACKAGE, loop, "stand-in", cache_bytes=0)
    side = device_side(pipe, loop)
    assert side.versions == {"backend": "stand-in", "device": "host memory"}
    yield Bench(device, side, pipe, loop, runs)
    side.prepare("unet", GUIDED)  # and is left open
    side.close()
    side.close()
    assert not device.blocks, "memory that was not given back"
    assert (device.stopwatches, device.graphs) == (set(), set())


@pytest.fixture(scope="module")
def host() -> Generator[OpenSide]:
    with closing(ours.open_side(Task(model=PACKAGE.root, backend="onnxruntime", threads=1))) as opened:
        yield opened


def check_alike(found: Work, wanted: Work) -> None:
    a, b = found.outputs(), wanted.outputs()
    assert set(a) == set(b)
    for name, array in b.items():
        assert a[name].shape == array.shape
        assert a[name].dtype == array.dtype
        if array.dtype == np.uint8:
            assert np.abs(a[name].astype(int) - array).max() <= 1
        else:
            assert np.linalg.norm(a[name] - array) / np.linalg.norm(array) < 1e-4


# ── what is computed, and how long it takes ────────────────────────────────────────────────────────


@pytest.mark.parametrize("case", [GUIDED, PLAIN, NOISY], ids=["guided", "plain", "noisy"])
@pytest.mark.parametrize("workload", WORKLOADS)
def test_the_device_computes_what_the_host_does(
    opened: Bench, host: OpenSide, workload: str, case: Case
) -> None:
    if case == NOISY and workload not in ("update", "picture"):
        return  # no sampler takes part
    found, wanted = opened.side.prepare(workload, case), host.prepare(workload, case)
    began = perf_counter()
    found.run()
    seconds = perf_counter() - began
    wanted.run()
    check_alike(found, wanted)
    assert 0 < found.figures().get("device_s", seconds / 2) < seconds
    assert found.repeats == wanted.repeats
    found.close()


RUNS = {
    "text_encoder": {"text_encoder": 1},
    "invariants": {"unet_context": 1, "unet_time": 1},
    "unet": {"unet": 1},
    "update": {"step": BETWEEN},
    "vae_decoder": {"vae_decoder": 1},
    "picture": {"text_encoder": 1, "unet_context": 1, "unet_time": 1, "unet": 4, "step": 4, "vae_decoder": 1},
}


@pytest.mark.parametrize("workload", WORKLOADS)
def test_a_run_repeats_itself_allocates_nothing_and_waits_as_often_as_it_must(
    opened: Bench, workload: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(HostStopwatch, "seconds", lambda self: 2.0)
    opened.loop.free_idle()  # what an earlier test captured
    monkeypatch.setattr(opened.loop, "_graphs", "off")
    prepared = opened.side.prepare(workload, GUIDED)
    opened.runs.clear()
    prepared.run()
    assert opened.runs == RUNS[workload]
    first = {name: array.copy() for name, array in prepared.outputs().items()}
    device = opened.device
    sizes, allocations, waits = dict(device.sizes), device.allocations, device.synchronisations
    for _ in range(3):
        prepared.run()
        if workload != "picture":
            figures = dict(prepared.figures())
            assert figures.pop("host_s") > 0
            assert figures == {"device_s": 2.0 / prepared.repeats}
    each = 2 if workload == "picture" else 1  # its prompt's context comes back before the rows begin
    assert (device.sizes, device.allocations) == (sizes, allocations)
    assert device.synchronisations == waits + 3 * each
    for name, array in prepared.outputs().items():
        np.testing.assert_array_equal(array, first[name])
    prepared.close()


# ── captured graphs ────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize("workload", [name for name in WORKLOADS if name != "picture"])
def test_a_workload_is_captured_once_and_computes_the_same(opened: Bench, workload: str) -> None:
    replayed = device_side(opened.pipe, opened.loop, replayed=True)
    with closing(opened.side.prepare(workload, GUIDED)) as plain:
        plain.run()
        wanted = {name: array.copy() for name, array in plain.outputs().items()}
    with closing(replayed.prepare(workload, GUIDED)) as work:
        launches = opened.device.launches
        for _ in range(2):
            work.run()
            assert all((array == wanted[name]).all() for name, array in work.outputs().items())
        assert opened.device.launches == launches + 2
    assert not opened.device.graphs


def test_a_picture_has_settled_before_it_is_timed(opened: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    loop, device, steps = opened.loop, opened.device, GUIDED.steps
    # "auto" compares both ways in two launches, and replays what was faster; "on" knows that they are equal
    launches: dict[Graphs, set[int]] = {"auto": {2, 2 + steps}, "on": {steps}, "off": {0}}
    monkeypatch.setattr(loop, "_verdicts", Verdicts())
    for graphs, expected in launches.items():
        loop.free_idle()
        monkeypatch.setattr(loop, "_graphs", graphs)
        device.launches = 0
        picture = opened.side.prepare("picture", GUIDED)
        before = device.launches
        assert before in expected
        picture.run()
        assert graphs == "auto" or device.launches - before == (steps if graphs == "on" else 0)
        assert {"prepare", "enqueue", "wait"} <= set(picture.figures()["stages_s"])
    loop.free_idle()


# ── memory ─────────────────────────────────────────────────────────────────────────────────────────


def test_what_is_prepared_has_its_own_buffers_until_it_is_closed(opened: Bench, host: OpenSide) -> None:
    device = opened.device
    opened.loop.free_idle()
    before = dict(device.sizes)
    small, large = (opened.side.prepare("unet", case) for case in (GUIDED, PLAIN))
    for _ in range(2):  # in turns, as scaling has them
        for prepared, case in ((small, GUIDED), (large, PLAIN)):
            prepared.run()
            wanted = host.prepare("unet", case)
            wanted.run()
            check_alike(prepared, wanted)
    small.close()
    large.run()
    large.close()
    large.close()
    assert device.sizes == before
    with pytest.raises(AssertionError):
        large.run()
    server = process.Server(opened.side, Task(model=Path("demo")))
    sizes: list[list[int]] = []
    for _ in range(3):  # in the same slot
        server.answer({"do": "prepare", "workload": "vae_decoder", "case": GUIDED.to_json(), "slot": "a"})
        sizes.append(sorted(device.sizes.values()))
    assert sizes[0] == sizes[1] == sizes[2]


@pytest.mark.parametrize("workload", WORKLOADS)
def test_what_cannot_be_prepared_leaves_nothing(
    opened: Bench, monkeypatch: pytest.MonkeyPatch, workload: str
) -> None:
    device, loop = opened.device, opened.loop
    loop.free_idle()
    blocks, stopwatches = dict(device.sizes), len(device.stopwatches)
    for room in (500, 3 * KIB, 9 * KIB):  # not even the scratch block; not the buffers
        monkeypatch.setattr(device, "limit", device.used + room)
        with pytest.raises(MemoryLimitError, match="asked"):
            opened.side.prepare(workload, GUIDED)
        loop.free_idle()
        assert device.sizes == blocks
        assert len(device.stopwatches) == stopwatches


def test_memory_is_the_ledger(opened: Bench) -> None:
    picture = opened.side.prepare("picture", GUIDED)
    found = opened.side.memory()
    weights = {name: row["weights"] for name, row in found["ledger"].items()}
    assert weights == {name: opened.loop.nets[name].memory.weights for name in DEVICE_NETS}
    assert found["scratch"] == len(DEVICE_NETS) * KIB, "the largest of the nets'"
    assert json.loads(json.dumps(found)) == found
    picture.close()


# ── opening ────────────────────────────────────────────────────────────────────────────────────────


def test_a_pipeline_on_a_device_gets_this_side(monkeypatch: pytest.MonkeyPatch) -> None:
    with device_pipeline(PACKAGE, HostDevice()) as (pipe, _):
        monkeypatch.setattr(ours, "open_pipeline", lambda task: pipe)
        with closing(ours.open_side(Task(model=PACKAGE.root))) as side:
            assert side.versions["device"] == "host memory"
