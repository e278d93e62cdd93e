"""Several backends as one: each net is run by the one that was measured to be its fastest."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from ..backend import HostBackend, Net
from ..backends import BACKENDS
from ..errors import BackendError
from ..package import Package
from ..spec import NETS


@dataclass(frozen=True, kw_only=True)
class MixedBackend:
    """`HostBackend` of others.

    Attributes:
        usual: runs every net of a part that has none of its own.
        of_part: by part of the model (`NetRow.part`): a decoder's backend is its encoder's, too.
    """

    usual: HostBackend
    of_part: Mapping[str, HostBackend]

    @property
    def fixed_shapes(self) -> bool:
        """See `HostBackend`."""
        return any(getattr(one, "fixed_shapes", False) for one in self._all)

    @property
    def _all(self) -> tuple[HostBackend, ...]:
        return self.usual, *self.of_part.values()

    def refusal(self) -> BackendError | None:
        """The first error of one that cannot run here; never raises."""
        return next((error for one in self._all if (error := one.refusal())), None)

    def describe(self) -> str:
        """What runs most nets, and what runs the others."""
        others = (f"{part} on {one.describe()}" for part, one in self.of_part.items())
        return "; ".join((self.usual.describe(), *others))

    def open_net(self, package: Package, name: str, *, threads: int | None = None) -> Net:
        """Load one net of a package. Raises as the backend that runs it."""
        part = NETS[name].part if name in NETS else ""
        return self.of_part.get(part, self.usual).open_net(package, name, threads=threads)


def backend_of(nets: Mapping[str, str]) -> Any:
    """The backend of nets that were measured, as `Standing.nets`, the first of which is the usual one."""
    (_, first), *others = nets.items()
    usual = BACKENDS[first].load()
    of_part = {NETS[net].part: BACKENDS[name].load() for net, name in others if name != first}
    return MixedBackend(usual=usual, of_part=of_part) if of_part else usual
