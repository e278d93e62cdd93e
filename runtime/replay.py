"""One loop as a captured graph: when to capture it, and whether replaying is the faster way."""

from __future__ import annotations

from collections.abc import Callable
from typing import Literal

from ..engines.device import Device, Graph
from ..engines.errors import BackendError

Graphs = Literal["auto", "on", "off"]


class Replay:
    """For one pair of canvas and schedule: what they do is the same work at the same addresses every time.

    The first run is plain whatever is asked: TensorRT wants one after every change of shape, and ONNX Runtime
    allocates in it. With "auto" the second is plain and timed, the third captured, the fourth timed, and
    from then on the faster way is taken.
    """

    def __init__(self, graphs: Graphs) -> None:
        self._graphs = graphs
        self._graph: Graph | None = None
        self._runs = 0
        self._plain_s = self._graph_s = float("inf")
        self._replayed = self._captured_now = False
        self.reason = "" if graphs != "off" else "graphs are off"

    @property
    def replayed(self) -> bool:
        """Whether the last run was the graph."""
        return self._replayed

    def run(
        self, device: Device, enqueue: Callable[[], None], log: Callable[[str], None] = lambda line: None
    ) -> None:
        """Put the loop on the stream, captured or plain."""
        self._replayed = self._captured_now = False
        plain_runs = 1 if self._graphs == "on" else 2
        if self._graph is None and not self.reason and self._runs >= plain_runs:
            self._capture(device, enqueue, log)
        self._runs += 1
        if self._graph is not None and (
            self._graphs == "on" or self._graph_s <= self._plain_s or self._untimed
        ):
            self._replayed = True
            self._graph.launch()
        else:
            enqueue()

    @property
    def _untimed(self) -> bool:
        return self._graph_s == float("inf")

    def took(self, seconds: float) -> None:
        """Be told how long the last run was, from enqueueing to the end of the picture."""
        if self._runs == 1 or self._captured_now:
            return  # cold
        if self._replayed:
            self._graph_s = min(self._graph_s, seconds)
        else:
            self._plain_s = min(self._plain_s, seconds)

    def _capture(self, device: Device, enqueue: Callable[[], None], log: Callable[[str], None]) -> None:
        try:
            with device.capture() as graphs:
                enqueue()
        except BackendError as error:
            self.reason = error.found
            log(f"the loop is not captured: {error.found}")
            return
        (self._graph,) = graphs
        self._captured_now = True

    def close(self) -> None:
        """Free the graph. May be called twice."""
        graph, self._graph = self._graph, None
        self.reason = self.reason or "closed"
        if graph is not None:
            graph.close()
