"""From the store to a picture through the simulated TensorRT: engines found, chosen, bound, drawn with."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from latentrt.engines.cuda.facts import DeviceFacts
from latentrt.engines.device import Device
from latentrt.engines.errors import BackendError, EngineError, UsageError
from latentrt.engines.package import NetFile, Package
from latentrt.engines.profiles import Profile, net_profiles
from latentrt.engines.store.engine_store import EngineStore
from latentrt.engines.tensorrt import backend as tensorrt_backend
from latentrt.engines.tensorrt.build import engine_key
from latentrt.engines.tensorrt.builder import BuildOptions
from latentrt.runtime.loop.device.loop import DeviceLoop
from latentrt.runtime.pipeline import Pipeline
from tests.engines.host_device import DEVICE_NETS, HostDevice
from tests.engines.simulated_tensorrt import SimulatedLibrary, simulated_engine
from tests.engines.simulated_tensorrt_names import VARIANTS
from tests.engines.tensorrt_setting import row

PROMPT = "a red circle on a blue background"
SMALL: dict[str, Any] = {"num_inference_steps": 3, "height": 64, "width": 64, "seed": 3, "output_type": "np"}
GPU = DeviceFacts(
    index=0,
    name="Imagined",
    compute_capability=(8, 9),
    multiprocessors=58,
    driver="580.82",
    cuda="13.0",
    total=2**34,
    unified=False,
    uuid="GPU-0",
)


def fill(
    store: EngineStore, package: Package, variant: str, texts: list[str], net: str | None = None
) -> None:
    """Engines as `latentrt build` would leave them, for one `--profile` list."""
    sources = [Profile.parse(text) for text in texts]
    for name in [net] if net else DEVICE_NETS:
        file = package.manifest.nets[name]
        profiles = net_profiles(name, file.spec, sources)
        key = engine_key(package, name, row(variant), VARIANTS[variant], profiles, BuildOptions(), gpu=GPU)

        def build(path: Path, file: NetFile = file, profiles: Any = profiles) -> dict[str, Any]:
            path.write_bytes(simulated_engine(variant, package.path(file.graph), profiles))
            return {"profiles": [str(source) for source in sources]}

        store.get_or_build(key, build)


class Bench:
    def __init__(self, monkeypatch: pytest.MonkeyPatch, variant: str) -> None:
        self.device = HostDevice()
        self.device.facts = GPU  # pyright: ignore[reportAttributeAccessIssue]
        self.trt = SimulatedLibrary(variant, self.device.submit)
        self.variant, self.backend = variant, variant.partition(" ")[0]
        monkeypatch.setattr(tensorrt_backend, "CudaDevice", lambda _: self.device)
        monkeypatch.setattr(tensorrt_backend, "load", lambda row: self.trt)
        monkeypatch.setattr(tensorrt_backend, "flavour", lambda backend: row(variant))
        monkeypatch.setattr(tensorrt_backend, "installed_version", lambda backend: VARIANTS[variant])

    def open(self, package: Package, store: EngineStore) -> Pipeline:
        device, nets = tensorrt_backend.TensorRTBackend(self.backend).open_device(
            package, DEVICE_NETS, store=store
        )
        loop = DeviceLoop(_as_device(device), nets, package.manifest, graphs="on")
        return Pipeline.over(package, loop, self.backend, cache_bytes=0)


def _as_device(device: Device) -> Device:
    return device


@pytest.mark.parametrize("variant", VARIANTS)
def test_engines_of_the_store_draw_the_hosts_picture(
    package: Package,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    variant: str,
) -> None:
    store, bench = EngineStore(tmp_path), Bench(monkeypatch, variant)
    fill(store, package, variant, ["64x64:b1-2", "96x64:b1-2"])
    with Pipeline.open(package.root, backend="onnxruntime") as host:
        wanted = [host(PROMPT, **{**SMALL, "width": width}).images for width in (64, 96)]
    with bench.open(package, store) as pipe:
        for _ in range(3):
            for width, images in zip((64, 96), wanted, strict=True):
                found = pipe(PROMPT, **{**SMALL, "width": width}).images
                assert np.abs(found.astype(int) - images).max() <= 1
        # Each size is plain once before it is captured; the larger one's activations moved the first one's
        # block, so that was plain twice. Each is compared once, by two launches.
        assert bench.device.launches == 3 * 3 + 2 * 2
        addresses = bench.trt._world.counts["address latent"]
        pipe(PROMPT, **SMALL)
        assert bench.trt._world.counts["address latent"] == addresses, "bound once, not once a picture"
    assert not bench.device.blocks


@pytest.mark.parametrize("variant", VARIANTS)
def test_one_engine_takes_any_number_of_embeddings(
    package: Package,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    variant: str,
) -> None:
    store, bench = EngineStore(tmp_path), Bench(monkeypatch, variant)
    fill(store, package, variant, ["64x64:b1"])
    rows = np.random.default_rng(0).standard_normal((20, 96), np.float32) / 4
    words = [{"one": rows[:1]}, {"twenty": rows}]
    prompts = ("one", PROMPT, "a twenty, one")
    with Pipeline.open(package.root, backend="onnxruntime") as host:
        host.load_textual_inversion(words)
        wanted = [host(prompt, **SMALL).images for prompt in prompts]
    with bench.open(package, store) as pipe:
        pipe.load_textual_inversion(words)
        for prompt, images in zip(prompts, wanted, strict=True):
            assert np.abs(pipe(prompt, **SMALL).images.astype(int) - images).max() <= 1


def test_a_later_build_is_chosen_where_it_fits(
    package: Package,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    store, bench = EngineStore(tmp_path), Bench(monkeypatch, "tensorrt-rtx")
    fill(store, package, "tensorrt-rtx", ["64x64:b1"])
    with (
        bench.open(package, store) as pipe,
        pytest.raises(UsageError, match="--profile 64x64:b1 --profile 96"),
    ):
        pipe(PROMPT, **{**SMALL, "width": 96})
    fill(store, package, "tensorrt-rtx", ["96x64:b1"])
    bench = Bench(monkeypatch, "tensorrt-rtx")
    with bench.open(package, store) as pipe:
        pipe(PROMPT, **{**SMALL, "width": 96})
        used = bench.trt._world.counts["deserialised"]
        assert used == len(DEVICE_NETS), "only the engines that serve"
        pipe(PROMPT, **SMALL)
        assert bench.trt._world.counts["deserialised"] > used


def test_missing_engines_name_the_command(
    package: Package,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    store, bench = EngineStore(tmp_path), Bench(monkeypatch, "tensorrt 11")
    fill(store, package, "tensorrt 11", ["64x64:b1"], net="unet")
    with pytest.raises(
        BackendError, match=r"no tensorrt 11.* engines of text_encoder.*sm_89.*latentrt build"
    ):
        bench.open(package, store)
    assert not bench.device.blocks


def test_a_damaged_engine_is_never_deserialised(
    package: Package,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    store, bench = EngineStore(tmp_path), Bench(monkeypatch, "tensorrt 10")
    fill(store, package, "tensorrt 10", ["64x64:b1"])
    for entry in store.entries():
        data = bytearray(
            (entry.path / "engine.bin").read_bytes() if entry.path.is_dir() else entry.path.read_bytes()
        )
        data[-2] ^= 1
        (entry.path / "engine.bin" if entry.path.is_dir() else entry.path).write_bytes(data)
    with bench.open(package, store) as pipe, pytest.raises(EngineError):
        pipe(PROMPT, **SMALL)
    assert bench.trt._world.counts["deserialised"] == 0


def test_a_picture_says_which_profile_drew_it(
    package: Package, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    store, bench = EngineStore(tmp_path), Bench(monkeypatch, "tensorrt-rtx")
    fill(store, package, "tensorrt-rtx", ["64x64:b1-4", "64-128@128x64:b2"])
    with bench.open(package, store) as pipe:
        for change, expected in (
            ({}, "64x64 b1-4 guided"),
            ({"guidance_scale": 1.0}, "64x64 b1-4"),
            ({"width": 128, "num_images_per_prompt": 2}, "64-128@128x64 b2 guided"),
        ):
            assert pipe(PROMPT, **{**SMALL, **change}).producer["profile"].startswith(expected)
