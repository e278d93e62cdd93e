"""What the simulated TensorRT is made of: enumerations, the logger, run-time kernels, and the test's hold.

Every public class and member is one of the libraries'.
"""

from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from enum import IntEnum
from typing import Any

import numpy as np

VARIANTS = {"tensorrt 10": "10.14.1.48", "tensorrt 11": "11.4.0.106", "tensorrt-rtx": "1.7.1.116"}
ONLY = {  # names that not all libraries have
    "EngineStat": ("tensorrt 11", "tensorrt-rtx"),
    "EngineValidity": ("tensorrt-rtx",),
    "EngineInvalidityDiagnostics": ("tensorrt-rtx",),
    "CudaGraphStrategy": ("tensorrt-rtx",),
    "DynamicShapesKernelSpecializationStrategy": ("tensorrt-rtx",),
    "IRuntimeCache": ("tensorrt-rtx",),
    "IRuntimeConfig": ("tensorrt-rtx",),
}
ORT_TYPES = {
    "tensor(float)": "FLOAT",
    "tensor(float16)": "HALF",
    "tensor(int32)": "INT32",
    "tensor(int64)": "INT64",
    "tensor(uint8)": "UINT8",
}
NUMPY_TYPES = {
    "FLOAT": np.float32,
    "HALF": np.float16,
    "INT32": np.int32,
    "INT64": np.int64,
    "UINT8": np.uint8,
}


@dataclass
class World:
    """What a test watches and breaks. `failing` has the calls that fail next, and what they log."""

    submit: Callable[[Callable[[], None]], Any] = lambda work: work()
    compute_capability: str = "8.9"
    host_code: bool = False
    verdict: tuple[int, int] = (0, 0)  # of get_engine_validity
    context: Any = None  # the class of execution contexts
    counts: Counter[str] = field(default_factory=Counter)
    failing: dict[str, str] = field(default_factory=dict)


class Severity(IntEnum):
    INTERNAL_ERROR, ERROR, WARNING, INFO, VERBOSE = range(5)


class ILogger:
    Severity = Severity

    def log(self, severity: Severity, msg: str) -> None:
        raise NotImplementedError


class DataType(IntEnum):
    FLOAT, HALF, INT8, INT32, BOOL, UINT8, FP8, BF16, INT64 = range(9)


class TensorIOMode(IntEnum):
    NONE, INPUT, OUTPUT = range(3)


class TensorLocation(IntEnum):
    DEVICE, HOST = range(2)


class TensorFormat(IntEnum):
    LINEAR, CHW2 = range(2)


class ExecutionContextAllocationStrategy(IntEnum):
    STATIC, ON_PROFILE_CHANGE, USER_MANAGED = range(3)


class EngineStat(IntEnum):
    TOTAL_WEIGHTS_SIZE, STRIPPED_WEIGHTS_SIZE = range(2)


class EngineValidity(IntEnum):
    VALID, SUBOPTIMAL, INVALID = range(3)


class EngineInvalidityDiagnostics(IntEnum):
    VERSION_MISMATCH, UNSUPPORTED_CC, OLD_CUDA_DRIVER, OLD_CUDA_RUNTIME = 1, 2, 4, 8
    INSUFFICIENT_GPU_MEMORY, MALFORMED_ENGINE, CUDA_ERROR = 16, 32, 64


class CudaGraphStrategy(IntEnum):
    DISABLED, WHOLE_GRAPH_CAPTURE = range(2)


class DynamicShapesKernelSpecializationStrategy(IntEnum):
    LAZY, EAGER, NONE = range(3)


def nptype(kind: DataType) -> type:
    return NUMPY_TYPES[kind.name]


class IRuntimeCache:
    def __init__(self, world: World) -> None:
        self._world, self._kernels = world, set[str]()

    def _head(self) -> bytes:
        return f"kernels for {self._world.compute_capability}:".encode()

    def deserialize(self, blob: bytes) -> bool:
        if not blob.startswith(self._head()):
            return False
        self._kernels = set(blob[len(self._head()) :].decode().split(";"))
        return True

    def serialize(self) -> memoryview:
        self._world.counts["serialised"] += 1
        return memoryview(self._head() + ";".join(sorted(self._kernels)).encode())


class IRuntimeConfig:
    def __init__(self, world: World) -> None:
        self._world = world
        self._strategy = ExecutionContextAllocationStrategy.STATIC
        self._cache: IRuntimeCache | None = None
        self.cuda_graph_strategy = CudaGraphStrategy.WHOLE_GRAPH_CAPTURE
        self.dynamic_shapes_kernel_specialization_strategy = DynamicShapesKernelSpecializationStrategy.LAZY

    def set_execution_context_allocation_strategy(self, strategy: Any) -> None:
        self._strategy = strategy

    def create_runtime_cache(self) -> IRuntimeCache:
        return IRuntimeCache(self._world)

    def set_runtime_cache(self, cache: IRuntimeCache) -> bool:
        self._cache = cache
        return True

    def _compile(self, profile: int, shapes: Any) -> None:
        eager = DynamicShapesKernelSpecializationStrategy.EAGER
        assert self.dynamic_shapes_kernel_specialization_strategy == eager
        assert self.cuda_graph_strategy == CudaGraphStrategy.DISABLED, "the loop is captured by us"
        kernel = f"{profile}:{sorted(shapes.items())}"
        if self._cache is not None and kernel not in self._cache._kernels:
            self._world.counts["compiled"] += 1
            self._cache._kernels.add(kernel)
