"""What the sides on a device share: nets bound to one block, timed by the device; and what they hold."""

from __future__ import annotations

from collections.abc import Callable, Generator, Iterable, Mapping
from contextlib import ExitStack, closing, contextmanager
from dataclasses import asdict, dataclass
from typing import Any

from ...engines.device import BoundNet, Device, DeviceNet, Graph
from ...engines.spec import Array
from ...runtime.loop.device.loop import DeviceLoop
from ...runtime.loop.device.programs import (
    Block,
    BlockLayout,
    BoundProgram,
    Scratch,
    Sizes,
    input_shapes,
)
from .contract import Work

Call = tuple[str, Sizes]  # a net, and the symbols of its shapes


@dataclass(frozen=True, kw_only=True)
class DeviceNets:
    """Nets on a device, to be bound and timed."""

    device: Device
    nets: Mapping[str, DeviceNet]

    def scratch(self, stack: ExitStack, calls: Iterable[Call]) -> Scratch:
        """Room for the activations of any of these calls. Raises MemoryLimitError."""
        needed = [self.nets[name].scratch(input_shapes(self.nets[name].spec, sizes)) for name, sizes in calls]
        return stack.enter_context(closing(Scratch(self.device, max(needed))))

    def bind(self, stack: ExitStack, *calls: Call) -> tuple[Block, list[BoundNet]]:
        """Nets bound to one block, which the stack frees; what one writes, the others read by its name.

        Raises MemoryLimitError, BackendError and UsageError as the device and the nets do.
        """
        layout = BlockLayout()
        for name, sizes in calls:
            spec = self.nets[name].spec
            tensors = (*spec.inputs, *spec.outputs)
            layout.add_tensors([item for item in tensors if item.name not in layout.places], sizes)
        program = BoundProgram(self.device, layout, self.scratch(stack, calls))
        stack.enter_context(closing(program))
        found: list[BoundNet] = []
        for name, sizes in calls:
            net = self.nets[name]
            found.append(program.bind(net, input_shapes(net.spec, sizes), program.addresses(net.spec)))
        return program.block, found

    def work(
        self,
        stack: ExitStack,
        enqueue: Callable[[], None],
        fetch: Callable[[], Mapping[str, Array]] = dict[str, Array],
        *,
        repeats: int = 1,
    ) -> Work:
        """What is enqueued is timed, by the device too, and waited for; `fetch` downloads."""
        device = self.device
        watch = stack.enter_context(closing(device.stopwatch()))
        device.synchronize()

        def call() -> Mapping[str, Array]:
            watch.start()
            enqueue()
            watch.stop()
            device.synchronize()
            return {}

        def outputs() -> Mapping[str, Array]:
            found = fetch()
            device.synchronize()
            return found

        return Work(
            call=call,
            fetch=outputs,
            figures=lambda: {"device_s": watch.seconds() / repeats},
            repeats=repeats,
        )


def upload(block: Block, arrays: Mapping[str, Array]) -> None:
    """Fill tensors of a block from the host."""
    for name, array in arrays.items():
        block.upload(name, array)


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
