"""What the GPU check found, in rows: one measurement each, judged, and never lost to an exception."""

from __future__ import annotations

import traceback
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from ...engines.errors import LatentrtError
from ..records import Figures, Status, plain, short


@dataclass(frozen=True, kw_only=True)
class Row:
    """One thing that was looked at. `reason` is "" where `status` is ok; `figures` are plain JSON."""

    what: str
    status: Status
    reason: str = ""
    figures: Figures = field(default_factory=dict[str, Any])

    def to_json(self) -> dict[str, Any]:
        """Plain data; numbers that JSON has no word for as text."""
        return {
            "what": self.what,
            "status": self.status,
            "reason": short(self.reason),
            "figures": plain(self.figures),
        }

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> Row:
        """The reverse of `to_json`."""
        return cls(**{name: data[name] for name in ("what", "status", "reason", "figures")})

    def format(self) -> str:
        """One line, without the backend."""
        told = "  ".join(f"{name} {_figure(value)}" for name, value in self.figures.items() if _fits(value))
        return (
            f"{self.what}: {self.status}{f': {short(self.reason)}' if self.reason else ''}  {told}".rstrip()
        )


def judged(what: str, problems: Sequence[str], figures: Figures) -> Row:
    """A row that is ok if there are no problems."""
    return Row(
        what=what, status="FAILED" if problems else "ok", reason="; ".join(problems), figures=dict(figures)
    )


def failed(what: str, error: BaseException) -> Row:
    """The row of an exception: our own errors in their words, others with the line that raised them."""
    if isinstance(error, LatentrtError):
        reason = f"{type(error).__name__}: {error}"
    else:
        frames = traceback.extract_tb(error.__traceback__)
        where = f" ({Path(frames[-1].filename).name}:{frames[-1].lineno})" if frames else ""
        reason = f"{type(error).__name__}: {error}{where}"
    return Row(what=what, status="FAILED", reason=reason)


def attempt(what: str, make: Callable[[], Row]) -> Row:
    """The row that `make` returns, or the one of what it raises: the rows after it are still wanted."""
    try:
        return make()
    except Exception as error:  # whatever a library raises is a result
        return failed(what, error)


def collect(rows: Iterable[Row]) -> Iterator[Row]:
    """`rows`, and instead of an exception a last row that has it."""
    try:
        yield from rows
    except Exception as error:  # whatever a library raises is a result
        yield failed("the section", error)


def mebibytes(size: int) -> float:
    """Of bytes, for people."""
    return round(size / 2**20, 2)


def _fits(value: Any) -> bool:
    return isinstance(value, (bool, int, float, str)) and len(str(value)) < 60


def _figure(value: Any) -> str:
    return f"{value:.4g}" if isinstance(value, float) else str(value)
