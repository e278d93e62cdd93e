"""A row of the loop as a CUDA graph: when to capture it, and whether replaying it is faster.

Every row of a `DenoiseProgram` is the same work at the same addresses, whatever the request and schedule:
what differs is copied in before. So one small graph serves all of them, where a graph of the whole loop would
be as many times larger as there are rows, and be captured anew for every number of steps.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Literal

from ....engines.device import Device, Graph
from ....engines.errors import BackendError

Graphs = Literal["auto", "on", "off"]

_ATTEMPTS = 3  # a library's arena may have grown during one capture, and be large enough for the next


class Replay:
    """Runs the rows of one `DenoiseProgram`, plainly or as a captured graph, whichever is faster.

    The first picture always runs plainly: TensorRT needs a plain run after every change of shape, and ONNX
    Runtime allocates in it. With "auto" the second is plain and timed, the third captured, the fourth timed,
    and from then on the faster way is taken.

    Args:
        graphs: "on", "off" or "auto".
        log: is passed the reason why a row is not captured.
    """

    def __init__(self, graphs: Graphs, log: Callable[[str], None] = lambda line: None) -> None:
        self._graphs = graphs
        self._log = log
        self._graph: Graph | None = None
        self._pictures = 0  # since the last attempt at capturing
        self._attempts = 0 if graphs != "off" else _ATTEMPTS
        self._plain_s = self._graph_s = float("inf")
        self._cold = True
        self.replayed = False

    def begin(self, device: Device, body: Callable[[], None]) -> None:
        """Decide for the picture that begins now; `body` enqueues one row."""
        plain_pictures = 1 if self._graphs == "on" else 2
        self._cold = self._pictures == 0
        if self._graph is None and self._attempts < _ATTEMPTS and self._pictures >= plain_pictures:
            self._capture(device, body)
        self._pictures += 1
        wanted = self._graphs == "on" or self._graph_s <= self._plain_s or self._graph_s == float("inf")
        self.replayed = self._graph is not None and wanted

    def enqueue(self, body: Callable[[], None]) -> None:
        """Enqueue one row, as `begin` decided."""
        if self.replayed and self._graph is not None:
            self._graph.launch()
        else:
            body()

    def record_time(self, seconds_per_row: float) -> None:
        """Note how long a row of the picture took; the first picture after a change does not count."""
        if self._cold:
            return
        if self.replayed:
            self._graph_s = min(self._graph_s, seconds_per_row)
        else:
            self._plain_s = min(self._plain_s, seconds_per_row)

    def _capture(self, device: Device, body: Callable[[], None]) -> None:
        self._attempts += 1
        self._pictures = 0
        self._cold = True
        try:
            with device.capture() as graphs:
                body()
        except BackendError as error:
            self._log(f"the loop is not captured: {error.found}")
            return
        (self._graph,) = graphs

    def close(self) -> None:
        """Free the graph; later rows run plainly. May be called twice."""
        graph, self._graph = self._graph, None
        self._attempts = _ATTEMPTS
        if graph is not None:
            graph.close()
