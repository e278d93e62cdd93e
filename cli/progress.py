"""One progress bar for every wait of over a second, on stderr; a line now and then if it is no terminal."""

from __future__ import annotations

from collections.abc import Callable, Generator
from contextlib import contextmanager
from threading import Event, Thread
from time import perf_counter

from .shown import printable, tell

Advance = Callable[[str, int, int], None]  # (what is being done, how many are done, of how many)
_EVERY = 30.0  # seconds between two lines


@contextmanager
def progress_bar(*, enabled: bool = True) -> Generator[Advance]:
    """Yield a function that moves the bar."""
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

    console = Console(stderr=True)
    if not enabled:
        yield lambda what, done, total: None
        return
    if not console.is_terminal:
        with _lines() as advance:
            yield advance
        return
    text = TextColumn("{task.description}", markup=False)  # a file's name may hold brackets
    columns = (text, BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    with Progress(*columns, console=console, transient=True) as progress:
        task = progress.add_task("starting", total=None)
        yield lambda what, done, total: progress.update(
            task, description=printable(what), completed=done, total=total
        )


@contextmanager
def _lines() -> Generator[Advance]:
    """Yield a function that notes what is being done, which is told again and again while it lasts."""
    began, doing, over = perf_counter(), list[str](), Event()

    def repeat() -> None:
        while not over.wait(_EVERY):
            if doing:
                tell(f"{doing[-1]} ({perf_counter() - began:.0f} s so far)")

    def advance(what: str, done: int, total: int) -> None:
        doing[:] = [f"{what}, {done} of {total}" if total > 1 else what]

    teller = Thread(target=repeat, daemon=True)
    teller.start()
    try:
        yield advance
    finally:
        over.set()
        teller.join()
