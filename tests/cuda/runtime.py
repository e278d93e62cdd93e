"""The stand-in's CUDA runtime behind the names of `cuda.bindings.runtime`, and what it has counted.

`install` puts it where `engines/cuda` imports that module and NVML from, so `CudaDevice` and ONNX Runtime's
CUDA provider share one runtime, as they do on a GPU. The process must have been started with the stand-in's
folder in LD_LIBRARY_PATH, else the provider would load another.
"""
# ruff: noqa: N802, N815 - the names are CUDA's and NVML's

from __future__ import annotations

import ctypes as c
import os
import sys
from collections import Counter
from collections.abc import Callable
from enum import IntEnum
from typing import Any

from tests.cuda.libraries import RUNTIME

_ADDRESS, _BYTES, _INT = c.c_void_p, c.c_size_t, c.c_int
# What a function returns beside its error, and what it takes. Out parameters come first in CUDA, but in one.
_FUNCTIONS: dict[str, tuple[list[Any], list[Any]]] = {
    "cudaGetDeviceCount": ([_INT], []),
    "cudaSetDevice": ([], [_INT]),
    "cudaGetDevice": ([_INT], []),
    "cudaDriverGetVersion": ([_INT], []),
    "cudaRuntimeGetVersion": ([_INT], []),
    "cudaGetLastError": ([], []),
    "cudaMemGetInfo": ([_BYTES, _BYTES], []),
    "cudaMalloc": ([_ADDRESS], [_BYTES]),
    "cudaFree": ([], [_ADDRESS]),
    "cudaMallocHost": ([_ADDRESS], [_BYTES]),
    "cudaFreeHost": ([], [_ADDRESS]),
    "cudaMemcpy": ([], [_ADDRESS, _ADDRESS, _BYTES, _INT]),
    "cudaMemsetAsync": ([], [_ADDRESS, _INT, _BYTES, _ADDRESS]),
    "cudaMemcpyAsync": ([], [_ADDRESS, _ADDRESS, _BYTES, _INT, _ADDRESS]),
    "cudaMemcpy2DAsync": ([], [_ADDRESS, _BYTES, _ADDRESS, _BYTES, _BYTES, _BYTES, _INT, _ADDRESS]),
    "cudaStreamCreate": ([_ADDRESS], []),
    "cudaStreamCreateWithFlags": ([_ADDRESS], [c.c_uint]),
    "cudaStreamDestroy": ([], [_ADDRESS]),
    "cudaStreamSynchronize": ([], [_ADDRESS]),
    "cudaStreamWaitEvent": ([], [_ADDRESS, _ADDRESS, c.c_uint]),
    "cudaDeviceSynchronize": ([], []),
    "cudaStreamBeginCapture": ([], [_ADDRESS, _INT]),
    "cudaStreamEndCapture": ([_ADDRESS], [_ADDRESS]),
    "cudaGraphInstantiate": ([_ADDRESS], [_ADDRESS, c.c_ulonglong]),
    "cudaGraphUpload": ([], [_ADDRESS, _ADDRESS]),
    "cudaGraphDestroy": ([], [_ADDRESS]),
    "cudaGraphExecDestroy": ([], [_ADDRESS]),
    "cudaGraphLaunch": ([], [_ADDRESS, _ADDRESS]),
    "cudaEventCreate": ([_ADDRESS], []),
    "cudaEventRecord": ([], [_ADDRESS, _ADDRESS]),
    "cudaEventSynchronize": ([], [_ADDRESS]),
    "cudaEventElapsedTime": ([c.c_float], [_ADDRESS, _ADDRESS]),
    "cudaEventDestroy": ([], [_ADDRESS]),
}
_OUT_LAST = ("cudaStreamEndCapture",)


class MemcpyKind(IntEnum):
    cudaMemcpyHostToHost = 0
    cudaMemcpyHostToDevice = 1
    cudaMemcpyDeviceToHost = 2
    cudaMemcpyDeviceToDevice = 3


class CaptureMode(IntEnum):
    cudaStreamCaptureModeGlobal = 0
    cudaStreamCaptureModeThreadLocal = 1
    cudaStreamCaptureModeRelaxed = 2


class Report(Counter[tuple[str, str]]):
    """What the stand-in has counted, by kind and name: calls, counts, what is open, notes, kernels."""

    def of(self, kind: str) -> dict[str, int]:
        """The numbers of one kind that are not 0, by name."""
        return {name: number for (this, name), number in sorted(self.items()) if this == kind and number}

    def events(self) -> dict[str, int]:
        """Launches, copies, waits, plans and allocations, without those that are 0."""
        calls = self.of("call")
        calls_of = {
            "allocations": ("cudaMalloc", "cudaMallocFromPoolAsync"),
            "page-locked allocations": ("cudaHostAlloc", "cudaMallocHost"),
        }
        sums = {what: sum(calls.get(name, 0) for name in names) for what, names in calls_of.items()}
        return self.of("count") | {what: number for what, number in sums.items() if number}

    def since(self, before: Report) -> Report:
        """The difference; what went down counts below 0."""
        return Report({key: self[key] - before[key] for key in {*self, *before}})


class StandIn:
    """`cuda.bindings.runtime`, as far as latentrt calls it, and the levers of a test."""

    cudaMemcpyKind, cudaStreamCaptureMode, cudaStreamNonBlocking = MemcpyKind, CaptureMode, 1

    def __init__(self, library: str = RUNTIME) -> None:
        self._library = c.CDLL(library)
        self._library.stand_in_report.restype = _ADDRESS
        self._library.stand_in_free.argtypes = [_ADDRESS]
        for text in ("cudaGetErrorName", "cudaGetErrorString"):
            getattr(self._library, text).restype = c.c_char_p
        for name, (outs, arguments) in _FUNCTIONS.items():
            setattr(self, name, self._function(name, outs, arguments))

    def __getattr__(self, name: str) -> Any:
        raise AttributeError(f"the stand-in's Python side has no {name}: add it to tests/cuda/runtime.py")

    def _function(self, name: str, outs: list[Any], arguments: list[Any]) -> Callable[..., tuple[Any, ...]]:
        function = getattr(self._library, name)
        pointers = [c.POINTER(kind) for kind in outs]
        last = name in _OUT_LAST
        function.argtypes = [*arguments, *pointers] if last else [*pointers, *arguments]

        def call(*given: Any) -> tuple[Any, ...]:
            places = [kind() for kind in outs]
            found = [c.byref(place) for place in places]
            error = function(*given, *found) if last else function(*found, *given)
            return (error, *(place.value for place in places))

        return call

    def cudaGetErrorName(self, error: int) -> tuple[int, bytes]:
        return 0, self._library.cudaGetErrorName(error)

    def cudaGetErrorString(self, error: int) -> tuple[int, bytes]:
        return 0, self._library.cudaGetErrorString(error)

    def cudaGetDeviceProperties(self, device: int) -> tuple[int, Properties]:
        place = c.create_string_buffer(1008)
        return self._library.cudaGetDeviceProperties(place, device), Properties(place.raw)

    # ── for tests ──────────────────────────────────────────────────────────────────────────────

    def report(self) -> Report:
        """Everything counted since the process began."""
        text = self._library.stand_in_report()
        try:
            lines = c.string_at(text).decode().splitlines()
        finally:
            self._library.stand_in_free(text)
        report = Report()
        for kind, name, number in (line.split("\t") for line in lines):
            report[kind, name] += int(number)
        return report

    def fail(self, name: str, error: int, *, call: int = 1, sticky: bool = False) -> None:
        """That call of the function from now on answers `error`; a sticky one is every later answer too."""
        self._library.stand_in_fail(name.encode(), c.c_long(call), error, int(sticky))

    def mend(self) -> None:
        """No failure is left."""
        self._library.stand_in_mend()

    def set_total(self, size: int) -> None:
        """The bytes that the device has; 80 GiB at first."""
        self._library.stand_in_set_total(_BYTES(size))

    def set_devices(self, number: int) -> None:
        """How many devices there are; one at first."""
        self._library.stand_in_set_devices(number)

    def set_copied(self, size: int) -> None:
        """Copies to or on the device of more bytes move nothing; 4 MiB at first."""
        self._library.stand_in_set_copied(_BYTES(size))

    def install(self) -> None:
        """Be `cuda.bindings.runtime` and NVML for this process."""
        sys.modules["cuda.bindings.runtime"] = self  # pyright: ignore[reportArgumentType]
        sys.modules["pynvml"] = Nvml(self)  # pyright: ignore[reportArgumentType]


class Properties:
    """The members of cudaDeviceProp that latentrt reads, at their places in CUDA 13.0."""

    def __init__(self, content: bytes) -> None:
        self.name = content[:256].rstrip(b"\0")
        self.uuid = Uuid(content[256:272])
        self.totalGlobalMem = int.from_bytes(content[288:296], "little")
        self.major, self.minor, self.multiProcessorCount, self.integrated = (
            int.from_bytes(content[place : place + 4], "little") for place in (360, 364, 384, 388)
        )


class Uuid:
    def __init__(self, content: bytes) -> None:
        self.bytes = content


class NVMLError(Exception):
    pass


class Nvml:
    """The part of `pynvml` that `engines/cuda/facts.py` calls, with this process alone on the device."""

    NVMLError = NVMLError

    def __init__(self, runtime: StandIn) -> None:
        self._runtime = runtime

    def nvmlInit(self) -> None:
        pass

    def nvmlSystemGetDriverVersion(self) -> str:
        return "580.82.07"

    def nvmlDeviceGetHandleByUUID(self, uuid: str) -> str:
        if not uuid.startswith("GPU-"):
            raise NVMLError("Not Found")
        return uuid

    def nvmlDeviceGetMemoryInfo(self, handle: str) -> Values:
        memory = self._runtime.report().of("memory")
        used, total = memory.get("used", 0), memory["total"]
        return Values(free=total - used, total=total, used=used)

    def nvmlDeviceGetComputeRunningProcesses(self, handle: str) -> list[Values]:
        used = self._runtime.report().of("memory").get("used", 0)
        return [Values(pid=os.getpid(), usedGpuMemory=used)]


class Values:
    def __init__(self, **values: int) -> None:
        vars(self).update(values)
