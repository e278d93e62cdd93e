"""Placement is read from real profiles of the CPU provider, and from what CUDA would add to them."""

import json
from pathlib import Path
from typing import Any

import pytest

from latentrt.benchmarks.gpu.placement import read_placement
from latentrt.engines.errors import BackendError
from latentrt.engines.onnxruntime.nets import CPU, open_onnxruntime_net
from tests.engines.test_onnxruntime_nets import DEMO, Bound, Host


@pytest.fixture(scope="module")
def profile(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """ONNX Runtime's profile of three runs of a net on the CPU."""
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


def test_all_on_the_gpu(profile: Path, tmp_path: Path) -> None:
    def move(args: dict[str, Any]) -> None:
        args["provider"] = "CUDAExecutionProvider"

    found = read_placement(changed(profile, tmp_path, move))
    assert (found.on_cpu, found.copies, found.floats) == (0, (), ())


def test_shapes_may_stay_on_the_cpu_and_copies_are_named(profile: Path, tmp_path: Path) -> None:
    def turn(args: dict[str, Any]) -> None:
        args.update(input_type_shape=[{"int64": [4]}], output_type_shape=[{"bool": []}])
        if args["op_name"] in ("Sin", "Cos"):
            args.update(op_name="MemcpyToHost", provider="CUDAExecutionProvider")

    found = read_placement(changed(profile, tmp_path, turn))
    assert found.on_cpu > 0
    assert found.floats == ()
    assert found.copies
    assert all(name.endswith("(MemcpyToHost)") for name in found.copies)


@pytest.mark.parametrize("content", ["", "[{]", "3", "[3]", '[{"cat": "Session", "name": "model_run"}]'])
def test_what_is_no_profile(tmp_path: Path, content: str) -> None:
    path = tmp_path / "profile.json"
    path.write_text(content)
    with pytest.raises(BackendError, match=r"expected the JSON file that end_profiling"):
        read_placement(path)


def test_a_net_that_was_not_profiled() -> None:
    net: Any = open_onnxruntime_net(DEMO, "unet", Host(), provider=CPU, threads=1)  # type: ignore[arg-type]
    with pytest.raises(BackendError, match=r"'unet' has no profile.*Pass `profile`"):
        net.end_profile()
