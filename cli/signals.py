"""Ctrl-C and SIGTERM unwind what a command is doing, so that what it was writing is cleaned up."""

from __future__ import annotations

import os
import signal
import sys
from collections.abc import Generator
from contextlib import contextmanager
from threading import RLock, Timer
from types import FrameType
from typing import Any

_LOST_S = 5.0  # after a signal: who has not stopped by then has lost it
_SOON_S = 0.01


class StoppedError(BaseException):
    """A signal asked to stop. No Exception, so that nobody who wraps a library's errors takes it for one."""

    def __init__(self, number: int) -> None:
        super().__init__(signal.Signals(number).name)
        self.number = number


class _Again:
    """Sends a signal once more, at the time that was set last, and never after `cancel` has returned."""

    def __init__(self) -> None:
        # A signal's handler may come in while its own thread is in here.
        self._turn = RLock()
        self._due: Timer | None = None

    def after(self, seconds: float, number: int) -> None:
        self.cancel()
        timer = Timer(seconds, lambda: self._send(timer, number))
        timer.daemon = True
        self._due = timer
        timer.start()

    def cancel(self) -> None:
        with self._turn:
            timer, self._due = self._due, None
        if timer is not None:
            timer.cancel()

    def _send(self, timer: Timer, number: int) -> None:
        with self._turn:
            if timer is self._due:
                os.kill(os.getpid(), number)


@contextmanager
def stoppable() -> Generator[None]:
    """Raise StoppedError in the block at SIGINT and SIGTERM.

    What nobody has heard is sent again: a library may take the error for one of its own, and Python drops
    what is raised in a finaliser or a callback of C, wherever the signal met it.
    """
    again = _Again()
    inside = True  # the block
    dropping = False  # Python's hook for such errors is at work, and would drop another one too
    soon = _SOON_S

    def stop(number: int, frame: FrameType | None) -> None:
        nonlocal soon
        if dropping:
            soon *= 2  # a loaded machine may take longer for the hook
            again.after(soon, number)
        elif inside:
            again.after(_LOST_S, number)
            raise StoppedError(number)

    def hook(lost: Any) -> None:
        nonlocal dropping
        if isinstance(lost.exc_value, StoppedError):
            dropping = True
            again.after(soon, lost.exc_value.number)
            dropping = False
        else:
            plain(lost)

    plain, sys.unraisablehook = sys.unraisablehook, hook
    before = {number: signal.signal(number, stop) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield
    finally:
        inside = False
        again.cancel()
        sys.unraisablehook = plain
        for number, handler in before.items():
            signal.signal(number, signal.SIG_IGN)  # drops one that is on its way
            signal.signal(number, handler)
