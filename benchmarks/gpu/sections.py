"""The sections of the GPU check, each run in a process of its own.

    python -m latentrt.benchmarks.gpu.sections BACKEND SECTION PACKAGE

writes each row to stdout, a line of JSON, as soon as it is known; what libraries print goes to stderr.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from ...engines.backend import choose_backend
from ...engines.errors import BackendError
from ...engines.package import Package
from ..child import become_child
from ..records import Row
from .judge import collect, judged, not_available
from .memory import ladder, memory
from .nets import build, opens, parity, placement
from .opener import Opener, Scale, backend_opener
from .pictures import graphs, host_memory, peers, picture, timing


@dataclass(frozen=True, kw_only=True)
class Section:
    """What is checked, and how many seconds it may take."""

    run: Callable[[Opener, Scale], Iterator[Row]]
    limit: float


def available(opener: Opener, scale: Scale) -> Iterator[Row]:
    """What the backend says it is. (Where it cannot run there is no opener, and `section_rows` says why.)"""
    del scale
    _, engine = choose_backend(opener.task.backend)
    yield judged("backend", [], {"is": engine.describe()})


# In this order. Without those that are needed, or if one of them fails, the rest has nothing to run on.
SECTIONS: Mapping[str, Section] = {
    "available": Section(run=available, limit=60),
    "build": Section(run=build, limit=300),
    "open": Section(run=opens, limit=60),
    "placement": Section(run=placement, limit=60),
    "parity": Section(run=parity, limit=90),
    "picture": Section(run=picture, limit=120),
    "graphs": Section(run=graphs, limit=90),
    "memory": Section(run=memory, limit=90),
    "host_memory": Section(run=host_memory, limit=120),
    "ladder": Section(run=ladder, limit=120),
    "timing": Section(run=timing, limit=60),
    "peers": Section(run=peers, limit=90),
}
NEEDED = ("available", "build", "open")


def section_rows(section: str, backend: str, root: Path) -> Iterator[Row]:
    """The rows of a section; "not available" where the backend cannot run here. Raises LatentrtError."""
    package = Package.open(root)
    try:
        opener = backend_opener(backend, package)
    except BackendError as error:
        yield not_available("backend", error.found)
        return
    yield from SECTIONS[section].run(opener, Scale.of(package.manifest))


def main(arguments: Sequence[str]) -> None:
    """Run a section and write its rows."""
    backend, section, root = arguments
    reply = become_child()
    for row in collect(section_rows(section, backend, Path(root))):
        reply(row.to_json())


if __name__ == "__main__":
    main(sys.argv[1:])
