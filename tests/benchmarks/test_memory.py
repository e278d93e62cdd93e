"""Memory from outside against processes that hold a known amount, and planted growth that must be found."""

import json
import sys
import time
from collections.abc import Callable, Generator, Iterator
from dataclasses import replace
from pathlib import Path
from threading import Event
from typing import Any

import numpy as np
import pytest

from latentrt.benchmarks.machine import resident_bytes
from latentrt.benchmarks.process import Child, SideError
from latentrt.benchmarks.records import Document, Row
from latentrt.benchmarks.sides import watched
from latentrt.benchmarks.sides.contract import OURS
from latentrt.benchmarks.verbs import memory, memory_watch
from latentrt.benchmarks.verbs.latency import Sides
from latentrt.benchmarks.verbs.memory import Bench, judge_growth, measure_memory, measure_side, timeline
from latentrt.benchmarks.verbs.memory_watch import Look, holding, look, on_a_grid, sampled
from latentrt.engines.cuda.facts import Nvml
from latentrt.engines.errors import BackendError
from latentrt.runtime.pipeline import Pipeline
from tests.benchmarks.stand_in_side import CASE, PACKAGE, TASK, StandInSide, row_of
from tests.engines.host_device import HostDevice
from tests.engines.simulated_nvml import Numbers, SimulatedNvml
from tests.runtime.device_bench import device_pipeline

MIB = 2**20
IDENTITY = "00010203-0405-0607-0809-0a0b0c0d0e0f"
on_linux = pytest.mark.skipif(not Path("/proc").exists(), reason="needs /proc")


def bench(**changes: Any) -> Bench:
    return Bench(PACKAGE, TASK, CASE, watch=lambda: None, interpreter=1, context=0)._replace(**changes)


# ── resident memory ────────────────────────────────────────────────────────────────────────────

HOLDING = """
block = bytearray(b"x") * (64 << 20)  # written, so that it is resident
print("{}", flush=True); input()
del block
print("{}", flush=True); input()
"""


@on_linux
def test_resident_memory_of_another_process() -> None:
    own = np.ones(200 * MIB, np.uint8)  # ru_maxrss of a child would begin with this
    with Child("-c", HOLDING) as child:
        child.answer()
        full = resident_bytes(child.pid)
        child.ask()
        freed = resident_bytes(child.pid)
    assert own[-1]
    assert full[0] - freed[0] == pytest.approx(64 * MIB, rel=0.02)
    assert 0.99 * full[0] < freed[1] < 120 * MIB, "outlives what was held, and is not the parent's"
    assert resident_bytes(child.pid) == (0, 0), "it ended"


def test_a_grid_keeps_peaks_and_fills_gaps() -> None:
    series = [(9.0, 5), (10.01, 7), (10.05, 99), (10.09, 3), (10.31, 8), (10.62, 1)]
    # intervals of 0.1 s: the most in the first, nothing new in two, then 8, then nothing new
    assert on_a_grid(series, 10.0, 10.5, 0.1) == [99, 3, 3, 8, 8]
    assert on_a_grid(series[:1], 10.0, 10.2, 0.1) == [5, 5], "from before it began"
    assert on_a_grid([(10.15, 7)], 10.0, 10.2, 0.1) == [7, 7], "nothing was seen before"


def test_what_fails_while_memory_is_watched_is_raised() -> None:
    answers, failed = iter([1]), Event()

    def read() -> int:
        if (answer := next(answers, None)) is None:
            failed.set()
            raise BackendError("the device is lost", expected="an answer", fix="None.")
        return answer

    with pytest.raises(BackendError, match="the device is lost"), sampled(read, 0.001):
        assert failed.wait(30)


# ── a GPU, simulated ───────────────────────────────────────────────────────────────────────────


def test_what_a_process_holds() -> None:
    before = Look(processes={1: 50}, used=400)
    seen = (({1: 50}, 410), ({1: 50, 7: 30}, 480), ({7: 90}, 520), ({7: 60}, 500))
    later = [Look(processes=processes, used=used) for processes, used in seen]
    assert holding(7, before, later) == ([30, 90, 60], "process")
    # NVML numbers it otherwise, as in a container
    assert holding(8, before, later) == ([10, 80, 120, 100], "device")
    assert not holding(8, Look(processes={}, used=None), later)[0]
    assert not holding(8, Look(processes={}, used=600), later)[0], "it holds nothing that can be seen"


def test_watch_asks_nvml() -> None:
    listed = [Numbers(pid=7, usedGpuMemory=30)]
    assert look(Nvml(IDENTITY, SimulatedNvml(processes=listed))) == Look(processes={7: 30}, used=400)
    silent = SimulatedNvml(unknown=("nvmlDeviceGetMemoryInfo", "nvmlDeviceGetComputeRunningProcesses"))
    assert look(Nvml(IDENTITY, silent)) is None


class Growing:
    """A device whose use goes up with every look: 100, 110, …"""

    def __init__(self) -> None:
        self.looks = 0

    def __call__(self) -> Look:
        self.looks += 1
        return Look(processes={}, used=90 * MIB + 10 * MIB * self.looks)


def imagined(monkeypatch: pytest.MonkeyPatch, name: str, **ledger: Any) -> Any:
    """A side that draws one picture in 50 ms, and has this ledger."""
    side: Any = StandInSide(name, lambda workload, case: 0.0, {"image": np.zeros((1, 8, 8, 3), np.uint8)})
    side.ask = lambda do: {"own": ledger}
    side.time = lambda runs: time.sleep(0.05)
    side.pid = 7
    monkeypatch.setattr(memory, "SideProcess", lambda name, module, task: side)
    return side


def test_rows_of_a_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    nets = {"unet": {"weights": 3, "activations": None, "io": 4, "total": 7}}
    imagined(monkeypatch, OURS, ledger=nets, scratch=5)
    device = Growing()
    rows, outputs = measure_side(bench(watch=device, interpreter=0, context=5 * MIB), OURS, {})
    found = {row.workload: row for row in rows}
    assert outputs["image"].shape == (1, 8, 8, 3)
    assert found["peak"].status == "not available"
    peak = found["device peak"]
    number = (peak.samples[0] + 5 * MIB) / (10 * MIB)
    assert number.is_integer()
    # the last but that of closing; on a busy machine the sampler may look once more before it is told to end
    assert device.looks - 5 < number < device.looks
    assert peak.figures["measured_by"] == "device"
    assert found["device opened"].samples[0] < peak.samples[0]
    assert found["ledger"].samples == (12.0,), "a total is not counted besides its parts"
    assert found["ledger"].figures["nets"]["unet"]["io"] == 4


@on_linux
def test_an_empty_interpreter_and_context(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(memory_watch, "_CONTEXT", "print(flush=True); input()")
    monkeypatch.setattr(memory_watch, "device_watch", Growing)
    _, interpreter, context = memory_watch.measure_baselines(0.01)
    assert 2 * MIB < interpreter < 40 * MIB
    assert context
    assert context % (10 * MIB) == 0


# ── sides ──────────────────────────────────────────────────────────────────────────────────────


def test_a_peer_that_draws_something_else(monkeypatch: pytest.MonkeyPatch) -> None:
    side = imagined(monkeypatch, "openvino")
    ((row,), _) = measure_side(bench(), "openvino", {"image": np.full((1, 8, 8, 3), 200, np.uint8)})
    assert (row.status, row.samples) == ("FAILED", ())
    assert "is not ours" in row.reason
    rows, _ = measure_side(bench(), "openvino", side.outputs)
    assert (rows[-1].workload, rows[-1].status) == ("ledger", "not available")


def test_sides_and_pipelines_that_cannot_be_opened() -> None:
    ((row,), _) = measure_side(bench(), "diffusers", {})
    assert row.status == "not available"
    missing = bench(task=replace(TASK, model=TASK.model / "none"))
    with pytest.raises(SideError, match="does not exist"):
        measure_side(missing, OURS, {})
    with pytest.raises(SideError, match="none"):
        timeline(missing)
    assert timeline(bench(interpreter=0)).status == "not available"


# ── steps ──────────────────────────────────────────────────────────────────────────────────────


@pytest.fixture(scope="module")
def pipe() -> Generator[Pipeline]:
    with Pipeline.open(PACKAGE.root, backend="onnxruntime", threads=1) as opened:
        watched.watch_steps(opened, replace(CASE, steps=24))  # fills lists of free objects
        yield opened


def keeping(pipe: Pipeline, monkeypatch: pytest.MonkeyPatch, make: Callable[[int], Any]) -> list[Any]:
    """Every step keeps what `make` returns for its number, unless that is None."""
    kept: list[Any] = []
    loop = pipe.loop
    steps = loop.steps

    def keeps(*arguments: Any) -> Iterator[Any]:
        for state in steps(*arguments):
            if (item := make(state.index)) is not None:
                kept.append(item)
            yield state

    monkeypatch.setattr(loop, "steps", keeps)
    return kept


def growth_row(pipe: Pipeline, steps: int) -> Row:
    return judge_growth(watched.watch_steps(pipe, replace(CASE, steps=steps)))


def test_one_small_array_kept_per_step_is_found(pipe: Pipeline, monkeypatch: pytest.MonkeyPatch) -> None:
    kept = keeping(pipe, monkeypatch, lambda index: np.full(4, index, np.float32))
    row = growth_row(pipe, 24)
    assert row.status == "FAILED"
    assert "bytes per step" in row.reason
    (size,) = {sys.getsizeof(array) for array in kept}  # the object and its 16 bytes
    # What else this process fills meanwhile comes on top: `bench memory` watches in a process of its own.
    assert size / 2 < row.figures["growth_per_step"] < 3 * size
    assert row.figures["requests"] == watched.REQUESTS


def test_a_cache_that_fills_up_to_a_bound(pipe: Pipeline, monkeypatch: pytest.MonkeyPatch) -> None:
    kept = keeping(pipe, monkeypatch, lambda index: bytearray(400) if len(kept) < 48 else None)
    row = growth_row(pipe, 24)
    assert (row.status, row.reason) == ("ok", "")
    assert 1 < row.figures["requests"] <= watched.REQUESTS, "it grew in one of them, but not in the next"


def test_growth_per_step() -> None:
    def grown(values: Any) -> float:
        return watched.growth_per_step(np.asarray(values).tolist())

    steps, settled = np.arange(100), watched.SETTLED
    assert grown(7000 + 80 * (steps % 2)) == 0, "it comes and goes with every other step"
    assert grown(7000 + 300 * steps + 80 * (steps % 2)) == pytest.approx(300, rel=0.02)
    for at in range(settled, 100):
        assert grown(7000 + 6210 * (steps >= at)) == 0, f"once, in step {at}"
    seldom = (100 - settled) // watched.BLOCKS
    assert grown(7000 + 16 * (steps // seldom)) > watched.STEADY, "one object in every block"
    assert grown([7000]) == grown([0] * settled) == 0, "too few steps to tell"


class Careless(HostDevice):
    """Takes memory whenever it is waited for, once it is `careless`."""

    careless = False

    def synchronize(self) -> None:
        super().synchronize()
        if self.careless:
            self.free(self.allocate(64))


def test_the_device_loop_allocates_nothing_between_rows() -> None:
    device = Careless()
    with device_pipeline(PACKAGE, device) as (pipe, _):
        for device.careless, reason in (False, ""), (True, "7 allocations on the device between rows"):
            between = watched.device_allocations(pipe, replace(CASE, steps=8))
            row = judge_growth({"traced": [5], "requests": 1, "device_allocations": between})
            assert (row.status, row.reason) == ("FAILED" if reason else "ok", reason)


# ── all of it ──────────────────────────────────────────────────────────────────────────────────


@pytest.fixture(scope="module")
def document() -> Document:
    return measure_memory(PACKAGE, Sides(task=TASK, references=()), CASE, steps=16)


@on_linux
def test_the_demo_model(document: Document) -> None:
    opened, first, peak = (row_of(document, name).samples[0] for name in ("opened", "first picture", "peak"))
    assert 20 * MIB < opened < first <= peak < 400 * MIB
    ledger = row_of(document, "ledger")
    weights = ledger.figures["weights"]
    assert ledger.samples[0] >= weights > 5e6
    assert row_of(document, "peak").figures["over_weights"] == pytest.approx(peak / weights)
    growth = row_of(document, "growth per step")
    assert (growth.status, growth.reason) == ("ok", "")
    assert growth.figures["growth_per_step"] <= watched.STEADY
    assert json.loads(json.dumps(document.to_json()))["rows"][0]["stamp"]["cpu"]


@on_linux
def test_timeline_of_a_request(document: Document) -> None:
    row = row_of(document, "timeline")
    marks = row.figures["marks"]
    stages = [mark["stage"] for mark in marks]
    assert stages == ["text_encoder", "invariants", "unet", "unet", "vae_decoder"]
    moments = [0.0, *(mark["at_s"] for mark in marks), row.figures["seconds"]]
    assert moments == sorted(moments)
    assert len(row.samples) == int(np.ceil(row.figures["seconds"] / row.figures["interval_s"]))
    opened = row_of(document, "opened").samples[0]
    assert row.samples[-1] > row.samples[0] > 0.7 * opened
