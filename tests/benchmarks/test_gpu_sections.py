"""The steps of the GPU check on host memory: each passes there, and fails where a defect is planted."""

import ctypes
import json
from collections.abc import Callable, Generator, Iterator
from contextlib import contextmanager
from dataclasses import replace
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from latentrt.benchmarks.case import HOST_NETS, sizes_of
from latentrt.benchmarks.gpu import sections
from latentrt.benchmarks.gpu.check import line_of
from latentrt.benchmarks.gpu.opener import Opener, Scale, collect
from latentrt.benchmarks.gpu.sections import build, graphs, parity, picture, placement, sharing
from latentrt.benchmarks.records import Row
from latentrt.benchmarks.verbs import parity as parity_verb
from latentrt.engines.device import Addresses, Graph, Shapes
from latentrt.engines.errors import BackendError
from latentrt.runtime.loop.device.programs import input_shapes
from tests.benchmarks.gpu_stand_in import PACKAGE, SCALE, WatchedDevice, in_process, stand_in
from tests.engines.host_device import HostDevice


def run(section: Callable[[Opener, Scale], Iterator[Row]], opener: Opener, scale: Scale = SCALE) -> list[Row]:
    rows = list(collect(section(opener, scale)))
    for row in rows:  # what is printed and written is made of every row
        assert row.workload in line_of(replace(row, case={"backend": "b", "what": row.workload}))
        json.loads(json.dumps(row.to_json(), allow_nan=False))
    return rows


def failures(rows: list[Row]) -> list[str]:
    return [f"{row.workload}: {row.reason}" for row in rows if row.status == "FAILED"]


# ── without a defect ─────────────────────────────────────────────────────────────────────────────


@pytest.fixture
def run_verb(monkeypatch: pytest.MonkeyPatch) -> Callable[..., list[Row]]:
    """A section whose verb opens its sides in this process."""

    def run_it(section: Callable[[Opener, Scale], Iterator[Row]], opener: Opener) -> list[Row]:
        monkeypatch.setattr(parity_verb, "SideProcess", partial(in_process, opener))
        return run(section, opener)

    return run_it


def test_parity(run_verb: Callable[..., list[Row]]) -> None:
    device = WatchedDevice(2**30)
    rows = run_verb(parity, stand_in(device))
    assert not failures(rows)
    sizes = "width 64, height 64, pictures 1", "width 64, height 48, pictures 3"
    nets = "text_encoder", "unet", "vae_decoder"
    expected = [f"{net}, {size}, guidance_scale 3.0" for size in sizes for net in nets]
    assert [row.workload for row in rows] == [*expected, "vae_encoder"]
    assert all(row.figures["relative_l2"] < 1e-5 for row in rows)
    assert not device.blocks


def test_pictures(run_verb: Callable[..., list[Row]]) -> None:
    rows = run_verb(picture, stand_in())
    assert [row.workload for row in rows] == [
        f"picture, sampler {sampler}, width 64, height 48, pictures 3, guidance_scale {scale}"
        for scale in (3.0, 1.0)
        for sampler in ("dpmpp_2m", "ddim", "euler_a")
    ]
    assert not failures(rows)


def test_graphs() -> None:
    rows = run(graphs, stand_in())
    assert [(row.status, row.figures["psnr_db"]) for row in rows] == [("ok", float("inf"))] * 2
    rows = run(graphs, stand_in(WatchedDevice(2**30, capturable=False)))
    assert {row.status for row in rows} == {"not available"}
    assert rows[0].reason == "rows are not replayed: the stream cannot be captured"


# ── with one ─────────────────────────────────────────────────────────────────────────────────────


def wrong(net: str, output: str, add: float = 0.5, when: Callable[[Shapes], bool] = bool) -> Any:
    """Adds to a part of an output of the net where `when` says so, after each run."""

    def wrap(name: str, hungry: Any) -> Any:
        plain = hungry.bind

        def bind(shapes: Shapes, addresses: Addresses, scratch: int) -> Any:
            bound = plain(shapes, addresses, scratch)
            count = next(iter(shapes.values()))[0] * 4 * 36
            values = np.ctypeslib.as_array((ctypes.c_float * count).from_address(addresses[output]))
            run, submit = bound.enqueue, bound._net.submit

            def enqueue() -> None:
                run()
                submit(partial(np.add, values, add, values))

            if when(shapes):
                bound.enqueue = enqueue
            return bound

        if name == net:
            hungry.bind = bind
        return hungry

    return wrap


def test_parity_fails_for_a_wrong_output(run_verb: Callable[..., list[Row]]) -> None:
    for add in (0.02, float("nan")):
        unet, encoder = wrong("unet", "prediction", add), wrong("vae_encoder", "mean", add)
        wrap = lambda name, net: encoder(name, unet(name, net))  # noqa: E731, B023
        rows = run_verb(parity, stand_in(wrap=wrap))
        failed = [row.workload.partition(",")[0] for row in rows if row.status == "FAILED"]
        assert failed == ["unet", "unet", "vae_encoder"]


def test_pictures_fail_for_one_that_differs(run_verb: Callable[..., list[Row]]) -> None:
    guided = lambda shapes: shapes["prediction"][0] == 6  # noqa: E731
    rows = failures(run_verb(picture, stand_in(wrap=wrong("step", "latent", 0.5, guided))))
    assert ["guidance_scale 3.0: " in text for text in rows] == [True] * 3


class Forgetting(WatchedDevice):
    """Its graphs leave out what was captured last."""

    @contextmanager
    def capture(self) -> Generator[list[Graph]]:
        graphs: list[Any] = []
        with super().capture() as captured:
            yield graphs
        for graph in captured:
            graph.work = graph.work[: len(graph.work) // 2]
            graphs.append(graph)


def test_graphs_fail_where_something_else_is_replayed() -> None:
    rows = run(graphs, stand_in(Forgetting(2**30)))
    assert [row.status for row in rows] == ["FAILED"] * 2
    assert "a replayed row is" in rows[0].reason


def test_graphs_fail_where_nothing_is_replayed(monkeypatch: pytest.MonkeyPatch) -> None:
    def silent(self: Any, *arguments: Any) -> None:
        """Gives up, for a reason that nobody hears of."""

    monkeypatch.setattr("latentrt.runtime.loop.device.cuda_graphs.Replay._capture", silent)
    rows = run(graphs, stand_in())
    assert rows[0].reason == "no graph is replayed, and nothing says why"


def test_shared_rows() -> None:
    rows = run(sharing, stand_in())
    assert [row.workload for row in rows] == ["2 rows", "4 rows", "8 rows"]
    assert not failures(rows)
    assert [(row.figures["equal"], row.figures["pictures"]) for row in rows] == [(6, 6)] * 3
    assert all(row.figures["psnr_db_of_other_numbers"] > 60 for row in rows)


def test_sharing_fails_where_rows_are_mixed() -> None:
    """Each run adds a little of the first row to the others."""

    def mixing(name: str, hungry: Any) -> Any:
        plain = hungry.bind

        def bind(shapes: Shapes, addresses: Addresses, scratch: int) -> Any:
            bound = plain(shapes, addresses, scratch)
            count = int(np.prod(shapes["latent"]))
            values = np.ctypeslib.as_array((ctypes.c_float * count).from_address(addresses["prediction"]))
            by_row = values.reshape(shapes["latent"])
            run, submit = bound.enqueue, bound._net.submit

            def enqueue() -> None:
                run()
                submit(lambda: np.add(by_row, 0.3 * by_row[:1], by_row))

            bound.enqueue = enqueue
            return bound

        if name == "unet":
            hungry.bind = bind
        return hungry

    rows = run(sharing, stand_in(wrap=mixing))
    assert [row.status for row in rows][1:] == ["FAILED"] * 2
    assert "between shared and alone" in rows[1].reason


# ── opening and building ─────────────────────────────────────────────────────────────────────────


def refuse(device: HostDevice) -> None:
    raise BackendError("the engine is not for this GPU", expected="", fix="")


def test_opening() -> None:
    (row,) = run(placement, stand_in())
    assert row.status == "ok"
    assert row.figures["weights_mib"] > 1
    (row,) = run(placement, stand_in(opened=refuse))
    assert row.status == "FAILED"
    assert row.reason.startswith("BackendError: the engine is not for this GPU")


def test_engines_are_built_into_the_store(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (row,) = run(build, stand_in())
    assert row.status == "not available", "it builds nothing"
    pytest.importorskip("tensorrt_rtx")
    monkeypatch.setenv("LATENTRT_CACHE", str(tmp_path / "store"))
    monkeypatch.setattr(sections, "built_nets", lambda package: ("step",))
    (row,) = run(build, stand_in(backend="tensorrt-rtx"))
    assert row.status == "ok", row.reason
    assert row.figures["engine_mb"] > 0
    assert list((tmp_path / "store" / "engines").iterdir())


def test_the_profile_covers_all_that_is_drawn() -> None:
    from latentrt.engines.profiles import Profile, net_profiles

    scale = Scale.of(PACKAGE.manifest)
    portrait = replace(scale, case=replace(scale.case, width=64))
    assert portrait.profile == "64-256@64x64-256@128:b1-16"
    profile = Profile.parse(scale.profile, multiple=PACKAGE.manifest.size_multiple)
    assert (scale.case.width, scale.several.height, scale.large.width) == (128, 96, 256)
    for case in (scale.case, scale.several, scale.large):
        for net in ("unet", "vae_decoder"):
            shapes = input_shapes(PACKAGE.manifest.nets[net].spec, sizes_of(case, PACKAGE.manifest))
            assert any(
                item.covers(shapes) for item in net_profiles(net, PACKAGE.manifest.nets[net].spec, [profile])
            )


def test_placement_fails_for_nets_on_the_cpu() -> None:
    first, *rows = run(placement, stand_in(backend="onnxruntime-cuda"))
    assert first.status == "ok"
    assert {row.workload for row in rows} == {*HOST_NETS, "step", "vae_encoder"}
    for row in rows:
        assert row.status == "FAILED"
        assert "floating-point nodes on the CPU: " in row.reason
        assert row.figures["nodes"] == row.figures["on_cpu"] > 0


def test_placement_is_judged(tmp_path: Path) -> None:
    """Integers may stay on the CPU; a copy may not be, and nodes have to be there."""

    def event(name: str, operator: str, provider: str, kind: str) -> dict[str, Any]:
        types = {"input_type_shape": [{kind: [4]}], "output_type_shape": [{kind: []}]}
        args = {"op_name": operator, "provider": f"{provider}ExecutionProvider", **types}
        return {"cat": "Node", "name": f"{name}_kernel_time", "args": args}

    profile = tmp_path / "profile.json"
    net = SimpleNamespace(end_profile=lambda: profile)
    good = [event("a", "Add", "CUDA", "float"), event("b", "Shape", "CPU", "int64"), {"cat": "Session"}]
    for events, reason in (
        (good, ""),
        (
            [*good, event("c", "MemcpyToHost", "CUDA", "float")],
            "1 copies between CPU and GPU: c (MemcpyToHost)",
        ),
        ([*good, event("c", "Sin", "CPU", "float16")], "1 floating-point nodes on the CPU: c (Sin)"),
        ([{"cat": "Session"}], "the profile has no node that ran"),
    ):
        profile.write_text(json.dumps(events))
        row = sections._placed("unet", net)
        assert (row.status, row.reason) == ("FAILED" if reason else "ok", reason)
