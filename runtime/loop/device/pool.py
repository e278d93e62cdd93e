"""Programs by shape, checked out and given back, and the activations' block they share."""

from __future__ import annotations

from collections.abc import Callable, Generator, Hashable, Iterable
from contextlib import ExitStack, contextmanager
from typing import Protocol, TypeVar, cast

from ....engines.device import Device, Shapes
from ....engines.errors import MemoryLimitError
from .buffers import Scratch
from .programs import Nets, Program

P = TypeVar("P", bound=Program)
Calls = Iterable[tuple[str, Shapes]]  # nets, and the shapes of their inputs


class Take(Protocol):
    """Check a program out: the idle one of that key, or a new one, whose memory `net` is to answer for."""

    def __call__(self, key: Hashable, net: str, make: Callable[[Scratch], P]) -> P:
        """The program."""
        ...


# Idle programs kept for requests of the same shape; the oldest goes first.
_KEPT = 12


@contextmanager
def blame(net: str) -> Generator[None]:
    """Let a MemoryLimitError name the net that wanted the memory."""
    try:
        yield
    except MemoryLimitError as error:
        error.culprit = error.culprit or net
        raise


class Pool:
    """A program is either idle here or checked out by one request: two requests never share buffers.

    They may share the scratch block, because nets run one after the other on the one stream. `forget` is told
    of every program that is about to be freed.
    """

    def __init__(self, device: Device, nets: Nets, forget: Callable[[Program], None]) -> None:
        self._device = device
        self._nets = nets
        self._forget = forget
        self._scratch = Scratch(device, 0)
        self._idle: dict[Hashable, Program] = {}
        self._keys: dict[Program, Hashable] = {}

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

    @contextmanager
    def returning_on_error(self) -> Generator[Take]:
        """Yield the function that checks programs out; if the block fails, all of them are given back."""
        taken: list[Program] = []

        def take(key: Hashable, net: str, make: Callable[[Scratch], P]) -> P:
            program = self._idle.pop((net, key), None)
            if program is None:
                with blame(net):
                    program = make(self._scratch)
                self._keys[program] = (net, key)
            taken.append(program)
            return cast(P, program)

        try:
            yield take
        except BaseException:
            self.give_back(*taken)
            raise

    def give_back(self, *programs: Program) -> None:
        """Keep them for the next request of their shape, unless they are outdated or one too many."""
        outdated: list[Program] = []
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
        """Free every idle program, and the scratch if nobody else uses it; whether there was anything."""
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

    def _drop(self, *programs: Program) -> None:
        """Free programs. What failed on the device is raised, after everything was freed."""
        with ExitStack() as everything:
            for program in programs:
                del self._keys[program]
                everything.callback(self._free, program)
            if programs:
                self._device.synchronize()  # what they enqueued may still be running

    def _free(self, program: Program) -> None:
        with ExitStack() as everything:
            everything.callback(self._free_scratch, program.scratch)
            everything.callback(program.close)
            self._forget(program)

    def _free_scratch(self, scratch: Scratch) -> None:
        if scratch is not self._scratch and scratch.users == 0:
            scratch.close()
