"""What is seen of a loop on a device from outside: launches of captured work, and what it holds."""

from __future__ import annotations

from collections.abc import Generator
from contextlib import contextmanager
from dataclasses import asdict
from typing import Any

from ...engines.device import Device, Graph
from ...runtime.loop.device.loop import DeviceLoop


class CountedDevice:
    """A loop's device that counts launches of captured work, from outside the loop."""

    def __init__(self, device: Device) -> None:
        self.launches = 0
        self._device = device
        self.copy = device.copy  # what a row calls is the device's own

    def __getattr__(self, name: str) -> Any:
        """Everything else is the device's."""
        return getattr(self._device, name)

    @contextmanager
    def capture(self) -> Generator[list[Graph], None, None]:
        """As the device's own."""
        graphs: list[Graph] = []
        with self._device.capture() as captured:
            yield graphs
        graphs += [_CountedGraph(self, graph) for graph in captured]


class _CountedGraph:
    def __init__(self, device: CountedDevice, graph: Graph) -> None:
        self._device, self._graph, self.close = device, graph, graph.close

    def launch(self) -> None:
        self._device.launches += 1
        self._graph.launch()


def ledger_of(loop: DeviceLoop) -> dict[str, Any]:
    """What a loop holds on its device, in bytes, as JSON.

    Returns:
        ledger: of each net, as it says itself: `weights`, `activations` (None where the library has them in
            an arena and does not tell), and `io`. Buffers that two nets share count for both.
        scratch: the block of activations that all nets share.
        known: all of this together.
    """
    nets = {name: asdict(held) for name, held in loop.ledger.items()}
    scratch = loop.pool.scratch_size
    known = scratch + sum(size or 0 for net in nets.values() for size in net.values())
    return {"ledger": nets, "scratch": scratch, "known": known}
