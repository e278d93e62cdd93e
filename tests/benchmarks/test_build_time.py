"""What happens once: builds, of two small nets by TensorRT-RTX, and fresh processes, few times."""

import tempfile
import time
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from latentrt.benchmarks.case import Case
from latentrt.benchmarks.records import Document, Row, read_document
from latentrt.benchmarks.report.reading import Result
from latentrt.benchmarks.report.tables import full_tables, short_table
from latentrt.benchmarks.sides.contract import OURS
from latentrt.benchmarks.verbs import build as build_time
from latentrt.benchmarks.verbs import cold_start
from latentrt.benchmarks.verbs.build import TOGETHER, Builds, measure_build
from latentrt.benchmarks.verbs.cold_start import PARTS, measure_cold_start
from latentrt.engines.errors import EngineError, UsageError
from latentrt.engines.net_weights import engine_bytes
from latentrt.engines.onnxruntime.tuning import cuda as tuning
from latentrt.engines.profiles import Profile
from tests.benchmarks.stand_in_side import PACKAGE, TASK

NETS = ("unet_context", "unet_time")


def test_one_net_alone_is_no_row_of_the_short_table() -> None:
    stamp = {"cpu": "x", "cores": 2}
    figures = {"peak_rss_gb": 1.0, "engine_mb": 5.0}
    row = Row(side=OURS, workload="unet", rounds=((2.0,),), figures=figures, stamp=stamp)
    together = replace(row, workload=TOGETHER)

    def tables(*nets: Row) -> tuple[str, str]:
        document = Document(benchmark="build", model={"name": "m"}, settings={}, rows=(*nets, together))
        results = [Result(name="build-m", digest="", document=document)]
        return full_tables(results, {}), short_table(results)

    whole, short = tables(row)
    assert "| engine of unet alone | 1 of 1 nets in 2.00 s, peak 1.00 GB, engines 5.00 MB |" in whole
    assert "engine" not in short
    whole, short = tables(row, replace(row, workload="vae_decoder"))
    assert all("build of the engines | 2 of 2 nets in 2.00 s" in table for table in (whole, short))


def test_two_nets_by_tensorrt_rtx(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    said: list[str] = []
    profile = Profile.parse("64x64:b1", multiple=PACKAGE.manifest.size_multiple)
    builds = Builds(profiles=(profile,), nets=NETS)
    document = measure_build(PACKAGE, builds, progress=said.append)
    document.write(tmp_path / "build.json")
    rows = {row.workload: row for row in read_document(tmp_path / "build.json").rows}
    assert list(rows) == [*NETS, "every net"]
    assert not document.failed
    for name in NETS:
        assert rows[name].case == {"backend": "tensorrt-rtx", "profiles": ["64x64:b1"], "weights": "embedded"}
        assert rows[name].figures["engine_mb"] > engine_bytes(PACKAGE, name) / 1e6 > 0
        assert rows[name].figures["library"].startswith("tensorrt_rtx ")
        assert 0.05 < rows[name].figures["peak_rss_gb"] < 2
    together = rows["every net"]
    assert together.samples[0] == pytest.approx(sum(rows[name].samples[0] for name in NETS), rel=1e-4)
    assert together.figures["peak_rss_gb"] == max(rows[name].figures["peak_rss_gb"] for name in NETS)
    assert [line.partition(":")[0] for line in said] == list(NETS)
    assert [path.name for path in tmp_path.iterdir()] == ["build.json"], "the store is thrown away"


def test_a_net_that_fails_has_no_time_and_the_others_go_on(monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[str] = []

    def build(*arguments: Any, nets: list[str], **more: Any) -> tuple[Any]:
        """Raises from one net's second build on; the peak grows from build to build."""
        (net,) = nets
        if net == "unet_time" and net in calls:
            raise EngineError("it broke", expected="a builder", fix="Mend it.")
        calls.append(net)
        facts = {"peak_rss": 1e9 * calls.count(net), "library": "trt"}
        return (SimpleNamespace(entry=SimpleNamespace(facts=facts, build_seconds=2.0, size=4e6)),)

    monkeypatch.setattr(build_time, "build_package", build)
    document = measure_build(PACKAGE, Builds(nets=NETS, repeats=3))
    assert calls == ["unet_context", "unet_time", "unet_context", "unet_context"]
    rows = {row.workload: row for row in document.rows}
    assert rows["unet_context"].rounds == ((2.0,), (2.0,), (2.0,))
    assert rows["unet_context"].figures["peak_rss_gb"] == 3.0
    assert (rows["unet_time"].status, rows["unet_time"].rounds) == ("FAILED", ())
    assert rows["unet_time"].reason == "it broke"
    assert rows["every net"].status == "FAILED"
    assert rows["every net"].reason == "unet_time: it broke"


def test_layouts_are_timed_too(monkeypatch: pytest.MonkeyPatch) -> None:
    facts = {"layout": "NCHW", "milliseconds": {"NCHW": 1.5}, "relative_l2": {"NCHW": 0.0}, "rejected": {}}
    entry = SimpleNamespace(facts={**facts, "more": 1}, build_seconds=0.5)
    monkeypatch.setattr(tuning, "tune_package", lambda *arguments, nets: (SimpleNamespace(entry=entry),))
    first, *_, last = measure_build(PACKAGE, Builds(backend="onnxruntime-cuda")).rows
    assert (first.samples, first.figures) == ((0.5,), facts)
    assert last.samples == (1.0,)


def test_what_cannot_be_built() -> None:
    document = measure_build(PACKAGE, Builds(backend="abacus", nets=NETS))
    assert {row.status for row in document.rows} == {"not available"}
    assert "abacus" in document.rows[0].reason
    assert not document.failed
    with pytest.raises(UsageError, match="no net 'nerve'"):
        measure_build(PACKAGE, Builds(nets=("nerve",)))


def measure(said: list[str], backend: str = "auto") -> Document:
    case = Case.of(PACKAGE.manifest, width=64, height=64, steps=2)
    return measure_cold_start(PACKAGE, replace(TASK, backend=backend), case, repeats=1, progress=said.append)


def test_processes_and_their_parts(tmp_path: Path) -> None:
    said: list[str] = []
    document = measure(said)
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


def test_a_process_that_fails_or_hangs_is_not_started_again(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cold_start, "_BLOCKED", "import time; time.sleep(60)\n")
    monkeypatch.setattr(cold_start, "LIMIT", 1.0)
    began = time.perf_counter()
    rows = {row.workload: row for row in measure([]).rows}
    assert time.perf_counter() - began < 15
    assert rows["bare interpreter"].status == "ok"
    for name in ("import latentrt.runtime", "whole process", *PARTS):
        assert (rows[name].status, rows[name].rounds) == ("FAILED", ())
        assert rows[name].reason == "it did not end within 1 s"
    monkeypatch.undo()
    assert "unknown backend 'abacus'" in measure([], backend="abacus").rows[-1].reason
