"""A row of the loop as a CUDA graph: captured, compared with a plain row, and replayed where that is faster.

Every row of a `DenoiseProgram` is the same work at the same addresses, whatever the request and schedule:
what differs is copied in before. So one small graph serves all of them, where a graph of the whole loop would
be as many times larger as there are rows, and be captured anew for every number of steps.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import ExitStack
from time import perf_counter
from typing import Protocol

import numpy as np

from ....engines.device import Device, Graph
from ....engines.errors import BackendError, MemoryLimitError
from ....engines.spec import Array
from ....engines.tolerances import NET_RELATIVE_L2, relative_l2
from .verdicts import Graphs, Verdict, Verdicts

_ROWS = 2  # compared in one go: the second has other data, and starts from what the first computed
# What plain rows differ by from each other is allowed for, up to so many times the bar.
_MOST_NOISE = 10


class Picture(Protocol):
    """What is drawn by rows that are alike: `rows` of them."""

    rows: int
    capturable: bool  # whether the libraries say that a row can be

    def rewind(self) -> None:
        """Enqueue what brings the state to where the first row begins."""
        ...

    def feed_row(self, row: int) -> None:
        """Enqueue what differs from row to row."""
        ...

    def blank_row(self) -> None:
        """Enqueue zeros in place of what `feed_row` has fed."""
        ...

    def enqueue_row(self) -> None:
        """Enqueue a row: always the same work."""
        ...

    def read_state(self) -> Array:
        """What the rows so far have computed, filled at the next `synchronize`."""
        ...


class Replay:
    """Runs the rows of one `DenoiseProgram`, plainly or as a captured graph.

    The first picture always runs plainly: TensorRT needs a plain run after every change of shape, and ONNX
    Runtime allocates in it. At the beginning of the second a row is captured, and compared with plain rows
    unless a verdict is known; then this picture and all later ones go the way that was found to be right and,
    with "auto", faster.

    Args:
        graphs: "on", "off" or "auto".
        dtype: of the nets, "fp32" or "fp16": how near equal results are.
        shape: what is replayed, to find its verdict.
        verdicts: the known ones.
        log: is passed the reason why a row is not replayed.
    """

    def __init__(
        self,
        graphs: Graphs,
        *,
        dtype: str,
        shape: str,
        verdicts: Verdicts,
        log: Callable[[str], None] = lambda line: None,
    ) -> None:
        self._graphs: Graphs = graphs
        self._allowed = NET_RELATIVE_L2[dtype]
        self._shape, self._verdicts, self._log = shape, verdicts, log
        self._graph: Graph | None = None
        self._warm = False
        self._closed = graphs == "off"

    @property
    def replayed(self) -> bool:
        """Whether rows are replayed now."""
        return self._graph is not None

    def begin(self, device: Device, picture: Picture) -> None:
        """Decide for the picture that begins now, and leave its state where its first row begins."""
        if self._warm and not self._closed and self._graph is None:
            self._decide(device, picture)
            picture.rewind()
        self._warm = True

    def enqueue(self, picture: Picture) -> None:
        """Enqueue one row, as `begin` decided. Once a graph cannot be launched, later rows run plainly."""
        if self._graph is None:
            picture.enqueue_row()
            return
        try:
            self._graph.launch()
        except (BackendError, MemoryLimitError):
            self.close()
            raise

    def _decide(self, device: Device, picture: Picture) -> None:
        if not picture.capturable:
            self._refuse("the library says that its runs cannot be captured")
            return
        verdict = self._verdicts.find(self._shape)
        if verdict is None:
            verdict = self._compare(device, picture)
        elif not verdict.objection(self._graphs):
            self._graph = self._capture(device, picture)
        if verdict is not None and (objection := verdict.objection(self._graphs)):
            self._refuse(objection)

    def _compare(self, device: Device, picture: Picture) -> Verdict | None:
        """Run rows plainly, twice, and replayed, all from the picture's beginning. Leaves the graph open.

        None if a row cannot be captured or launched, or computes nothing that can be compared.
        """

        def run(enqueue: Callable[[], None]) -> tuple[Array, float]:
            picture.rewind()
            start = picture.read_state()
            device.synchronize()
            began = perf_counter()
            rows = min(_ROWS, picture.rows)
            for row in range(rows):
                picture.feed_row(row)
                enqueue()
            state = picture.read_state()
            device.synchronize()
            return state - start, (perf_counter() - began) / rows

        first, _ = run(picture.enqueue_row)
        plain, plain_s = run(picture.enqueue_row)
        noise = relative_l2(first, plain)  # of libraries that sum in any order
        if not np.isfinite(noise):
            return None  # the request fails for it; a later one may not
        self._verdicts.begin(self._shape)
        with ExitStack() as unless_right:
            # Of what ends here before its end nothing is known, unless it has taken the device with it.
            unless_right.callback(self._verdicts.forget, self._shape)
            if (graph := self._capture(device, picture)) is None:
                return None
            unless_right.callback(graph.close)
            try:
                replayed, replayed_s = run(graph.launch)
            except (BackendError, MemoryLimitError) as error:
                if not _works(device, picture):
                    unless_right.pop_all()
                    raise
                self._refuse(error.found)
                return None
            unless_right.pop_all()
            self._graph = graph
        verdict = Verdict(
            distance=relative_l2(replayed, plain),
            allowed=self._allowed + min(2 * noise, _MOST_NOISE * self._allowed),
            plain_s=plain_s,
            replayed_s=replayed_s,
        )
        self._verdicts.keep(self._shape, verdict)
        return verdict

    def _capture(self, device: Device, picture: Picture) -> Graph | None:
        """The graph of a row; None, and no further attempt, if it cannot be captured."""
        # Directly before: in a plain row libraries load kernels and make plans, which a capture forbids.
        picture.rewind()
        picture.feed_row(0)
        picture.enqueue_row()
        picture.blank_row()  # a graph that keeps the data it was recorded with computes something else then
        device.synchronize()
        try:
            with device.capture() as graphs:
                picture.enqueue_row()
        except BackendError as error:
            self._refuse(error.found)
            return None
        return graphs[0]

    def _refuse(self, why: str) -> None:
        self._log(f"rows are not replayed: {why}")
        self.close()

    def drop(self) -> None:
        """Free the graph; the next picture runs plainly, and the one after may capture again."""
        graph, self._graph = self._graph, None
        self._warm = False
        if graph is not None:
            graph.close()

    def close(self) -> None:
        """Free the graph; later rows run plainly. May be called twice."""
        self._closed = True
        self.drop()


def _works(device: Device, picture: Picture) -> bool:
    """Whether the device still does what it is told: some errors spoil all later work."""
    try:
        picture.rewind()
        device.synchronize()
    except BackendError:
        return False
    return True
