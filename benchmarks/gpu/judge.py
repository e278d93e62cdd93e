"""Rows of the GPU check: one thing that was looked at, judged, and never lost to an exception.

A section names what it looked at in `workload`; `check.py` moves that to the case, beside the backend.
"""

from __future__ import annotations

import traceback
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path

from ...engines.errors import LatentrtError
from ..records import Figures, Row
from ..sides.contract import OURS


def judged(what: str, problems: Sequence[str], figures: Figures, samples: Sequence[float] = ()) -> Row:
    """A row that is ok if there are no problems; samples are seconds."""
    return Row(
        side=OURS,
        workload=what,
        rounds=(tuple(samples),) if samples else (),
        status="FAILED" if problems else "ok",
        reason="; ".join(problems),
        figures=figures,
    )


def not_available(what: str, reason: str, figures: Figures | None = None) -> Row:
    """The row of what cannot be looked at here."""
    return Row(side=OURS, workload=what, status="not available", reason=reason, figures=figures or {})


def failed(what: str, error: BaseException) -> Row:
    """The row of an exception: our own errors in their words, others with the line that raised them."""
    where = ""
    if not isinstance(error, LatentrtError) and (frames := traceback.extract_tb(error.__traceback__)):
        where = f" ({Path(frames[-1].filename).name}:{frames[-1].lineno})"
    return judged(what, [f"{type(error).__name__}: {error}{where}"], {})


def attempt(what: str, make: Callable[[], Row]) -> Row:
    """The row that `make` returns, or the row of what it raises: the rows after it are still wanted."""
    try:
        return make()
    except Exception as error:  # whatever a library raises is a result
        return failed(what, error)


def collect(rows: Iterable[Row]) -> Iterator[Row]:
    """`rows`; an exception among them becomes a last row."""
    try:
        yield from rows
    except Exception as error:  # whatever a library raises is a result
        yield failed("the section", error)


def mebibytes(size: int) -> float:
    """Bytes as MiB, for people."""
    return round(size / 2**20, 2)
