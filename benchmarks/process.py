"""Processes of their own, for whatever is measured: every child of the benchmarks is started here.

`run` waits for a process and returns what it printed; `Child` talks with one in lines of JSON; `SideProcess`
is a child with one side open (`child.py`).
"""

from __future__ import annotations

import json
import os
import queue
import signal
import subprocess
import sys
import tempfile
import threading
from collections.abc import Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from time import monotonic
from types import TracebackType
from typing import IO, TYPE_CHECKING, Any

import numpy as np

from ..engines.errors import BackendError
from ..engines.spec import Array
from .case import Case
from .machine import clocks, describe_machine
from .records import Status, short
from .sides.contract import Task

if TYPE_CHECKING:
    from typing_extensions import Self

LIMIT = 900.0  # seconds for a process to open, or to answer
_TAIL = 400  # characters of what a child printed, in an error


class SideError(BackendError):
    """A child could not carry out a command; its row has this `status` and `reason`."""

    def __init__(self, status: Status, reason: str) -> None:
        super().__init__(
            reason,
            expected="a process that opens, runs and answers",
            fix="`latentrt generate` with the same model and backend may say more.",
        )
        self.status: Status = status
        self.reason = reason


class Child:
    """A Python process that writes lines to stdout. A context manager, which ends it.

    It leads a session of its own, so that whatever it started is killed with it.

    Args:
        arguments: of the interpreter.
        environment: variables besides this process's own.
    """

    def __init__(self, *arguments: str, environment: Mapping[str, str] | None = None) -> None:
        self._noise = tempfile.TemporaryFile()  # noqa: SIM115
        self._process = subprocess.Popen(  # noqa: S603
            [sys.executable, *arguments],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self._noise,
            encoding="utf-8",
            errors="replace",
            # PYTHONSAFEPATH: `-m` would otherwise put the current folder first, and take modules from there.
            env={**os.environ, "PYTHONSAFEPATH": "1", **(environment or {})},
            start_new_session=True,
        )
        self._lines: queue.SimpleQueue[str] = queue.SimpleQueue()
        self._reader = threading.Thread(target=self._read, args=(self._process.stdout,), daemon=True)
        self._reader.start()

    @property
    def pid(self) -> int:
        """The number of the process."""
        return self._process.pid

    def ask(self, **command: Any) -> dict[str, Any]:
        """The answer to one command. Raises SideError."""
        assert self._process.stdin is not None
        with suppress(BrokenPipeError):  # it died: the missing answer says so
            self._process.stdin.write(json.dumps(command) + "\n")
            self._process.stdin.flush()
        return self.answer()

    def answer(self) -> dict[str, Any]:
        """The next line as JSON. Raises SideError if there is none, or if it is {"error", "kind"}."""
        late = f"no answer within {LIMIT:.0f} s"
        line = self._next(LIMIT, late)
        if not line:
            self._wait(LIMIT, late)
            raise SideError("FAILED", self._ending())
        answer: dict[str, Any] = json.loads(line)
        if "error" in answer:
            raise SideError(answer["kind"], answer["error"])
        return answer

    def lines(self, limit: float | None) -> Iterator[str]:
        """Every line until the process ends, as soon as it is written.

        Raises SideError if it ends badly, or not within `limit` seconds: it is killed then.
        """
        end, late = monotonic() + (limit or 0.0), f"it did not end within {limit or 0.0:.0f} s"

        def left() -> float | None:
            return None if limit is None else max(end - monotonic(), 0.0)

        while line := self._next(left(), late):
            yield line.rstrip("\n")
        if self._wait(left(), late):  # a library may hang in its last clean-up, after the last line
            raise SideError("FAILED", self._ending())

    def close(self) -> None:
        """Kill the process and all that it started. May be called twice."""
        self._kill()
        self._reader.join()
        for stream in (self._process.stdin, self._process.stdout):
            if stream is not None:
                with suppress(BrokenPipeError):
                    stream.close()
        self._noise.close()

    def __enter__(self) -> Self:
        """The child itself."""
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Close."""
        self.close()

    def _read(self, stream: IO[str]) -> None:
        for line in stream:
            self._lines.put(line)
        self._lines.put("")  # the end

    def _next(self, seconds: float | None, late: str) -> str:
        """The next line, "" at the end. Where none comes in time it is killed: raises SideError(`late`)."""
        try:
            line = self._lines.get(timeout=seconds)
        except queue.Empty:
            self._kill()
            raise SideError("FAILED", late) from None
        if not line:
            self._lines.put("")  # for whoever asks again
        return line

    def _wait(self, seconds: float | None, late: str) -> int:
        """The exit code. Where it does not end in time it is killed: raises SideError(`late`)."""
        try:
            return self._process.wait(seconds)
        except subprocess.TimeoutExpired:
            self._kill()
            raise SideError("FAILED", late) from None

    def _kill(self) -> None:
        if self._process.poll() is None:
            if hasattr(os, "killpg"):
                os.killpg(self._process.pid, signal.SIGKILL)
            else:
                self._process.kill()
            self._process.wait()

    def _ending(self) -> str:
        """How it ended, and the last that it printed on stderr."""
        code = self._process.wait()
        names = {int(item): item.name for item in signal.Signals}
        how = f"exit code {code}" if code >= 0 else names.get(-code, f"signal {-code}")
        size = self._noise.seek(0, os.SEEK_END)
        self._noise.seek(max(0, size - 4 * _TAIL))
        text = short(self._noise.read().decode("utf-8", errors="replace"))[-_TAIL:]
        return f"it ended with {how}" + (f": {text}" if text else "")


def run(
    arguments: Sequence[str], *, limit: float | None = None, environment: Mapping[str, str] | None = None
) -> list[str]:
    """The lines that `python ARGUMENTS` printed. Raises SideError as `Child.lines`."""
    with Child(*arguments, environment=environment) as child:
        return list(child.lines(limit))


class SideProcess(Child):
    """A fresh process with one side open; `ask` once for each command of `child.py`.

    Args:
        name: of the row; a name of `SIDES`, or `AGAIN` for ours a second time.
        module: the name in `SIDES`.
        task: what it opens.

    Raises:
        SideError: it could not be opened, or died.
    """

    def __init__(self, name: str, module: str, task: Task) -> None:
        super().__init__("-m", f"{__package__}.child", module, json.dumps(task.to_json()))
        self.name = name
        self._folder = tempfile.TemporaryDirectory()
        try:
            self.opened = self.answer()
        except SideError:
            self.close()
            raise
        self._stop(True)
        self._machine = {**describe_machine(), "side": self.opened["versions"]}

    @property
    def stamp(self) -> dict[str, Any]:
        """What a row of this side was measured on, with the clocks as they are now."""
        return {**self._machine, **clocks()}

    def prepare(
        self, workload: str, case: Case, *, slot: str = ""
    ) -> tuple[dict[str, Any], Mapping[str, Array]]:
        """Have a workload prepared and run once; the answer and the outputs. Raises SideError."""
        path = Path(self._folder.name) / "outputs.npz"
        answer = self.ask(do="prepare", workload=workload, case=case.to_json(), slot=slot, save=str(path))
        if not answer["finite"]:
            raise SideError("FAILED", f"{workload}: the output is not finite")
        with np.load(path) as file:
            return answer, {name: file[name] for name in file.files}

    def time(
        self, runs: int, *, slot: str = "", beside: str | None = None
    ) -> tuple[tuple[float, ...], list[dict[str, Any]]]:
        """Seconds of each run, and its figures: `beside_s` of a second slot that runs after each run.

        Raises:
            SideError: also for an output that is not finite.
        """
        answer = self.ask(do="time", runs=runs, slot=slot, beside=beside)
        if not answer["finite"]:
            raise SideError("FAILED", "the output is not finite")
        return tuple(answer["seconds"]), answer["figures"]

    def ask(self, **command: Any) -> dict[str, Any]:
        """The answer to one command; the process runs only meanwhile. Raises SideError."""
        self._stop(False)
        try:
            return super().ask(**command)
        finally:
            self._stop(command["do"] != "close")

    def _stop(self, now: bool) -> None:
        """Have the process not run while others are timed, or run again.

        Thread pools spin for a while after a run: ONNX Runtime's for 50 ms, OpenBLAS's for 110 ms, which
        doubled the times of whoever came next on two cores.
        """
        if hasattr(signal, "SIGSTOP") and self._process.poll() is None:  # not on Windows
            self._process.send_signal(signal.SIGSTOP if now else signal.SIGCONT)

    def close(self) -> None:
        """Have the side closed, then end the process. May be called twice."""
        if self._process.poll() is None:
            with suppress(SideError):
                self.ask(do="close")
        super().close()
        self._folder.cleanup()


@dataclass(frozen=True, kw_only=True)
class Slot:
    """One of several workloads that a side has ready at once. It is `rounds.Timed`."""

    name: str
    side: SideProcess

    def time(self, runs: int) -> tuple[tuple[float, ...], list[dict[str, Any]]]:
        """As `SideProcess.time`."""
        return self.side.time(runs, slot=self.name)
