"""Captured rows: compared with plain ones once per shape, and replayed where they are right and faster."""

import json
from collections.abc import Callable, Generator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from latentrt.engines.errors import BackendError, MemoryLimitError
from latentrt.engines.installed import latentrt_version
from latentrt.engines.onnxruntime.lowering.lower import REVISION
from latentrt.engines.package import Package
from latentrt.engines.store.engine_store import EngineStore
from latentrt.runtime.loop.device import cuda_graphs
from latentrt.runtime.loop.device import verdicts as verdicts_module
from latentrt.runtime.loop.device.cuda_graphs import Replay
from latentrt.runtime.loop.device.verdicts import UNFINISHED, Verdict, Verdicts
from latentrt.runtime.loop.open import replayed_facts
from tests.engines.host_device import HostDevice
from tests.runtime.device_bench import device_pipeline

PROMPT = "a red circle on a blue background"
SMALL = {"num_inference_steps": 3, "height": 64, "width": 64, "output_type": "np"}
COMPARED = 2  # launches of a comparison


# ── pictures ────────────────────────────────────────────────────────────────────────────────────────────


def test_a_replayed_loop_draws_the_same(package: Package) -> None:
    device = HostDevice()
    requests: list[dict[str, object]] = [
        {"seed": 1},
        {"seed": 2, "sampler": "ddim"},
        {"seed": 3, "guidance_scale": 2.0},
        {"seed": 1, "num_inference_steps": 5},
    ]
    with device_pipeline(package, device) as (plain, _):
        wanted = [plain(PROMPT, **{**SMALL, **request}).images for request in requests]
    with device_pipeline(package, device, graphs="on") as (pipe, _):
        launches = [0]
        for request, images in zip(requests, wanted, strict=True):
            np.testing.assert_array_equal(pipe(PROMPT, **{**SMALL, **request}).images, images)
            launches.append(device.launches)
        # the first is plain; sampler, seed, prompt, guidance and steps are data of the one graph
        assert np.diff(launches).tolist() == [0, COMPARED + 3, 3, 5]
        *_, last = pipe.stream(PROMPT, **{**SMALL, **requests[0]})
        np.testing.assert_array_equal(np.asarray(last.preview()[0]), wanted[0][0])


def test_noise_is_replayed_too(package: Package) -> None:
    device = HostDevice()
    with device_pipeline(package, device, graphs="on") as (pipe, _):
        first = pipe(PROMPT, **SMALL, seed=1, sampler="euler_a").images
        pipe(PROMPT, **SMALL, seed=2, sampler="euler_a")
        np.testing.assert_array_equal(pipe(PROMPT, **SMALL, seed=1, sampler="euler_a").images, first)
        assert device.launches == COMPARED + 6


def test_what_cannot_be_captured_runs_plainly_and_says_why_once(package: Package) -> None:
    device = HostDevice(capturable=False)
    lines: list[str] = []
    with device_pipeline(package, device, graphs="on", log=lines.append) as (pipe, _):
        pictures = [pipe(PROMPT, **SMALL, seed=1).images for _ in range(4)]
        for _ in range(2):
            pipe(PROMPT, **{**SMALL, "width": 96})
    for picture in pictures[1:]:
        np.testing.assert_array_equal(picture, pictures[0])
    assert device.launches == 0
    assert lines == ["rows are not replayed: the stream cannot be captured"]


def test_a_graph_does_not_outlive_another_shape(package: Package) -> None:
    """ONNX Runtime destroys the plans it was recorded from (`OnnxRuntimeDeviceNet`)."""
    device = HostDevice()
    wide = {**SMALL, "width": 96}
    with device_pipeline(package, device, graphs="on") as (pipe, loop):
        wanted = pipe(PROMPT, **SMALL, seed=1).images
        pipe(PROMPT, **SMALL, seed=1)
        assert loop.replays
        assert len(device.graphs) == 1
        pipe(PROMPT, **wide)
        assert not loop.replays
        assert not device.graphs
        counts = [device.launches]
        for _ in range(2):
            np.testing.assert_array_equal(pipe(PROMPT, **SMALL, seed=1).images, wanted)
            counts.append(device.launches)
        assert np.diff(counts).tolist() == [0, 3], "plain first, and no second comparison"
        # in the middle of a picture, too
        steps = pipe.stream(PROMPT, **SMALL, seed=1)
        next(steps)
        assert loop.replays
        pipe(PROMPT, **wide)
        launches = device.launches
        *_, last = steps
        assert device.launches == launches
        np.testing.assert_array_equal(np.asarray(last.preview()[0]), wanted[0])


def test_a_graph_does_not_outlive_another_requests_row(package: Package) -> None:
    """Two streams in turns: the other one's row has taken the plans."""
    device = HostDevice()
    wide = {**SMALL, "width": 96}
    with device_pipeline(package, device, graphs="on") as (pipe, loop):
        for _ in range(2):
            wanted = pipe(PROMPT, **wide, seed=1).images
        small = pipe.stream(PROMPT, **SMALL)
        next(small)
        other = pipe.stream(PROMPT, **wide, seed=1)
        next(other)
        *_, last = pipe.stream(PROMPT, **wide, seed=1)  # captured again, as its second picture
        third = pipe.stream(PROMPT, **wide, seed=1)
        next(third)
        assert loop.replays
        next(small)
        assert not loop.replays
        launches = device.launches
        *_, last = third
        assert device.launches == launches
        np.testing.assert_array_equal(np.asarray(last.preview()[0]), wanted[0])


def test_graphs_that_outlive_other_shapes_stay(package: Package) -> None:
    def lasting(name: str, net: Any) -> Any:
        net.graphs_outlive_other_shapes = True
        return net

    device = HostDevice()
    with device_pipeline(package, device, graphs="on", wrap=lasting) as (pipe, _):
        for width in (64, 64, 96, 96, 64, 96):
            pipe(PROMPT, **{**SMALL, "width": width})
        assert device.launches == 4 * 3 + 2 * COMPARED
        assert len(device.graphs) == 2


def test_host_memory_refuses_a_capture_out_of_order(package: Package) -> None:
    """As a library would, which makes plans in the first run after another shape."""
    device = HostDevice()
    with device_pipeline(package, device) as (pipe, loop):
        pipe(PROMPT, **SMALL)
        (small,) = loop._rows.replays
        pipe(PROMPT, **{**SMALL, "width": 96})
        with pytest.raises(AssertionError, match="captured without a plain run"), device.capture():
            small.enqueue_row()  # type: ignore[attr-defined]
        small.enqueue_row()  # type: ignore[attr-defined]
        with device.capture():
            small.enqueue_row()  # type: ignore[attr-defined]


# ── the decision ────────────────────────────────────────────────────────────────────────────────────────


class Bench:
    """A row that doubles its state, and adds its number, plainly and as a graph, on a clock of its own."""

    rows, capturable = 3, True

    def __init__(
        self, monkeypatch: pytest.MonkeyPatch, *, plain_s: float = 1.0, graph_s: float = 0.5
    ) -> None:
        self.state, self.row, self.fed = np.ones(4), 0, 0
        self.now, self.plain_s, self.graph_s = 0.0, plain_s, graph_s
        self.graph_error = self.noise = 0.0
        self.keeps = False  # whether the graph computes with what was fed when it was recorded
        self.steps = list[str]()
        self.lines = list[str]()
        self.failing: Callable[[str], None] = lambda step: None
        monkeypatch.setattr(cuda_graphs, "perf_counter", lambda: self.now)

    def _step(self, name: str) -> None:
        self.failing(name)
        self.steps.append(name)

    def rewind(self) -> None:
        self._step("rewind")
        self.state = np.ones(4)

    def feed_row(self, row: int) -> None:
        self.row = row

    def blank_row(self) -> None:
        self.row = -1

    def enqueue_row(self) -> None:
        self._step("plain")
        self.now += self.plain_s
        self.state = self.state * 2 + self.row
        if self.noise:  # as from sums in any order
            self.state[0] += self.noise * len(self.steps)

    def read_state(self) -> Any:
        return self.state.copy()

    def synchronize(self) -> None:
        self._step("wait")

    @contextmanager
    def capture(self) -> Generator[list[Any]]:
        graphs = list[Any]()
        self._step("capture")
        self.fed = self.row
        before, now = self.state, self.now
        yield graphs
        self.state, self.now = before, now  # recorded, not run
        self.steps.pop()
        graphs.append(self)

    def launch(self) -> None:
        self._step("launch")
        self.now += self.graph_s
        self.state = self.state * 2 + (self.fed if self.keeps else self.row) + self.graph_error

    def close(self) -> None:
        self._step("close")

    def pictures(self, replay: Replay, count: int) -> list[bool]:
        """Draw pictures of three rows; which of them were replayed."""
        replayed = list[bool]()
        for _ in range(count):
            self.state = np.ones(4)
            replay.begin(self, self)  # type: ignore[arg-type]
            assert (self.state == 1).all(), "begin left the state elsewhere"
            for row in range(self.rows):
                self.feed_row(row)
                replay.enqueue(self)
            replayed.append(replay.replayed)
        return replayed

    def replay(self, graphs: Any = "auto", verdicts: Verdicts | None = None) -> Replay:
        verdicts = verdicts or Verdicts()
        return Replay(graphs, dtype="fp16", shape="a", verdicts=verdicts, log=self.lines.append)


@pytest.mark.parametrize(
    ("graphs", "graph_s", "expected", "line"),
    [
        ("auto", 0.5, [False, True, True], ""),
        ("auto", 1.5, [False] * 3, "replaying takes 1500.00 ms a row, running 1000.00"),
        ("on", 1.5, [False, True, True], ""),
        ("off", 0.5, [False] * 3, ""),
    ],
)
def test_the_faster_way_is_taken(
    monkeypatch: pytest.MonkeyPatch, graphs: str, graph_s: float, expected: list[bool], line: str
) -> None:
    bench = Bench(monkeypatch, graph_s=graph_s)
    replay = bench.replay(graphs)
    assert bench.pictures(replay, 3) == expected
    assert bench.lines == ([f"rows are not replayed: {line}"] if line else [])
    replay.close()
    replay.close()
    assert bench.steps.count("close") == bench.steps.count("capture")


def test_the_last_thing_before_a_capture_is_a_plain_row(monkeypatch: pytest.MonkeyPatch) -> None:
    """Whatever ran before: plans of another shape would be built within the capture."""
    bench = Bench(monkeypatch)
    verdicts = Verdicts()
    bench.pictures(bench.replay(verdicts=verdicts), 2)
    bench.pictures(bench.replay(verdicts=verdicts), 2)  # which compares nothing any more
    places = [place for place, step in enumerate(bench.steps) if step == "capture"]
    assert len(places) == 2
    assert [bench.steps[place - 2 : place] for place in places] == [["plain", "wait"]] * 2
    assert bench.steps.count("launch") == COMPARED + 3 + 3


@pytest.mark.parametrize("graphs", ["on", "auto"])
def test_a_replay_that_computes_something_else_is_not_used(
    monkeypatch: pytest.MonkeyPatch, graphs: str
) -> None:
    bench = Bench(monkeypatch)
    bench.graph_error = 0.1
    assert bench.pictures(bench.replay(graphs), 3) == [False] * 3
    # two rows of 2y + row + 0.1 from y = 1 are 0.3 from 5, which is 4 from the start
    assert bench.lines == ["rows are not replayed: a replayed row is 7.5e-02 from a plain one, over 5.0e-03"]


def test_a_graph_that_computes_always_the_same_row_is_not_used(monkeypatch: pytest.MonkeyPatch) -> None:
    for rows in (3, 1):
        bench = Bench(monkeypatch)
        bench.keeps, bench.rows = True, rows
        assert bench.pictures(bench.replay("on"), 3) == [False] * 3
        assert "from a plain one" in bench.lines[0]


def test_a_library_that_says_no_is_quoted(monkeypatch: pytest.MonkeyPatch) -> None:
    bench = Bench(monkeypatch)
    bench.capturable = False
    assert bench.pictures(bench.replay("on"), 3) == [False] * 3
    assert bench.lines == ["rows are not replayed: the library says that its runs cannot be captured"]
    assert "capture" not in bench.steps


def test_pictures_of_one_row(monkeypatch: pytest.MonkeyPatch) -> None:
    bench = Bench(monkeypatch)
    bench.rows = 1
    assert bench.pictures(bench.replay(), 3) == [False, True, True]


@pytest.mark.parametrize("glitch", [3.0, np.nan])
def test_one_glitch_excuses_no_wrong_graph(monkeypatch: pytest.MonkeyPatch, glitch: float) -> None:
    bench = Bench(monkeypatch)
    bench.graph_error = 0.5
    good, runs = bench.enqueue_row, iter(range(1000))

    def now_and_then() -> None:
        good()
        if next(runs) == 3:  # of the first picture's three rows, then the first that is compared
            bench.state = bench.state + glitch

    monkeypatch.setattr(bench, "enqueue_row", now_and_then)
    assert bench.pictures(bench.replay("on"), 3)[-1] is False


@pytest.mark.parametrize("at", ["launch", "capture"])
def test_a_comparison_that_is_interrupted_decides_nothing(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, at: str
) -> None:
    """A wrong graph least of all."""
    bench = Bench(monkeypatch)
    bench.graph_error = 0.1
    replay = bench.replay("on", Verdicts(EngineStore(tmp_path)))

    def fail(step: str) -> None:
        if step == at:
            raise KeyboardInterrupt

    bench.failing = fail
    with pytest.raises(KeyboardInterrupt):
        bench.pictures(replay, 2)
    assert not replay.replayed
    assert kept(tmp_path) == []
    bench.failing = lambda step: None
    assert bench.pictures(replay, 2) == [False, False]
    assert "from a plain one" in bench.lines[0], "compared anew, and refused"
    assert bench.steps.count("close") == bench.steps.count("capture")


@pytest.mark.parametrize("kind", [BackendError, MemoryLimitError])
def test_a_graph_that_cannot_be_launched_is_not_used(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, kind: type[BackendError | MemoryLimitError]
) -> None:
    bench = Bench(monkeypatch)
    replay = bench.replay("on", Verdicts(EngineStore(tmp_path)))

    def fail(step: str) -> None:
        if step == "launch":
            raise kind("refused", expected="", fix="")

    bench.failing = fail
    assert bench.pictures(replay, 3) == [False] * 3
    assert bench.lines == ["rows are not replayed: refused"]
    assert kept(tmp_path) == [], "the device works: the next process may try again"


def test_after_a_graph_that_fails_later_rows_run_plainly(monkeypatch: pytest.MonkeyPatch) -> None:
    bench = Bench(monkeypatch)
    replay = bench.replay()
    assert bench.pictures(replay, 2) == [False, True]

    def fail(step: str) -> None:
        if step == "launch":
            raise BackendError("refused", expected="", fix="")

    bench.failing = fail
    with pytest.raises(BackendError, match="refused"):
        bench.pictures(replay, 1)
    assert bench.pictures(replay, 2) == [False, False]


def test_what_differs_from_itself_may_differ_as_much(monkeypatch: pytest.MonkeyPatch) -> None:
    bench = Bench(monkeypatch)
    bench.noise, bench.graph_error = 0.01, 0.02
    assert bench.pictures(bench.replay(), 3) == [False, True, True]
    bench = Bench(monkeypatch)
    bench.noise, bench.graph_error = 0.001, 0.02
    assert bench.pictures(bench.replay(), 3) == [False] * 3


def test_pictures_that_are_not_finite_decide_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    bench = Bench(monkeypatch)
    replay, good = bench.replay(), bench.enqueue_row

    def broken() -> None:
        good()
        bench.state = bench.state * np.nan

    monkeypatch.setattr(bench, "enqueue_row", broken)
    assert bench.pictures(replay, 2) == [False, False]
    monkeypatch.setattr(bench, "enqueue_row", good)
    assert bench.pictures(replay, 1) == [True]
    assert bench.lines == []


# ── what is remembered ──────────────────────────────────────────────────────────────────────────────────


def kept(root: Path) -> list[dict[str, Any]]:
    files = sorted((root / "caches" / "replays").glob("*"))
    return [json.loads(file.read_bytes()[:-40]) for file in files]


def test_a_verdict_holds_for_the_next_process(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    store = EngineStore(tmp_path)
    bench = Bench(monkeypatch)
    bench.pictures(bench.replay(verdicts=Verdicts(store, {"gpu": "L4"})), 2)
    (verdict,) = kept(tmp_path)
    assert verdict == {
        "failed": "",
        "began": 0,
        "distance": 0,
        "allowed": 5e-3,
        "plain_s": 1.0,
        "replayed_s": 0.5,
    }
    launches = bench.steps.count("launch")
    assert bench.pictures(bench.replay(verdicts=Verdicts(store, {"gpu": "L4"})), 2) == [False, True]
    assert bench.steps.count("launch") == launches + 3, "compared again"
    bench.pictures(bench.replay(verdicts=Verdicts(store, {"gpu": "L40"})), 2)
    assert len(kept(tmp_path)) == 2
    store.prune(everything=True)
    assert kept(tmp_path) == []


def test_a_slow_or_wrong_replay_is_remembered(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    store = EngineStore(tmp_path)
    bench = Bench(monkeypatch, graph_s=2.0)
    for _ in range(2):
        assert bench.pictures(bench.replay(verdicts=Verdicts(store)), 2) == [False, False]
    assert bench.steps.count("capture") == 1
    assert len(bench.lines) == 2
    assert bench.pictures(bench.replay("on", verdicts=Verdicts(store)), 2) == [False, True]


def test_a_comparison_that_ends_the_process_is_not_tried_again(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    store = EngineStore(tmp_path)
    bench = Bench(monkeypatch)

    def fail(step: str) -> None:
        lost = "launch" in bench.steps or step == "launch"
        if lost and "launch" not in bench.steps:
            bench.steps.append("launch")
        if lost:
            raise BackendError("an illegal address", expected="", fix="")

    bench.failing = fail
    times = iter((1000.0, 1059.0, 1061.0))
    monkeypatch.setattr(verdicts_module, "time", lambda: next(times))
    for _ in range(2):  # 59 seconds later another process may still be at it
        bench.steps.clear()
        with pytest.raises(BackendError, match="illegal address"):
            bench.pictures(bench.replay(verdicts=Verdicts(store)), 2)
        assert [(item["failed"], item["began"]) for item in kept(tmp_path)] == [(UNFINISHED, 1000)]
    bench.steps.clear()
    assert bench.pictures(bench.replay("on", verdicts=Verdicts(store)), 3) == [False] * 3
    assert bench.lines == [f"rows are not replayed: {UNFINISHED}"]


def test_a_capture_that_fails_is_tried_by_the_next_process(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """Memory may have been short, for instance."""
    store = EngineStore(tmp_path)
    bench = Bench(monkeypatch)

    def fail(step: str) -> None:
        if step == "capture":
            raise BackendError("no room for it", expected="", fix="")

    bench.failing = fail
    assert bench.pictures(bench.replay(verdicts=Verdicts(store)), 4) == [False] * 4
    assert bench.lines == ["rows are not replayed: no room for it"]
    assert kept(tmp_path) == []
    bench.failing = lambda step: None
    assert bench.pictures(bench.replay(verdicts=Verdicts(store)), 2) == [False, True]


def test_running_out_of_memory_before_a_capture_is_the_requests_matter(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """It gives something up and draws again (`memory_fallback.py`)."""
    bench = Bench(monkeypatch)
    replay = bench.replay(verdicts=Verdicts(EngineStore(tmp_path)))
    bench.pictures(replay, 1)

    def fail(step: str) -> None:
        if step == "plain":
            raise MemoryLimitError("no room", expected="", fix="")

    bench.failing = fail
    with pytest.raises(MemoryLimitError):
        bench.pictures(replay, 1)
    assert kept(tmp_path) == []
    bench.failing = lambda step: None
    assert bench.pictures(replay, 1) == [True]


@pytest.mark.parametrize("content", [b"", b"{}?", b"[1]", b'{"speed": 1}'])
def test_a_verdict_that_cannot_be_read_is_none(tmp_path: Path, content: bytes) -> None:
    verdicts = Verdicts(EngineStore(tmp_path), "here")
    verdicts.keep("a", Verdict(distance=1.0))
    assert Verdicts(EngineStore(tmp_path), "here").find("a") == Verdict(distance=1.0)
    (file,) = (tmp_path / "caches" / "replays").iterdir()
    EngineStore(tmp_path).write_side_file(file, content)
    assert Verdicts(EngineStore(tmp_path), "here").find("a") is None


def test_a_store_that_cannot_be_written(tmp_path: Path) -> None:
    (tmp_path / "file").write_bytes(b"")
    verdicts = Verdicts(EngineStore(tmp_path / "file"), "here")
    verdicts.keep("a", Verdict())
    assert verdicts.find("a") == Verdict()
    verdicts.forget("a")
    assert verdicts.find("a") is None


def test_what_a_verdict_holds_for(package: Package) -> None:
    """Another GPU, driver, library, release or graph may replay something else."""
    known = replayed_facts(package, "onnxruntime 1.31.1 CUDA", HostDevice())
    assert known == replayed_facts(package, "onnxruntime 1.31.1 CUDA", HostDevice())
    other_device = HostDevice()
    other_device.kind = "NVIDIA L4, 58 SMs, 24 GiB, driver 580.82.07"
    graph = package.manifest.nets["unet"].graph
    files = {**package.manifest.files, graph: replace(package.manifest.files[graph], sha256="0" * 64)}
    other_graph = replace(package, manifest=replace(package.manifest, files=files))
    others = [
        replayed_facts(package, "onnxruntime 1.32.0 CUDA", HostDevice()),
        replayed_facts(package, "onnxruntime 1.31.1 CUDA", other_device),
        replayed_facts(other_graph, "onnxruntime 1.31.1 CUDA", HostDevice()),
    ]
    assert known not in others
    assert known["latentrt"] == latentrt_version()
    assert REVISION in known.values(), "how graphs are lowered"
