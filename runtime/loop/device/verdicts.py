"""What comparing replayed rows with plain ones has shown, remembered in the engine store.

A verdict holds for one shape, on one kind of GPU with one driver, one release of the library and one graph.
"""

from __future__ import annotations

import json
from contextlib import suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from time import time
from typing import TYPE_CHECKING, Literal

from ....engines.errors import LatentrtError

if TYPE_CHECKING:
    from ....engines.store.engine_store import EngineStore

Graphs = Literal["auto", "on", "off"]

# What is remembered while a comparison runs: an error of the device may end the process in the middle of it.
UNFINISHED = "an earlier comparison with plain rows did not end (`latentrt cache prune --all` forgets it)"
# Seconds in which another process may still be at it; a comparison is half a dozen rows.
_AT_IT = 60.0


@dataclass(frozen=True, kw_only=True)
class Verdict:
    """What comparing replayed rows with plain ones has shown.

    Attributes:
        failed: why there is nothing to compare; "" if there is.
        distance: |replayed - plain| / |plain - start| of the state after the compared rows.
        allowed: the largest distance at which the two are equal.
        plain_s, replayed_s: seconds of a row.
        began: when an unfinished comparison began, in seconds since the epoch.
    """

    failed: str = ""
    began: float = 0.0
    distance: float = 0.0
    allowed: float = 0.0
    plain_s: float = 0.0
    replayed_s: float = 0.0

    def objection(self, graphs: Graphs) -> str:
        """Why rows should run plainly; "" if they should be replayed. "on" does not ask which is faster."""
        if self.failed:
            return self.failed
        if not self.distance <= self.allowed:
            return f"a replayed row is {self.distance:.1e} from a plain one, over {self.allowed:.1e}"
        if graphs == "auto" and self.replayed_s > self.plain_s:
            return f"replaying takes {1e3 * self.replayed_s:.2f} ms a row, running {1e3 * self.plain_s:.2f}"
        return ""


class Verdicts:
    """The verdicts on one device, library and package, by shape.

    Args:
        store: where they are kept; None keeps them as long as this object lives.
        facts: all that they hold for, as plain JSON.
    """

    def __init__(self, store: EngineStore | None = None, facts: object = None) -> None:
        self._store = store
        self._facts = facts
        self._known: dict[str, Verdict] = {}

    def find(self, shape: str) -> Verdict | None:
        """The verdict on a shape; None if there is none, or none that can be read."""
        if shape not in self._known and self._store is not None:
            with suppress(ValueError, TypeError):
                verdict = Verdict(**json.loads(self._store.read_side_file(self._path(shape))))
                if verdict.failed != UNFINISHED or time() - verdict.began > _AT_IT:
                    self._known[shape] = verdict
        return self._known.get(shape)

    def begin(self, shape: str) -> None:
        """Remember that a comparison has begun; if one has already, when that was."""
        if self._store is None or not self._store.read_side_file(self._path(shape)):
            self.keep(shape, Verdict(failed=UNFINISHED, began=time()))

    def keep(self, shape: str, verdict: Verdict) -> None:
        """Remember a verdict. A store that cannot be written only means to compare again next time."""
        self._known[shape] = verdict
        if self._store is not None:
            with suppress(LatentrtError):
                content = json.dumps(asdict(verdict)).encode()
                self._store.write_side_file(self._path(shape), content)

    def forget(self, shape: str) -> None:
        """Remember nothing of a shape."""
        self._known.pop(shape, None)
        if self._store is not None:
            with suppress(OSError):
                self._path(shape).unlink()

    def _path(self, shape: str) -> Path:
        from ....engines.store.key import canonical_sha256

        assert self._store is not None
        return self._store.side_file("replays", canonical_sha256([self._facts, shape]))
