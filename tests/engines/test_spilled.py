"""Arrays in a file in place of memory."""

from pathlib import Path
from time import sleep
from typing import Any

import numpy as np
import pytest

from latentrt import Pipeline
from latentrt.engines import spilled
from latentrt.engines.onnxruntime import nets
from latentrt.engines.package import Package
from latentrt.engines.spilled import available_bytes, spill
from latentrt.runtime.loop import denoise
from latentrt.runtime.model import SHIPPED
from tests.runtime.test_adapters import write

FAST: dict[str, Any] = {"num_inference_steps": 1, "height": 64, "width": 64, "seed": 3, "output_type": "np"}


def some_arrays() -> dict[str, np.ndarray]:
    random = np.random.default_rng(0)
    return {
        "turned": random.standard_normal((5, 7), np.float32).T,
        "half": random.standard_normal(3).astype(np.float16),
        "none": np.zeros((0, 4), np.float32),
        "one": np.array(2.5),
    }


def test_they_are_the_same_in_a_file(tmp_path: Path) -> None:
    arrays = some_arrays()
    spill(arrays, tmp_path / "cache")
    for name, array in some_arrays().items():
        assert arrays[name].shape == array.shape
        assert arrays[name].dtype == array.dtype
        assert np.array_equal(arrays[name], array), name
        assert isinstance(arrays[name], np.memmap) == bool(array.size)
        assert arrays[name].flags.c_contiguous
    assert not list((tmp_path / "cache").iterdir()), "the file has no name"


def test_a_full_disk_leaves_them_in_memory(tmp_path: Path) -> None:
    arrays = some_arrays()
    (tmp_path / "cache").write_bytes(b"")
    spill(arrays, tmp_path / "cache")
    assert not any(isinstance(array, np.memmap) for array in arrays.values())


def test_what_is_available(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    told = tmp_path / "meminfo"
    monkeypatch.setattr(spilled, "_TOLD_BY_LINUX", told)
    assert available_bytes() is None
    told.write_text("MemTotal: 8 kB\nMemAvailable:    1024 kB\n")
    assert available_bytes() == 2**20
    told.write_text("MemAvailable:\n")
    assert available_bytes() is None


def test_pictures_are_the_same_where_memory_is_short(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write(tmp_path / "loop.safetensors", "loop")

    def draw() -> bytes:
        with Pipeline.open("demo", backend="onnxruntime", loras=tmp_path) as pipe:
            return pipe("a red circle", loras=["loop"], **FAST).images.tobytes()

    wanted = draw()
    moved: list[int] = []

    def counted(arrays: dict[str, np.ndarray], folder: Path) -> None:
        spill(arrays, folder)
        moved.append(sum(isinstance(array, np.memmap) for array in arrays.values()))

    monkeypatch.setattr(nets, "spill", counted)
    monkeypatch.setattr(nets, "available_bytes", lambda: 0)
    assert draw() == wanted
    assert sum(moved) > 0


@pytest.mark.parametrize(("available", "at_once"), [(None, True), (2**50, True), (0, False)])
def test_nets_are_opened_one_by_one_where_memory_is_short(
    available: int | None, at_once: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    running, most, order = list[str](), list[int](), list[str]()

    class Slow:
        def open_net(self, package: Package, name: str, *, threads: int | None) -> Any:
            running.append(name)
            order.append(name)
            sleep(0.05)
            most.append(len(running))
            running.remove(name)

    monkeypatch.setattr(denoise, "available_bytes", lambda: available)
    monkeypatch.setattr(denoise, "usable_processors", lambda: 2)
    package = Package.open(SHIPPED["demo"])
    loop = denoise.HostLoop(package, Slow(), None)  # pyright: ignore[reportArgumentType]
    loop.open_nets(["unet_time", "vae_decoder", "unet"])
    assert max(most) == (2 if at_once else 1)
    if not at_once:
        assert order == ["unet", "vae_decoder", "unet_time"]
