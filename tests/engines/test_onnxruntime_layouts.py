"""Which layout is the fastest: the decision with clocks of our own, then real runs on the CPU."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from latentrt.engines.errors import BackendError, MemoryLimitError, UsageError
from latentrt.engines.onnxruntime.lowering import files as lowering_files
from latentrt.engines.onnxruntime.tuning import cuda as onnxruntime_tuning
from latentrt.engines.onnxruntime.tuning.cpu_layouts import CPU_LAYOUTS
from latentrt.engines.onnxruntime.tuning.cuda import tune_package
from latentrt.engines.package import Package
from latentrt.engines.store.engine_store import BuildProgress, EngineStore
from latentrt.engines.tolerances import NET_RELATIVE_L2, relative_l2
from latentrt.engines.tuning.choice import (
    MARGIN,
    ROUNDS,
    TUNED_NETS,
    WARM_UP,
    Choice,
    Measured,
    choose_layout,
    measured_profile,
)
from latentrt.runtime.model import SHIPPED
from tests.engines.layout_setting import KnownHost, open_on_cpu

PARITY = NET_RELATIVE_L2["fp16"]
WANTED = np.linspace(-1, 1, 1000, dtype=np.float32)
Clock = Callable[[int], float]


class Bench:
    """Candidates with a clock each (its argument: the how manieth run), and what was done with them."""

    def __init__(
        self, outputs: dict[str, np.ndarray | Exception] | None = None, **clocks: Clock | float
    ) -> None:
        self.clocks, self.outputs = clocks, outputs or {}
        self.runs: list[str] = []
        self.closed: list[str] = []

    def measure(self, name: str) -> Measured:
        output = self.outputs.get(name, WANTED)
        if isinstance(output, Exception):
            raise output
        clock = self.clocks[name]

        def run() -> float:
            self.runs.append(name)
            return clock(self.runs.count(name) - 1) if callable(clock) else clock

        return Measured(outputs={"y": output}, run=run, close=lambda: self.closed.append(name))

    def choose(self, **options: Any) -> Choice:
        return choose_layout(self.measure, CPU_LAYOUTS, parity=PARITY, **options)


def test_the_fastest_wins() -> None:
    bench = Bench(plain=3.0, fused=2.0, winograd=1.0)
    choice = bench.choose()
    assert choice == Choice(
        layout="winograd",
        milliseconds={"plain": 3.0, "fused": 2.0, "winograd": 1.0},
        relative_l2={"fused": 0.0, "winograd": 0.0},
        rejected={},
    )
    assert sorted(bench.closed) == sorted(CPU_LAYOUTS)
    assert Bench(plain=3.0, fused=1.0, winograd=2.0).choose().layout == "fused"
    assert Bench(plain=1.0, fused=3.0, winograd=2.0).choose().layout == "plain"


@pytest.mark.parametrize(
    ("times", "layout"),
    [
        ((1.0, 1.0, 1.0), "plain"),
        ((1.0 + 0.99 * MARGIN, 1.0, 1.0), "plain"),
        ((1.0 + 1.01 * MARGIN, 1.0, 1.0), "fused"),
        ((2.0, 1.0 + 0.99 * MARGIN, 1.0), "fused"),
        ((2.0, 1.0 + 1.01 * MARGIN, 1.0), "winograd"),
    ],
)
def test_within_the_margin_the_simpler_one_wins(times: tuple[float, float, float], layout: str) -> None:
    assert Bench(**dict(zip(CPU_LAYOUTS, times, strict=True))).choose().layout == layout


def test_turns_are_taken_and_turned_round() -> None:
    bench = Bench(plain=1.0, fused=1.0, winograd=1.0)
    bench.choose(rounds=3, warm_up=1)
    forth = ["plain", "fused", "winograd"]
    assert bench.runs == [*forth, *forth[::-1], *forth, *forth[::-1]]
    bench = Bench(plain=1.0, fused=1.0, winograd=1.0)
    bench.choose()
    assert ROUNDS >= 20
    assert {bench.runs.count(name) for name in CPU_LAYOUTS} == {ROUNDS + WARM_UP}


def test_a_drifting_and_noisy_clock_misleads_nobody() -> None:
    """Everything slows down to a third meanwhile; a tenth of the runs is hit by someone else's work."""
    rng = np.random.default_rng(3)

    def noisy(base: float) -> Clock:
        return lambda run: (
            base * (1 + run / 10) * (1 + 0.01 * rng.random()) * (8 if rng.random() < 0.1 else 1)
        )

    for seed in range(50):
        rng = np.random.default_rng(seed)
        bench = Bench(plain=noisy(1.0), fused=noisy(0.8), winograd=noisy(0.6))
        assert bench.choose().layout == "winograd", seed


def test_the_first_runs_do_not_count() -> None:
    slow_start: Clock = lambda run: 1000.0 if run < WARM_UP else 1.0  # noqa: E731
    assert Bench(plain=2.0, fused=2.0, winograd=slow_start).choose().milliseconds["winograd"] == 1.0


@pytest.mark.parametrize("kind", [BackendError, MemoryLimitError])
def test_a_candidate_that_does_not_open(kind: type[Any]) -> None:
    error = kind("no kernel\nfor it", expected="one", fix="none")
    bench = Bench({"winograd": error}, plain=2.0, fused=1.0, winograd=0.1)
    choice = bench.choose()
    assert (choice.layout, choice.rejected) == ("fused", {"winograd": "no kernel for it"})
    assert "winograd" not in choice.milliseconds
    bench = Bench({"winograd": ValueError("odd"), "fused": RuntimeError()}, plain=2.0)
    choice = bench.choose()
    assert (choice.layout, choice.rejected) == ("plain", {"fused": "RuntimeError", "winograd": "odd"})


def test_a_candidate_that_fails_later() -> None:
    def breaks(run: int) -> float:
        if run == 7:
            raise BackendError("it broke", expected="", fix="")
        return 0.1

    bench = Bench(plain=2.0, fused=breaks, winograd=1.0)
    choice = bench.choose()
    assert (choice.layout, choice.rejected) == ("winograd", {"fused": "it broke"})
    assert (bench.runs.count("fused"), bench.runs.count("winograd")) == (8, ROUNDS + WARM_UP)
    assert sorted(bench.closed) == sorted(CPU_LAYOUTS)


def test_a_candidate_that_computes_something_else() -> None:
    near, far = WANTED * np.float32(1 + 0.9 * PARITY), WANTED * np.float32(1 + 1.1 * PARITY)
    choice = Bench({"fused": near, "winograd": far}, plain=2.0, fused=1.0, winograd=0.1).choose()
    assert choice.layout == "fused"
    assert choice.rejected == {"winograd": "its output is 5.5e-03 (relative L2) from plain's, over 5e-03"}
    assert choice.relative_l2 == pytest.approx({"fused": 0.9 * PARITY, "winograd": 1.1 * PARITY}, rel=1e-3)


@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_outputs_that_are_not_finite(value: float) -> None:
    broken = WANTED.copy()
    broken[17] = value
    bench = Bench({"winograd": broken}, plain=2.0, fused=1.0, winograd=0.1)
    choice = bench.choose()
    assert (choice.layout, choice.rejected) == ("fused", {"winograd": "its output is not finite"})
    assert bench.closed[0] == "winograd"
    choice = Bench({"plain": broken}, plain=2.0, fused=1.0, winograd=0.1).choose()
    assert choice.layout == "plain"
    assert set(choice.rejected) == {"fused", "winograd"}
    assert "the output of plain is not finite" in choice.rejected["winograd"]


def test_without_the_reference_there_is_no_choice() -> None:
    with pytest.raises(BackendError, match="broken"):
        Bench({"plain": BackendError("broken", expected="", fix="")}).choose()

    def breaks(run: int) -> float:
        raise MemoryLimitError("full", expected="", fix="")

    bench = Bench(plain=breaks, fused=1.0, winograd=1.0)
    with pytest.raises(MemoryLimitError, match="full"):
        bench.choose()
    assert sorted(bench.closed) == sorted(CPU_LAYOUTS)


def test_relative_l2() -> None:
    assert relative_l2(np.uint8([200, 0]), np.uint8([100, 0])) == 1.0
    assert relative_l2(np.zeros(3), np.zeros(3)) == 0.0
    assert relative_l2(np.float16([60000] * 9), np.float16([60000] * 9)) == 0.0


# ── real runs on host memory ────────────────────────────────────────────────────────────────────────────


@pytest.fixture(scope="module")
def demo() -> Package:
    return Package.open(SHIPPED["demo"])


def test_what_is_measured(demo: Package) -> None:
    unet = {name: shapes[1] for name, shapes in measured_profile(demo, "unet").shapes.items()}
    assert unet["latent"] == (2, 4, 16, 16)
    assert {shape[0] for name, shape in unet.items() if name.startswith("context.")} == {2}
    assert measured_profile(demo, "vae_decoder").shapes["latent"][1] == (1, 4, 16, 16)


@pytest.mark.parametrize("net", TUNED_NETS)
def test_the_cpu_has_no_kernels_for_lowered_graphs(demo: Package, tmp_path: Path, net: str) -> None:
    device, told = KnownHost(), list[BuildProgress]()
    (tuned,) = tune_package(
        demo, EngineStore(tmp_path), told.append, nets=[net], device=device, open_net=open_on_cpu, rounds=2
    )
    facts = tuned.entry.facts
    assert (tuned.net, facts["layout"], set(facts["milliseconds"])) == (net, "plain", {"plain"})
    assert set(facts["rejected"]) == {"nhwc"}
    assert all("onnxruntime" in reason and "refuses" in reason for reason in facts["rejected"].values())
    assert facts["milliseconds"]["plain"] > 0
    assert tuned.entry.read() == demo.path(demo.manifest.nets[net].graph).read_bytes()
    assert not device.blocks, "memory that was not given back"
    assert not device.closed
    phases = list(dict.fromkeys(now.phase for now in told))
    assert phases == ["opening plain", "opening nhwc", "timing plain"]
    assert all(0 <= now.fraction <= 1 and (now.index, now.total) == (0, 1) for now in told)


def test_memory_that_is_short(demo: Package, tmp_path: Path) -> None:
    device = KnownHost(2**17)
    with pytest.raises(MemoryLimitError):
        tune_package(demo, EngineStore(tmp_path), nets=["unet"], device=device, open_net=open_on_cpu)
    assert not device.blocks
    assert not EngineStore(tmp_path).entries()


def test_nets_without_a_choice(demo: Package, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="'step' has no layouts"):
        tune_package(demo, EngineStore(tmp_path), nets=["step"], device=KnownHost())


def test_without_onnx_ir_or_a_gpu(demo: Package, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    refused = BackendError("there is no NVIDIA GPU", expected="one", fix="Buy one.")
    monkeypatch.setattr(onnxruntime_tuning, "cuda_refusal", lambda: refused)
    with pytest.raises(BackendError, match="there is no NVIDIA GPU"):
        tune_package(demo, EngineStore(tmp_path))
    monkeypatch.setattr(lowering_files, "find_spec", lambda name: None)
    with pytest.raises(BackendError, match=r"onnx-ir is not installed.*pip install onnx-ir$"):
        tune_package(demo, EngineStore(tmp_path), device=KnownHost())
