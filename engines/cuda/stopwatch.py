"""How long a CUDA stream took, by two events in it ("CUDA Runtime API", chapter Event Management)."""

from __future__ import annotations

from typing import Any, Protocol

from ..errors import BackendError, LatentrtError
from .facts import checked


class Enter(Protocol):
    """What the device does before every call: it is open, and current, and is not capturing."""

    def __call__(self, doing: str) -> None:
        """Raises BackendError."""
        ...


class CudaStopwatch:
    """`Stopwatch` on CUDA; made by `CudaDevice.stopwatch`.

    "In milliseconds with a resolution of around 0.5 microseconds", its documentation says of
    cudaEventElapsedTime.
    """

    def __init__(self, runtime: Any, stream: Any, enter: Enter) -> None:
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
