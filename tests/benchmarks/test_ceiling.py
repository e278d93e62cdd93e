"""The references: a ceiling of matmuls and copies, on the CPU and on a device, and a yardstick."""

from functools import partial
from hashlib import sha256
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from latentrt.benchmarks import skeletons
from latentrt.benchmarks.case import Case
from latentrt.benchmarks.process import Server
from latentrt.benchmarks.sides import ceiling
from latentrt.benchmarks.sides.contract import NotAvailableError, OpenSide, Task, Work, side
from latentrt.benchmarks.sides.yardstick import GRAPH, SIZES, SKELETON, open_yardstick
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


def check_product(left: np.ndarray, product: np.ndarray, tolerance: float) -> None:
    """That it is `left` times the same matrix in every row, as NumPy's least squares would have it."""
    assert left.std() > 0.2, "zeros take less power, and less time"
    assert len(left) > left.shape[1]
    right, *_ = np.linalg.lstsq(left.astype(float), product.astype(float))
    assert right.std() > 0.2
    assert np.allclose(left.astype(float) @ right, product, rtol=tolerance, atol=tolerance)


def test_on_the_cpu() -> None:
    opened = ceiling.host_ceiling(2, SMALL[1:], copied=4097)
    assert opened.versions["threads"] == "2"
    work = opened.prepare("gemm", CASE)
    check_product(*work.call().values(), 1e-5)
    assert (work.figures()["flops"], work.figures()["shape"]) == (2 * 300 * 7 * 129, [300, 7, 129])
    child = Server(opened, Task(package=SHIPPED["demo"]))
    for workload, figure in (("gemm", "flops"), ("copy", "bytes"), ("gemm", "flops")):
        command = {"do": "prepare", "workload": workload, "case": CASE.to_json(), "slot": workload}
        first = child.answer(command)
        assert first["figures"][figure] == (2 * 4097 if workload == "copy" else 2 * 300 * 7 * 129)
        timed = child.answer({"do": "time", "slot": workload, "runs": 3})
        assert len(timed["seconds"]) == 3
        assert timed["figures"] == [first["figures"]] * 3
    assert child.answer({"do": "memory"})["own"] == {}
    with pytest.raises(NotAvailableError, match="ceiling has no workload 'unet'"):
        opened.prepare("unet", CASE)
    work.close()
    assert opened.prepare("gemm", CASE).call is work.call, "the choice is made once"
    child.answer({"do": "close"})


def test_a_copy_on_the_cpu_moves_what_it_says(monkeypatch: pytest.MonkeyPatch) -> None:
    moved: list[int] = []

    def copy(target: np.ndarray, source: np.ndarray) -> None:
        assert not np.array_equal(target, source)
        target[:] = source
        moved.append(source.nbytes)

    opened = ceiling.host_ceiling(3, SMALL, copied=1000)
    monkeypatch.setattr(np, "copyto", copy)
    opened.prepare("copy", CASE).run()
    assert sum(moved) == 1000
    assert len(moved) == 3, "a part for each thread"
    opened.close()


def test_no_threads() -> None:
    with pytest.raises(UsageError, match="threads is 0"):
        ceiling.host_ceiling(0)


def test_the_fastest_at_its_median_is_kept() -> None:
    now = [0.0]
    released: list[str] = []

    def candidate(name: str, flops: int, *seconds: float) -> Work:
        left = iter(seconds)
        work = Work(call=lambda: now.append(now[-1] + next(left)) or {}, figures=lambda: {"flops": flops})
        work.held.callback(released.append, name)
        return work

    steady = candidate("steady", 100, 1.0, 1.0, 1.1)
    lucky = candidate("lucky", 300, 3.4, 2.0, 3.5)  # 150 a second once
    slow = candidate("slow", 1, 1.0, 1.0, 1.0)
    assert ceiling.fastest([steady, lucky, slow], trials=3, clock=lambda: now[-1]) is steady
    assert released == ["lucky", "slow"]


@pytest.fixture
def device() -> HostDevice:
    return HostDevice(2**24)


def on(device: HostDevice, **changes: Any) -> OpenSide:
    settings: dict[str, Any] = {"shapes": SMALL, "provider": CPU, "submit": device.submit, **changes}
    return ceiling.device_ceiling(device, "fp32", **settings)


@pytest.mark.parametrize(("dtype", "tolerance"), [("fp32", 1e-5), ("fp16", 1e-2)])
def test_a_matmul_on_a_device(device: HostDevice, dtype: str, tolerance: float) -> None:
    rows, inner, columns = shape = SMALL[1]
    opened = ceiling.device_ceiling(device, dtype, shapes=[shape], provider=CPU, submit=device.submit)
    exercise = opened.prepare("gemm", CASE)
    device.submitted = 0
    exercise.run()
    assert device.submitted == ceiling.LAUNCHES + 2  # and the stopwatch's two
    assert exercise.figures()["flops"] == 2 * np.prod(shape)
    assert exercise.repeats == ceiling.LAUNCHES
    assert 0 < exercise.figures()["device_s"] < 10
    (address,) = device.sizes
    number = np.dtype("float16" if dtype == "fp16" else "float32")
    behind = aligned(rows * inner * number.itemsize)
    held = read(device, address, behind + rows * columns * number.itemsize)
    left = held[: rows * inner * number.itemsize].view(number).reshape(rows, inner)
    check_product(left, held[behind:].view(number).reshape(rows, columns), tolerance)
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


def test_it_is_a_side_that_can_run_here() -> None:
    task = Task(package=Path("none"), threads=1)
    assert side("ceiling").available(task) is None
    opened = side("ceiling").open_side(task)
    assert "CPU" in opened.versions["onnxruntime"]
    opened.close()


def test_on_cuda_it_takes_the_packages_dtype(monkeypatch: pytest.MonkeyPatch) -> None:
    task = Task(package=SHIPPED["demo"], device="cuda")
    monkeypatch.setattr(ceiling, "cuda_available", lambda: "no CUDA device")
    assert side("ceiling").available(task) == "no CUDA device"
    runtime, dtypes = SimulatedRuntime(total=2**22), list[str]()
    plain = ceiling.device_ceiling
    simulated = partial(cuda_device.CudaDevice, runtime=runtime, nvml=SimulatedNvml(unknown=("nvmlInit",)))
    monkeypatch.setattr(cuda_device, "CudaDevice", simulated)
    monkeypatch.setattr(
        ceiling, "device_ceiling", lambda device, dtype: dtypes.append(dtype) or plain(device, dtype)
    )
    opened = side("ceiling").open_side(task)
    assert (dtypes, opened.versions["device"]) == (["fp32"], "Simulated GPU")
    copy = opened.prepare("copy", CASE)
    copy.run()
    assert copy.figures()["bytes"] == 2 * 2**20
    assert copy.figures()["device_s"] >= 0
    opened.close()
    assert not runtime.blocks


# Times of documents that it stands in are alike only as long as its graph is.
FROZEN = "95b5dc17080686f98afbf7d3179d42f4707185d60f505cbe49fdcddaf0817cb5"


def test_it_is_what_it_always_was() -> None:
    assert sha256((skeletons.FOLDER / SKELETON / GRAPH).read_bytes()).hexdigest() == FROZEN


def test_it_computes_the_same_finite_numbers_in_every_process() -> None:
    task = Task(package=SHIPPED["demo"], threads=1)
    one, other = (open_yardstick(task) for _ in range(2))
    found, again = one.call()["prediction"], other.call()["prediction"]
    assert found.shape == (SIZES["B"], 4, SIZES["H/8"], SIZES["W/8"])
    assert np.array_equal(found, again)
    assert 0.01 < found.std() < 100
    assert one.figures() == {"sizes": SIZES}
