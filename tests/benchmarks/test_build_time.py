"""What happens once: builds, of two small nets by TensorRT-RTX, and fresh processes, few times."""

import tempfile
import time
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from latentrt.benchmarks.case import Case
from latentrt.benchmarks.records import Document, read_document
from latentrt.benchmarks.sides.contract import Task
from latentrt.benchmarks.verbs import build as build_time
from latentrt.benchmarks.verbs import cold_start
from latentrt.benchmarks.verbs.build import Builds, measure_build
from latentrt.benchmarks.verbs.cold_start import PARTS, measure_cold_start
from latentrt.engines.errors import EngineError, UsageError
from latentrt.engines.onnxruntime.tuning import cuda as tuning
from latentrt.engines.package import Package
from latentrt.engines.profiles import Profile
from latentrt.runtime.pipeline import SHIPPED

NETS = ("unet_context", "unet_time")


@pytest.fixture(scope="module")
def package() -> Package:
    return Package.open(SHIPPED["demo"])


def test_two_nets_by_tensorrt_rtx(package: Package, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    said: list[str] = []
    profile = Profile.parse("64x64:b1", multiple=package.manifest.size_multiple)
    builds = Builds(profiles=(profile,), nets=NETS)
    document = measure_build(package, builds, progress=said.append)
    document.write(tmp_path / "build.json")
    rows = {row.workload: row for row in read_document(tmp_path / "build.json").rows}
    assert list(rows) == [*NETS, "every net"]
    assert not document.failed
    for name in NETS:
        assert rows[name].case == {"backend": "tensorrt-rtx", "profiles": ["64x64:b1"], "weights": "embedded"}
        assert rows[name].figures["engine_mb"] > rows[name].figures["weights_mb"] > 0
        assert rows[name].figures["library"].startswith("tensorrt_rtx ")
        assert 0.05 < rows[name].figures["peak_rss_gb"] < 2
    together = rows["every net"]
    assert together.samples[0] == pytest.approx(sum(rows[name].samples[0] for name in NETS), rel=1e-4)
    assert together.figures["peak_rss_gb"] == max(rows[name].figures["peak_rss_gb"] for name in NETS)
    assert [line.partition(":")[0] for line in said] == list(NETS)
    assert [path.name for path in tmp_path.iterdir()] == ["build.json"], "the store is thrown away"


@dataclass
class Fails:
    """`build_package` that takes note of its calls, and raises from a net's second build on."""

    package: Package
    calls: list[str]

    def __call__(self, package: Package, *arguments: Any, nets: list[str], **more: Any) -> tuple[Any]:
        (net,) = nets
        if self.calls.count(net) == 1 and net == "unet_time":
            raise EngineError("it broke", expected="a builder", fix="Mend it.")
        self.calls.append(net)
        peak = 1e9 * self.calls.count(net)
        told = {"labels": ["a"], "parse_seconds": 0.1, "peak_rss": peak, "layers": 3, "library": "trt"}
        entry = SimpleNamespace(facts=told, build_seconds=2.0, size=4e6)
        return (SimpleNamespace(net=net, entry=entry),)


def test_a_net_that_fails_has_no_time_and_the_others_go_on(
    package: Package, monkeypatch: pytest.MonkeyPatch
) -> None:
    build = Fails(package, [])
    monkeypatch.setattr(build_time, "build_package", build)
    document = measure_build(package, Builds(nets=NETS, repeats=3))
    assert build.calls == ["unet_context", "unet_time", "unet_context", "unet_context"]
    rows = {row.workload: row for row in document.rows}
    assert rows["unet_context"].rounds == ((2.0,), (2.0,), (2.0,))
    assert rows["unet_context"].figures["peak_rss_gb"] == 3.0
    assert (rows["unet_time"].status, rows["unet_time"].rounds) == ("FAILED", ())
    assert rows["unet_time"].reason == "it broke"
    assert rows["every net"].status == "FAILED"
    assert rows["every net"].reason == "unet_time: it broke"


def test_layouts_are_timed_too(package: Package, monkeypatch: pytest.MonkeyPatch) -> None:
    facts = {"layout": "NCHW", "milliseconds": {"NCHW": 1.5}, "relative_l2": {"NCHW": 0.0}, "rejected": {}}
    entry = SimpleNamespace(facts={**facts, "more": 1}, build_seconds=0.5)
    monkeypatch.setattr(tuning, "tune_package", lambda *arguments, nets: (SimpleNamespace(entry=entry),))
    first, *_, last = measure_build(package, Builds(backend="onnxruntime-cuda")).rows
    assert (first.samples, first.figures) == ((0.5,), facts)
    assert last.samples == (1.0,)


def test_what_cannot_be_built(package: Package) -> None:
    document = measure_build(package, Builds(backend="abacus", nets=NETS))
    assert {row.status for row in document.rows} == {"not available"}
    assert "abacus" in document.rows[0].reason
    assert not document.failed
    with pytest.raises(UsageError, match="no net 'nerve'"):
        measure_build(package, Builds(nets=("nerve",)))


def measure(package: Package, said: list[str], **task: str) -> Document:
    case = Case.of(package.manifest, width=64, height=64, steps=2)
    opened = Task(package=package.root, threads=1, **task)  # pyright: ignore[reportArgumentType]
    return measure_cold_start(package, opened, case, repeats=1, progress=said.append)


def test_processes_and_their_parts(package: Package, tmp_path: Path) -> None:
    said: list[str] = []
    document = measure(package, said)
    document.write(tmp_path / "cold.json")
    assert len(read_document(tmp_path / "cold.json").rows) == len(document.rows)
    assert said == ["a first round, not counted", "round 1 of 1"]
    assert not document.failed, [row.reason for row in document.rows]
    rows = {row.workload: row for row in document.rows}
    whole = ["bare interpreter", "import numpy", "import latentrt.runtime", "--help", "whole process"]
    assert list(rows) == [*whole, *PARTS]
    assert all(len(row.rounds) == len(row.samples) == 1 for row in document.rows)
    inside, total = sum(rows[name].samples[0] for name in PARTS), rows["whole process"].samples[0]
    assert total / 2 < inside < total
    assert min(rows["import numpy"].samples) > min(rows["bare interpreter"].samples)
    assert rows["first picture"].case["width"] == 64
    assert rows["first picture"].stamp["side"]["backend"].startswith("onnxruntime ")


def test_a_process_that_fails_or_hangs_says_why_and_is_not_started_again(
    package: Package, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(cold_start, "_BLOCKED", "import time; time.sleep(60)\n")
    monkeypatch.setattr(cold_start, "LIMIT", 1.0)
    began = time.perf_counter()
    rows = {row.workload: row for row in measure(package, []).rows}
    assert time.perf_counter() - began < 15
    assert rows["bare interpreter"].status == "ok"
    for name in ("import latentrt.runtime", "whole process", *PARTS):
        assert (rows[name].status, rows[name].rounds) == ("FAILED", ())
        assert rows[name].reason == "it did not end within 1 s"
    monkeypatch.undo()
    assert "unknown backend 'abacus'" in measure(package, [], backend="abacus").rows[-1].reason
