"""The part of `cuda.bindings.runtime` that latentrt calls, on host memory: as strict as CUDA, and as late.

Nothing that is enqueued happens before the stream is waited for, and every copy reads its source only then:
the worst that CUDA's documentation allows. Freed memory, a second free, and what cannot be captured are
errors with CUDA's own numbers. Memory comes in blocks of 2 MiB, as the driver maps it, and a graph that is
instantiated takes some; each thread has a current device of its own. `fail` injects errors; a sticky one is
the answer to every later call, as in a spoiled context.
"""
# ruff: noqa: N801, N802, N803, N815 - the names are CUDA's

import ctypes
import threading
from collections.abc import Callable
from enum import IntEnum
from typing import Any

import numpy as np

Work = Callable[[], "cudaError_t"]


class cudaError_t(IntEnum):
    cudaSuccess = 0
    cudaErrorInvalidValue = 1
    cudaErrorMemoryAllocation = 2
    cudaErrorInvalidPitchValue = 12
    cudaErrorInsufficientDriver = 35
    cudaErrorNoDevice = 100
    cudaErrorInvalidDevice = 101
    cudaErrorInvalidResourceHandle = 400
    cudaErrorIllegalState = 401
    cudaErrorNotReady = 600
    cudaErrorIllegalAddress = 700
    cudaErrorLaunchFailure = 719
    cudaErrorStreamCaptureUnsupported = 900
    cudaErrorStreamCaptureInvalidated = 901
    cudaErrorStreamCaptureWrongThread = 908


class cudaMemcpyKind(IntEnum):
    cudaMemcpyHostToDevice = 1
    cudaMemcpyDeviceToHost = 2
    cudaMemcpyDeviceToDevice = 3


class cudaStreamCaptureMode(IntEnum):
    cudaStreamCaptureModeThreadLocal = 1


OK = cudaError_t.cudaSuccess
INVALID = cudaError_t.cudaErrorInvalidValue
GRANULE = 2 * 2**20  # bytes
NO_HANDLE = cudaError_t.cudaErrorInvalidResourceHandle
ILLEGAL = cudaError_t.cudaErrorIllegalAddress
SEVERED = cudaError_t.cudaErrorStreamCaptureInvalidated


class Uuid:
    bytes = bytes(range(16))


class Properties:
    name = b"Simulated GPU"
    major, minor, integrated = 8, 9, 0
    uuid = Uuid()
    totalGlobalMem, multiProcessorCount = 64 << 20, 58


class SimulatedRuntime:
    cudaError_t, cudaMemcpyKind = cudaError_t, cudaMemcpyKind
    cudaStreamCaptureMode, cudaStreamNonBlocking = cudaStreamCaptureMode, 1

    def __init__(self, *, total: int = 64 << 20, devices: int = 1) -> None:
        self.total, self.devices = total, devices
        self.taken = 0  # bytes that libraries and other processes hold
        self.current = threading.local()  # its `device`: 0 in a new thread
        self.places: dict[int, int] = {}  # handle or address -> the device that was current when it was made
        self.blocks: dict[int, tuple[np.ndarray, int]] = {}  # device memory
        self.pinned: dict[int, np.ndarray] = {}
        self.graphs: dict[int, list[Work]] = {}
        self.executables: dict[int, list[Work]] = {}
        self.streams: dict[int, list[Work]] = {}
        self.events: dict[int, float | None] = {}  # milliseconds; None until the stream has passed it
        self.recorded: set[int] = set()
        self.milliseconds = 0.0  # each copy takes one
        self.recording: list[Work] | None = None
        self.captured_on, self.captured_by = 0, 0  # stream, thread
        self.severed = False
        self.last = self.sticky = OK
        self.failures: dict[str, cudaError_t] = {}
        self.calls: list[str] = []
        self.handles = 1000
        self.sticky_next = False

    # ── for tests ──────────────────────────────────────────────────────────────────────────────

    def fail(self, name: str, error: cudaError_t, *, sticky: bool = False) -> None:
        """The next call of that function fails."""
        self.failures[name] = error
        self.sticky_next = sticky

    @property
    def used(self) -> int:
        sizes = [*(size for _, size in self.blocks.values()), *(1 for _ in self.executables)]
        return sum(-(-size // GRANULE) * GRANULE for size in sizes)

    @property
    def free(self) -> int:
        return self.total - self.taken - self.used

    def nothing_left(self) -> bool:
        return not (
            self.blocks or self.pinned or self.graphs or self.executables or self.streams or self.events
        )

    # ── the machinery ──────────────────────────────────────────────────────────────────────────

    def _begin(self, name: str, *, captured: bool = True) -> cudaError_t:
        self.calls.append(name)
        if self.sticky:
            return self._note(self.sticky)
        if error := self.failures.pop(name, None):
            self.sticky = error if self.sticky_next else OK
            return self._note(error)
        if self.recording is not None and not captured:
            self.severed = True
            return self._note(cudaError_t.cudaErrorStreamCaptureUnsupported)
        return OK

    def _note(self, error: cudaError_t) -> cudaError_t:
        self.last = error or self.last
        return error

    def _handle(self) -> int:
        self.handles += 1
        self.places[self.handles] = self.device
        return self.handles

    @property
    def device(self) -> int:
        """The calling thread's."""
        return getattr(self.current, "device", 0)

    def _inside(self, address: int, size: int) -> bool:
        return any(start <= address and address + size <= start + n for start, (_, n) in self.blocks.items())

    def _enqueue(self, stream: Any, work: Work) -> tuple[cudaError_t]:
        if int(stream) not in self.streams:
            return (self._note(NO_HANDLE),)
        if self.recording is not None and self.captured_on == int(stream):
            self.recording.append(work)
        else:
            self.streams[int(stream)].append(work)
        return (OK,)

    def _drain(self) -> cudaError_t:
        for queue in self.streams.values():
            while queue:
                if error := queue.pop(0)():
                    self.sticky = error
                    queue.clear()
        return self._note(self.sticky)

    def _move(self, to: int, source: int, size: int, kind: cudaMemcpyKind) -> cudaError_t:
        """At run time: memory that was freed meanwhile spoils the context."""
        down, up = cudaMemcpyKind.cudaMemcpyDeviceToHost, cudaMemcpyKind.cudaMemcpyHostToDevice
        if (kind != down and not self._inside(to, size)) or (kind != up and not self._inside(source, size)):
            return ILLEGAL
        ctypes.memmove(to, source, size)
        self.milliseconds += 1
        return OK

    # ── devices and errors ─────────────────────────────────────────────────────────────────────

    def cudaGetDeviceCount(self) -> tuple[Any, ...]:
        return self._begin("cudaGetDeviceCount"), self.devices

    def cudaSetDevice(self, device: int) -> tuple[Any, ...]:
        error = self._begin("cudaSetDevice")
        if not error and device >= self.devices:
            error = self._note(cudaError_t.cudaErrorInvalidDevice)
        self.current.device = self.device if error else device
        return (error,)

    def cudaGetDeviceProperties(self, device: int) -> tuple[Any, ...]:
        return self._begin("cudaGetDeviceProperties"), Properties

    def cudaDriverGetVersion(self) -> tuple[Any, ...]:
        return self._begin("cudaDriverGetVersion"), 13000

    def cudaRuntimeGetVersion(self) -> tuple[Any, ...]:
        return self._begin("cudaRuntimeGetVersion"), 13050

    def cudaGetLastError(self) -> tuple[Any, ...]:
        last, self.last = self.last, self.sticky
        return (last,)

    def cudaGetErrorName(self, error: cudaError_t) -> tuple[Any, ...]:
        return OK, error.name.encode()

    def cudaGetErrorString(self, error: cudaError_t) -> tuple[Any, ...]:
        return OK, f"error {error.value}".encode()

    # ── memory ─────────────────────────────────────────────────────────────────────────────────

    def cudaMemGetInfo(self) -> tuple[Any, ...]:
        return self._begin("cudaMemGetInfo"), self.free, self.total

    def cudaMalloc(self, size: int) -> tuple[Any, ...]:
        if error := self._begin("cudaMalloc", captured=False):
            return error, None
        if not size:
            return self._note(INVALID), None
        if -(-size // GRANULE) * GRANULE > self.free:
            return self._note(cudaError_t.cudaErrorMemoryAllocation), None
        block = np.full(size + 512, 0xCD, np.uint8)  # CUDA does not clear memory
        address = -(-block.ctypes.data // 256) * 256
        self.blocks[address], self.places[address] = (block, size), self.device
        return OK, address

    def cudaFree(self, devPtr: int) -> tuple[Any, ...]:
        if error := self._begin("cudaFree", captured=False) or self._drain():
            return (error,)
        return (OK if self.blocks.pop(devPtr, None) else self._note(INVALID),)

    def cudaMallocHost(self, size: int) -> tuple[Any, ...]:
        if error := self._begin("cudaMallocHost", captured=False):
            return error, None
        block = np.zeros(size, np.uint8)
        self.pinned[block.ctypes.data] = block
        return OK, block.ctypes.data

    def cudaFreeHost(self, ptr: int) -> tuple[Any, ...]:
        if error := self._begin("cudaFreeHost", captured=False):
            return (error,)
        return (self._note(INVALID) if self.pinned.pop(ptr, None) is None else OK,)

    def cudaMemsetAsync(self, devPtr: int, value: int, count: int, stream: Any) -> tuple[Any, ...]:
        if error := self._begin("cudaMemsetAsync"):
            return (error,)
        if not self._inside(devPtr, count):
            return (self._note(INVALID),)

        def work() -> cudaError_t:
            if not self._inside(devPtr, count):
                return ILLEGAL
            ctypes.memset(devPtr, value, count)
            return OK

        return self._enqueue(stream, work)

    def cudaMemcpyAsync(
        self, dst: int, src: int, count: int, kind: cudaMemcpyKind, stream: Any
    ) -> tuple[Any, ...]:
        return self._copy("cudaMemcpyAsync", [(dst, src)], count, kind, stream)

    def cudaMemcpy2DAsync(
        self,
        dst: int,
        dpitch: int,
        src: int,
        spitch: int,
        width: int,
        height: int,
        kind: cudaMemcpyKind,
        stream: Any,
    ) -> tuple[Any, ...]:
        if not width <= min(dpitch, spitch) <= max(dpitch, spitch) < 2**31:
            return (self._note(cudaError_t.cudaErrorInvalidPitchValue),)
        pairs = [(dst + row * dpitch, src + row * spitch) for row in range(height)]
        return self._copy("cudaMemcpy2DAsync", pairs, width, kind, stream)

    def _copy(
        self, name: str, pairs: list[tuple[int, int]], size: int, kind: cudaMemcpyKind, stream: Any
    ) -> tuple[Any, ...]:
        if error := self._begin(name):
            return (error,)
        kind = cudaMemcpyKind(int(kind))
        down, up = cudaMemcpyKind.cudaMemcpyDeviceToHost, cudaMemcpyKind.cudaMemcpyHostToDevice
        for to, source in pairs:
            if (kind != down and not self._inside(to, size)) or (
                kind != up and not self._inside(source, size)
            ):
                return (self._note(INVALID),)
            self._enqueue(stream, lambda to=to, source=source: self._move(to, source, size, kind))
        return (OK,)

    # ── streams and graphs ─────────────────────────────────────────────────────────────────────

    def cudaStreamCreateWithFlags(self, flags: int) -> tuple[Any, ...]:
        if error := self._begin("cudaStreamCreateWithFlags"):
            return error, None
        assert flags == self.cudaStreamNonBlocking
        stream = self._handle()
        self.streams[stream] = []
        return OK, stream

    def cudaStreamDestroy(self, stream: Any) -> tuple[Any, ...]:
        error = self._begin("cudaStreamDestroy")
        return (error or (self._note(NO_HANDLE) if self.streams.pop(int(stream), None) is None else OK),)

    def cudaStreamSynchronize(self, stream: Any) -> tuple[Any, ...]:
        error = self._begin("cudaStreamSynchronize", captured=False)
        if not error and int(stream) not in self.streams:
            error = self._note(NO_HANDLE)
        return (error or self._drain(),)

    def cudaStreamBeginCapture(self, stream: Any, mode: cudaStreamCaptureMode) -> tuple[Any, ...]:
        if error := self._begin("cudaStreamBeginCapture"):
            return (error,)
        if int(stream) not in self.streams:  # the legacy stream, 0, cannot be captured either
            return (self._note(cudaError_t.cudaErrorStreamCaptureUnsupported if not stream else NO_HANDLE),)
        if self.recording is not None:
            return (self._note(cudaError_t.cudaErrorIllegalState),)
        if mode != cudaStreamCaptureMode.cudaStreamCaptureModeThreadLocal:
            return (self._note(INVALID),)  # of those that exist, the one that lets other threads allocate
        self.recording, self.severed = [], False
        self.captured_on, self.captured_by = int(stream), threading.get_ident()
        return (OK,)

    def cudaStreamEndCapture(self, stream: Any) -> tuple[Any, ...]:
        if self.recording is not None and self.captured_on != int(stream):
            return self._note(cudaError_t.cudaErrorIllegalState), None
        if self.recording is not None and self.captured_by != threading.get_ident():
            return self._note(cudaError_t.cudaErrorStreamCaptureWrongThread), None
        work, self.recording = self.recording, None
        if error := self._begin("cudaStreamEndCapture"):
            return error, None
        if work is None or self.severed:
            return self._note(SEVERED if work is not None else cudaError_t.cudaErrorIllegalState), None
        graph = self._handle()
        self.graphs[graph] = work
        return OK, graph

    def cudaGraphInstantiate(self, graph: Any, flags: int) -> tuple[Any, ...]:
        if error := self._begin("cudaGraphInstantiate"):
            return error, None
        if self.free < GRANULE:
            return self._note(cudaError_t.cudaErrorMemoryAllocation), None
        executable = self._handle()
        self.executables[executable] = list(self.graphs[int(graph)])
        return OK, executable

    def cudaGraphDestroy(self, graph: Any) -> tuple[Any, ...]:
        error = self._begin("cudaGraphDestroy")
        return (error or (self._note(INVALID) if self.graphs.pop(int(graph), None) is None else OK),)

    def cudaGraphExecDestroy(self, graphExec: Any) -> tuple[Any, ...]:
        error = self._begin("cudaGraphExecDestroy")
        return (error or (self._note(INVALID) if self.executables.pop(graphExec, None) is None else OK),)

    def cudaGraphUpload(self, graphExec: Any, stream: Any) -> tuple[Any, ...]:
        error = self._begin("cudaGraphUpload")
        return (error or (OK if graphExec in self.executables else self._note(INVALID)),)

    def cudaGraphLaunch(self, graphExec: Any, stream: Any) -> tuple[Any, ...]:
        if error := self._begin("cudaGraphLaunch"):
            return (error,)
        if graphExec not in self.executables:
            return (self._note(INVALID),)
        for work in self.executables[graphExec]:
            self._enqueue(stream, work)
        return (OK,)

    # ── events ─────────────────────────────────────────────────────────────────────────────────

    def cudaEventCreate(self) -> tuple[Any, ...]:
        if error := self._begin("cudaEventCreate"):
            return error, None
        event = self._handle()
        self.events[event] = None
        return OK, event

    def cudaEventRecord(self, event: Any, stream: Any) -> tuple[Any, ...]:
        if error := self._begin("cudaEventRecord"):
            return (error,)
        if event not in self.events or self.places[event] != self.places.get(int(stream)):
            return (self._note(NO_HANDLE),)
        self.events[event] = None
        self.recorded.add(event)

        def work() -> cudaError_t:
            if event in self.events:
                self.events[event] = self.milliseconds
            return OK

        return self._enqueue(stream, work)

    def cudaEventElapsedTime(self, start: Any, end: Any) -> tuple[Any, ...]:
        if error := self._begin("cudaEventElapsedTime"):
            return error, None
        if not {start, end} <= self.recorded & self.events.keys():
            return self._note(NO_HANDLE), None
        began, ended = self.events[start], self.events[end]
        if began is None or ended is None:
            return self._note(cudaError_t.cudaErrorNotReady), None
        return OK, ended - began

    def cudaEventDestroy(self, event: Any) -> tuple[Any, ...]:
        if error := self._begin("cudaEventDestroy"):
            return (error,)
        known = event in self.events
        self.events.pop(event, None)
        return (OK if known else self._note(NO_HANDLE),)
