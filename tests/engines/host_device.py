"""The seam's device on host memory, as strict as CUDA: the device loop runs for real without a GPU.

Work may be deferred (`lazy=True`): nothing happens before `synchronize`, so a loop that reads a result too
early reads zeros, as it would on a GPU. `limit` is the memory it has, in bytes.
"""

import ctypes
from collections.abc import Callable, Generator
from contextlib import contextmanager
from time import perf_counter
from typing import Any
from weakref import WeakKeyDictionary

import numpy as np

from latentrt.engines.device import ALIGNMENT, DeviceMemory, Graph
from latentrt.engines.errors import BackendError, MemoryLimitError

# The nets that a device draws a picture with, from a prompt.
DEVICE_NETS = ("text_encoder", "unet_context", "unet_time", "unet", "step", "vae_decoder")


class HostGraph:
    def __init__(self, device: "HostDevice", work: list[Callable[[], None]]) -> None:
        self.device, self.work = device, work
        device.graphs.add(self)

    def launch(self) -> None:
        self.device.launches += 1
        for item in self.work:
            self.device.submit(item)

    def close(self) -> None:
        self.work = []
        self.device.graphs.discard(self)


class HostStopwatch:
    def __init__(self, device: "HostDevice") -> None:
        self.device, self.times = device, dict[str, float]()
        device.stopwatches.add(self)

    def _note(self, name: str) -> None:
        assert self in self.device.stopwatches, "the stopwatch is closed"
        assert self.device.recording is None, "a stopwatch during capture"
        self.times.pop(name, None)
        self.device.submit(lambda: self.times.update({name: perf_counter()}))

    def start(self) -> None:
        self._note("start")

    def stop(self) -> None:
        self._note("stop")

    def seconds(self) -> float:
        assert self.times.keys() == {"start", "stop"}, "the stream has not passed both"
        return self.times["stop"] - self.times["start"]

    def close(self) -> None:
        self.device.stopwatches.discard(self)


class HostDevice:
    name = kind = "host memory"
    stream = 7

    def __init__(self, limit: int = 2**40, *, lazy: bool = True, capturable: bool = True) -> None:
        self.limit, self.lazy, self.capturable = limit, lazy, capturable
        self.blocks: dict[int, np.ndarray] = {}
        self.sizes: dict[int, int] = {}
        self.queue: list[Callable[[], None]] = []
        self.recording: list[Callable[[], None]] | None = None
        self.stopwatches: set[HostStopwatch] = set()
        self.graphs: set[HostGraph] = set()
        self.peak = self.synchronisations = self.launches = self.copies = self.submitted = 0
        self.allocations = 0
        self.ran_last: WeakKeyDictionary[Any, Any] = WeakKeyDictionary()  # net -> what it was bound to

    # ── memory ─────────────────────────────────────────────────────────────────────────────────

    def allocate(self, size: int) -> int:
        assert self.recording is None, "allocation during capture"
        assert size > 0
        if self.used + size > self.limit:
            raise MemoryLimitError(
                f"{size} bytes asked, {self.limit - self.used} of {self.limit} free", expected="less", fix=""
            )
        block = np.zeros(size + ALIGNMENT, np.uint8)
        address = -(-block.ctypes.data // ALIGNMENT) * ALIGNMENT
        self.blocks[address], self.sizes[address] = block, size
        self.allocations += 1
        self.peak = max(self.peak, self.used)
        return address

    def free(self, address: int) -> None:
        self._run_queue()
        del self.blocks[address], self.sizes[address]

    @property
    def used(self) -> int:
        return sum(self.sizes.values())

    def _check(self, address: int, size: int) -> None:
        inside = any(a <= address and address + size <= a + n for a, n in self.sizes.items())
        assert inside, "an access outside allocated memory"

    def memory(self) -> DeviceMemory:
        return DeviceMemory(free=self.limit - self.used, total=self.limit, unified=False)

    # ── the stream ─────────────────────────────────────────────────────────────────────────────

    def submit(self, work: Callable[[], None]) -> None:
        self.submitted += 1
        self._check_order(work)
        if self.recording is not None:
            self.recording.append(work)
        elif self.lazy:
            self.queue.append(work)
        else:
            work()

    def _check_order(self, work: Callable[[], None]) -> None:
        """A net is captured right after a plain run of the same shapes: in that run libraries allocate, load
        kernels and make plans, none of which a capture allows.
        """
        bound = getattr(work, "__self__", None)
        net = getattr(bound, "_net", None)
        if net is None:
            return
        if self.recording is None:
            self.ran_last[net] = bound
        assert self.ran_last.get(net) is bound, "captured without a plain run of the same shapes before"

    def _run_queue(self) -> None:
        queue, self.queue = self.queue, []
        for work in queue:
            work()

    def upload(self, address: int, array: np.ndarray) -> None:
        content = np.ascontiguousarray(array).tobytes()
        self._check(address, len(content))
        self.submit(lambda: ctypes.memmove(address, content, len(content)) and None)

    def download(self, address: int, array: np.ndarray) -> None:
        assert array.flags.c_contiguous
        self._check(address, array.nbytes)
        self.submit(lambda: ctypes.memmove(array.ctypes.data, address, array.nbytes) and None)

    def copy(
        self, to: int, source: int, width: int, *, rows: int = 1, to_pitch: int = 0, pitch: int = 0
    ) -> None:
        self.copies += 1
        for row in range(rows):
            a, b = to + row * to_pitch, source + row * pitch
            self._check(a, width)
            self._check(b, width)
            self.submit(lambda a=a, b=b: ctypes.memmove(a, b, width) and None)

    def synchronize(self) -> None:
        assert self.recording is None, "synchronisation during capture"
        self.synchronisations += 1
        self._run_queue()

    @contextmanager
    def capture(self) -> Generator[list[Graph]]:
        if not self.capturable:
            raise BackendError("the stream cannot be captured", expected="one that can", fix="")
        self.recording, graphs = [], []
        try:
            yield graphs
            graphs.append(HostGraph(self, self.recording))
        finally:
            self.recording = None

    def stopwatch(self) -> HostStopwatch:
        return HostStopwatch(self)

    def close(self) -> None:
        self._run_queue()
