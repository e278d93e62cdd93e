"""The sections of the GPU check on host memory: each passes there, and fails where a defect is planted."""

import json
import re
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
from latentrt.benchmarks.gpu import nets as gpu_nets
from latentrt.benchmarks.gpu import pictures as gpu_pictures
from latentrt.benchmarks.gpu.check import line_of
from latentrt.benchmarks.gpu.memory import ballast, ladder, memory
from latentrt.benchmarks.gpu.nets import build, placement, read_profile
from latentrt.benchmarks.gpu.opener import Opener, Scale, collect
from latentrt.benchmarks.gpu.pictures import graphs, host_memory, parity, picture, timing
from latentrt.benchmarks.records import Row
from latentrt.benchmarks.rounds import Pace
from latentrt.benchmarks.verbs import parity as parity_verb
from latentrt.engines.backend import MemoryLedger
from latentrt.engines.device import Addresses, DeviceMemory, Graph, Shapes
from latentrt.engines.errors import BackendError, MemoryLimitError
from latentrt.engines.onnxruntime.nets import CPU, open_onnxruntime_net
from latentrt.runtime.loop.device.programs import input_shapes
from tests.benchmarks.gpu_stand_in import MIB, PACKAGE, SCALE, Hungry, WatchedDevice, in_process, stand_in
from tests.engines.host_device import HostDevice
from tests.engines.test_onnxruntime_nets import DEMO, Bound, Host


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
    assert [row.workload for row in rows] == [
        f"{net}, {size}, guidance_scale 3.0" for size in sizes for net in nets
    ]
    assert all(row.figures["relative_l2"] < 1e-5 for row in rows)
    assert not device.blocks


def test_pictures(run_verb: Callable[..., list[Row]]) -> None:
    rows = run_verb(picture, stand_in())
    assert [row.workload for row in rows] == [
        *(
            f"picture, sampler {sampler}, width 64, height 48, pictures 3, guidance_scale {scale}"
            for scale in (3.0, 1.0)
            for sampler in ("dpmpp_2m", "ddim", "euler_a")
        ),
        "from a picture",
    ]
    assert not failures(rows)


def test_graphs() -> None:
    rows = run(graphs, stand_in())
    assert not failures(rows)
    for row in rows:
        assert row.figures["identical"]
        assert row.figures["launches"] >= SCALE.runs
        assert min(row.figures["plain_p50_s"], row.figures["graph_p50_s"]) > 0
    rows = run(graphs, stand_in(WatchedDevice(2**30, capturable=False)))
    assert {row.status for row in rows} == {"not available"}
    assert (rows[0].reason, rows[0].figures["launches"]) == ("the stream cannot be captured", 0)


def test_memory() -> None:
    rows = run(memory, stand_in())
    assert not failures(rows)
    assert [row.workload for row in rows] == [
        "first cycle",
        *[f"cycle {n}" for n in (1, 2, 3)],
        "no growth",
        "ledger",
    ]
    cycle, ledger = rows[1].figures, rows[-1].figures
    assert cycle["peak_mib"] > 4
    assert cycle["closed_mib"] == 0
    assert set(ledger["ledger"]) >= {"unet", "step", "vae_decoder"}
    assert ledger["scratch"] >= 4 * MIB


def test_the_ladder() -> None:
    device = WatchedDevice(2**28)
    rows = {row.workload: row for row in run(ladder, stand_in(device))}
    assert not failures(list(rows.values()))
    assert "split the batch" in rows["a rung helped"].figures["rungs"]
    assert rows["memory to spare"].figures["need_mib"] > 8
    assert re.search(r"0 MiB of 256 free", rows["nothing free"].figures["refused"])
    assert rows["free again"].figures["psnr_db"] >= 40
    assert not device.blocks


def test_a_device_that_shares_memory_with_the_host_keeps_it() -> None:
    class Unified(WatchedDevice):
        def memory(self) -> DeviceMemory:
            return replace(super().memory(), unified=True)

    (row,) = run(ladder, stand_in(Unified(2**28)))
    assert row.status == "not available"


def test_timing_beside_peers(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gpu_pictures, "_PACE", Pace(runs=2, rounds=3, warm_up=1))
    small = replace(SCALE, case=replace(SCALE.case, width=96, height=72), steps=4)
    rows = run(timing, stand_in(backend="onnxruntime"), small)
    assert [(row.side, row.workload, row.status) for row in rows] == [
        ("latentrt", "picture by latentrt", "ok"),
        ("onnxruntime", "picture by onnxruntime", "ok"),
    ]
    assert all(row.samples for row in rows)
    assert rows[0].figures["stages_p50_s"]["text_encoder"] > 0
    (row,) = run(timing, stand_in())
    assert row.status == "FAILED"
    assert "unknown backend 'stand-in'" in row.reason


def test_ballast_leaves_the_margin_and_comes_back_also_where_memory_is_in_pieces() -> None:
    class Fragmented(HostDevice):
        def allocate(self, size: int) -> int:
            if size > 3 * MIB:
                raise MemoryLimitError("in pieces", expected="", fix="")
            return super().allocate(size)

    for device in (HostDevice(20 * MIB), Fragmented(20 * MIB)):
        with ballast(device, 7 * MIB):
            assert 7 * MIB <= device.memory().free < 8 * MIB
        assert device.memory().free == 20 * MIB


# ── with one ─────────────────────────────────────────────────────────────────────────────────────


class Wrong(Hungry):
    """Adds to an output of the net where `when` says so, after each run."""

    def __init__(
        self, net: Hungry, output: str, add: float, when: Callable[[Shapes], bool] = lambda shapes: True
    ) -> None:
        super().__init__(net.net, net.per_row)
        self.output, self.add, self.when = output, add, when

    def bind(self, shapes: Shapes, addresses: Addresses, scratch: int) -> Any:
        bound: Any = super().bind(shapes, addresses, scratch)
        session, address = bound._net, addresses[self.output]
        plain = bound.enqueue

        def spoil() -> None:
            import ctypes

            count = next(iter(shapes.values()))[0] * 4 * 36  # a part of it
            values = (ctypes.c_float * count).from_address(address)
            for index in range(count):
                values[index] += self.add

        def enqueue() -> None:
            plain()
            session.submit(spoil)

        if self.when(shapes):
            bound.enqueue = enqueue
        return bound


def wrong(
    net: str, output: str, add: float = 0.5, when: Callable[[Shapes], bool] = lambda shapes: True
) -> Any:
    return lambda name, hungry: Wrong(hungry, output, add, when) if name == net else hungry


def test_parity_fails_for_a_wrong_output(run_verb: Callable[..., list[Row]]) -> None:
    for add in (0.02, float("nan")):
        rows = run_verb(parity, stand_in(wrap=wrong("unet", "prediction", add)))
        assert [text.partition(",")[0] for text in failures(rows)] == ["unet", "unet"]


def test_parity_goes_on_after_a_net_that_fails(run_verb: Callable[..., list[Row]]) -> None:
    class Refusing(Hungry):
        def bind(self, shapes: Shapes, addresses: Addresses, scratch: int) -> Any:
            raise BackendError("refused", expected="", fix="")

    device = WatchedDevice(2**30)
    wrap = lambda name, net: Refusing(net.net, 0) if name == "unet_time" else net  # noqa: E731
    rows = run_verb(parity, stand_in(device, wrap=wrap))
    assert [row.status for row in rows] == ["ok", "FAILED", "ok"] * 2
    assert rows[1].reason == "latentrt: refused"
    assert not device.blocks


def test_the_decoder_alone_is_held_to_more_than_a_whole_picture(monkeypatch: pytest.MonkeyPatch) -> None:
    rows = [
        Row(side="latentrt", workload="vae_decoder", unit="dB", figures={"psnr_db": db}) for db in (59, 61)
    ]
    answer = SimpleNamespace(rows=rows)
    monkeypatch.setattr(gpu_pictures, "measure_parity", lambda *arguments, **named: answer)
    assert [row.reason for row in run(parity, stand_in())] == ["59.0 dB, below 60", ""]


def test_pictures_fail_for_one_that_differs(run_verb: Callable[..., list[Row]]) -> None:
    guided = lambda shapes: shapes["prediction"][0] == 6  # noqa: E731
    step, encoder = wrong("step", "latent", 0.5, guided), wrong("vae_encoder", "mean")
    wrap = lambda name, net: encoder(name, step(name, net))  # noqa: E731
    *rows, last = failures(run_verb(picture, stand_in(wrap=wrap)))
    assert ["guidance_scale 3.0: " in text for text in rows] == [True] * 3
    assert re.match(r"from a picture: \d+\.\d dB, below 48", last)


class Graphs(WatchedDevice):
    """Replays through `change`."""

    def __init__(self, change: Callable[[Graph], Graph]) -> None:
        super().__init__(2**30)
        self.change = change

    @contextmanager
    def capture(self) -> Generator[list[Graph]]:
        graphs: list[Graph] = []
        with super().capture() as captured:
            yield graphs
        graphs += [self.change(graph) for graph in captured]


class Partial:
    """A graph that leaves out what was captured last."""

    def __init__(self, graph: Any) -> None:
        graph.work = graph.work[: len(graph.work) // 2]
        self.launch, self.close = graph.launch, graph.close


def test_graphs_fail_where_something_else_is_replayed() -> None:
    rows = run(graphs, stand_in(Graphs(Partial)))
    assert [row.status for row in rows] == ["FAILED"] * 2
    assert "dB between plain and replayed" in rows[0].reason


def test_graphs_fail_where_nothing_is_replayed(monkeypatch: pytest.MonkeyPatch) -> None:
    def silent(self: Any, *arguments: Any) -> None:
        """Gives up, for a reason that nobody hears of."""

    monkeypatch.setattr("latentrt.runtime.loop.device.cuda_graphs.Replay._capture", silent)
    rows = run(graphs, stand_in())
    assert "launched in 0 of 3 runs, and nothing says why" in rows[0].reason


@pytest.mark.parametrize(("size", "expected"), [(30, ["cycle 3", "no growth"]), (9, ["no growth"])])
def test_memory_fails_for_a_leak(size: int, expected: list[str]) -> None:
    rows = run(memory, stand_in(opened=lambda device: device.allocate(size * MIB) and None))
    assert [text.partition(":")[0] for text in failures(rows)] == expected


def test_memory_fails_for_a_ledger_without_weights() -> None:
    class Forgetful(Hungry):
        @property
        def memory(self) -> MemoryLedger:
            return replace(self.net.memory, weights=0)

    rows = run(memory, stand_in(wrap=lambda name, net: Forgetful(net.net, net.per_row)))
    names = "text_encoder, vae_encoder, unet_context, unet_time, unet, vae_decoder"
    assert failures(rows) == [f"ledger: no weights of {names} are counted"]


def test_the_ladder_fails_where_a_rung_draws_something_else() -> None:
    apart = lambda shapes: shapes["latent"][0] in (1, 4)  # noqa: E731
    rows = run(ladder, stand_in(WatchedDevice(2**28), wrap=wrong("unet", "prediction", 0.5, apart)))
    assert any("of that free" in text and "dB, below 40" in text for text in failures(rows))


def test_the_ladder_fails_where_no_rung_helps() -> None:
    class Constant(Hungry):
        def scratch(self, shapes: Shapes) -> int:
            return 40 * MIB if shapes["latent"][-1] == 8 else 0

    wrap = lambda name, net: Constant(net.net, 0) if name == "unet" else net  # noqa: E731
    rows = run(ladder, stand_in(WatchedDevice(2**28), wrap=wrap))
    assert "a rung helped: no request was drawn that needed a rung" in failures(rows)


def test_the_ladder_fails_where_memory_never_runs_out() -> None:
    class Endless(WatchedDevice):
        def memory(self) -> DeviceMemory:
            return replace(super().memory(), free=max(0, self.limit // 2 - self.used))

    rows = failures(run(ladder, stand_in(Endless(2**29))))
    assert "nothing free: it was drawn, although no memory was free" in rows
    assert "a rung helped: no request was drawn that needed a rung" in rows


def test_the_ladder_fails_for_another_error() -> None:
    class Breaking(WatchedDevice):
        def allocate(self, size: int) -> int:
            try:
                return super().allocate(size)
            except MemoryLimitError as error:
                raise BackendError("the context is spoilt", expected="", fix="") from error

    rows = failures(run(ladder, stand_in(Breaking(2**28))))
    assert any("BackendError: the context is spoilt" in text for text in rows)


# ── opening and building ─────────────────────────────────────────────────────────────────────────


def refuse(device: HostDevice) -> None:
    raise BackendError("the engine is not for this GPU", expected="", fix="")


def test_opening() -> None:
    (row,) = run(placement, stand_in())
    assert row.status == "ok"
    assert row.figures["weights_mib"] > 1
    (row,) = run(placement, stand_in(opened=refuse))
    assert row.status == "FAILED"
    (row,) = run(placement, stand_in(opened=refuse, unsupported="sm_90 is none of 8.9"))
    assert row.status == "not available"
    assert row.reason.startswith("sm_90 is none of 8.9: BackendError: the engine is not for this GPU")


def test_engines_are_built_into_the_store(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (row,) = run(build, stand_in())
    assert row.status == "not available", "it builds nothing"
    pytest.importorskip("tensorrt_rtx")
    monkeypatch.setenv("LATENTRT_CACHE", str(tmp_path / "store"))
    monkeypatch.setattr(gpu_nets, "built_nets", lambda package: ("step",))
    (row,) = run(build, stand_in(backend="tensorrt-rtx"))
    assert row.status == "ok", row.reason
    assert row.figures["engine_mb"] > 0
    assert list((tmp_path / "store" / "engines").iterdir())


def test_the_profile_covers_all_that_is_drawn() -> None:
    from latentrt.engines.profiles import Profile, net_profiles

    scale = Scale.of(PACKAGE.manifest)
    profile = Profile.parse(scale.profile, multiple=PACKAGE.manifest.size_multiple)
    assert (scale.case.width, scale.short, scale.large) == (128, 96, 256)
    for case in (scale.case, scale.several, scale.large_case):
        for net in ("unet", "vae_decoder"):
            shapes = input_shapes(PACKAGE.manifest.nets[net].spec, sizes_of(case, PACKAGE.manifest))
            assert any(
                item.covers(shapes) for item in net_profiles(net, PACKAGE.manifest.nets[net].spec, [profile])
            )


def test_placement_fails_for_nets_on_the_cpu() -> None:
    first, *rows = run(placement, stand_in(backend="onnxruntime-cuda"))
    assert first.status == "ok"
    assert {row.workload for row in rows} == {*HOST_NETS, "vae_encoder", "step"}
    for row in rows:
        assert row.status == "FAILED"
        assert "floating-point nodes on the CPU: " in row.reason
        assert row.figures["nodes"] == row.figures["on_cpu"] > 0


def test_placement_is_judged(monkeypatch: pytest.MonkeyPatch) -> None:
    shape = {"provider": "CPUExecutionProvider", "input_type_shape": [{"int64": [4]}]}
    copied = "1 copies between CPU and GPU: a (MemcpyToHost)"
    for node, reason in ("a (Shape)", ""), ("a (MemcpyToHost)", copied):
        monkeypatch.setattr(gpu_nets, "read_profile", lambda path, node=node: {node: shape, "b (Add)": {}})
        for row in run(placement, stand_in(backend="onnxruntime-cuda"))[1:]:
            assert (row.status, row.reason) == ("FAILED" if reason else "ok", reason)
            assert (row.figures["nodes"], row.figures["on_cpu"]) == (2, 1)


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


def test_a_real_profile(profile: Path) -> None:
    nodes = read_profile(profile)
    assert len(nodes) > 10
    assert {args["provider"] for args in nodes.values()} == {CPU}
    (sine,) = (args for node, args in nodes.items() if node.endswith("(Sin)"))
    assert gpu_nets._types(sine) == {"float"}


def test_what_is_no_profile(tmp_path: Path) -> None:
    path = tmp_path / "profile.json"
    for content in ("", "[{]", "3", "[3]", '[{"cat": "Session", "name": "model_run"}]'):
        path.write_text(content)
        with pytest.raises(BackendError, match=r"expected the JSON file that end_profiling"):
            read_profile(path)
    net: Any = open_onnxruntime_net(DEMO, "unet", Host(), provider=CPU, threads=1)  # type: ignore[arg-type]
    with pytest.raises(BackendError, match=r"'unet' has no profile.*Pass `profile`"):
        net.end_profile()


def test_captured_pipelines_are_opened_for_it() -> None:
    opener, options = stand_in(backend="onnxruntime-cuda"), list[dict[str, Any]]()

    def open_device(**more: Any) -> Any:
        options.append(more)
        return opener.open_device()

    for mode in ("off", "auto", "on"):
        with replace(opener, open_device=open_device).pipeline(mode):
            pass
    assert options == [{}, {}, {"capture": True}]
