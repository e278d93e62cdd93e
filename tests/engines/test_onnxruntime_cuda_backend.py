"""The backend on host memory that passes for a GPU: what is remembered, what is opened, what is drawn."""

import json
import sys
from collections.abc import Generator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from latentrt import cli
from latentrt.engines.backend import DeviceBackend, choose_backend
from latentrt.engines.cuda import device as cuda_device
from latentrt.engines.cuda import facts as cuda_facts
from latentrt.engines.errors import BackendError, PackageError
from latentrt.engines.onnxruntime import cuda_backend
from latentrt.engines.onnxruntime.cuda_backend import ONNXRUNTIME_CUDA
from latentrt.engines.onnxruntime.lowering import files as lowering_files
from latentrt.engines.onnxruntime.lowering.lower import REVISION, lower
from latentrt.engines.onnxruntime.tuning import cuda as tuning
from latentrt.engines.onnxruntime.tuning.cuda import tune_package
from latentrt.engines.onnxruntime.tuning.cuda_layouts import CUDA_LAYOUTS, layout_key, stored_graph
from latentrt.engines.package import Package
from latentrt.engines.store.engine_store import EngineStore, Miss
from latentrt.engines.store.key import EngineKey
from latentrt.engines.tuning.choice import TUNED_NETS
from latentrt.runtime.pipeline import Pipeline
from tests.engines.host_device import DEVICE_NETS
from tests.engines.layout_setting import GPU, KnownHost, open_on_cpu, oracle_opener
from tests.runtime.device_bench import package_with_step

PROMPT = "a red circle on a blue background"
REQUEST: dict[str, Any] = {
    "num_inference_steps": 3,
    "seed": 5,
    "height": 64,
    "width": 96,
    "output_type": "np",
}


@pytest.fixture(scope="module")
def demo(tmp_path_factory: pytest.TempPathFactory) -> Package:
    return package_with_step(tmp_path_factory.mktemp("demo") / "package")


@pytest.fixture
def store(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> EngineStore:
    """The user's own."""
    monkeypatch.setenv("LATENTRT_CACHE", str(tmp_path / "cache"))
    return EngineStore()


@pytest.fixture
def host(monkeypatch: pytest.MonkeyPatch) -> Generator[KnownHost]:
    """In place of the GPU, with nets on the CPU."""
    device = KnownHost()
    for module in (cuda_device, tuning):
        monkeypatch.setattr(module, "CudaDevice", lambda _=0: device)
    for module in (cuda_backend, tuning):
        monkeypatch.setattr(module, "cuda_refusal", lambda: None)
        monkeypatch.setattr(module, "open_onnxruntime_net", open_on_cpu)
    monkeypatch.setattr(cuda_facts, "facts", lambda _=0: GPU)
    yield device
    assert not device.blocks, "memory that was not given back"


def remember(demo: Package, net: str, layout: str, store: EngineStore, **change: Any) -> EngineKey:
    """Put a choice into the store, as if it had been measured."""
    key = replace(layout_key(demo, net, GPU), **change)

    def build(path: Path) -> dict[str, Any]:
        graph = demo.path(demo.manifest.nets[net].graph)
        if layout == "nhwc":
            graph = lower(demo, net, path.parent / "lowered")
        path.write_bytes(graph.read_bytes())
        return {"layout": layout, "milliseconds": {}, "relative_l2": {}, "rejected": {}}

    store.get_or_build(key, build)
    return key


# ── the store ───────────────────────────────────────────────────────────────────────────────────────────


def test_every_layout_is_measured_once(demo: Package, store: EngineStore, tmp_path: Path) -> None:
    """The lowered graphs in the oracle's standard operators: their parity is that of the lowering."""
    device, opener = KnownHost(), oracle_opener(tmp_path / "graphs")
    (tmp_path / "graphs").mkdir()
    first = tune_package(demo, store, device=device, open_net=opener, rounds=2)
    assert [item.why for item in first] == [
        f"no engine of {net} for onnxruntime-cuda has been built yet" for net in TUNED_NETS
    ]
    for item in first:
        facts = json.loads(json.dumps(dict(item.entry.facts)))
        assert facts["rejected"] == {}
        assert set(facts["milliseconds"]) == set(CUDA_LAYOUTS)
        assert 0 <= max(facts["relative_l2"].values()) < 1e-3
        assert set(facts["relative_l2"]) == {"nhwc"}
    submitted = device.submitted
    again = tune_package(demo, store, device=device, open_net=opener)
    assert device.submitted == submitted
    assert [(item.net, item.entry.facts["layout"], item.why) for item in again] == [
        (item.net, item.entry.facts["layout"], "") for item in first
    ]
    for item in first:
        assert stored_graph(demo, item.net, store, GPU) == (item.entry.facts["layout"], item.entry.read())
    assert not device.blocks


def test_the_key(demo: Package) -> None:
    key = layout_key(demo, "unet", GPU, "1.31.1")
    assert (key.backend, key.backend_version, key.compute_capability) == (
        "onnxruntime-cuda",
        "1.31.1",
        "sm_89",
    )
    assert (key.gpu, key.driver) == ("NVIDIA L4, 58 SMs, 24 GiB", "580")
    assert key.profiles == ("B=2 H/8=16 T=77 W/8=16",)
    assert key.flags == (f"lowering {REVISION}", "nhwc", "plain")
    assert key.weights == demo.manifest.files["unet/weights.safetensors"].sha256


@pytest.mark.parametrize(
    "change",
    [
        {"backend_version": "1.25.0"},
        {"gpu": "NVIDIA L40"},
        {"compute_capability": "sm_90"},
        {"driver": "575"},
    ],
)
def test_measured_elsewhere(demo: Package, store: EngineStore, change: dict[str, str]) -> None:
    remember(demo, "unet", "nhwc", store, **change)
    assert stored_graph(demo, "unet", store, GPU) is None


def test_a_choice_that_is_damaged_or_from_another_release(demo: Package, store: EngineStore) -> None:
    key = remember(demo, "unet", "nhwc", store)
    path = store.engines / key.digest / "engine.bin"
    path.write_bytes(path.read_bytes()[:-1] + b"?")
    assert stored_graph(demo, "unet", store, GPU) is None
    assert isinstance(store.find(key), Miss)
    remember(demo, "vae_decoder", "nhcw16", store)
    assert stored_graph(demo, "vae_decoder", store, GPU) is None


# ── opening ─────────────────────────────────────────────────────────────────────────────────────────────


def test_available_here() -> None:
    if ONNXRUNTIME_CUDA.refusal() is None:
        pytest.skip("there is a CUDA device")
    with pytest.raises(BackendError, match="backend onnxruntime-cuda cannot run here: "):
        choose_backend("onnxruntime-cuda")


def test_it_is_a_device_backend(host: KnownHost) -> None:
    name, found = choose_backend("onnxruntime-cuda")
    assert name == "onnxruntime-cuda"
    assert isinstance(found, DeviceBackend)
    assert ONNXRUNTIME_CUDA.describe().startswith("onnxruntime 1.")
    assert ONNXRUNTIME_CUDA.describe().endswith(" CUDA (NVIDIA L4, sm_89)")


def test_each_net_opens_in_its_layout(
    demo: Package,
    store: EngineStore,
    host: KnownHost,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    logged: list[str],
) -> None:
    (tmp_path / "graphs").mkdir()
    opened = list[tuple[str, bytes]]()
    monkeypatch.setattr(cuda_backend, "open_onnxruntime_net", oracle_opener(tmp_path / "graphs", opened))
    nets = ("text_encoder", *TUNED_NETS)
    lowered = {net: lower(demo, net, tmp_path / "lowered").read_bytes() for net in nets}

    def graphs() -> dict[str, bytes]:
        opened.clear()
        device, nets = ONNXRUNTIME_CUDA.open_device(demo, DEVICE_NETS)
        assert [item[0] for item in opened] == list(nets) == list(DEVICE_NETS)
        for net in nets.values():
            net.close()
        device.close()
        assert logged == []
        return {name: graph for name, graph in opened if graph}

    assert graphs() == lowered, "nothing is measured: `nhwc`"
    remember(demo, "unet", "plain", store)
    del lowered["unet"]
    assert graphs() == lowered
    key = remember(demo, "vae_decoder", "nhwc", store)
    lowered["vae_decoder"] = (store.engines / key.digest / "engine.bin").read_bytes()
    assert graphs() == lowered


def test_what_cannot_be_lowered_is_said_in_one_line(
    demo: Package,
    store: EngineStore,
    host: KnownHost,
    monkeypatch: pytest.MonkeyPatch,
    logged: list[str],
) -> None:
    monkeypatch.setattr(lowering_files, "find_spec", lambda name: None)
    device, nets = ONNXRUNTIME_CUDA.open_device(demo, ["step", "unet", "vae_decoder"])
    for net in nets.values():
        net.close()
    device.close()
    assert logged == [
        "unet and vae_decoder run in the layout `plain`, which is slower: there is no layout but `plain`:"
        " onnx-ir is not installed; Install it: pip install onnx-ir"
    ]


def test_nothing_stays_open_after_an_error(
    demo: Package, store: EngineStore, host: KnownHost, monkeypatch: pytest.MonkeyPatch
) -> None:
    opened = list[Any]()

    def fails_later(package: Package, name: str, device: Any, **options: Any) -> Any:
        if opened:
            raise PackageError("no", expected="", fix="")
        opened.append(open_on_cpu(package, name, device, **options))
        return opened[0]

    monkeypatch.setattr(cuda_backend, "open_onnxruntime_net", fails_later)
    with pytest.raises(PackageError):
        ONNXRUNTIME_CUDA.open_device(demo, ["step", "unet"])
    assert host.closed
    with pytest.raises(BackendError, match="'step' is closed"):
        opened[0].session()


@pytest.mark.parametrize("layout", [None, "plain"])
def test_it_draws_what_the_host_draws(
    demo: Package,
    store: EngineStore,
    host: KnownHost,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    logged: list[str],
    layout: str | None,
) -> None:
    """The lowered graphs as the oracle's functions, or what the store says."""
    (tmp_path / "graphs").mkdir()
    monkeypatch.setattr(cuda_backend, "open_onnxruntime_net", oracle_opener(tmp_path / "graphs"))
    for net in TUNED_NETS if layout else ():
        remember(demo, net, str(layout), store)
    with Pipeline.open(demo.root, backend="onnxruntime") as pipe:
        wanted = pipe(PROMPT, **REQUEST).images.astype(int)
    with Pipeline.open(demo.root, backend="onnxruntime-cuda", graphs="off") as pipe:
        assert pipe.backend == ONNXRUNTIME_CUDA.describe()
        found = pipe(PROMPT, **REQUEST).images.astype(int)
    assert found.shape == wanted.shape == (1, 64, 96, 3)
    assert np.abs(found - wanted).max() <= 1
    assert host.closed
    assert logged == []


# ── the command ─────────────────────────────────────────────────────────────────────────────────────────


@pytest.fixture
def build(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], demo: Package) -> Any:
    """Call `latentrt build` for this backend: (exit code, stdout, stderr)."""

    def call(*arguments: str) -> tuple[int, str, str]:
        command = ["latentrt", "build", str(demo.root), "--backend", "onnxruntime-cuda", *arguments]
        monkeypatch.setattr(sys, "argv", command)
        with pytest.raises(SystemExit) as caught:
            cli.main()
        out, err = capsys.readouterr()
        return int(caught.value.code or 0), out, err

    return call


def test_the_command_without_a_gpu(build: Any, store: EngineStore) -> None:
    if ONNXRUNTIME_CUDA.refusal() is None:
        pytest.skip("there is a CUDA device")
    code, out, err = build()
    assert (code, out) == (4, "")
    assert "the backend onnxruntime-cuda cannot run here: " in err


def test_the_command_prints_medians_and_choice(
    build: Any, store: EngineStore, host: KnownHost, monkeypatch: pytest.MonkeyPatch
) -> None:
    def tune(*arguments: Any, nets: Any) -> Any:
        return tune_package(*arguments, nets=nets, open_net=open_on_cpu, rounds=1)

    monkeypatch.setattr(tuning, "tune_package", tune)
    code, out, err = build("--nets", "unet")
    assert (code, err) == (0, "")
    first, *others = out.splitlines()
    assert first.startswith("unet  plain  (plain ")
    assert first.endswith(" ms)  measured: no engine of unet for onnxruntime-cuda has been built yet")
    assert [line.partition(":")[0] for line in others] == ["  nhwc is out"]
    assert build("--nets", "unet")[1].splitlines()[0].endswith(" ms)  in the store")
    code, out, _ = build("--json", "--nets", "unet")
    found = json.loads(out)
    assert (code, found["backend"], found["nets"][0]["cached"]) == (0, "onnxruntime-cuda", True)
    assert found["nets"][0]["facts"]["layout"] == "plain"


@pytest.mark.parametrize(
    ("arguments", "text"),
    [
        (["--profile", "512x512"], "--profile was given with --backend onnxruntime-cuda"),
        (["--dry-run"], "--dry-run was given with --backend onnxruntime-cuda"),
        (["--weights", "streamed"], "--weights was given with --backend onnxruntime-cuda"),
        (["--optimization-level", "5"], "--optimization-level was given with --backend onnxruntime-cuda"),
        (["--workspace", "16"], "--workspace was given with --backend onnxruntime-cuda"),
        (
            ["--hardware-compatibility", "ampere_plus"],
            "--hardware-compatibility was given with --backend onnxruntime-cuda",
        ),
        (["--nets", "step"], "the net 'step' has no layouts"),
    ],
)
def test_what_the_command_refuses(
    build: Any, store: EngineStore, host: KnownHost, arguments: list[str], text: str
) -> None:
    code, out, err = build(*arguments)
    assert (code, out) == (2, "")
    assert text in " ".join(err.split())
