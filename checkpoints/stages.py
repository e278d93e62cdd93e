"""How far an export, or the first opening of a checkpoint, has come."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from itertools import count


@dataclass(frozen=True, kw_only=True)
class Progress:
    """One stage begins: the `index`-th (from 0) of `total`."""

    stage: str
    index: int
    total: int


OnProgress = Callable[[Progress], None]


def stages(total: int, report: OnProgress | None) -> Callable[[str], None]:
    """A function that reports each of `total` stages as it begins."""
    numbers = count()

    def begin(stage: str) -> None:
        if report is not None:
            report(Progress(stage=stage, index=next(numbers), total=total))

    return begin
