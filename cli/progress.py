"""One progress bar for every wait of over a second; on a terminal only, on stderr."""

from __future__ import annotations

from collections.abc import Callable, Generator
from contextlib import contextmanager

Advance = Callable[[str, int, int], None]  # (what is being done, how many are done, of how many)


@contextmanager
def progress_bar(*, enabled: bool = True) -> Generator[Advance]:
    """Yield a function that moves the bar; it does nothing where stderr is no terminal."""
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

    console = Console(stderr=True)
    if not (enabled and console.is_terminal):
        yield lambda what, done, total: None
        return
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    with Progress(*columns, console=console, transient=True) as progress:
        task = progress.add_task("starting", total=None)
        yield lambda what, done, total: progress.update(task, description=what, completed=done, total=total)
