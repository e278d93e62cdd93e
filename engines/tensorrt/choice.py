"""Several engines of one net behind one `DeviceNet`: each call's shapes choose the engine and its profile.

What a user has built is in the store; a request says nothing of engines. An engine is opened when a request
first chooses it, and stays open.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass

from ..device import Addresses, BoundNet, DeviceNet, MemoryLedger, Shapes
from ..profiles import NetProfile, choose
from ..spec import NetSpec


@dataclass(frozen=True, kw_only=True)
class Candidate:
    """An engine that is built: its profiles, in its own order, and what puts it on the device."""

    profiles: tuple[NetProfile, ...]
    open: Callable[[], DeviceNet]


class ChosenNet:
    """`DeviceNet` over candidates, at least one.

    Args:
        spec: the net's boundary, the same for all of them.
        candidates: the engines.
        backend: for messages.
        package: for messages.
    """

    def __init__(self, spec: NetSpec, candidates: Sequence[Candidate], *, backend: str, package: str) -> None:
        self._spec = spec
        self._candidates = tuple(candidates)
        self._open: dict[int, DeviceNet] = {}
        self._backend, self._package = backend, package

    @property
    def spec(self) -> NetSpec:
        """Inputs and outputs."""
        return self._spec

    @property
    def memory(self) -> MemoryLedger:
        """What all open engines hold together."""
        parts = [net.memory for net in self._open.values()]
        activations = [part.activations for part in parts if part.activations is not None]
        return MemoryLedger(
            weights=sum(part.weights for part in parts),
            activations=max(activations, default=None),  # they share one block
            io=sum(part.io for part in parts),
        )

    def scratch(self, shapes: Shapes) -> int:
        """Bytes for the engine that these shapes choose. Raises UsageError if no engine covers them."""
        return self._net(shapes).scratch(shapes)

    def bind(self, shapes: Shapes, addresses: Addresses, scratch: int) -> BoundNet:
        """Bind the engine that these shapes choose. Raises UsageError, MemoryLimitError."""
        return self._net(shapes).bind(shapes, addresses, scratch)

    def settle(self) -> None:
        """Settle every open engine."""
        for net in self._open.values():
            net.settle()

    def release(self) -> None:
        """Release what every open engine can spare."""
        for net in self._open.values():
            net.release()

    def stream_weights(self) -> int:
        """Stream the weights of every open engine; the bytes that this frees."""
        return sum(net.stream_weights() for net in self._open.values())

    def close(self) -> None:
        """Free everything, also where closing one fails. May be called twice."""
        nets, self._open = self._open, {}
        with ExitStack() as stack:
            for net in nets.values():
                stack.callback(net.close)

    def _net(self, shapes: Shapes) -> DeviceNet:
        owners = [index for index, item in enumerate(self._candidates) for _ in item.profiles]
        profiles = [profile for item in self._candidates for profile in item.profiles]
        owner = owners[choose(profiles, shapes, backend=self._backend, package=self._package)]
        if owner not in self._open:
            self._open[owner] = self._candidates[owner].open()
        return self._open[owner]
