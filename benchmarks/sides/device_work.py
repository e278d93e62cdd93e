"""What the sides on a device share: nets bound to one block, timed by the device; and what they hold."""

from __future__ import annotations

from collections.abc import Callable, Generator, Iterable, Mapping
from contextlib import ExitStack, closing, contextmanager
from dataclasses import asdict, dataclass, replace
from typing import Any

from ...engines.device import BoundNet, Device, DeviceNet, Graph
from ...engines.spec import Array, TensorSpec
from ...runtime.loop.device.loop import DeviceLoop
from ...runtime.loop.device.programs import Block, BlockLayout, Scratch, Sizes, input_shapes
from .contract import Work

# The UNet before hoisting has diffusers' names; here it reads and writes what other nets do.
_OUR_NAMES = {"sample": "latent", "out_sample": "prediction"}


@dataclass(frozen=True, kw_only=True)
class DeviceNets:
    """Nets on a device, to be bound and timed."""

    device: Device
    nets: Mapping[str, DeviceNet]

    def scratch(self, stack: ExitStack, calls: Iterable[tuple[str, Sizes]]) -> Scratch:
        """Room for the activations of any of these calls. Raises MemoryLimitError."""
        needed = [self.nets[name].scratch(input_shapes(self.nets[name].spec, sizes)) for name, sizes in calls]
        return stack.enter_context(closing(Scratch(self.device, max(needed))))

    def bind(
        self, stack: ExitStack, *calls: tuple[str, Sizes], more: Iterable[TensorSpec] = ()
    ) -> tuple[Block, list[BoundNet]]:
        """Nets bound to one block, which the stack frees; what one writes, the others read by its name.

        A tensor has the size of the first call that has it; `more` are tensors that the block has besides.
        Raises MemoryLimitError, BackendError and UsageError as the device and the nets do.
        """
        layout = BlockLayout()
        for name, sizes in calls:
            spec = self.nets[name].spec
            named = [replace(item, name=_our_name(item)) for item in (*spec.inputs, *spec.outputs)]
            layout.add_tensors([item for item in named if item.name not in layout.places], sizes)
        layout.add_tensors(more, {})
        scratch = self.scratch(stack, calls)
        block = stack.enter_context(closing(Block(self.device, layout)))
        found: list[BoundNet] = []
        for name, sizes in calls:
            spec = self.nets[name].spec
            addresses = {item.name: block.address(_our_name(item)) for item in (*spec.inputs, *spec.outputs)}
            found.append(self.nets[name].bind(input_shapes(spec, sizes), addresses, scratch.address))
            stack.callback(found[-1].close)
        return block, found

    def work(
        self,
        stack: ExitStack,
        enqueue: Callable[[], None],
        fetch: Callable[[], Mapping[str, Array]] = dict[str, Array],
        *,
        before: Callable[[], None] = lambda: None,
        repeats: int = 1,
        figures: Mapping[str, Any] | None = None,
    ) -> Work:
        """What is enqueued after `before` is timed, by the device, and waited for; `fetch` downloads."""
        device = self.device
        watch = stack.enter_context(closing(device.stopwatch()))
        device.synchronize()

        def call() -> Mapping[str, Array]:
            before()
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
            figures=lambda: {"device_s": watch.seconds() / repeats, **(figures or {})},
            repeats=repeats,
        )

    def one_call(
        self, stack: ExitStack, name: str, sizes: Sizes, inputs: Mapping[str, Array], output: str
    ) -> Work:
        """One call of a net; inputs and output by the names that the block has."""
        block, (bound,) = self.bind(stack, (name, sizes))
        upload(block, inputs)
        return self.work(stack, bound.enqueue, lambda: {output: block.download(output)})


def _our_name(tensor: TensorSpec) -> str:
    return _OUR_NAMES.get(tensor.name, tensor.name)


def upload(block: Block, arrays: Mapping[str, Array]) -> None:
    """Fill tensors of a block from the host."""
    for name, array in arrays.items():
        block.upload(name, array)


class TimedDevice:
    """A loop's device that times pictures and counts launches of captured work, from outside the loop.

    A picture takes from its first upload to the last work before its last wait: what the host does before and
    after is not in it; what it does in between is, if the stream has to wait. Two events a picture are all
    that this adds to the stream.
    """

    def __init__(self, device: Device) -> None:
        self.launches = 0
        self.copy = device.copy  # what a row calls is the device's own
        self._device = device
        self._watch = device.stopwatch()
        self._timing = self._started = False
        self._launches_before = 0

    def __getattr__(self, name: str) -> Any:
        """Everything else is the device's."""
        return getattr(self._device, name)

    def restart(self) -> None:
        """The next upload is the first of a picture that is timed."""
        self._timing, self._started, self._launches_before = True, False, self.launches

    def upload(self, address: int, array: Array) -> None:
        """As the device's own."""
        if self._timing and not self._started:
            self._started = True
            self._watch.start()
        self._device.upload(address, array)

    def synchronize(self) -> None:
        """As the device's own."""
        if self._started:
            self._watch.stop()
        self._device.synchronize()

    @contextmanager
    def capture(self) -> Generator[list[Graph], None, None]:
        """As the device's own."""
        graphs: list[Graph] = []
        with self._device.capture() as captured:
            yield graphs
        graphs += [_CountedGraph(self, graph) for graph in captured]

    @property
    def figures(self) -> dict[str, Any]:
        """`device_s` of the last picture, and whether its rows were those of a captured graph."""
        return {"device_s": self._watch.seconds(), "replayed": self.launches > self._launches_before}

    def stop_timing(self) -> None:
        """Free the events; pictures are no longer timed."""
        self._timing = self._started = False
        self._watch.close()


class _CountedGraph:
    def __init__(self, device: TimedDevice, graph: Graph) -> None:
        self._device, self._graph, self.close = device, graph, graph.close

    def launch(self) -> None:
        self._device.launches += 1
        self._graph.launch()


def ledger_of(loop: DeviceLoop) -> dict[str, Any]:
    """What a loop holds on its device, in bytes, as JSON.

    Returns:
        ledger: of each net, as it says itself: `weights`, `activations` (None where the library has them in
            an arena and does not tell), `io`, and their `total`. Buffers that two nets share count for both.
        scratch: the block of activations that all nets share.
        known: all of this together.
        process: what NVML says this process holds; None where it does not.
        rest: what the process holds besides: the CUDA context, libraries and their arenas; None if not known.
        memory, device: free and total of the device, and its name.
    """
    device: Any = loop.device
    nets = {name: asdict(net.memory) for name, net in loop.nets.items()}
    for row in nets.values():
        row["total"] = sum(size or 0 for size in row.values())
    known = sum(row["total"] for row in nets.values()) + loop.pool.scratch_size
    process: int | None = device.process_memory() if hasattr(device, "process_memory") else None
    return {
        "ledger": nets,
        "device": device.name,
        "scratch": loop.pool.scratch_size,
        "process": process,
        "memory": asdict(device.memory()),
        "known": known,
        "rest": None if process is None else max(0, process - known),
    }
