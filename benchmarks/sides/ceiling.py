"""What the machine can do at best, measured beside the others: a matmul and a copy, of random numbers.

    gemm    with a constant right side, through ONNX Runtime: float32 on the CPU, the package's dtype on a
            CUDA device; the fastest of several shapes. figures: flops, shape, dtype
    copy    memory to memory, more than a last cache holds. On the CPU it is NumPy's, with all threads; on a
            CUDA device ONNX Runtime's `Identity`. figures: bytes read and written

Inputs and outputs stay where they are computed. On a device a run is several launches (`repeats`) and one
wait; seconds and figures are of one.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import cache
from pathlib import Path
from statistics import median
from time import perf_counter
from typing import Any

import numpy as np

from ...engines.onnxruntime import session as onnxruntime
from ...engines.onnxruntime.nets import CPU, CUDA, cuda_available
from ...engines.spec import Array
from .contract import CEILING, OpenSide, Task, Work, open_package
from .plain_loop import open_on

Shape = tuple[int, int, int]  # rows of the left side, columns of it, columns of the right side

# Large enough to reach the rate, and about 50 to 100 ms on two cores of 2023, or 1 ms on a GPU of 2024.
HOST_SHAPES: Sequence[Shape] = (
    (2048, 2048, 1024),
    (8192, 2880, 320),  # SD 1.5 at 512x512 with guidance: a 3x3 convolution of the first level, as a matmul
    (2048, 5760, 640),  # one of the second
    (512, 1280, 10240),  # a GEGLU of the third
)
DEVICE_SHAPES: Sequence[Shape] = (
    (8192, 8192, 8192),
    (4096, 4096, 4096),
    (16384, 4096, 4096),
    (8192, 5760, 2560),
)
TRIALS = 8  # of each shape, in turns: on a shared machine fewer would leave the choice to luck
COPIED = 2**29  # bytes, twice: from half of that on, a last cache of 300 MiB made no difference
LAUNCHES = {CPU: 1, CUDA: 8}  # in a run: on a device waiting for its end would be measured otherwise
_TILE = 2**24  # random bytes, over and over


def available(task: Task) -> str | None:
    """None if ONNX Runtime can run on the task's device, else the reason."""
    return cuda_available() if task.device == "cuda" else onnxruntime.available()


def open_side(task: Task) -> OpenSide:
    """Raises UsageError for less than one thread, PackageError for a package whose dtype cannot be read."""
    if task.device == "cuda":
        provider, threads, shapes = CUDA, 1, DEVICE_SHAPES
        dtype = open_package(task).manifest.net("unet").spec.inputs[0].dtype
    else:
        threads = int(onnxruntime.session_options(task.threads).intra_op_num_threads)
        provider, shapes, dtype = CPU, HOST_SHAPES, "float32"

    @cache  # the same for every case, prepared once
    def best_gemm() -> Work:
        return fastest([gemm(shape, dtype, provider, threads) for shape in shapes])

    @cache
    def copy() -> Work:
        return host_copy(threads) if provider == CPU else device_copy()

    version = str(onnxruntime.library().__version__)
    return OpenSide(
        name=CEILING,
        versions={"onnxruntime": version, "provider": provider, "threads": str(threads)},
        makers={"gemm": lambda case, stack: best_gemm(), "copy": lambda case, stack: copy()},
    )


def fastest(
    candidates: Sequence[Work], trials: int = TRIALS, clock: Callable[[], float] = perf_counter
) -> Work:
    """The one with the most FLOP/s at the median of its trials, which take turns.

    At the median, for that is what its rounds are judged by: one lucky run has chosen a shape that was a
    third slower than another from then on.
    """
    rates: list[list[float]] = [[] for _ in candidates]
    for _ in range(trials):
        for candidate, found in zip(candidates, rates, strict=True):
            began = clock()
            candidate.run()
            found.append(candidate.figures()["flops"] / (clock() - began))
    medians = list(map(median, rates))
    return candidates[medians.index(max(medians))]


def gemm(shape: Shape, dtype: str, provider: str, threads: int) -> Work:
    """A matmul whose right side is a constant, so that a runtime may lay it out anew."""
    rows, inner, columns = shape
    left, right = random_numbers(rows, inner, dtype), random_numbers(inner, columns, dtype)
    launch, _ = bind("MatMul", left, (rows, columns), provider, threads, constant=right)
    facts = {"flops": 2 * rows * inner * columns, "shape": list(shape), "dtype": dtype}
    return Work(call=launch, repeats=LAUNCHES[provider], figures=lambda: facts)


def host_copy(threads: int) -> Work:
    """NumPy lets go of the interpreter while it copies, so the threads work side by side."""
    source = random_bytes(COPIED)
    target = np.ones_like(source)  # pages of zeros are not there until they are written
    pool = ThreadPoolExecutor(threads)
    parts = np.array_split(target, threads), np.array_split(source, threads)

    def call() -> dict[str, Array]:
        list(pool.map(np.copyto, *parts))
        return {}

    return Work(call=call, figures=lambda: {"bytes": 2 * COPIED, "threads": threads})


def device_copy() -> Work:
    """On the device, from one place of its memory to another."""
    launch, _ = bind("Identity", random_bytes(COPIED), (COPIED,), CUDA, 1)
    return Work(call=launch, repeats=LAUNCHES[CUDA], figures=lambda: {"bytes": 2 * COPIED})


def bind(
    operator: str,
    x: Array,
    shape: tuple[int, ...],
    provider: str,
    threads: int,
    *,
    constant: Array | None = None,
) -> tuple[Callable[[], dict[str, Array]], Any]:
    """What launches `y = operator(x, constant)`, whose numbers lie where it runs; and y, an OrtValue."""
    from onnx import numpy_helper, parser

    number = {"float32": "float", "float16": "float16", "uint8": "uint8"}[str(x.dtype)]
    arguments = "x" if constant is None else "x, constant"
    graph = f"one ({number}{list(x.shape)} x) => ({number}{list(shape)} y) {{ y = {operator}({arguments}) }}"
    model = parser.parse_model(f'<ir_version: 8, opset_import: ["" : 13]> {graph}')
    if constant is not None:
        model.graph.initializer.append(numpy_helper.from_array(constant, "constant"))
    session = open_on(
        provider,
        Path(operator),
        onnxruntime.session_options(threads),
        {"use_tf32": "0"},
        culprit=operator,
        content=model.SerializeToString(),
    )
    values, device = onnxruntime.library().OrtValue, "cuda" if provider == CUDA else "cpu"
    y = values.ortvalue_from_shape_and_type(shape, x.dtype.type, device, 0)
    binding = session.io_binding()
    binding.bind_ortvalue_input("x", values.ortvalue_from_numpy(x, device, 0))
    binding.bind_ortvalue_output("y", y)
    at_once = onnxruntime.run_options()
    at_once.add_run_config_entry("disable_synchronize_execution_providers", "1")

    def launch() -> dict[str, Array]:
        for _ in range(LAUNCHES[provider]):
            session.run_with_iobinding(binding, at_once)
        binding.synchronize_outputs()
        return {}

    return launch, y


def random_numbers(rows: int, columns: int, dtype: str) -> Array:
    """(rows, columns) from -0.5 to 0.5: float16 holds sums of thousands of their products."""
    numbers = np.random.default_rng(rows * columns).random((rows, columns), np.float32)
    return (numbers - np.float32(0.5)).astype(dtype)


def random_bytes(size: int) -> Array:
    """So many random bytes; after some MiB they are the same again."""
    return np.resize(np.random.default_rng(size).integers(0, 256, min(size, _TILE), np.uint8), size)
