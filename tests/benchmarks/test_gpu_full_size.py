"""The steps of the GPU check over a large model, torch and what runs first, on host memory with the demo."""

import ctypes
import json
import math
from collections.abc import Callable, Generator, Iterator
from contextlib import contextmanager
from dataclasses import replace
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from latentrt.benchmarks.gpu import opener as gpu_opener
from latentrt.benchmarks.gpu import smoke as gpu_smoke
from latentrt.benchmarks.gpu import torch_unet as gpu_torch
from latentrt.benchmarks.gpu.check import line_of
from latentrt.benchmarks.gpu.full_size import net, outlived, shapes, whole
from latentrt.benchmarks.gpu.opener import Opener, Scale, collect
from latentrt.benchmarks.gpu.smoke import environment, smoke
from latentrt.benchmarks.gpu.torch_unet import torch_unet
from latentrt.benchmarks.models.recipes import unet
from latentrt.benchmarks.records import Row
from latentrt.engines.device import Addresses, Graph, Shapes
from latentrt.engines.errors import BackendError
from latentrt.engines.onnxruntime.nets import CPU
from tests.benchmarks.gpu_stand_in import PACKAGE, SCALE, WatchedDevice, stand_in

FIRST = {"first_s", "second_s", "third_s", "device_p50_s", "host_p50_s", "taken_mib", "peak_mib"}


def run(step: Callable[[Opener, Scale], Iterator[Row]], opener: Opener) -> dict[str, Row]:
    rows = {row.workload: row for row in collect(step(opener, SCALE))}
    for row in rows.values():
        assert row.workload in line_of(replace(row, case={"backend": "b", "what": row.workload}))
        json.loads(json.dumps(row.to_json(), allow_nan=False))
    return rows


def statuses(rows: dict[str, Row]) -> dict[str, str]:
    return {name: row.reason or row.status for name, row in rows.items()}


# ── one net ──────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize("workload", ["unet", "vae_decoder", "text_encoder"])
def test_a_net_is_timed_plain_and_replayed(tmp_path: Path, workload: str) -> None:
    device = WatchedDevice(2**30)
    rows = run(partial(net, workload=workload), stand_in(device, folder=tmp_path))
    assert statuses(rows) == {f"{workload} {how}": "ok" for how in ("opened", "plain", "replayed")}
    plain, replayed = rows[f"{workload} plain"], rows[f"{workload} replayed"]
    assert set(plain.figures) == FIRST
    assert replayed.figures["relative_l2"] == 0
    assert len(replayed.samples) == SCALE.steps
    assert plain.figures["peak_mib"] >= plain.figures["taken_mib"] > 0
    assert not device.blocks


@pytest.mark.parametrize(
    ("value", "reason"), [(100.0, "prediction is not ours: relative L2"), (math.nan, "is not finite")]
)
def test_later_steps_have_to_come_to_what_the_first_did(tmp_path: Path, value: float, reason: str) -> None:
    run(net, stand_in(folder=tmp_path))

    class Off:
        def __init__(self, bound: Any, address: int, submit: Any) -> None:
            self.bound, self.address, self.submit = bound, address, submit

        def __getattr__(self, name: str) -> Any:
            return getattr(self.bound, name)

        def enqueue(self) -> None:
            self.bound.enqueue()
            place = ctypes.c_float.from_address(self.address)
            self.submit(lambda: setattr(place, "value", value))

    def wrong(name: str, hungry: Any) -> Any:
        bind = hungry.bind

        def changed(shapes: Shapes, addresses: Addresses, scratch: int) -> Any:
            return Off(bind(shapes, addresses, scratch), addresses["prediction"], hungry.net.submit)

        if name == "unet":
            hungry.bind = changed
        return hungry

    rows = run(partial(net, layout="plain"), stand_in(wrap=wrong, folder=tmp_path))
    for how in ("plain", "replayed"):
        assert reason in rows[f"unet {how}"].reason
        assert rows[f"unet {how}"].samples, "how long it took is still of interest"


def test_what_cannot_be_captured_is_told_and_the_rest_counts(tmp_path: Path) -> None:
    rows = statuses(run(net, stand_in(WatchedDevice(2**30, capturable=False), folder=tmp_path)))
    assert rows["unet plain"] == "ok"
    assert "the stream cannot be captured" in rows["unet replayed"]


def test_experiments_reach_the_library(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[Any] = []

    def opened(package: Any, name: str, device: Any, *, graph: Any, settings: Any) -> Any:
        asked.append((name, graph.name if graph else None, settings))
        return SimpleNamespace(close=lambda: None)

    fake = SimpleNamespace(facts=None, close=lambda: asked.append("closed"))
    monkeypatch.setattr(gpu_opener, "choose_backend", lambda name: (name, None))
    monkeypatch.setattr(gpu_opener, "CudaDevice", lambda: fake)
    monkeypatch.setattr(gpu_opener, "open_onnxruntime_net", opened)
    monkeypatch.setattr(gpu_opener, "lower", lambda package, name, folder: folder / f"{name}.onnx")
    opener = gpu_opener.backend_opener("onnxruntime-cuda", PACKAGE, Path("nowhere"))
    _, nets = opener.open_device(nets=("unet_time", "unet"), layout="nhwc", settings={"a": "1"})
    assert list(nets) == ["unet_time", "unet"]
    opener.open_device(nets=("unet",), layout="plain")
    assert asked == [("unet_time", None, {"a": "1"}), ("unet", "unet.onnx", {"a": "1"}), ("unet", None, None)]
    monkeypatch.setattr(gpu_opener, "open_onnxruntime_net", lambda *a, **k: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        opener.open_device(nets=("unet",), layout="plain")
    assert asked[-1] == "closed"


# ── a whole picture ────────────────────────────────────────────────────────────────────────────────


def test_a_whole_picture() -> None:
    device = WatchedDevice(2**30)
    rows = run(whole, stand_in(device))
    names = ["picture opened", "first picture", "plain pictures", "memory", "replayed pictures"]
    assert statuses(rows) == dict.fromkeys(names, "ok")
    assert len(rows["first picture"].samples) == 1
    assert rows["replayed pictures"].figures["psnr_db"] == float("inf")
    memory = rows["memory"].figures
    assert memory["peak_mib"] > 0 == memory["opened_mib"] == memory["closed_mib"]
    assert memory["of_process_mib"] is None
    assert not device.blocks


def test_a_picture_that_fails_leaves_the_memory() -> None:
    def refuse(name: str, hungry: Any) -> Any:
        def bind(*arguments: Any) -> Any:
            raise BackendError("no room", expected="", fix="")

        if name == "vae_decoder":
            hungry.bind = bind
        return hungry

    rows = statuses(run(whole, stand_in(wrap=refuse)))
    assert "no room" in rows["first picture"]
    assert rows["memory"] == "ok"
    assert rows["replayed pictures"] == "there is no plain picture to compare with"


def test_replayed_pictures_are_compared(monkeypatch: pytest.MonkeyPatch) -> None:
    likeness = iter(
        [41.0, 60.0, 41.0, 42.0]
    )  # replayed and plain; two plain ones: libraries sum in any order
    monkeypatch.setattr("latentrt.benchmarks.gpu.full_size.psnr", lambda *pictures: next(likeness))
    rows = statuses(run(whole, stand_in()))
    assert rows["replayed pictures"] == "41.0 dB between plain and replayed, below 50"
    assert statuses(run(whole, stand_in()))["replayed pictures"] == "ok"


# ── experiments ────────────────────────────────────────────────────────────────────────────────────


def test_two_shapes_in_turns() -> None:
    rows = run(shapes, stand_in())
    assert list(rows) == [f"{name}, turn {turn}" for turn in (1, 2, 3) for name in ("guided", "unguided")]
    assert {row.status for row in rows.values()} == {"ok"}
    for row in rows.values():
        assert row.figures["rebuilt_s"] < row.figures["first_s"]


def test_whether_a_graph_outlives_another_shape() -> None:
    rows = run(outlived, stand_in())
    assert statuses(rows) == dict.fromkeys(
        ["two plain runs", "replayed", "replayed after another shape"], "ok"
    )
    assert rows["replayed after another shape"].figures == {"relative_l2": 0, "outlives": "yes"}


class Fragile(WatchedDevice):
    """Its graphs compute something else once it is spoilt."""

    spoilt = False

    @contextmanager
    def capture(self) -> Generator[list[Graph]]:
        with super().capture() as graphs:
            yield graphs
        graph: Any = graphs[0]
        launch = graph.launch
        graph.launch = lambda: self.spoil() if self.spoilt else launch()

    def spoil(self) -> None:
        for address, size in list(self.sizes.items()):
            self.submit(partial(ctypes.memset, address, 60, size))


def test_a_graph_that_does_not_outlive_it_is_no_failure_and_a_wrong_one_is() -> None:
    device = Fragile(2**30)

    def spoiling(name: str, hungry: Any) -> Any:
        bind = hungry.bind

        def bound(shapes: Shapes, addresses: Addresses, scratch: int) -> Any:
            found = bind(shapes, addresses, scratch)
            enqueue = found.enqueue
            if shapes.get("latent", (0,))[0] == 1:  # the unguided one
                found.enqueue = lambda: setattr(device, "spoilt", True) or enqueue()
            return found

        if name == "unet":
            hungry.bind = bound
        return hungry

    rows = run(outlived, stand_in(device, wrap=spoiling))
    last = rows["replayed after another shape"]
    assert statuses(rows) == dict.fromkeys(rows, "ok")
    assert last.figures["outlives"] == "no"
    rows = run(outlived, stand_in(device))
    assert "from a plain run, above" in rows["replayed"].reason


# ── torch ────────────────────────────────────────────────────────────────────────────────────────


class Event:
    def __init__(self, enable_timing: bool) -> None:
        self.times = 0

    def record(self) -> None:
        self.times += 1

    def elapsed_time(self, other: "Event") -> float:
        assert self.times == other.times
        return 7.0


def test_torchs_unet_is_timed_by_its_events(monkeypatch: pytest.MonkeyPatch) -> None:
    import torch

    tiny = unet((32,), (False,), cross_attention_dim=32, attention_head_dim=2, sample_size=8)
    waits, modes = list[None](), list[str]()
    monkeypatch.setattr(gpu_torch, "UNET", {**tiny, "layers_per_block": 1})
    monkeypatch.setattr(gpu_torch, "DEVICE", "cpu")
    monkeypatch.setattr(gpu_torch, "_RUNS", 2)
    monkeypatch.setattr(gpu_torch, "missing_modules", lambda *names: None)
    monkeypatch.setattr(gpu_torch, "set_up", lambda nets, half, compiled: modes.append(compiled))
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "Event", Event)
    monkeypatch.setattr(torch.cuda, "synchronize", lambda: waits.append(None))
    for mode, said in (("", "no"), ("reduce-overhead", "reduce-overhead")):
        (row,) = collect(torch_unet(mode))
        assert row.status == "ok", row.reason
        assert row.figures["device_p50_s"] == 0.007
        assert row.figures["compile"] == said
        assert FIRST - {"taken_mib", "peak_mib"} <= set(row.figures)
        assert len(row.samples) == 2
    assert modes == ["", "reduce-overhead"]
    assert len(waits) == 2 * 5


def test_torch_is_not_needed(monkeypatch: pytest.MonkeyPatch) -> None:
    import torch

    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    (row,) = torch_unet("")
    assert (row.status, row.reason) == ("not available", "torch sees no CUDA device")
    monkeypatch.setattr("latentrt.benchmarks.sides.contract.find_spec", lambda name: None)
    (row,) = torch_unet("reduce-overhead")
    assert (row.status, row.reason) == ("not available", "not installed: torch, diffusers, triton")


# ── what runs first ────────────────────────────────────────────────────────────────────────────────


@pytest.fixture
def on_cpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gpu_smoke, "CUDA", CPU)
    monkeypatch.setattr(gpu_smoke, "load_libraries", lambda: None)


@pytest.mark.usefixtures("on_cpu")
def test_the_least_that_can_be_run() -> None:
    assert statuses(run(smoke, stand_in())) == {"step": "ok", "convolution": "ok", "unet": "ok"}


@pytest.mark.usefixtures("on_cpu")
def test_each_error_of_the_least_has_a_row(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(device: Any) -> None:
        raise BackendError("no device", expected="a device", fix="Buy one.")

    monkeypatch.setattr(gpu_smoke, "_CHANNELS", 4)
    monkeypatch.setattr(np, "ones", np.zeros)
    rows = statuses(run(smoke, stand_in(opened=refuse)))
    assert "no device" in rows["step"]
    assert "no device" in rows["unet"]
    assert rows["convolution"] == "ones by ones came to 0 to 0, not 4"
    monkeypatch.setattr(gpu_smoke, "CUDA", "CUDAExecutionProvider")
    monkeypatch.setattr(gpu_smoke, "library", _on_the_cpu)
    assert "on the CPU" in statuses(run(smoke, stand_in(opened=refuse)))["convolution"]


def _on_the_cpu() -> Any:
    """onnxruntime where its CUDA provider does not load: it says so on stderr, and goes on without."""
    session = SimpleNamespace(get_providers=lambda: [CPU])
    return SimpleNamespace(InferenceSession=lambda content, **options: session)


def test_what_loads_and_what_the_loader_says(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    def missing() -> None:
        raise BackendError("cuDNN does not load: libcudnn.so.9", expected="cuDNN", fix="Install it.")

    described = SimpleNamespace(describe=lambda: "onnxruntime 9")
    monkeypatch.setattr(gpu_smoke, "load_libraries", missing)
    monkeypatch.setattr(gpu_smoke, "choose_backend", lambda name: (name, described))
    monkeypatch.setattr(gpu_smoke, "library", lambda: SimpleNamespace(__file__=str(tmp_path / "__init__.py")))
    monkeypatch.setattr(gpu_smoke, "cuda_refusal", lambda: None)
    (tmp_path / "capi").mkdir()
    for name in ("shared", "cuda"):
        (tmp_path / "capi" / f"libonnxruntime_providers_{name}.so").write_text("no library")
    rows = {row.workload: row for row in environment("onnxruntime-cuda")}
    assert "libcudnn.so.9" in rows["CUDA and cuDNN"].reason
    assert rows["the CUDA provider"].status == "FAILED"
    assert "libonnxruntime_providers_shared.so" in rows["the CUDA provider"].reason
    assert rows["backend"].figures == {"is": "onnxruntime 9"}
    assert [row.workload for row in environment("tensorrt")] == ["backend"]
    refused = BackendError("the wheel of the CPU", expected="another", fix="Install it.")
    monkeypatch.setattr(gpu_smoke, "cuda_refusal", lambda: refused)
    _, provider, _ = environment("onnxruntime-cuda")
    assert "the wheel of the CPU" in provider.reason
