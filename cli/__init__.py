"""The command `latentrt`: one thin module per verb, nothing heavy imported before a verb runs.

Exit codes: 0 done, 2 usage, 3 bad model, 4 no backend or device, 5 out of memory, 6 cancelled,
7 disk, 8 NaN or a constant picture, 1 anything else (engines/errors.py); 141 nobody reads the output.
"""

from __future__ import annotations

import atexit
import json
import logging
import os
import sys
from collections.abc import Callable, Generator
from contextlib import contextmanager, suppress
from traceback import format_exception
from typing import Annotated, Any, NoReturn, Protocol, runtime_checkable

import typer

from ..engines.errors import CancelledError, LatentrtError, StorageError, UsageError
from .bench import bench
from .build import build
from .cache import cache
from .convert import convert
from .doctor import doctor
from .export import export
from .export_triton import export_triton
from .generate import generate
from .inspect import inspect, metadata
from .opened import models
from .quantise import quantise
from .serve import serve
from .shown import tell
from .signals import StoppedError, stoppable
from .streams import ReaderGoneError, standard_streams

app = typer.Typer(
    name="latentrt",
    help="Stable Diffusion checkpoints as exported graphs, driven by a small runtime without torch.",
    epilog=(__doc__ or "").partition("\n\n")[2],
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
)


def _print_version(wanted: bool) -> None:
    if wanted:
        from ..engines.installed import latentrt_version

        print(f"latentrt {latentrt_version()}")
        raise typer.Exit


@app.callback()
def _latentrt(  # pyright: ignore[reportUnusedFunction]
    version: Annotated[
        bool, typer.Option("--version", callback=_print_version, is_eager=True, help="Print it and stop.")
    ] = False,
) -> None: ...


for verb in (
    generate,
    serve,
    export,
    quantise,
    export_triton,
    build,
    models,
    inspect,
    metadata,
    convert,
    doctor,
):
    app.command()(verb)
app.add_typer(bench, name="bench")
app.add_typer(cache, name="cache")

_READER_GONE = 128 + 13  # what a shell reports of a program that SIGPIPE ended


class _StoppedBySignalError(CancelledError):
    """A StoppedError as an error for the user."""


def main() -> None:
    """Run the command line; an error latentrt raises on purpose becomes a message and an exit code."""
    words = sys.argv[1:]
    as_json = "--json" in (words[: words.index("--")] if "--" in words else words)
    try:
        with standard_streams() as output_lost, _remarks(logging.WARNING if as_json else logging.INFO):
            try:
                code = _run()
            except LatentrtError as error:
                code = _tell(error, as_json=as_json, output_lost=output_lost)
                if isinstance(error, _StoppedBySignalError):
                    _leave(code)
    except ReaderGoneError:
        code = _READER_GONE
    raise SystemExit(code)


def _leave(code: int) -> NoReturn:
    """End the process without waiting for threads: a library that was opening a net would abort it."""
    with suppress(OSError, ValueError):  # nobody reads any more
        sys.stdout.flush()
        sys.stderr.flush()
    atexit._run_exitfuncs()  # pyright: ignore[reportPrivateUsage] (temporary folders go)
    os._exit(code)


def _run() -> int:
    """Run the verb; what click says of the words of a command becomes a UsageError. Raises LatentrtError."""
    try:
        with stoppable():
            code = app(prog_name="latentrt", standalone_mode=False)
            sys.stdout.flush()
    except StoppedError as stopped:
        raise _StoppedBySignalError(
            f"stopped by {stopped}", expected="to be left to finish", fix="Run it again to start over."
        ) from None
    except Exception as error:
        if isinstance(error, _ClickError):
            raise _WordsError.of(error) from error
        raise
    return code if isinstance(code, int) else 0


@runtime_checkable
class _ClickError(Protocol):
    """What click raises about the words of a command. typer has a copy of click, or the real one."""

    def format_message(self) -> str: ...
    def show(self) -> None: ...


class _WordsError(UsageError):
    """An unknown option or verb, a missing argument, a value that is none of its option's."""

    show: Callable[[], None]  # click's own way to print it

    @classmethod
    def of(cls, error: Any) -> _WordsError:
        """In our words."""
        command = getattr(getattr(error, "ctx", None), "command_path", "latentrt")
        found = cls(
            " ".join(error.format_message().split()).rstrip("."),
            expected="the arguments and options that the help lists",
            fix=f"See: {command} --help",
        )
        found.show = error.show
        return found


def _tell(error: LatentrtError, *, as_json: bool, output_lost: Callable[[], bool]) -> int:
    """Print an error; where JSON is asked for but cannot be printed, as text. Returns the exit code."""
    if as_json:
        public = (kind for kind in (UsageError, CancelledError) if isinstance(error, kind))
        kind = next(public, type(error)) if type(error).__name__.startswith("_") else type(error)
        parts = {"type": kind.__name__, "found": error.found, "expected": error.expected, "fix": error.fix}
        with suppress(StorageError):
            print(json.dumps({"error": {**parts, "exit_code": error.exit_code}}))
            sys.stdout.flush()
    if isinstance(error, _WordsError) and not as_json:
        error.show()  # with the usage above
    elif not as_json or output_lost():
        tell(f"error: {error}")
    return error.exit_code


class _Remarks(logging.Handler):
    """Prints what the library logs."""

    def emit(self, record: logging.LogRecord) -> None:
        """One line, and what was raised; on the stream of this moment: a progress bar puts its own there."""
        tell(f"latentrt: {record.getMessage()}")
        if record.exc_info is not None:
            for line in "".join(format_exception(*record.exc_info)).splitlines():
                tell(line)


@contextmanager
def _remarks(level: int) -> Generator[None]:
    """Print what the library logs from that level on, while the block runs."""
    logger, handler = logging.getLogger("latentrt"), _Remarks()
    before = logger.level
    logger.setLevel(level)
    logger.addHandler(handler)
    try:
        yield
    finally:
        logger.removeHandler(handler)
        logger.setLevel(before)
