"""The ceiling: what it computes is a matmul and a copy, of the sizes it says, on the CPU and on a device."""

from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime
import pytest

from latentrt.benchmarks.case import Case
from latentrt.benchmarks.process import Server
from latentrt.benchmarks.sides import ceiling
from latentrt.benchmarks.sides.contract import NotAvailableError, OpenSide, Task, Work, side
from latentrt.engines.cuda import device as cuda_device
from latentrt.engines.errors import UsageError
from latentrt.engines.onnxruntime.nets import CPU
from latentrt.runtime.loop.device.programs import aligned
from latentrt.runtime.pipeline import SHIPPED
from tests.engines.host_device import HostDevice
from tests.engines.simulated_cuda import SimulatedRuntime
from tests.engines.simulated_nvml import SimulatedNvml

CASE = Case(width=64, height=64, guidance_scale=1.0)
SMALL = [(32, 48, 16), (300, 7, 129)]


@pytest.mark.parametrize("dtype", [np.float32, np.float16])
@pytest.mark.parametrize("shape", [(3, 5, 2), (1, 1, 1), (130, 300, 129)])
def test_the_graph_is_a_matmul(tmp_path: Path, shape: tuple[int, int, int], dtype: type) -> None:
    random = np.random.default_rng(3)
    left, right = (random.standard_normal(size).astype(dtype) for size in (shape[:2], shape[1:]))
    path = ceiling._write_matmul(tmp_path, left.shape, right)
    onnx.checker.check_model(onnx.load(path), full_check=True)
    (product,) = onnxruntime.InferenceSession(path, providers=[CPU]).run(None, {"left": left})
    expected = left.astype(np.float64) @ right.astype(np.float64)
    assert np.allclose(product, expected, rtol=1e-5 if dtype is np.float32 else 1e-2, atol=0.02)


# ── on the CPU ─────────────────────────────────────────────────────────────────────────────────────


def test_a_matmul_on_the_cpu() -> None:
    opened = ceiling.host_ceiling(1, SMALL[:1])
    exercise = opened.prepare("gemm", CASE)
    left, product = exercise.call().values()
    right = ceiling._sides(SMALL[0], "float32")[1]
    assert np.allclose(product, left @ right, rtol=1e-5, atol=1e-5)
    assert left.std() > 0.2, "zeros take less power, and less time"
    assert exercise.figures()["flops"] == 2 * 32 * 48 * 16
    assert exercise.figures()["shape"] == [32, 48, 16]
    opened.close()
    opened.close()


class Pool:
    """Stands for the threads: runs each part at once, and counts what it was given."""

    moved = 0

    def map(self, function: Callable[..., Any], *parts: Iterable[np.ndarray]) -> list[Any]:
        targets, sources = (list(group) for group in parts)
        assert all(not np.array_equal(a, b) for a, b in zip(targets, sources, strict=True))
        done = [function(*pair) for pair in zip(targets, sources, strict=True)]
        assert all(np.array_equal(a, b) for a, b in zip(targets, sources, strict=True))
        self.moved = sum(array.nbytes for array in (*targets, *sources))
        self.most = max(array.nbytes for array in targets)
        return done


@pytest.mark.parametrize(("size", "threads"), [(1000, 3), (3 * 2**24 + 5, 2)])
def test_a_copy_on_the_cpu_moves_what_it_says(size: int, threads: int) -> None:
    pool = Pool()
    exercise = ceiling._host_copy(size, pool, threads)  # pyright: ignore[reportArgumentType]
    exercise.run()
    assert pool.moved == exercise.figures()["bytes"] == 2 * size
    assert pool.most <= size // threads + 1


def test_it_speaks_with_the_benchmark() -> None:
    opened = ceiling.host_ceiling(2, SMALL, copied=4096)
    assert opened.versions["threads"] == "2"
    child = Server(opened, Task(package=SHIPPED["demo"]))
    for workload, figure in (("gemm", "flops"), ("copy", "bytes"), ("gemm", "flops")):
        command = {"do": "prepare", "workload": workload, "case": CASE.to_json(), "slot": workload}
        first = child.answer(command)
        assert first["figures"][figure] > 0
        timed = child.answer({"do": "time", "slot": workload, "runs": 3})
        assert len(timed["seconds"]) == 3
        assert timed["figures"] == [first["figures"]] * 3
        assert timed["finite"]
    assert child.answer({"do": "memory"})["own"] == {}
    with pytest.raises(NotAvailableError, match="ceiling has no workload 'unet'"):
        opened.prepare("unet", CASE)
    child.answer({"do": "close"})


def test_the_choice_is_made_once() -> None:
    opened = ceiling.host_ceiling(1, SMALL, copied=64)
    first = opened.prepare("gemm", CASE)
    first.close()
    assert opened.prepare("gemm", CASE).call is first.call
    opened.close()


def test_no_threads() -> None:
    with pytest.raises(UsageError, match="threads is 0"):
        ceiling.host_ceiling(0)


def test_the_fastest_at_its_median_is_kept() -> None:
    now = 0.0
    released: list[str] = []

    def candidate(name: str, flops: int, *seconds: float) -> Work:
        left = iter(seconds)

        def call() -> dict[str, np.ndarray]:
            nonlocal now
            now += next(left)
            return {}

        work = Work(call=call, figures=lambda: {"flops": flops})
        work.held.callback(released.append, name)
        return work

    steady, spiked, slow = (
        candidate("steady", 100, 1.0, 1.0, 1.1),
        candidate("lucky", 300, 3.4, 2.0, 3.5),  # 150 a second once
        candidate("slow", 1, 1.0, 1.0, 1.0),
    )
    found = ceiling.fastest([steady, spiked, slow], trials=3, clock=lambda: now)
    assert found is steady
    assert released == ["lucky", "slow"]


# ── on a device ────────────────────────────────────────────────────────────────────────────────────


@pytest.fixture
def device() -> HostDevice:
    return HostDevice(2**24)


def on(device: HostDevice, **changes: Any) -> OpenSide:
    settings: dict[str, Any] = {"shapes": SMALL, "provider": CPU, "submit": device.submit, **changes}
    return ceiling.device_ceiling(device, "fp32", **settings)


@pytest.mark.parametrize("shape", SMALL)
def test_a_matmul_on_a_device(device: HostDevice, shape: tuple[int, int, int]) -> None:
    opened = on(device, shapes=[shape])
    exercise = opened.prepare("gemm", CASE)
    device.submitted = 0
    exercise.run()
    assert device.submitted == ceiling.LAUNCHES + 2  # and the stopwatch's two
    assert exercise.figures()["flops"] == 2 * np.prod(shape)
    assert exercise.repeats == ceiling.LAUNCHES
    assert 0 < exercise.figures()["device_s"] < 10
    left, right = ceiling._sides(shape, "float32")
    (address,) = device.sizes
    used = aligned(left.nbytes) // 4, left.shape[0] * right.shape[1]
    product = read(device, address, 4 * sum(used)).view(np.float32)[used[0] :]
    assert np.allclose(product.reshape(shape[0], shape[2]), left @ right, rtol=1e-5, atol=1e-4)
    opened.close()
    assert device.used == 0
    assert not device.stopwatches


def test_of_several_shapes_one_stays_on_the_device(device: HostDevice) -> None:
    opened = on(device)
    rows, inner, columns = opened.prepare("gemm", CASE).figures()["shape"]
    assert device.used == aligned(4 * rows * inner) + aligned(4 * rows * columns)
    opened.close()


@pytest.mark.parametrize(("copied", "moved"), [(2**30, 2**22), (5000, 5000)])
def test_a_copy_on_a_device(device: HostDevice, copied: int, moved: int) -> None:
    """No more than a quarter of what is free, twice."""
    opened = on(device, copied=copied)
    exercise = opened.prepare("copy", CASE)
    assert device.used == 2 * moved
    exercise.run()
    assert exercise.figures()["bytes"] == 2 * moved
    source, target = (read(device, address, moved) for address in device.sizes)
    assert np.array_equal(source, target)
    assert len(np.unique(source)) == 256
    opened.close()
    assert device.used == 0


def read(device: HostDevice, address: int, size: int) -> np.ndarray:
    array = np.empty(size, np.uint8)
    device.download(address, array)
    device.synchronize()
    return array


def test_a_copy_longer_than_the_random_numbers_repeats_them(
    device: HostDevice, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(ceiling, "_TILE", 1024)
    opened = on(device, copied=5000)
    exercise = opened.prepare("copy", CASE)
    exercise.run()
    assert exercise.figures()["bytes"] == 2 * 4096
    source, target = (read(device, address, 4096) for address in device.sizes)
    assert np.array_equal(source, np.tile(source[:1024], 4))
    assert np.array_equal(source, target)
    opened.close()


# ── as a side ──────────────────────────────────────────────────────────────────────────────────────


def test_it_is_a_side_that_can_run_here() -> None:
    task = Task(package=Path("none"), threads=1)
    module = side("ceiling")
    assert module.available(task) is None
    opened = module.open_side(task)
    assert "CPU" in opened.versions["onnxruntime"]
    opened.close()


def test_on_cuda_it_takes_the_packages_dtype(monkeypatch: pytest.MonkeyPatch) -> None:
    task = Task(package=SHIPPED["demo"], device="cuda")
    monkeypatch.setattr(ceiling, "cuda_available", lambda: "no CUDA device")
    assert side("ceiling").available(task) == "no CUDA device"

    runtime = SimulatedRuntime(total=2**22)
    opened_devices: list[cuda_device.CudaDevice] = []
    real = cuda_device.CudaDevice

    def simulated() -> cuda_device.CudaDevice:
        opened_devices.append(real(runtime=runtime, nvml=SimulatedNvml(unknown=("nvmlInit",))))
        return opened_devices[0]

    dtypes: list[str] = []
    plain = ceiling.device_ceiling
    monkeypatch.setattr(cuda_device, "CudaDevice", simulated)
    monkeypatch.setattr(
        ceiling, "device_ceiling", lambda device, dtype: dtypes.append(dtype) or plain(device, dtype)
    )
    opened = side("ceiling").open_side(task)
    assert dtypes == ["fp32"]
    assert opened.versions["device"] == "Simulated GPU"
    copy = opened.prepare("copy", CASE)
    copy.run()
    assert copy.figures()["bytes"] == 2 * 2**20
    assert copy.figures()["device_s"] >= 0
    opened.close()
    assert not runtime.blocks
