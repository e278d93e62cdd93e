"""What draws with sets of adapters: a loop and text encoders for each, those used last kept open."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Generator, Iterable
from concurrent.futures import Future
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field, replace
from threading import Lock

from ..adapters.sets import AdapterSet
from ..engines.errors import NumericError
from ..engines.heap import give_back_heap
from ..engines.package import Package
from ..engines.spec import TEXT_ENCODERS
from .loop.job import PackageLoop
from .prompts.encode import TextConditioner

# Of the weights of nets that are open with and without adapters, together.
ADAPTED_BYTES = 8 * 2**30
# Each session has threads of its own (docs/design.md), one fewer than processors, and memory beside its
# weights: 14 MB for each set of the demo. Who tries strengths would have both without end.
MOST_SETS = 16


@dataclass(frozen=True, kw_only=True)
class Adapted:
    """What a generation runs on: the nets, and the prompts' encoders."""

    loop: PackageLoop
    text: TextConditioner


@dataclass(kw_only=True)
class _Entry:
    """What is open for a set, or is being opened; how many generations draw with it or wait for it."""

    opened: Future[Adapted] = field(default_factory=Future[Adapted])
    users: int = 0
    forgotten: bool = False


class AdaptedLoops:
    """Opens the nets that sets of adapters change, and forgets those used longest ago. Threads may share it.

    A set's nets are opened once, by the first who asks; others wait for them. What is forgotten is freed when
    the last generation that draws with it ends, so that no generation waits for another one.

    Args:
        package: without changes.
        base: runs its nets, and encodes for them.
        encode: makes the conditioner of a loop with other text encoders.
        limit: bytes of nets' weights above which sets are forgotten; and of the base the nets that a set
            has others of, which are opened again when they are asked for.
        most: sets that are kept open, whatever they take.
    """

    def __init__(
        self,
        package: Package,
        base: Adapted,
        encode: Callable[[PackageLoop], TextConditioner],
        limit: int = ADAPTED_BYTES,
        most: int = MOST_SETS,
    ) -> None:
        self._package, self._base, self._encode = package, base, encode
        self._limit, self._most = limit, most
        self._entries: OrderedDict[str, _Entry] = OrderedDict()
        self._base_made_way = False
        self._lock = Lock()

    @contextmanager
    def use(self, chosen: AdapterSet) -> Generator[Adapted]:
        """What draws with a set, for as long as the block runs.

        Raises:
            LatentrtError: what opening its nets raises; nothing is kept of it then.
            NumericError: what the block raises, with the adapters' names: their weights may fit a type that
                what is computed with them does not.
        """
        if not chosen.key:
            self._make_room_for_base()
            yield self._base
            return
        with self._lock:
            entry = self._entries.get(chosen.key)
            first = entry is None
            if entry is None:
                entry = self._entries[chosen.key] = _Entry()
            self._entries.move_to_end(chosen.key)
            entry.users += 1
        try:
            if first:
                self._open(chosen, entry)
            adapted = entry.opened.result()
            try:
                yield adapted
            except NumericError as error:
                raise _named(error, chosen) from error
        finally:
            with self._lock:
                entry.users -= 1
            _free(entry)

    def forget(self) -> None:
        """Forget all sets."""
        with self._lock:
            entries = list(self._entries.values())
            self._entries.clear()
        _let_go(entries)

    def _open(self, chosen: AdapterSet, entry: _Entry) -> None:
        try:
            loop = self._base.loop.adapted(replace(self._package, changes=chosen.changes))
            self._make_room(loop, entry)
            loop.open_own()
            text = self._encode(loop) if set(TEXT_ENCODERS) & set(chosen.changes) else self._base.text
            entry.opened.set_result(Adapted(loop=loop, text=text))
        except BaseException as error:
            with self._lock:
                self._entries.pop(chosen.key, None)
            entry.opened.set_exception(error)

    def _make_room(self, loop: PackageLoop, mine: _Entry) -> None:
        """Before nets are opened, so that there are never more open than fit."""
        going: list[_Entry] = []
        with self._lock:
            sizes = self._sizes(besides=mine)
            taken = 2 * loop.own_bytes + sum(sizes.values())  # the base has the same nets
            kept = len(sizes)
            for key, size in sizes.items():
                if taken > self._limit or kept >= self._most:
                    kept -= 1
                    going.append(self._entries.pop(key))
                    taken -= size
            self._base_made_way |= taken > self._limit
        _let_go(going)
        if taken > self._limit:
            self._base.loop.make_way(loop)
            give_back_heap()  # other threads have other heaps, and would not find what this leaves in one

    def _make_room_for_base(self) -> None:
        """Before those of its nets are opened again that made way: the sets' make way for them."""
        going: list[_Entry] = []
        with self._lock:
            sizes = self._sizes() if self._base_made_way else {}
            self._base_made_way = False
            for key in tuple(sizes):
                if max(sizes.values()) + sum(sizes.values()) > self._limit:
                    del sizes[key]
                    going.append(self._entries.pop(key))
        _let_go(going)

    def _sizes(self, besides: _Entry | None = None) -> dict[str, int]:
        """Bytes of the nets of each set that is open, the one used longest ago first; under the lock."""
        opened = {key: _opened(entry) for key, entry in self._entries.items() if entry is not besides}
        return {key: adapted.loop.own_bytes for key, adapted in opened.items() if adapted}


def _opened(entry: _Entry) -> Adapted | None:
    """What is open; None while it is not, or if it could not be."""
    with suppress(BaseException):
        return entry.opened.result(timeout=0)
    return None


def _named(error: NumericError, chosen: AdapterSet) -> NumericError:
    """The error, with what may have caused it."""
    names = ", ".join(dict.fromkeys(name for name, _, _ in chosen.adapters))
    return NumericError(
        f"with the adapters {names}: {error.found}",
        expected=error.expected,
        fix=f"Use less of them. {error.fix}",
    )


def _let_go(entries: Iterable[_Entry]) -> None:
    for entry in entries:
        entry.forgotten = True
        _free(entry)


def _free(entry: _Entry) -> None:
    """Free what is forgotten and not used."""
    if entry.forgotten and not entry.users and (adapted := _opened(entry)):
        adapted.loop.close()
        give_back_heap()
