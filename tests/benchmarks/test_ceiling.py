"""The references: a ceiling of matmuls and copies, on the CPU and on a device, and a yardstick."""

from dataclasses import replace
from hashlib import sha256
from typing import Any

import numpy as np
import onnxruntime
import pytest

from latentrt.benchmarks import skeletons
from latentrt.benchmarks.case import Case
from latentrt.benchmarks.process import Server
from latentrt.benchmarks.sides import ceiling, contract
from latentrt.benchmarks.sides.contract import NotAvailableError, Task, Work, side
from latentrt.benchmarks.sides.yardstick import GRAPH, SIZES, SKELETON, open_yardstick
from latentrt.engines import processors
from latentrt.engines.onnxruntime.nets import CPU, CUDA
from latentrt.runtime.model import SHIPPED

CASE = Case(width=64, height=64, guidance_scale=1.0)
SMALL = [(32, 48, 16), (300, 7, 129)]
TASK = Task(model=SHIPPED["demo"], threads=2)


@pytest.fixture
def two_processors(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(processors, "usable_processors", lambda: 2)


@pytest.mark.usefixtures("two_processors")
def test_a_side_of_the_harness(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ceiling, "HOST_SHAPES", SMALL[1:])
    monkeypatch.setattr(ceiling, "COPIED", 4097)
    opened = contract.open_side("ceiling", TASK)
    assert opened.versions == {"onnxruntime": onnxruntime.__version__, "provider": CPU, "threads": "2"}
    child = Server(opened, TASK)
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
    opened.prepare("gemm", CASE).close()
    assert opened.prepare("gemm", CASE) is opened.prepare("gemm", CASE), "the choice is made once"
    child.answer({"do": "close"})


@pytest.mark.parametrize(("dtype", "tolerance"), [("float32", 1e-5), ("float16", 1e-2)])
def test_what_is_bound_is_computed(dtype: str, tolerance: float) -> None:
    random = np.random.default_rng(1)
    left, right = (random.random(shape).astype(dtype) for shape in ((30, 7), (7, 12)))
    launch, product = ceiling.bind("MatMul", left, (30, 12), CPU, 2, constant=right)
    launch()
    np.testing.assert_allclose(product.numpy(), left.astype(float) @ right, rtol=tolerance)
    launch, copied = ceiling.bind("Identity", right, right.shape, CPU, 1)
    launch()
    np.testing.assert_array_equal(copied.numpy(), right)
    assert copied.data_ptr() != right.ctypes.data


@pytest.mark.usefixtures("two_processors")
def test_a_copy_on_the_cpu_moves_what_it_says(monkeypatch: pytest.MonkeyPatch) -> None:
    moved: list[int] = []

    def copy(target: np.ndarray, source: np.ndarray) -> None:
        assert not np.array_equal(target, source)
        target[:] = source
        moved.append(source.nbytes)

    monkeypatch.setattr(np, "copyto", copy)
    monkeypatch.setattr(ceiling, "COPIED", 1000)
    side("ceiling").open_side(TASK).prepare("copy", CASE).run()
    assert moved == [500, 500], "a part for each thread"


def test_the_fastest_at_its_median_is_kept() -> None:
    now = [0.0]

    def candidate(flops: int, *seconds: float) -> Work:
        left = iter(seconds)
        return Work(call=lambda: now.append(now[-1] + next(left)) or {}, figures=lambda: {"flops": flops})

    steady = candidate(100, 1.0, 1.0, 1.1)
    lucky = candidate(300, 3.4, 2.0, 3.5)  # 150 a second once
    slow = candidate(1, 1.0, 1.0, 1.0)
    assert ceiling.fastest([steady, lucky, slow], trials=3, clock=lambda: now[-1]) is steady


def test_on_cuda_it_takes_the_packages_dtype(monkeypatch: pytest.MonkeyPatch) -> None:
    task = replace(TASK, device="cuda")
    monkeypatch.setattr(ceiling, "cuda_available", lambda: "no CUDA device")
    assert side("ceiling").available(task) == "no CUDA device"
    bound: list[tuple[Any, ...]] = []

    def bind(
        operator: str, x: np.ndarray, shape: tuple[int, ...], provider: str, *_: Any, **more: Any
    ) -> Any:
        bound.append((operator, x.dtype, shape, provider))
        return dict, None

    monkeypatch.setattr(ceiling, "bind", bind)
    monkeypatch.setattr(ceiling, "DEVICE_SHAPES", SMALL)
    monkeypatch.setattr(ceiling, "COPIED", 5000)
    opened = side("ceiling").open_side(task)
    gemm, copy = opened.prepare("gemm", CASE), opened.prepare("copy", CASE)
    assert gemm.repeats == copy.repeats == 8
    assert gemm.figures()["dtype"] == "float32"
    assert copy.figures() == {"bytes": 10000}
    products = [("MatMul", np.float32, (rows, columns), CUDA) for rows, _, columns in SMALL]
    assert bound == [*products, ("Identity", np.uint8, (5000,), CUDA)]


def test_its_numbers_are_random() -> None:
    assert len(np.unique(ceiling.random_bytes(5000))) == 256
    assert ceiling.random_numbers(300, 7, "float16").std() > 0.2, "zeros take less power, and less time"


# Times of documents that it stands in are alike only as long as its graph is.
FROZEN = "95b5dc17080686f98afbf7d3179d42f4707185d60f505cbe49fdcddaf0817cb5"


def test_it_is_what_it_always_was() -> None:
    assert sha256((skeletons.FOLDER / SKELETON / GRAPH).read_bytes()).hexdigest() == FROZEN


def test_it_computes_the_same_finite_numbers_in_every_process() -> None:
    task = Task(model=SHIPPED["demo"], threads=1)
    one, other = (open_yardstick(task) for _ in range(2))
    found, again = one.call()["prediction"], other.call()["prediction"]
    assert found.shape == (SIZES["B"], 4, SIZES["H/8"], SIZES["W/8"])
    assert np.array_equal(found, again)
    assert 0.01 < found.std() < 100
