"""The device of the seam on CUDA: one device, one stream of its own, and the driver calls behind it.

The stream is not the default one and does not wait for it: only such a stream can be captured, and what
other libraries do on theirs does not delay this one. ONNX Runtime and TensorRT get its handle
(`CudaDevice.stream`).

The functions are those of NVIDIA's "CUDA Runtime API", chapters Memory Management, Stream Management and
Graph Management and Event Management; its chapter "API synchronization behavior" says what an
asynchronous copy promises.
"""

from __future__ import annotations

import ctypes
from collections.abc import Callable, Generator
from contextlib import contextmanager
from functools import partial
from typing import Any

import numpy as np

from ..device import ALIGNMENT, DeviceMemory, Graph
from ..errors import BackendError, LatentrtError, MemoryLimitError, UsageError
from ..spec import Array
from .facts import DeviceFacts, Nvml, checked, facts, load_runtime


class CudaStopwatch:
    """`Stopwatch` on CUDA; made by `CudaDevice.stopwatch`.

    "In milliseconds with a resolution of around 0.5 microseconds", its documentation says of
    cudaEventElapsedTime.
    """

    def __init__(self, runtime: Any, stream: Any, enter: Callable[[str], None]) -> None:
        self._runtime, self._stream, self._enter = runtime, stream, enter
        self._events: list[Any] = []
        self._stopped = False
        try:
            for _ in range(2):
                self._events.append(checked(runtime, runtime.cudaEventCreate(), "making a stopwatch"))
        except LatentrtError:
            self.close()
            raise

    def start(self) -> None:
        """Begin with what is enqueued next. Raises BackendError."""
        self._record(0, "starting a stopwatch")
        self._stopped = False

    def stop(self) -> None:
        """End with what was enqueued last. Raises BackendError."""
        self._record(1, "stopping a stopwatch")
        self._stopped = True

    def seconds(self) -> float:
        """The seconds between start and stop; call it after `synchronize`.

        Raises:
            BackendError: it was not stopped, never started or is closed, or the stream is not there yet.
        """
        begin, end = self._open("reading a stopwatch")
        if not self._stopped:
            raise BackendError(
                "reading a stopwatch that was not stopped",
                expected="start, stop, and a wait for the stream before",
                fix="Call stop and Device.synchronize first.",
            )
        result = self._runtime.cudaEventElapsedTime(begin, end)
        return float(checked(self._runtime, result, "reading a stopwatch")) / 1000  # CUDA has milliseconds

    def close(self) -> None:
        """Free both events. May be called twice; never raises: a spoiled context refuses it."""
        events, self._events = self._events, []
        for event in events:
            self._runtime.cudaEventDestroy(event)
        if events:
            self._runtime.cudaGetLastError()

    def _record(self, which: int, doing: str) -> None:
        event = self._open(doing)[which]
        checked(self._runtime, self._runtime.cudaEventRecord(event, self._stream), doing)

    def _open(self, doing: str) -> list[Any]:
        self._enter(doing)
        if not self._events:
            raise BackendError(
                f"{doing} that is closed", expected="an open stopwatch", fix="Make another: Device.stopwatch."
            )
        return self._events


# Bytes of page-locked memory that uploads pass through. A request uploads 1 to 10 MB; what is longer goes in
# pieces, with a wait in between.
STAGING = 16 * 2**20
_MOST_PITCH = 2**31 - 1  # bytes: what every device takes (cudaDeviceProp.memPitch)


class CudaGraph:
    """Captured work, ready to launch on the stream it was captured from."""

    def __init__(self, device: CudaDevice, executable: Any) -> None:
        self._device = device
        self._executable = executable

    def launch(self) -> None:
        """Enqueue all of it. Raises BackendError once closed, or if CUDA refuses, MemoryLimitError."""
        if self._executable is None:
            raise BackendError(
                "the graph is closed",
                expected="an open graph",
                fix="Capture the work again, then launch that.",
            )
        self._device.launch(self._executable)

    def close(self) -> None:
        """Free it, once the stream is done with it. May be called twice."""
        executable, self._executable = self._executable, None
        if executable is not None:
            self._device.discard(self, executable)


class CudaDevice:
    """`Device` on CUDA. Not safe to share between threads without a lock.

    Memory comes from cudaMalloc, whose addresses are multiples of 256 ("CUDA C++ Programming Guide", Device
    Memory Accesses), and goes back with cudaFree at once, so that other libraries and NVML see it free.

    Args:
        index: of the device, as CUDA_VISIBLE_DEVICES numbers them.
        runtime: the CUDA runtime; `cuda.bindings.runtime` unless a test passes another.
        nvml: NVML; `pynvml`, if it is installed, unless a test passes another.

    Raises:
        BackendError: no such device can be used here.
    """

    def __init__(self, index: int = 0, *, runtime: Any = None, nvml: Any = None) -> None:
        self._runtime: Any = runtime or load_runtime()
        self.facts: DeviceFacts = facts(index, runtime=self._runtime, nvml=nvml)
        self.name = self.facts.name
        self.kind = f"{self.facts.kind}, driver {self.facts.driver or self.facts.cuda}"
        self.index = index
        self._nvml = Nvml(self.facts.uuid, nvml)
        self._sizes: dict[int, int] = {}  # address -> bytes
        self._graphs: dict[CudaGraph, Any] = {}
        self._stopwatches: list[CudaStopwatch] = []
        self._downloads: list[Array] = []
        self._staging = 0  # address of the page-locked block, once there is one
        self._staged = 0  # bytes of it that the stream may still read
        self._capturing = False
        self._closed = False
        self._enter("opening the device")
        flag = self._runtime.cudaStreamNonBlocking
        self._stream: Any = self._call("cudaStreamCreateWithFlags", flag, doing="making a stream")
        self.stream = int(self._stream)

    # ── memory ─────────────────────────────────────────────────────────────────────────────────

    def allocate(self, size: int) -> int:
        """The address of `size` bytes of zeros. Raises MemoryLimitError with the numbers, BackendError."""
        self._enter("allocating", recorded=False)
        doing = f"allocating {size} bytes"
        address = int(self._call("cudaMalloc", max(size, 1), doing=doing))
        self._sizes[address] = size
        try:
            self._call("cudaMemsetAsync", address, 0, size, self._stream, doing=doing)
        except LatentrtError:
            self.free(address)
            raise
        return address

    def free(self, address: int) -> None:
        """Wait for the stream, then give back what `allocate` returned.

        Raises BackendError for an address that is not allocated, or for what failed on the stream: the memory
        is free even so.
        """
        self._enter("freeing", recorded=False)
        if self._sizes.pop(address, None) is None:
            raise BackendError(
                f"the address {address:#x} is not allocated, or is free already",
                expected="one that `allocate` returned",
                fix="Free each block once; if you did not write this call, report it.",
            )
        try:
            self.synchronize()
        finally:
            self._call("cudaFree", address, doing="freeing memory")

    def memory(self) -> DeviceMemory:
        """Now, and of all processes: from NVML, or CUDA where NVML has no answer."""
        self._enter("asking for the free memory")
        # NVML knows nothing of memory that is shared with the host
        numbers = None if self.facts.unified else self._nvml.memory()
        free, total = numbers or self._call("cudaMemGetInfo", doing="asking for the free memory")
        return DeviceMemory(free=int(free), total=int(total), unified=self.facts.unified)

    def process_memory(self) -> int | None:
        """Bytes of the device that this whole process holds; None where NVML does not tell."""
        return self._nvml.process_memory()

    # ── copies ─────────────────────────────────────────────────────────────────────────────────

    def upload(self, address: int, array: Array) -> None:
        """Host to device. The array's content is taken at once; `array` may have any strides.

        From memory that is not page-locked, cudaMemcpyAsync "might be synchronous" ("API synchronization
        behavior"): no promise. So the content passes through a page-locked block here, each byte of which is
        used once per synchronisation. Raises BackendError, also during capture: a graph would read the block
        at each launch.
        """
        self._enter("uploading", recorded=False)
        source = np.ascontiguousarray(array)
        done = 0
        while done < source.nbytes:
            place, room = self._room()
            length = min(room, source.nbytes - done)
            ctypes.memmove(place, source.ctypes.data + done, length)
            self._copy(address + done, place, length, "cudaMemcpyHostToDevice")
            self._staged += -(-length // ALIGNMENT) * ALIGNMENT
            done += length

    def _room(self) -> tuple[int, int]:
        """The next free address of the page-locked block, and how many bytes are free there."""
        if not self._staging:
            self._staging = int(self._call("cudaMallocHost", STAGING, doing="locking memory for uploads"))
        if self._staged >= STAGING:
            self.synchronize()
        return self._staging + self._staged, STAGING - self._staged

    def download(self, address: int, array: Array) -> None:
        """Device to a contiguous host array, whose content is there after `synchronize`.

        Raises:
            UsageError: the array is not contiguous, or read-only.
            BackendError: CUDA refuses, or work is being captured.
        """
        self._enter("downloading", recorded=False)
        if not (array.flags.c_contiguous and array.flags.writeable):
            raise UsageError(
                "the array to download into is read-only or not contiguous",
                expected="a writeable array in C order",
                fix="Make one: numpy.empty(shape, dtype).",
            )
        if array.nbytes:
            self._downloads.append(array)  # the copy may still be under way when the caller drops it
            self._copy(array.ctypes.data, address, array.nbytes, "cudaMemcpyDeviceToHost")

    def copy(
        self, to: int, source: int, width: int, *, rows: int = 1, to_pitch: int = 0, pitch: int = 0
    ) -> None:
        """Device to device: `rows` runs of `width` bytes that start `to_pitch` and `pitch` bytes apart.

        A `pitch` of 0 repeats the one run. The two areas may not overlap. Raises BackendError.
        """
        self._enter("copying")
        if rows > 1 and all(width <= item <= _MOST_PITCH for item in (to_pitch, pitch)):
            kind = self._runtime.cudaMemcpyKind.cudaMemcpyDeviceToDevice
            stream, doing = self._stream, f"copying {rows} runs of {width} bytes"
            self._call(
                "cudaMemcpy2DAsync", to, to_pitch, source, pitch, width, rows, kind, stream, doing=doing
            )
            return
        for row in range(rows):  # pitches that cudaMemcpy2DAsync refuses
            self._copy(to + row * to_pitch, source + row * pitch, width, "cudaMemcpyDeviceToDevice")

    def _copy(self, to: int, source: int, size: int, kind: str) -> None:
        way = getattr(self._runtime.cudaMemcpyKind, kind)
        self._call("cudaMemcpyAsync", to, source, size, way, self._stream, doing=f"copying {size} bytes")

    # ── the stream ─────────────────────────────────────────────────────────────────────────────

    def synchronize(self) -> None:
        """Wait for the stream. Raises BackendError or MemoryLimitError for what failed there meanwhile."""
        self._enter("synchronising", recorded=False)
        try:
            self._call("cudaStreamSynchronize", self._stream, doing="the work on the device")
        finally:
            self._staged = 0
            self._downloads.clear()

    @contextmanager
    def capture(self) -> Generator[list[Graph], None, None]:
        """Within the block, work is recorded, not run; afterwards the list holds its graph.

        Libraries must not allocate meanwhile: enqueue the same work once, plainly, before.

        Raises:
            BackendError: something in the block, or the graph itself, cannot be captured or does not fit the
                memory; what was recorded is gone.
        """
        graphs: list[Graph] = []
        self._enter("capturing", recorded=False)
        try:
            self._begin_capture()
            try:
                yield graphs
            except BaseException:
                self._discard_capture()
                raise
            finally:
                self._capturing = False
            graphs.append(self._end_capture())
        except Exception as error:
            # Whoever captures can do without: so being out of memory is no more than a reason not to.
            if isinstance(error, LatentrtError) and not isinstance(error, MemoryLimitError):
                raise
            raise BackendError(
                f"the work cannot be captured: {error}",
                expected="work without allocation, synchronisation or host memory",
                fix="Run it without a CUDA graph.",
            ) from error

    def _begin_capture(self) -> None:
        # ThreadLocal: other threads may allocate meanwhile, this one may not
        mode = self._runtime.cudaStreamCaptureMode.cudaStreamCaptureModeThreadLocal
        self._call("cudaStreamBeginCapture", self._stream, mode, doing="beginning a capture")
        self._capturing = True

    def _discard_capture(self) -> None:
        # after a call that cannot be captured this reports an error, and there is no graph
        _, graph = self._runtime.cudaStreamEndCapture(self._stream)
        if graph is not None and int(graph):
            self._runtime.cudaGraphDestroy(graph)
        self._runtime.cudaGetLastError()

    def _end_capture(self) -> CudaGraph:
        graph = self._call("cudaStreamEndCapture", self._stream, doing="capturing")
        try:
            executable = self._call("cudaGraphInstantiate", graph, 0, doing="making a CUDA graph")
        finally:
            self._runtime.cudaGraphDestroy(graph)
        captured = CudaGraph(self, executable)
        self._graphs[captured] = executable
        try:
            # else the first launch would pay for it
            self._call("cudaGraphUpload", executable, self._stream, doing="uploading a CUDA graph")
        except LatentrtError:
            captured.close()
            raise
        return captured

    def launch(self, executable: Any) -> None:
        """For CudaGraph: enqueue it."""
        self._enter("launching a CUDA graph", recorded=False)
        self._call("cudaGraphLaunch", executable, self._stream, doing="launching a CUDA graph")

    def discard(self, graph: CudaGraph, executable: Any) -> None:
        """For CudaGraph: destroy it, once the stream is done with it."""
        if self._graphs.pop(graph, None) is not None:
            self._runtime.cudaStreamSynchronize(self._stream)
            self._runtime.cudaGraphExecDestroy(executable)
            self._runtime.cudaGetLastError()

    def stopwatch(self) -> CudaStopwatch:
        """A new one, freed with the device at the latest. Raises BackendError, also during capture, or
        MemoryLimitError.
        """
        self._enter("making a stopwatch", recorded=False)
        made = CudaStopwatch(self._runtime, self._stream, partial(self._enter, recorded=False))
        self._stopwatches.append(made)
        return made

    def _call(self, name: str, *arguments: Any, doing: str) -> Any:
        """A call of the CUDA runtime. Raises BackendError, MemoryLimitError, that begin with `doing`."""
        return checked(self._runtime, getattr(self._runtime, name)(*arguments), doing)

    def close(self) -> None:
        """Free the stream, and whatever still lies on the device. May be called twice; never raises.

        After an error that spoils the context, CUDA refuses all of this, and the process's end does it.
        """
        if self._closed:
            return
        runtime = self._runtime
        runtime.cudaSetDevice(self.index)
        runtime.cudaStreamSynchronize(self._stream)
        for graph in list(self._graphs):
            graph.close()
        for stopwatch in self._stopwatches:
            stopwatch.close()
        for address in self._sizes:
            runtime.cudaFree(address)
        if self._staging:
            runtime.cudaFreeHost(self._staging)
        runtime.cudaStreamDestroy(self._stream)
        runtime.cudaGetLastError()
        self._sizes.clear()
        self._stopwatches.clear()
        self._downloads.clear()
        self._closed = True

    def _enter(self, doing: str, *, recorded: bool = True) -> None:
        """Before every call: the device is open, and current, and may do this even if it is capturing."""
        if self._closed:
            raise BackendError(
                f"{doing} on {self.name}, which is closed", expected="an open device", fix="Open it again."
            )
        if self._capturing and not recorded:
            raise BackendError(
                f"{doing} while work is being captured",
                expected="copies on the device and nets alone",
                fix="Do it before or after the capture.",
            )
        if not self._capturing:  # each thread has a current device of its own, 0 at first
            self._call("cudaSetDevice", self.index, doing=doing)
