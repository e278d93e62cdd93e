"""Which of the store's engines a GPU is given, and what is said of GPUs that the library does not list."""

from dataclasses import replace
from pathlib import Path
from typing import Any, cast

import pytest

from latentrt.engines.cuda.facts import DeviceFacts
from latentrt.engines.device import Shapes
from latentrt.engines.errors import BackendError
from latentrt.engines.profiles import Profile, net_profiles
from latentrt.engines.store.engine_store import EngineStore
from latentrt.engines.tensorrt import backend as tensorrt_backend
from latentrt.engines.tensorrt.backend import TENSORRT, TENSORRT_RTX, Candidate, ChosenNet
from latentrt.engines.tensorrt.build import engine_key, find_engines
from latentrt.engines.tensorrt.builder import BuildOptions
from tests.engines import tensorrt_setting as setting
from tests.engines.host_device import HostDevice
from tests.engines.simulated_tensorrt import simulated_engine
from tests.engines.simulated_tensorrt_names import VARIANTS
from tests.engines.tensorrt_setting import PACKAGE, SMALL, bound, row

TRT, RTX, NET = "tensorrt 11", "tensorrt-rtx", "vae_decoder"
GPU = DeviceFacts(
    index=0,
    name="NVIDIA GeForce RTX 3060",
    compute_capability=(8, 6),
    multiprocessors=28,
    driver="580.82",
    cuda="13.0",
    total=12 * 2**30 - 2**26,
    unified=False,
    uuid="GPU-0",
)
SOURCE = Profile.parse("64x64:b1-2")


def put(store: EngineStore, gpu: DeviceFacts, level: str = "", variant: str = TRT) -> None:
    """An engine as `latentrt build` would leave it."""
    file = PACKAGE.manifest.nets[NET]
    profiles = net_profiles(NET, file.spec, [SOURCE])
    options = BuildOptions(hardware_compatibility=level)
    key = engine_key(PACKAGE, NET, row(variant), VARIANTS[variant], profiles, options, gpu=gpu)

    def build(path: Path) -> dict[str, Any]:
        path.write_bytes(simulated_engine(variant, PACKAGE.path(file.graph), profiles))
        return {"profiles": [str(SOURCE)]}

    store.get_or_build(key, build)


def levels(store: EngineStore, gpu: DeviceFacts | None, variant: str = TRT) -> list[str]:
    found = find_engines(PACKAGE, NET, row(variant), VARIANTS[variant], store, gpu=gpu)
    return [entry.key.hardware_compatibility for entry, _ in found]


# ── one name, several GPUs ───────────────────────────────────────────────────────────────────────


def test_gpus_of_one_name_have_engines_of_their_own(tmp_path: Path) -> None:
    store = EngineStore(tmp_path)
    assert GPU.kind == "NVIDIA GeForce RTX 3060, 28 SMs, 12 GiB"
    put(store, GPU)
    assert levels(store, GPU) == [""]
    assert levels(store, replace(GPU, total=12 * 2**30 - 2**25, uuid="GPU-1")) == [""], "another of its kind"
    assert levels(store, replace(GPU, total=8 * 2**30)) == []
    assert levels(store, replace(GPU, multiprocessors=30)) == []


def test_portable_engines_name_no_gpu(tmp_path: Path) -> None:
    store = EngineStore(tmp_path)
    put(store, GPU, variant=RTX)
    assert levels(store, replace(GPU, compute_capability=(12, 0), name="B"), RTX) == [""]
    assert levels(store, None, RTX) == [""]


# ── hardware compatibility ───────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize(
    ("compute_capability", "found"),
    [
        ((8, 6), ["same_compute_capability", "ampere_plus"]),
        ((8, 0), ["ampere_plus"]),
        ((12, 0), ["ampere_plus"]),
        ((7, 5), []),
    ],
)
def test_compatible_engines_are_found_on_other_gpus(
    tmp_path: Path, compute_capability: tuple[int, int], found: list[str]
) -> None:
    store = EngineStore(tmp_path)
    for level in ("ampere_plus", "same_compute_capability", ""):
        put(store, GPU, level)
    other = replace(
        GPU, name="Another", compute_capability=compute_capability, multiprocessors=9, uuid="GPU-1"
    )
    assert levels(store, other) == found
    assert levels(store, replace(other, driver="590.1")) == [], "as every engine"
    assert levels(store, GPU) == ["", "same_compute_capability", "ampere_plus"], "its own first"


def test_what_compatible_engines_are_called() -> None:
    def device(level: str) -> tuple[str, str, str]:
        options = BuildOptions(hardware_compatibility=level)
        key = engine_key(PACKAGE, NET, row(TRT), VARIANTS[TRT], (), options, gpu=GPU)
        return key.compute_capability, key.gpu, key.driver

    assert device("ampere_plus") == ("ampere_plus", "any", "580")
    assert device("same_compute_capability") == ("sm_86", "any", "580")
    assert device("") == ("sm_86", GPU.kind, "580")


# ── opening ──────────────────────────────────────────────────────────────────────────────────────


@pytest.fixture
def device(monkeypatch: pytest.MonkeyPatch) -> HostDevice:
    device = HostDevice()
    device.facts = GPU  # pyright: ignore[reportAttributeAccessIssue]
    monkeypatch.setattr(tensorrt_backend, "CudaDevice", lambda _: device)
    monkeypatch.setattr(tensorrt_backend, "load", lambda row: setting.library(RTX, device))
    monkeypatch.setattr(
        tensorrt_backend, "flavour", lambda backend: row(TRT if backend == "tensorrt" else RTX)
    )
    monkeypatch.setattr(
        tensorrt_backend, "installed_version", lambda backend: VARIANTS[TRT if backend == "tensorrt" else RTX]
    )
    return device


def test_a_gpu_that_the_library_does_not_list_is_tried_with_a_remark(
    tmp_path: Path, device: Any, monkeypatch: pytest.MonkeyPatch, logged: list[str]
) -> None:
    monkeypatch.setenv("LATENTRT_CACHE", str(tmp_path))
    put(EngineStore(), GPU, variant=RTX)
    put(EngineStore(), GPU, "ampere_plus")
    TENSORRT_RTX.open_device(PACKAGE, [NET])
    assert logged == []
    device.facts = replace(GPU, compute_capability=(9, 0))
    TENSORRT_RTX.open_device(PACKAGE, [NET])
    assert logged == ["TensorRT-RTX lists sm_80, sm_86, sm_89, sm_120; this is sm_90: trying"]
    TENSORRT.open_device(PACKAGE, [NET])
    assert len(logged) == 1, "its engines are built for this GPU, or for all since Ampere"


def test_a_choice_closes_every_engine_also_where_one_fails(device: HostDevice) -> None:
    class Failing:
        """An engine whose `close` fails."""

        def __init__(self) -> None:
            self.closed = 0

        def scratch(self, shapes: Shapes) -> int:
            return 0

        def close(self) -> None:
            self.closed += 1
            raise BackendError("this one fails", expected="closing", fix="None.")

    spec, opened = PACKAGE.manifest.nets[NET].spec, [Failing(), Failing()]
    candidates = [
        Candidate(
            profiles=net_profiles(NET, spec, [Profile.parse(size)]), open=lambda net=net: cast(Any, net)
        )
        for size, net in zip(("64x64:b1", "128x128:b1"), opened, strict=True)
    ]
    chosen = ChosenNet(spec, candidates, backend=RTX, package="PACKAGE")
    for cells in (8, 16):
        chosen.scratch({"latent": (1, 4, cells, cells)})
    with pytest.raises(BackendError, match="this one fails"):
        chosen.close()
    assert [net.closed for net in opened] == [1, 1]
    chosen.close()


def test_a_choice_settles_and_releases_every_engine_that_is_open(device: HostDevice) -> None:
    class Store:
        written: bytes = b""

        def read(self) -> bytes:
            return b""

        def write(self, data: bytes) -> None:
            self.written = data

    trt, kept = setting.library(RTX, device), Store()
    spec, profiles = PACKAGE.manifest.nets[NET].spec, setting.profiles(NET)
    candidate = Candidate(
        profiles=profiles,
        open=lambda: setting.open_simulated(trt, RTX, NET, device, options={"cache": kept}),
    )
    chosen = ChosenNet(spec, [candidate], backend=RTX, package="PACKAGE")
    chosen.settle()
    chosen.release()
    run, _, _ = bound(chosen, device, NET, SMALL)  # type: ignore[arg-type]
    run.enqueue()
    chosen.settle()
    assert kept.written
    chosen.scratch(setting.shapes(NET, setting.LARGE))
    assert trt._world.counts["contexts"] == 2
    chosen.release()
    chosen.scratch(setting.shapes(NET, {**setting.LARGE, "W/8": 15}))
    assert trt._world.counts["contexts"] == 3
