"""The seam between the device loop and a GPU: memory by address, one ordered stream, nets bound to addresses.

Everything above this module (which buffer goes where, what runs when, what to give up when memory is short)
is arithmetic that runs on any machine. Below it are a page of driver calls (`cuda/device.py`) and the two
libraries that enqueue nets on a stream (`tensorrt/nets.py`, `onnxruntime/nets.py`).

A device never runs anything by itself: calls are enqueued in order on its stream, and nothing is certain to
have happened before `synchronize`.
"""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Protocol

from .errors import UsageError
from .spec import Array, NetSpec

Shapes = Mapping[str, tuple[int, ...]]  # tensor name -> shape
Addresses = Mapping[str, int]  # tensor name -> device address

# TensorRT wants the addresses of inputs and outputs at multiples of this many bytes.
ALIGNMENT = 256


@dataclass(frozen=True, kw_only=True)
class MemoryLedger:
    """What one net holds, in bytes. `activations` is None where the backend does not tell."""

    weights: int
    activations: int | None
    io: int


@dataclass(frozen=True, kw_only=True)
class DeviceMemory:
    """In bytes. `free` and `total` are the device's; a `unified` device shares its memory with the host."""

    free: int
    total: int
    unified: bool


class Graph(Protocol):
    """Captured work."""

    def launch(self) -> None:
        """Enqueue all of it."""
        ...

    def close(self) -> None:
        """Free it. May be called twice."""
        ...


class Stopwatch(Protocol):
    """Measures the time between two places in the stream by the device's clock, with waits for the host."""

    def start(self) -> None:
        """Begin with what is enqueued next. A second call begins anew."""
        ...

    def stop(self) -> None:
        """End with what was enqueued last."""
        ...

    def seconds(self) -> float:
        """The seconds between, once `synchronize` has waited for them. Raises BackendError before `stop`."""
        ...

    def close(self) -> None:
        """Free it. May be called twice."""
        ...


class Device(Protocol):
    """One device and its one stream. Not safe to share between threads without a lock.

    Attributes:
        name: for people.
        kind: what times and captured work are alike on: the kind of GPU and its driver.
    """

    name: str
    kind: str

    def allocate(self, size: int) -> int:
        """The address of `size` bytes of zeros. Raises MemoryLimitError with the numbers."""
        ...

    def free(self, address: int) -> None:
        """Give back what `allocate` returned, once the stream is done with it."""
        ...

    def upload(self, address: int, array: Array) -> None:
        """Host to device. The array's content is taken at once."""
        ...

    def download(self, address: int, array: Array) -> None:
        """Device to a contiguous host array, whose content is there after `synchronize`."""
        ...

    def copy(
        self, to: int, source: int, width: int, *, rows: int = 1, to_pitch: int = 0, pitch: int = 0
    ) -> None:
        """Device to device: `rows` runs of `width` bytes, that start `to_pitch` and `pitch` bytes apart."""
        ...

    def synchronize(self) -> None:
        """Wait for the stream. Raises BackendError for what failed on the device since the last time."""
        ...

    def capture(self) -> AbstractContextManager[list[Graph]]:
        """Within the block, work is recorded, not run; afterwards the list holds its graph.

        Raises BackendError, and discards what was recorded, if any of it cannot be captured.
        """
        ...

    def stopwatch(self) -> Stopwatch:
        """A new one, on the stream. Raises BackendError, MemoryLimitError."""
        ...

    def memory(self) -> DeviceMemory:
        """Now."""
        ...

    def close(self) -> None:
        """Free the stream. May be called twice."""
        ...


class BoundNet(Protocol):
    """A net whose shapes and addresses are set, once; ready to enqueue any number of times."""

    profile: str  # what it was optimised for, for people

    @property
    def capturable(self) -> bool:
        """Whether the library says that a run can be captured; True where it does not say."""
        ...

    def enqueue(self) -> None:
        """Put one run on the device's stream."""
        ...

    def close(self) -> None:
        """Free what binding took. May be called twice."""
        ...


class DeviceNet(Protocol):
    """A net on a device.

    Attributes:
        spec: its boundary.
        graphs_outlive_other_shapes: whether a captured run stays right after the net has run in other shapes.
    """

    spec: NetSpec
    graphs_outlive_other_shapes: bool

    @property
    def memory(self) -> MemoryLedger:
        """What it holds now."""
        ...

    def scratch(self, shapes: Shapes) -> int:
        """Bytes of activations that a call of these input shapes needs; 0 where the library has its own.

        Raises UsageError if no profile of the engine covers the shapes.
        """
        ...

    def bind(self, shapes: Shapes, addresses: Addresses, scratch: int) -> BoundNet:
        """Set shapes (inputs) and addresses (inputs, outputs, and the activations' block) for good.

        Raises UsageError if no profile covers the shapes, MemoryLimitError.
        """
        ...

    def settle(self) -> None:
        """Do what must not be timed, such as saving compiled kernels. Called while the stream is idle."""
        ...

    def release(self) -> None:
        """Give back memory that only makes the next call faster. No captured graph uses the net now."""
        ...

    def stream_weights(self) -> int:
        """Keep as little of the weights on the device as possible; the bytes that this frees, or 0.

        Closes all bindings of the net, also those in use. Call it between requests only, and call `scratch`
        again afterwards.
        """
        ...

    def close(self) -> None:
        """Free everything. May be called twice."""
        ...


def check_addresses(net: str, spec: NetSpec, addresses: Addresses, scratch: int = 0) -> None:
    """Raise UsageError unless every input and output has an aligned address; `scratch` may be 0."""
    names = {tensor.name for tensor in (*spec.inputs, *spec.outputs)}
    if set(addresses) != names:
        raise UsageError(
            f"the net {net!r} was bound with addresses for {sorted(addresses)}",
            expected=f"exactly {sorted(names)}",
            fix="Check the call against the net's spec (`latentrt inspect PACKAGE`).",
        )
    for name, address in (*addresses.items(), ("the scratch memory", scratch)):
        if address < 0 or address % ALIGNMENT or (not address and name in names):
            raise UsageError(
                f"the address of {name} of the net {net!r} is {address:#x}",
                expected=f"device memory at a multiple of {ALIGNMENT} bytes",
                fix=f"Take addresses from Device.allocate, and round offsets up to {ALIGNMENT} bytes.",
            )
