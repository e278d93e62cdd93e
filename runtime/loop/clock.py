"""Wall time of the stages of one generation."""

from __future__ import annotations

from collections.abc import Generator, Iterator
from contextlib import contextmanager
from time import perf_counter
from typing import TypeVar

Item = TypeVar("Item")


class Clock:
    """Adds up seconds per stage. The time of a stage inside another counts for the inner one only."""

    def __init__(self) -> None:
        self.seconds: dict[str, float] = {}
        self._inner = 0.0  # seconds counted already for stages inside the one that is running

    @contextmanager
    def stage(self, name: str) -> Generator[None]:
        """Count the block's time for `name`."""
        outer, self._inner, began = self._inner, 0.0, perf_counter()
        try:
            yield
        finally:
            spent = perf_counter() - began
            self.seconds[name] = self.seconds.get(name, 0.0) + spent - self._inner
            self._inner = outer + spent

    def timed(self, name: str, items: Iterator[Item]) -> Iterator[Item]:
        """Yield the items. The time to make each counts for `name`; the consumer's time does not."""
        while True:
            with self.stage(name):
                item = next(items, None)
            if item is None:
                return
            yield item
