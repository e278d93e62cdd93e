"""Wall time per stage of one generation."""

from __future__ import annotations

from collections.abc import Generator, Iterator
from contextlib import contextmanager
from time import perf_counter
from typing import TypeVar

Item = TypeVar("Item")


class Clock:
    """Adds up seconds per stage. A stage inside another is charged to the inner one only."""

    def __init__(self) -> None:
        self.seconds: dict[str, float] = {}
        self._inner = 0.0  # seconds already charged below the stage that is running

    @contextmanager
    def stage(self, name: str) -> Generator[None]:
        """Charge the block to `name`."""
        outer, self._inner, began = self._inner, 0.0, perf_counter()
        try:
            yield
        finally:
            spent = perf_counter() - began
            self.seconds[name] = self.seconds.get(name, 0.0) + spent - self._inner
            self._inner = outer + spent

    def timed(self, name: str, items: Iterator[Item]) -> Iterator[Item]:
        """Charge the making of each item to `name`, not what the consumer does with it."""
        while True:
            with self.stage(name):
                item = next(items, None)
            if item is None:
                return
            yield item
