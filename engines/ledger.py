"""Where the memory of a device went, for people: a table of nets, and what the process holds as a whole."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any, Protocol

from .backend import MemoryLedger
from .device import DeviceMemory

_COLUMNS = ("net", "weights", "activations", "in and out", "total")


class _HasMemory(Protocol):
    @property
    def memory(self) -> MemoryLedger: ...


@dataclass(frozen=True, kw_only=True)
class NetRow:
    """One net, in bytes. `activations` is None where the library has them in an arena and does not tell."""

    name: str
    weights: int
    activations: int | None
    io: int

    @property
    def total(self) -> int:
        """Of what is known."""
        return self.weights + (self.activations or 0) + self.io


@dataclass(frozen=True, kw_only=True)
class Ledger:
    """In bytes. `scratch` is the block of activations that nets share; `process` is what NVML says this
    process holds, None where it does not.

    Buffers that two nets share count for both of them, so the nets' sum may be more than what was allocated.
    """

    device: str
    nets: tuple[NetRow, ...]
    scratch: int
    process: int | None
    memory: DeviceMemory

    @property
    def known(self) -> int:
        """Of all nets and the shared block."""
        return sum(row.total for row in self.nets) + self.scratch

    @property
    def rest(self) -> int | None:
        """What the process holds besides: the CUDA context, libraries and their arenas. None if not known."""
        return None if self.process is None else max(0, self.process - self.known)

    def to_json(self) -> dict[str, Any]:
        """Plain data, with the sums."""
        rows = [{**asdict(row), "total": row.total} for row in self.nets]
        return {**asdict(self), "nets": rows, "known": self.known, "rest": self.rest}

    def format(self) -> str:
        """A table in MiB, one line per net, then the sums."""
        lines = [_COLUMNS]
        lines += [
            (row.name, *map(_mebibytes, (row.weights, row.activations, row.io, row.total)))
            for row in self.nets
        ]
        lines.append(("shared activations", "", _mebibytes(self.scratch), "", _mebibytes(self.scratch)))
        sums = {"all of this": self.known, "the rest of the process": self.rest, "the process": self.process}
        lines += [(name, "", "", "", _mebibytes(size)) for name, size in sums.items()]
        widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
        table = [
            "  ".join([line[0].ljust(widths[0]), *map(str.rjust, line[1:], widths[1:])]).rstrip()
            for line in lines
        ]
        shared = ", shared with the host" if self.memory.unified else ""
        free, total = _mebibytes(self.memory.free), _mebibytes(self.memory.total)
        return "\n".join([f"{self.device}: {free} of {total} MiB free{shared}", *table])


def take_ledger(
    device: str,
    nets: Mapping[str, _HasMemory],
    memory: DeviceMemory,
    *,
    process: int | None = None,
    scratch: int = 0,
) -> Ledger:
    """What nets hold now.

    Args:
        device: its name.
        nets: nets of a backend or of a device, by name.
        memory: `Device.memory()`.
        process: `CudaDevice.process_memory()`.
        scratch: bytes of the block of activations that the nets share.
    """
    ledgers = {name: net.memory for name, net in nets.items()}
    rows = tuple(
        NetRow(name=name, weights=item.weights, activations=item.activations, io=item.io)
        for name, item in ledgers.items()
    )
    return Ledger(device=device, nets=rows, scratch=scratch, process=process, memory=memory)


def _mebibytes(size: int | None) -> str:
    return "?" if size is None else f"{size / 2**20:.1f}"
