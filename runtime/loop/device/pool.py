"""Programs by shape, checked out by one request at a time, and the block of activations that they share."""

from __future__ import annotations

from collections.abc import Callable, Generator, Hashable, Iterable
from contextlib import ExitStack, contextmanager
from typing import TypeVar, cast

from ....engines.device import Device, Shapes
from ....engines.errors import MemoryLimitError
from .programs import BoundProgram, Nets, Scratch

P = TypeVar("P", bound=BoundProgram)
Calls = Iterable[tuple[str, Shapes]]  # nets, and the shapes of their inputs


# Idle programs kept for requests of the same shape; the oldest goes first.
_KEPT = 12


@contextmanager
def blame(net: str) -> Generator[None]:
    """Name the net that wanted the memory in a MemoryLimitError, unless one is named already."""
    try:
        yield
    except MemoryLimitError as error:
        error.culprit = error.culprit or net
        raise


class ProgramPool:
    """Keeps programs; each is idle or checked out by one request, so requests never share buffers.

    They may share the scratch block, because nets run one after the other on the one stream. `forget` is
    called with every program that is about to be freed.
    """

    def __init__(self, device: Device, nets: Nets, forget: Callable[[BoundProgram], None]) -> None:
        self._device = device
        self._nets = nets
        self._forget = forget
        self._scratch = Scratch(device, 0)
        self._idle: dict[Hashable, BoundProgram] = {}
        self._keys: dict[BoundProgram, Hashable] = {}

    @property
    def scratch_size(self) -> int:
        """Bytes of the block of activations."""
        return self._scratch.size

    @property
    def in_use(self) -> bool:
        """Whether any request has programs checked out."""
        return len(self._keys) > len(self._idle)

    def reserve(self, calls: Calls) -> None:
        """Make the scratch block large enough for these calls. Raises MemoryLimitError, UsageError."""
        size, largest = max((self._scratch_of(name, shapes), name) for name, shapes in calls)
        if size <= self._scratch.size:
            return
        self.free_idle()
        with blame(largest):
            self._scratch = Scratch(self._device, size)

    def _scratch_of(self, name: str, shapes: Shapes) -> int:
        with blame(name):
            return self._nets[name].scratch(shapes)

    def check_out(self, until: ExitStack, key: Hashable, net: str, make: Callable[[Scratch], P]) -> P:
        """Check out the idle program of a key, or make one; `until` gives it back when it closes.

        Raises MemoryLimitError, which blames `net`, and whatever else `make` raises.
        """
        program = self._idle.pop((net, key), None)
        if program is None:
            with blame(net):
                program = make(self._scratch)
            self._keys[program] = (net, key)
        until.callback(self.give_back, program)
        return cast(P, program)

    def give_back(self, *programs: BoundProgram) -> None:
        """Keep programs for the next request of their shape, unless they are outdated or too many."""
        outdated: list[BoundProgram] = []
        for program in programs:
            key = self._keys.get(program)
            if key is None:
                continue  # the pool was closed meanwhile
            if program.scratch is not self._scratch or key in self._idle:
                outdated.append(program)
            else:
                self._idle[key] = program
        while len(self._idle) > _KEPT:
            outdated.append(self._idle.pop(next(iter(self._idle))))
        self._drop(*outdated)

    def free_idle(self) -> bool:
        """Free every idle program, and the scratch block if nothing else uses it.

        Returns whether there was an idle program.
        """
        idle, self._idle = self._idle, {}
        self._drop(*idle.values())
        if self._scratch.users == 0:
            self._scratch.close()
            self._scratch = Scratch(self._device, 0)
        return bool(idle)

    def close(self) -> None:
        """Free everything, programs that are still checked out as well."""
        self._idle.clear()
        self._drop(*self._keys)
        self._scratch.close()

    def _drop(self, *programs: BoundProgram) -> None:
        """Free programs. An error of the device is raised after all of them were freed."""
        with ExitStack() as everything:
            for program in programs:
                del self._keys[program]
                everything.callback(self._free, program)
            if programs:
                self._device.synchronize()  # what they enqueued may still be running

    def _free(self, program: BoundProgram) -> None:
        with ExitStack() as everything:
            everything.callback(self._free_scratch, program.scratch)
            everything.callback(program.close)
            self._forget(program)

    def _free_scratch(self, scratch: Scratch) -> None:
        if scratch is not self._scratch and scratch.users == 0:
            scratch.close()
