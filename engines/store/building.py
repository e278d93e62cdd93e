"""Makes sure that the store has the engines (or layouts) of several nets, one net after the other."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from .engine_store import EngineStore, Miss
from .entry import Entry

Report = Callable[[str, float], None]  # what is being done, and how much of one net is done (0 to 1)
Build = Callable[[str, Path, Report], dict[str, Any]]  # net, where its engine goes -> facts for the store


@dataclass(frozen=True, kw_only=True)
class BuildProgress:
    """How far a build is: net `index` of `total`, and `fraction` (0 to 1) of that net."""

    net: str
    index: int
    total: int
    phase: str
    fraction: float


OnProgress = Callable[[BuildProgress], None]


@dataclass(frozen=True, kw_only=True)
class BuiltEngine:
    """An entry that is in the store now. `why` it had to be built; "" where it was there before."""

    entry: Entry
    why: str

    @property
    def net(self) -> str:
        """The net's name."""
        return self.entry.key.net

    @property
    def cached(self) -> bool:
        """Whether nothing had to be built."""
        return not self.why


def build_missing(
    store: EngineStore, found: Sequence[Entry | Miss], build: Build, progress: OnProgress | None = None
) -> tuple[BuiltEngine, ...]:
    """An entry for each of `found`, which `EngineStore.find` returned; `build` makes what was missed.

    Raises:
        StorageError: the store cannot be written.
        Exception: whatever `build` raises. Entries that were complete stay.
    """

    def ensure(index: int, item: Entry | Miss) -> BuiltEngine:
        if isinstance(item, Entry):
            return BuiltEngine(entry=item, why="")
        net = item.key.net

        def report(phase: str, fraction: float) -> None:
            if progress is not None:
                progress(
                    BuildProgress(net=net, index=index, total=len(found), phase=phase, fraction=fraction)
                )

        entry = store.get_or_build(
            item.key,
            lambda path: build(net, path, report),
            waiting=lambda message: report(message, 0.0),
        )
        return BuiltEngine(entry=entry, why=item.reason)

    return tuple(ensure(index, item) for index, item in enumerate(found))
