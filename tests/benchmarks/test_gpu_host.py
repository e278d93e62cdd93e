"""The sections `placement` and `host_memory`, on host memory, with defects planted in it."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from latentrt.benchmarks.gpu import nets as gpu_nets
from latentrt.benchmarks.gpu import pictures as gpu_pictures
from latentrt.benchmarks.gpu.judge import collect
from latentrt.benchmarks.gpu.nets import placement
from latentrt.benchmarks.gpu.pictures import host_memory
from latentrt.benchmarks.gpu.placement import Placement, read_placement
from latentrt.engines.errors import BackendError
from latentrt.engines.onnxruntime.nets import CPU, open_onnxruntime_net
from latentrt.engines.tensorrt.build import built_nets
from tests.benchmarks.gpu_stand_in import PACKAGE, SCALE, Hungry, stand_in
from tests.engines.test_onnxruntime_nets import DEMO, Bound, Host


def test_placement_fails_for_nets_on_the_cpu() -> None:
    rows = list(collect(placement(stand_in(onnxruntime=True), SCALE)))
    assert [row.workload for row in rows] == list(built_nets(PACKAGE))
    for row in rows:
        assert row.status == "FAILED"
        assert "floating-point nodes on the CPU: " in row.reason
        assert row.figures["nodes"] == row.figures["on_cpu"] > 0


def test_placement_is_judged(monkeypatch: pytest.MonkeyPatch) -> None:
    for copies, reason in ((), ""), (("a (MemcpyToHost)",), "1 copies between CPU and GPU: a (MemcpyToHost)"):
        found = Placement(nodes=9, on_cpu=2, copies=copies, floats=())
        monkeypatch.setattr(gpu_nets, "read_placement", lambda path, found=found: found)
        for row in collect(placement(stand_in(onnxruntime=True), SCALE)):
            assert (row.status, row.reason) == ("FAILED" if reason else "ok", reason)
    (row,) = collect(placement(stand_in(), SCALE))
    assert row.status == "not available", "engines have none"


@pytest.mark.skipif(not gpu_pictures._STATM.exists(), reason="tells resident memory on Linux alone")
def test_host_memory_stays_and_a_leak_shows() -> None:
    kept: list[np.ndarray] = []

    class Leaking(Hungry):
        def settle(self) -> None:
            kept.append(np.ones(4 * 2**20, np.uint8))

    (row,) = collect(host_memory(stand_in(), SCALE))
    assert (row.status, row.reason) == ("ok", "")
    (row,) = collect(host_memory(stand_in(wrap=lambda name, net: Leaking(net.net, net.per_row)), SCALE))
    assert row.status == "FAILED"
    assert "MiB more" in row.reason


def test_without_a_system_that_tells(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(gpu_pictures, "_STATM", tmp_path / "none")
    (row,) = collect(host_memory(stand_in(), SCALE))
    assert row.status == "not available"


def test_shapes_may_stay_on_the_cpu_and_copies_are_named(profile: Path, tmp_path: Path) -> None:
    def move(args: dict[str, Any]) -> None:
        args["provider"] = "CUDAExecutionProvider"

    found = read_placement(changed(profile, tmp_path, move))
    assert (found.on_cpu, found.copies, found.floats) == (0, (), ())

    def turn(args: dict[str, Any]) -> None:
        args.update(input_type_shape=[{"int64": [4]}], output_type_shape=[{"bool": []}])
        if args["op_name"] in ("Sin", "Cos"):
            args.update(op_name="MemcpyToHost", provider="CUDAExecutionProvider")

    found = read_placement(changed(profile, tmp_path, turn))
    assert found.on_cpu > 0
    assert found.floats == ()
    assert found.copies
    assert all(name.endswith("(MemcpyToHost)") for name in found.copies)


# ── reading a profile ────────────────────────────────────────────────────────────────────────────


@pytest.fixture(scope="module")
def profile(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The fastest of three runs of a net on the CPU."""
    host, folder = Host(), tmp_path_factory.mktemp("profile")
    net: Any = open_onnxruntime_net(
        DEMO,
        "unet_time",
        host,  # type: ignore[arg-type]
        provider=CPU,
        threads=1,
        profile=folder,
    )
    bound = Bound(host, net)
    for _ in range(3):
        bound.bound.enqueue()
    path: Path = net.end_profile()
    net.close()
    assert path.parent == folder
    return path


def changed(profile: Path, folder: Path, change: Any) -> Path:
    """The profile with `change` applied to the arguments of each node's event."""
    events = json.loads(profile.read_bytes())
    for event in events:
        if event.get("cat") == "Node":
            change(event["args"])
    path = folder / "changed.json"
    path.write_text(json.dumps(events))
    return path


def test_a_real_profile(profile: Path) -> None:
    found = read_placement(profile)
    assert found.nodes == found.on_cpu > 10
    assert found.copies == ()
    assert any(name.endswith(("(Sin)", "(Cos)")) for name in found.floats)
    assert len(set(found.floats)) == len(found.floats)
    assert 0 < len(found.floats) <= found.nodes


def test_what_is_no_profile(tmp_path: Path) -> None:
    path = tmp_path / "profile.json"
    for content in ("", "[{]", "3", "[3]", '[{"cat": "Session", "name": "model_run"}]'):
        path.write_text(content)
        with pytest.raises(BackendError, match=r"expected the JSON file that end_profiling"):
            read_placement(path)
    net: Any = open_onnxruntime_net(DEMO, "unet", Host(), provider=CPU, threads=1)  # type: ignore[arg-type]
    with pytest.raises(BackendError, match=r"'unet' has no profile.*Pass `profile`"):
        net.end_profile()
