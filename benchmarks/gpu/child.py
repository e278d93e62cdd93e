"""One section of the GPU check in a process of its own: a crash, or a hang, is a row and not the end.

    python -m latentrt.benchmarks.gpu.child BACKEND SECTION PACKAGE ROWS

appends each row to the file ROWS, a line of JSON, as soon as it is known. Libraries print what they like.
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import IO

from ...engines.backend import choose_backend
from ...engines.errors import BackendError
from ...engines.package import Package
from ...runtime.pipeline import SHIPPED
from ..records import short
from .host import host_memory, placement
from .memory import ladder, memory
from .nets import build, opens, parity
from .opener import Opener, Scale, backend_opener
from .pictures import graphs, picture, timing
from .rows import Row, collect

_TAIL = 400  # characters of what a child printed


@dataclass(frozen=True, kw_only=True)
class Section:
    """What is checked, and how many seconds it may take."""

    run: Callable[[Opener, Scale], Iterator[Row]]
    limit: float


def available(opener: Opener, scale: Scale) -> Iterator[Row]:
    """What the backend says it is. (Where it cannot run there is no opener, and `main` says why.)"""
    del scale
    _, engine = choose_backend(opener.backend)
    yield Row(what="backend", status="ok", figures={"is": engine.describe()})


# In this order. Without the first two, or if one of them fails, the rest has nothing to run on.
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
}
NEEDED = ("available", "build", "open")


# ── the parent's side ──────────────────────────────────────────────────────────────────────────


def section_command(backend: str, section: str, package: Path) -> list[str]:
    """What runs a section; `run_child` adds the file of rows."""
    module = [sys.executable, "-X", "faulthandler", "-m", f"{__package__}.child"]
    return [*module, backend, section, str(package)]


def run_child(
    command: Sequence[str], limit: float, environment: Mapping[str, str] | None = None
) -> list[Row]:
    """The rows that a child wrote, and one more if it crashed, hung, failed or wrote none.

    Args:
        command: gets the path of the file of rows as its last argument.
        limit: seconds; then it is killed, with all that it started.
        environment: of the child, besides this process's own.
    """
    # PYTHONSAFEPATH: `-m` would otherwise put the current folder first, and take modules from there.
    variables = {**os.environ, "PYTHONSAFEPATH": "1", **(environment or {})}
    with tempfile.TemporaryDirectory() as folder, tempfile.TemporaryFile() as noise:
        path = Path(folder) / "rows"
        child = subprocess.Popen(  # noqa: S603
            [*command, str(path)],
            stdin=subprocess.DEVNULL,
            stdout=noise,
            stderr=noise,
            env=variables,
            start_new_session=True,  # so that builders it started can be killed with it
        )
        code: int | None = None
        try:
            with suppress(subprocess.TimeoutExpired):
                code = child.wait(max(limit, 0.0))
        finally:
            if code is None:  # also for KeyboardInterrupt
                _kill(child)
        rows = _read(path)
        if why := _why(code, limit, rows):
            rows.append(Row(what="process", status="FAILED", reason=f"{why}{_tail(noise)}"))
        return rows


def _kill(child: subprocess.Popen[bytes]) -> None:
    with suppress(ProcessLookupError):
        if hasattr(os, "killpg"):
            os.killpg(child.pid, signal.SIGKILL)
        else:
            child.kill()
    child.wait()


def _read(path: Path) -> list[Row]:
    rows: list[Row] = []
    if path.is_file():
        for line in path.read_text(encoding="utf-8").splitlines():
            with suppress(ValueError, KeyError):  # a line that a crash cut short
                rows.append(Row.from_json(json.loads(line)))
    return rows


def _why(code: int | None, limit: float, rows: list[Row]) -> str:
    if code is None:
        return f"it did not end within {limit:.0f} s"
    if code < 0:
        names = {int(item): item.name for item in signal.Signals}
        return f"it crashed with {names.get(-code, f'signal {-code}')}"
    if code:
        return f"it ended with exit code {code}"
    return "" if rows else "it ended without a row"


def _tail(noise: IO[bytes]) -> str:
    size = noise.seek(0, os.SEEK_END)
    noise.seek(max(0, size - 4 * _TAIL))
    text = short(noise.read().decode("utf-8", errors="replace"))[-_TAIL:]
    return f": {text}" if text else ""


# ── the child's side ───────────────────────────────────────────────────────────────────────────


def section_rows(section: str, backend: str, model: str) -> Iterator[Row]:
    """The rows of a section; "not available" where the backend cannot run here. Raises LatentrtError."""
    package = Package.open(SHIPPED.get(model, Path(model)))
    try:
        opener = backend_opener(backend, package)
    except BackendError as error:
        yield Row(what="backend", status="not available", reason=error.found)
        return
    yield from SECTIONS[section].run(opener, Scale.of(package.manifest))


def main(arguments: Sequence[str]) -> None:
    """Run a section and write its rows."""
    backend, section, model, path = arguments
    with Path(path).open("w", encoding="utf-8") as stream:
        for row in collect(section_rows(section, backend, model)):
            print(json.dumps(row.to_json()), file=stream, flush=True)


if __name__ == "__main__":
    main(sys.argv[1:])
