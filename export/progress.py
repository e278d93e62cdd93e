"""What an export tells its caller while it runs."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass


@dataclass(frozen=True, kw_only=True)
class Progress:
    """One stage begins: the `index`-th (from 0) of `total`."""

    stage: str
    index: int
    total: int


class Stages:
    """Counts the stages of one export and reports each as it begins."""

    def __init__(self, total: int, report: Callable[[Progress], None] | None) -> None:
        self._total = total
        self._report = report
        self._index = 0

    def begin(self, stage: str) -> None:
        """Report that `stage` begins."""
        if self._report is not None:
            self._report(Progress(stage=stage, index=self._index, total=self._total))
        self._index += 1
