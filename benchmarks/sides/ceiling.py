"""What the machine can do at best, measured beside the others: a matmul and a copy, of random numbers.

    gemm    with a constant right side, through ONNX Runtime as our own nets run: float32 on the CPU, the
            package's dtype on a CUDA device; the fastest of several shapes. figures: flops, shape, dtype
    copy    memory to memory, more than a last cache holds, with all threads. figures: bytes read and written

On a device a run is several launches (`repeats`); figures are of one, `device_s` is by the device's events.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path
from statistics import median
from tempfile import TemporaryDirectory
from time import perf_counter
from typing import Any

import numpy as np

from ...engines.device import Device
from ...engines.onnxruntime import session as onnxruntime
from ...engines.onnxruntime.nets import CPU, CUDA, Submit, cuda_available, open_onnxruntime_net
from ...engines.package import Manifest, NetFile, Package
from ...engines.spec import DTYPES, Array, NetSpec, TensorSpec, tensor_bytes
from ..case import Case
from .contract import OpenSide, Prepared, Task, not_available
from .matmul_graph import matmul_graph

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
DEVICE_COPIED = 2**30
LAUNCHES = 4  # in a run on a device: else waiting for its end would be measured
_TILE = 2**24  # random bytes, over and over
_FLOAT_OF = {"fp16": "float16", "fp32": "float32"}


def available(task: Task) -> str | None:
    """None if ONNX Runtime can run on the task's device, else the reason."""
    return cuda_available() if task.device == "cuda" else onnxruntime.available()


def open_side(task: Task) -> OpenSide:
    """Raises BackendError without the device, PackageError for a package whose dtype cannot be read."""
    if task.device != "cuda":
        return host_ceiling(task.threads)
    from ...engines.cuda.device import CudaDevice

    return device_ceiling(CudaDevice(), Package.open(task.package).manifest.dtype)


@dataclass(frozen=True, kw_only=True)
class Exercise:
    """A `Prepared` without outputs.

    Attributes:
        call: one run.
        facts: `flops` or `bytes` of each of its repeats, and what it consists of.
        repeats: how often a run does it.
        device_s: seconds of the last run, by the device.
        release: frees what it holds.
    """

    call: Callable[[], object]
    facts: Mapping[str, Any]
    repeats: int = 1
    device_s: Callable[[], float] | None = None
    release: Callable[[], None] = lambda: None

    def run(self) -> None:
        """Once."""
        self.call()

    def outputs(self) -> Mapping[str, Array]:
        """None."""
        return {}

    def figures(self) -> Mapping[str, Any]:
        """What a repeat does, and how long the device took for it."""
        return {**self.facts, **({"device_s": self.device_s() / self.repeats} if self.device_s else {})}


@dataclass(kw_only=True)
class Ceiling:
    """An `OpenSide`. What was prepared once is kept, so that its shape stays the same.

    Attributes:
        versions: of the library, and the device.
        makers: workload -> candidates, of which the fastest is prepared.
        resources: closed with it.
    """

    versions: Mapping[str, str]
    makers: Mapping[str, Callable[[], Sequence[Exercise]]]
    resources: ExitStack
    prepared: dict[str, Exercise] = field(default_factory=dict[str, Exercise])

    def prepare(self, workload: str, case: Case) -> Prepared:
        """The same for every case. Raises NotAvailableError for other workloads."""
        del case
        if workload not in self.makers:
            raise not_available("ceiling", workload)
        if workload not in self.prepared:
            self.prepared[workload] = fastest(self.makers[workload]())
        return self.prepared[workload]

    def memory(self) -> Mapping[str, Any]:
        """Nothing that would be compared."""
        return {}

    def close(self) -> None:
        """Free everything. May be called twice."""
        for exercise in self.prepared.values():
            exercise.release()
        self.prepared.clear()
        self.resources.close()


def fastest(
    candidates: Sequence[Exercise], trials: int = TRIALS, clock: Callable[[], float] = perf_counter
) -> Exercise:
    """The one with the most FLOP/s at the median of its trials, which take turns; the others are released.

    At the median, for that is what its rounds are judged by: one lucky run has chosen a shape that was a
    third slower than another from then on.
    """
    if len(candidates) == 1:
        return candidates[0]
    rates: list[list[float]] = [[] for _ in candidates]
    for _ in range(trials):
        for candidate, found in zip(candidates, rates, strict=True):
            began = clock()
            candidate.run()
            found.append(candidate.facts["flops"] / (clock() - began))
    medians = list(map(median, rates))
    chosen = candidates[medians.index(max(medians))]
    for candidate in candidates:
        if candidate is not chosen:
            candidate.release()
    return chosen


# ── on the CPU ─────────────────────────────────────────────────────────────────────────────────


def host_ceiling(threads: int | None, shapes: Sequence[Shape] = HOST_SHAPES, copied: int = COPIED) -> Ceiling:
    """On the CPU, with the threads that our own nets have. Raises UsageError for less than one."""
    count: int = onnxruntime.session_options(threads).intra_op_num_threads
    resources = ExitStack()
    pool = resources.enter_context(ThreadPoolExecutor(count))
    folder = Path(resources.enter_context(TemporaryDirectory()))
    return Ceiling(
        versions={
            "onnxruntime": f"onnxruntime {onnxruntime.library().__version__} (CPU)",
            "threads": str(count),
        },
        makers={
            "gemm": lambda: [_host_gemm(shape, folder, count) for shape in shapes],
            "copy": lambda: [_host_copy(copied, pool, count)],
        },
        resources=resources,
    )


def _host_gemm(shape: Shape, folder: Path, threads: int) -> Exercise:
    """Bound once, like a net on a device: neither the answer's allocation nor its copy is in the time."""
    left, right = _sides(shape, "float32")
    product = np.empty((shape[0], shape[2]), np.float32)
    path = _write_matmul(folder, left.shape, right)
    options = onnxruntime.session_options(threads)
    session = onnxruntime.open_session(path, options, [CPU], culprit="gemm")
    binding = session.io_binding()
    binding.bind_input("left", "cpu", 0, np.float32, left.shape, left.ctypes.data)
    binding.bind_output("product", "cpu", 0, np.float32, product.shape, product.ctypes.data)
    kept = left, product  # the binding has their addresses alone

    def call() -> object:
        session.run_with_iobinding(binding)
        return kept

    return Exercise(call=call, facts=_facts(shape, "float32"))


def _host_copy(size: int, pool: ThreadPoolExecutor, threads: int) -> Exercise:
    """NumPy lets go of the interpreter while it copies, so the threads work side by side."""
    source = np.resize(_random_bytes(min(size, _TILE)), size)
    target = np.zeros_like(source)
    target.fill(1)  # pages of zeros are not there until they are written
    parts = np.array_split(target, threads), np.array_split(source, threads)
    return Exercise(
        call=lambda: list(pool.map(np.copyto, *parts)), facts={"bytes": 2 * size, "threads": threads}
    )


# ── on a device ────────────────────────────────────────────────────────────────────────────────


def device_ceiling(
    device: Device,
    dtype: str,
    *,
    shapes: Sequence[Shape] = DEVICE_SHAPES,
    copied: int = DEVICE_COPIED,
    provider: str = CUDA,
    submit: Submit | None = None,
) -> Ceiling:
    """On a device, which is closed with it.

    Args:
        device: where.
        dtype: "fp16" or "fp32", of the matmul.
        shapes: of it.
        copied: bytes; at most a quarter of what is free then.
        provider: of ONNX Runtime, see `open_onnxruntime_net`.
        submit: see there.
    """
    resources = ExitStack()
    resources.callback(device.close)
    folder = Path(resources.enter_context(TemporaryDirectory()))
    float_dtype = _FLOAT_OF[dtype]
    return Ceiling(
        versions={"onnxruntime": onnxruntime.library().__version__, "device": device.name},
        makers={
            "gemm": lambda: [
                _device_gemm(shape, float_dtype, folder, device, provider, submit) for shape in shapes
            ],
            "copy": lambda: [_device_copy(min(copied, device.memory().free // 4), device)],
        },
        resources=resources,
    )


def _device_gemm(
    shape: Shape, dtype: str, folder: Path, device: Device, provider: str, submit: Submit | None
) -> Exercise:
    left, right = _sides(shape, dtype)
    spec = NetSpec(
        inputs=(TensorSpec(name="left", dtype=dtype, shape=left.shape),),
        outputs=(TensorSpec(name="product", dtype=dtype, shape=(shape[0], shape[2])),),
    )
    path = _write_matmul(folder, left.shape, right)
    package = _package(path, spec)
    net = open_onnxruntime_net(package, "gemm", device, provider=provider, submit=submit)
    addresses = {
        "left": device.allocate(left.nbytes),
        "product": device.allocate(tensor_bytes(dtype, (shape[0], shape[2]))),
    }
    device.upload(addresses["left"], left)
    bound = net.bind({"left": left.shape}, addresses, 0)

    def release() -> None:
        bound.close()
        net.close()
        for address in addresses.values():
            device.free(address)

    return _launched(device, bound.enqueue, _facts(shape, dtype), release)


def _device_copy(size: int, device: Device) -> Exercise:
    tile = _random_bytes(min(size, _TILE))
    size = size // tile.nbytes * tile.nbytes
    source, target = device.allocate(size), device.allocate(size)
    device.upload(source, tile)
    if size > tile.nbytes:
        rows = size // tile.nbytes - 1
        device.copy(source + tile.nbytes, source, tile.nbytes, rows=rows, to_pitch=tile.nbytes)

    def release() -> None:
        device.free(source)
        device.free(target)

    return _launched(device, lambda: device.copy(target, source, size), {"bytes": 2 * size}, release)


def _launched(
    device: Device, enqueue: Callable[[], None], facts: Mapping[str, Any], release: Callable[[], None]
) -> Exercise:
    """`LAUNCHES` in a row, and one wait."""
    stopwatch = device.stopwatch()

    def call() -> None:
        stopwatch.start()
        for _ in range(LAUNCHES):
            enqueue()
        stopwatch.stop()
        device.synchronize()

    def close() -> None:
        stopwatch.close()
        release()

    return Exercise(call=call, facts=facts, repeats=LAUNCHES, device_s=stopwatch.seconds, release=close)


# ── the matmul ──────────────────────────────────────────────────────────────────────


def _sides(shape: Shape, dtype: str) -> tuple[Array, Array]:
    """(M, K) and (K, N), evenly spread from -0.5 to 0.5: with a K of thousands float16 holds the sums."""
    random = np.random.default_rng(shape)

    def draw(*size: int) -> Array:
        return (random.random(size, np.float32) - np.float32(0.5)).astype(DTYPES[dtype])

    return draw(*shape[:2]), draw(*shape[1:])


def _random_bytes(size: int) -> Array:
    return np.random.default_rng(size).integers(0, 256, size, np.uint8)


def _facts(shape: Shape, dtype: str) -> dict[str, Any]:
    rows, inner, columns = shape
    return {"flops": 2 * rows * inner * columns, "shape": list(shape), "dtype": dtype}


def _write_matmul(folder: Path, left: tuple[int, ...], right: Array) -> Path:
    path = folder / f"{'x'.join(map(str, (*left, right.shape[1])))}.onnx"
    path.write_bytes(matmul_graph(left, right))
    return path


def _package(path: Path, spec: NetSpec) -> Package:
    """What a net is opened from; nothing but its one net is looked at."""
    manifest = Manifest(
        name="ceiling",
        family="none",
        dtype="fp32",
        latent_channels=1,
        context_width=1,
        scheduler={},
        nets={"gemm": NetFile(graph=path.name, weights=None, spec=spec)},
    )
    return Package(root=path.parent, manifest=manifest)
