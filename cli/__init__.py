"""The command `latentrt`: one thin module per verb, nothing heavy imported before a verb runs.

Exit codes: 0 done, 2 usage, 3 bad model, 4 no backend or device, 5 out of memory, 6 cancelled,
7 disk, 8 NaN or a constant picture, 1 anything else (engines/errors.py).
"""

from __future__ import annotations

import json
import signal
import sys
from collections.abc import Generator
from contextlib import contextmanager
from types import FrameType
from typing import Any, NoReturn

import typer

from ..engines.errors import CancelledError, LatentrtError
from .bench import bench
from .build import build
from .cache import cache
from .convert import convert
from .export import export
from .generate import generate
from .inspect import inspect, metadata

app = typer.Typer(
    name="latentrt",
    help="Stable Diffusion checkpoints as exported graphs, driven by a small runtime without torch.",
    epilog=(__doc__ or "").partition("\n\n")[2],
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
)
for verb in (generate, export, build, inspect, metadata, convert):
    app.command()(verb)
app.add_typer(bench, name="bench")
app.add_typer(cache, name="cache")


class _StoppedError(BaseException):
    """A signal asked to stop. No Exception, so that nobody who wraps a library's errors takes it for one."""


@contextmanager
def _stoppable() -> Generator[None]:
    """Let SIGINT and SIGTERM unwind the block, so that what it was writing is cleaned up."""

    def stop(number: int, frame: FrameType | None) -> None:
        raise _StoppedError(signal.Signals(number).name)

    before = {number: signal.signal(number, stop) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def main() -> None:
    """Run the command line; an error latentrt raises on purpose becomes a message and an exit code."""
    stdout: Any = sys.stdout  # None in some services, and another object in tests
    if hasattr(stdout, "reconfigure"):
        # A name that the console's encoding lacks is no error: its picture has been drawn.
        stdout.reconfigure(errors="backslashreplace")
    try:
        with _stoppable():
            app()
    except LatentrtError as error:
        _fail(error)
    except _StoppedError as stopped:
        _fail(
            CancelledError(
                f"stopped by {stopped}", expected="to be left to finish", fix="Run it again to start over."
            )
        )


def _fail(error: LatentrtError) -> NoReturn:
    if "--json" in sys.argv:
        parts = {"type": type(error).__name__, "found": error.found, "expected": error.expected}
        print(json.dumps({"error": {**parts, "fix": error.fix, "exit_code": error.exit_code}}))
    else:
        print(f"error: {error}", file=sys.stderr)
    raise SystemExit(error.exit_code) from None
