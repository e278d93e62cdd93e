"""The parent's handle on a side that runs in a process of its own (`child.py`)."""

from __future__ import annotations

import json
import os
import queue
import signal
import subprocess
import sys
import tempfile
import threading
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import IO, Any

import numpy as np

from ..engines.errors import BackendError
from ..engines.spec import Array
from .case import Case
from .machine import clocks, describe_machine
from .records import Status, short
from .sides.contract import Task

_TAIL = 400  # characters of what a child printed
OPENING, ANSWERING = 900.0, 900.0  # seconds


class SideError(BackendError):
    """A side could not do what it was asked; `status` is that of its row, and `found` its reason."""

    def __init__(self, status: Status, reason: str) -> None:
        super().__init__(
            reason,
            expected="a side that opens, runs and answers",
            fix="`latentrt generate` with the same model and backend may say more.",
        )
        self.status: Status = status
        self.reason = reason


@dataclass(frozen=True, kw_only=True)
class Slot:
    """One of several workloads that a side has ready at once. It is `rounds.Timed`."""

    name: str
    side: SideProcess

    def time(self, runs: int) -> tuple[tuple[float, ...], list[dict[str, Any]]]:
        """As `SideProcess.time`."""
        return self.side.time(runs, slot=self.name)


class SideProcess:
    """A fresh process with one side open. A context manager; `ask` once for each command of `child.py`.

    Args:
        name: of the row; a name of `SIDES`, or `AGAIN` for ours a second time.
        module: the name in `SIDES`.
        task: what it opens.

    Raises:
        SideError: it could not be opened, or died.
    """

    def __init__(self, name: str, module: str, task: Task) -> None:
        self.name = name
        self._folder = tempfile.TemporaryDirectory()
        self._noise = (Path(self._folder.name) / "noise").open("w+b")
        command = [sys.executable, "-m", f"{__package__}.child", module, json.dumps(task.to_json())]
        # PYTHONSAFEPATH: `-m` would otherwise put the current folder first, and take modules from there.
        environment = {**os.environ, "PYTHONSAFEPATH": "1"}
        self._child = subprocess.Popen(  # noqa: S603
            command,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self._noise,
            text=True,
            env=environment,
        )
        self._lines: queue.SimpleQueue[str] = queue.SimpleQueue()
        self._reader = threading.Thread(target=self._read, args=(self._child.stdout,), daemon=True)
        self._reader.start()
        try:
            self.opened = self._answer(OPENING)
        except SideError:
            self.close()
            raise
        self._stop(True)
        self._machine = {**describe_machine(), "side": self.opened["versions"]}

    @property
    def pid(self) -> int:
        """Of the process."""
        return self._child.pid

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
        """The answer to one command. Raises SideError."""
        assert self._child.stdin is not None
        self._stop(False)
        try:
            with suppress(BrokenPipeError):  # it died: the missing answer says so
                self._child.stdin.write(json.dumps(command) + "\n")
                self._child.stdin.flush()
            return self._answer(ANSWERING)
        finally:
            self._stop(command["do"] != "close")

    def _stop(self, now: bool) -> None:
        """Have the process not run while others are timed, or run again.

        Thread pools spin for a while after a run: ONNX Runtime's for 50 ms, OpenBLAS's for 110 ms, which
        doubled the times of whoever came next on two cores.
        """
        if hasattr(signal, "SIGSTOP") and self._child.poll() is None:  # not on Windows
            self._child.send_signal(signal.SIGSTOP if now else signal.SIGCONT)

    def close(self) -> None:
        """End the process. May be called twice."""
        if self._child.poll() is None:
            with suppress(SideError):
                self.ask(do="close")
        self._kill()
        self._reader.join()
        for stream in (self._child.stdin, self._child.stdout):
            if stream is not None:
                with suppress(BrokenPipeError):
                    stream.close()
        self._noise.close()
        self._folder.cleanup()

    def __enter__(self) -> SideProcess:
        """The side itself."""
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

    def _answer(self, limit: float) -> dict[str, Any]:
        try:
            line = self._lines.get(timeout=limit)
        except queue.Empty:
            self._kill()
            raise SideError("FAILED", f"no answer within {limit:.0f} s") from None
        if not line:
            self._lines.put("")  # whoever asks again
            raise SideError("FAILED", f"the process ended with exit code {self._child.wait()}{self._tail()}")
        answer: dict[str, Any] = json.loads(line)
        if "error" in answer:
            raise SideError(answer["kind"], answer["error"])
        return answer

    def _kill(self) -> None:
        self._child.kill()
        self._child.wait()

    def _tail(self) -> str:
        size = self._noise.seek(0, os.SEEK_END)
        self._noise.seek(max(0, size - 4 * _TAIL))
        text = short(self._noise.read().decode("utf-8", errors="replace"))[-_TAIL:]
        return f": {text}" if text else ""
