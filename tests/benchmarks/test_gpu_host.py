"""The sections `placement` and `host_memory`, on host memory, with defects planted in it."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from latentrt.benchmarks.gpu import nets as gpu_nets
from latentrt.benchmarks.gpu import pictures as gpu_pictures
from latentrt.benchmarks.gpu.judge import collect
from latentrt.benchmarks.gpu.nets import placement
from latentrt.benchmarks.gpu.pictures import host_memory
from latentrt.benchmarks.gpu.placement import Placement
from latentrt.engines.package import Package
from latentrt.engines.tensorrt.build import built_nets
from tests.benchmarks.gpu_stand_in import SCALE, Hungry, stand_in
from tests.runtime.device_bench import package_with_step


@pytest.fixture(scope="module")
def package(tmp_path_factory: pytest.TempPathFactory) -> Package:
    return package_with_step(tmp_path_factory.mktemp("demo") / "package")


def test_placement_fails_for_nets_on_the_cpu(package: Package) -> None:
    rows = list(collect(placement(stand_in(package, onnxruntime=True), SCALE)))
    assert [row.workload for row in rows] == list(built_nets(package))
    for row in rows:
        assert row.status == "FAILED"
        assert "floating-point nodes on the CPU: " in row.reason
        assert row.figures["nodes"] == row.figures["on_cpu"] > 0


@pytest.mark.parametrize(
    ("found", "reason"),
    [
        (Placement(nodes=9, on_cpu=2, copies=(), floats=()), ""),
        (
            Placement(nodes=9, on_cpu=2, copies=("a (MemcpyToHost)",), floats=()),
            "1 copies between CPU and GPU: a (MemcpyToHost)",
        ),
    ],
)
def test_placement_is_judged(
    package: Package, monkeypatch: pytest.MonkeyPatch, found: Placement, reason: str
) -> None:
    monkeypatch.setattr(gpu_nets, "read_placement", lambda path: found)
    for row in collect(placement(stand_in(package, onnxruntime=True), SCALE)):
        assert (row.status, row.reason) == ("FAILED" if reason else "ok", reason)


def test_engines_have_no_placement(package: Package) -> None:
    (row,) = collect(placement(stand_in(package), SCALE))
    assert row.status == "not available"


@pytest.mark.skipif(not gpu_pictures._STATM.exists(), reason="tells resident memory on Linux alone")
def test_host_memory_stays_and_a_leak_shows(package: Package) -> None:
    kept: list[np.ndarray] = []

    class Leaking(Hungry):
        def settle(self) -> None:
            kept.append(np.ones(4 * 2**20, np.uint8))

    (row,) = collect(host_memory(stand_in(package), SCALE))
    assert (row.status, row.reason) == ("ok", "")
    (row,) = collect(
        host_memory(stand_in(package, wrap=lambda name, net: Leaking(net.net, net.per_row)), SCALE)
    )
    assert row.status == "FAILED"
    assert "MiB more" in row.reason


def test_without_a_system_that_tells(
    package: Package, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(gpu_pictures, "_STATM", tmp_path / "none")
    (row,) = collect(host_memory(stand_in(package), SCALE))
    assert row.status == "not available"


def test_captured_pipelines_are_opened_for_it(package: Package) -> None:
    options: list[dict[str, Any]] = []
    opener = stand_in(package, onnxruntime=True)

    def open_device(*arguments: Any, **asked: Any) -> Any:
        options.append(asked)
        return opener.open_device(*arguments)

    for graphs in ("off", "auto", "on"):
        with replace(opener, open_device=open_device).pipeline(graphs):
            pass
    assert options == [{}, {}, {"capture": True}]
