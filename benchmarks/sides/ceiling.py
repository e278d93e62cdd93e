"""What the machine can do at best, measured beside the others: a matmul and a copy, of random numbers.

    gemm    with a constant right side, through ONNX Runtime as our own nets run: float32 on the CPU, the
            package's dtype on a CUDA device; the fastest of several shapes. figures: flops, shape, dtype
    copy    memory to memory, more than a last cache holds, with all threads. figures: bytes read and written

On a device a run is several launches (`repeats`); figures are of one, `device_s` is by the device's events.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from dataclasses import replace
from functools import partial
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
from ...engines.spec import DTYPES, Array, NetSpec, TensorSpec
from ..case import Case
from .contract import CEILING, OpenSide, Task, Work
from .device_work import DeviceNets

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


def fastest(
    candidates: Sequence[Work], trials: int = TRIALS, clock: Callable[[], float] = perf_counter
) -> Work:
    """The one with the most FLOP/s at the median of its trials, which take turns; the others are closed.

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
            found.append(candidate.figures()["flops"] / (clock() - began))
    medians = list(map(median, rates))
    chosen = candidates[medians.index(max(medians))]
    for candidate in candidates:
        if candidate is not chosen:
            candidate.close()
    return chosen


def _ceiling(
    versions: dict[str, str], resources: ExitStack, **candidates: Callable[[], Sequence[Work]]
) -> OpenSide:
    """A side whose workloads are the same for every case: each is chosen once, of its candidates."""
    kept: dict[str, Work] = {}

    def prepare(name: str, case: Case, stack: ExitStack) -> Work:
        if name not in kept:
            kept[name] = fastest(candidates[name]())
            resources.callback(kept[name].close)
        return replace(kept[name], held=ExitStack())  # it stays when this one is closed

    makers = {name: partial(prepare, name) for name in candidates}
    return OpenSide(name=CEILING, versions=versions, makers=makers, resources=resources)


def host_ceiling(
    threads: int | None, shapes: Sequence[Shape] = HOST_SHAPES, copied: int = COPIED
) -> OpenSide:
    """On the CPU, with the threads that our own nets have. Raises UsageError for less than one."""
    count: int = onnxruntime.session_options(threads).intra_op_num_threads
    resources = ExitStack()
    pool = resources.enter_context(ThreadPoolExecutor(count))
    folder = Path(resources.enter_context(TemporaryDirectory()))
    return _ceiling(
        {"onnxruntime": f"onnxruntime {onnxruntime.library().__version__} (CPU)", "threads": str(count)},
        resources,
        gemm=lambda: [_host_gemm(shape, folder, count) for shape in shapes],
        copy=lambda: [_host_copy(copied, pool, count)],
    )


def _host_gemm(shape: Shape, folder: Path, threads: int) -> Work:
    """Bound once, like a net on a device: neither the answer's allocation nor its copy is in the time."""
    left, right = _sides(shape, "float32")
    product = np.empty((shape[0], shape[2]), np.float32)
    path = _write_matmul(folder, left.shape, right)
    options = onnxruntime.session_options(threads)
    session = onnxruntime.open_session(path, options, [CPU], culprit="gemm")
    binding = session.io_binding()
    binding.bind_input("left", "cpu", 0, np.float32, left.shape, left.ctypes.data)
    binding.bind_output("product", "cpu", 0, np.float32, product.shape, product.ctypes.data)
    kept = {"left": left, "product": product}  # the binding has their addresses alone

    def call() -> dict[str, Array]:
        session.run_with_iobinding(binding)
        return kept

    return Work(call=call, fetch=dict[str, Array], figures=partial(_facts, shape, "float32"))


def _host_copy(size: int, pool: ThreadPoolExecutor, threads: int) -> Work:
    """NumPy lets go of the interpreter while it copies, so the threads work side by side."""
    source = np.resize(_random_bytes(size), size)
    target = np.zeros_like(source)
    target.fill(1)  # pages of zeros are not there until they are written
    parts = np.array_split(target, threads), np.array_split(source, threads)

    def call() -> dict[str, Array]:
        list(pool.map(np.copyto, *parts))
        return {}

    return Work(call=call, figures=lambda: {"bytes": 2 * size, "threads": threads})


def device_ceiling(
    device: Device,
    dtype: str,
    *,
    shapes: Sequence[Shape] = DEVICE_SHAPES,
    copied: int = DEVICE_COPIED,
    provider: str = CUDA,
    submit: Submit | None = None,
) -> OpenSide:
    """On a device, which is closed with it: a matmul of "fp16" or "fp32", and a copy of `copied` bytes.

    It copies no more than a quarter of what is free. `provider` and `submit` go to `open_onnxruntime_net`.
    """
    resources = ExitStack()
    resources.callback(device.close)
    folder = Path(resources.enter_context(TemporaryDirectory()))
    open_net = partial(open_onnxruntime_net, provider=provider, submit=submit)
    return _ceiling(
        {"onnxruntime": onnxruntime.library().__version__, "device": device.name},
        resources,
        gemm=lambda: [_device_gemm(shape, _FLOAT_OF[dtype], folder, device, open_net) for shape in shapes],
        copy=lambda: [_device_copy(min(copied, device.memory().free // 4), device)],
    )


def _device_gemm(
    shape: Shape, dtype: str, folder: Path, device: Device, open_net: Callable[..., Any]
) -> Work:
    left, right = _sides(shape, dtype)
    spec = NetSpec(
        inputs=(TensorSpec(name="left", dtype=dtype, shape=left.shape),),
        outputs=(TensorSpec(name="product", dtype=dtype, shape=(shape[0], shape[2])),),
    )
    graph = _write_matmul(folder, left.shape, right).name
    manifest = Manifest(  # nothing but its one net is looked at
        name="ceiling",
        family="none",
        dtype="fp32",
        latent_channels=1,
        context_width=1,
        scheduler={},
        nets={"gemm": NetFile(graph=graph, weights=None, spec=spec)},
    )
    with ExitStack() as stack:
        net = open_net(Package(root=folder, manifest=manifest), "gemm", device)
        stack.callback(net.close)
        nets = DeviceNets(device=device, nets={"gemm": net})
        block, (bound,) = nets.bind(stack, ("gemm", {}))
        block.upload("left", left)
        return _launched(nets, stack, bound.enqueue, _facts(shape, dtype))


def _device_copy(size: int, device: Device) -> Work:
    tile = _random_bytes(size)
    size = size // tile.nbytes * tile.nbytes
    with ExitStack() as stack:
        source, target = device.allocate(size), device.allocate(size)
        for address in (source, target):
            stack.callback(device.free, address)
        device.upload(source, tile)
        if size > tile.nbytes:
            rows = size // tile.nbytes - 1
            device.copy(source + tile.nbytes, source, tile.nbytes, rows=rows, to_pitch=tile.nbytes)
        nets = DeviceNets(device=device, nets={})
        return _launched(nets, stack, lambda: device.copy(target, source, size), {"bytes": 2 * size})


def _launched(nets: DeviceNets, stack: ExitStack, enqueue: Callable[[], None], facts: dict[str, Any]) -> Work:
    """`LAUNCHES` in a row, and one wait. What the stack holds is the work's from now on."""

    def launch() -> None:
        for _ in range(LAUNCHES):
            enqueue()

    work = nets.work(stack, launch, repeats=LAUNCHES, figures=facts)
    work.held = stack.pop_all()
    return work


def _sides(shape: Shape, dtype: str) -> tuple[Array, Array]:
    """(M, K) and (K, N), evenly spread from -0.5 to 0.5: with a K of thousands float16 holds the sums."""
    random = np.random.default_rng(shape)

    def draw(*size: int) -> Array:
        return (random.random(size, np.float32) - np.float32(0.5)).astype(DTYPES[dtype])

    return draw(*shape[:2]), draw(*shape[1:])


def _random_bytes(size: int) -> Array:
    size = min(size, _TILE)
    return np.random.default_rng(size).integers(0, 256, size, np.uint8)


def _facts(shape: Shape, dtype: str) -> dict[str, Any]:
    rows, inner, columns = shape
    return {"flops": 2 * rows * inner * columns, "shape": list(shape), "dtype": dtype}


def _write_matmul(folder: Path, left: tuple[int, ...], right: Array) -> Path:
    """The model `product = left @ right`, `left` (M, K), `right` (K, N) float32 or float16.

    `right` is a constant, so that a runtime may lay it out anew.
    """
    from onnx import helper, numpy_helper

    kind = helper.np_dtype_to_tensor_dtype(right.dtype)
    graph = helper.make_graph(
        [helper.make_node("MatMul", ["left", "right"], ["product"])],
        "gemm",
        [helper.make_tensor_value_info("left", kind, left)],
        [helper.make_tensor_value_info("product", kind, (left[0], right.shape[1]))],
        [numpy_helper.from_array(right, "right")],
    )
    model = helper.make_model(graph, ir_version=8, opset_imports=[helper.make_opsetid("", 13)])
    path = folder / f"{'x'.join(map(str, (*left, right.shape[1])))}.onnx"
    path.write_bytes(model.SerializeToString())
    return path
