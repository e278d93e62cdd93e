"""The parent's side of a build: start a child, follow its progress, turn its end into facts or an error."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import tempfile
from collections.abc import Callable, Mapping
from typing import IO, Any, cast

from .. import errors
from ..errors import BackendError, LatentrtError, MemoryLimitError
from ..store.building import Report
from .builder import Facts, Job

_COMMAND = (sys.executable, "-m", f"{__package__}.builder")
_TAIL = 1000  # characters of stderr in a message
_ERRORS: Mapping[str, type[LatentrtError]] = {
    name: getattr(errors, name)
    for name in ("PackageError", "BackendError", "MemoryLimitError", "StorageError", "UsageError")
}

Started = Callable[[int], None]  # process id


def run_builder(job: Job, report: Report, *, started: Started | None = None) -> Facts:
    """Build in a child process, which is gone when this returns or raises, whatever happens.

    Args:
        job: what to build.
        report: called with the phase, and how much of the whole is done (0 to 1, never falling).
        started: called with the child's process id.

    Raises:
        LatentrtError: what the child raised; MemoryLimitError if it was killed, BackendError if it crashed.
    """
    # PYTHONSAFEPATH: `-m` would otherwise put the current folder first, and take modules from there.
    environment = {**os.environ, "PYTHONSAFEPATH": "1"}
    with tempfile.TemporaryFile() as noise:
        child = subprocess.Popen(  # noqa: S603
            _COMMAND, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=noise, env=environment
        )
        try:
            if started is not None:
                started(child.pid)
            last = _follow(child, job, report)
            code = child.wait()
        finally:  # also for KeyboardInterrupt and whatever `report` raises
            child.kill()
            child.wait()
            for pipe in (child.stdin, child.stdout):
                _close(pipe)
        if code == 0 and "facts" in last:
            return cast(Facts, last["facts"])
        raise _failure(job, code, last, _tail(noise))


def _follow(child: subprocess.Popen[bytes], job: Job, report: Report) -> dict[str, Any]:
    """Hand over the job and read lines until the child closes its stdout; the last that is no progress."""
    assert child.stdin is not None
    assert child.stdout is not None
    try:
        child.stdin.write(json.dumps(job.to_json()).encode() + b"\n")
        child.stdin.flush()  # and not closed: the child ends when it closes
    except BrokenPipeError:
        pass  # it has ended already, and its exit code says more
    last: dict[str, Any] = {}
    for line in child.stdout:
        try:
            message = cast(dict[str, Any], json.loads(line))
        except ValueError:  # cut short by a signal
            continue
        if "fraction" in message:
            report(str(message["phase"]), float(message["fraction"]))
        else:
            last = message
    return last


def _failure(job: Job, code: int, last: Mapping[str, Any], noise: str) -> LatentrtError:
    if "error" in last:
        record = cast(dict[str, str], last["error"])
        kind = _ERRORS.get(record["type"], BackendError)
        parts = {"expected": record["expected"], "fix": record["fix"]}
        if kind is MemoryLimitError:
            return MemoryLimitError(record["found"], **parts, culprit=job.net)
        return kind(record["found"], **parts)
    words = f": {noise}" if noise else ""
    if code in (-getattr(signal, "SIGKILL", 9), 137):
        return MemoryLimitError(
            f"the builder of the net {job.net!r} was killed, most likely for want of memory{words}",
            expected="a builder that may finish",
            fix="Close other programs, or limit it: --workspace 2048 (MiB), or a smaller --profile.",
            culprit=job.net,
        )
    return BackendError(
        f"the builder of the net {job.net!r} crashed with exit code {code}{words}",
        expected="an engine, or an error that says why not",
        fix="Try --optimization-level 2 or a smaller --profile, and report it with the package's manifest.",
    )


def _tail(noise: IO[bytes]) -> str:
    size = noise.seek(0, os.SEEK_END)
    noise.seek(max(0, size - _TAIL))
    return " ".join(noise.read().decode("utf-8", errors="replace").split())


def _close(pipe: IO[bytes] | None) -> None:
    try:
        if pipe is not None:
            pipe.close()
    except BrokenPipeError:
        pass  # what was buffered for a child that is gone
