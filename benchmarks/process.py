"""Processes of their own, for whatever is measured, and what is said between them and this one.

`SideProcess` is a child with one side open: `python -m latentrt.benchmarks.process SIDE TASK`, commands on
stdin. Each command gets one line back, and what libraries print goes to stderr:

    {"do": "prepare", "workload", "case", "slot", "save"} -> {"seconds", "figures"}
        first run; outputs go to the .npz file `save`; what was in the slot before is forgotten; the workload
        "yardstick" is every side's
    {"do": "time", "slot", "runs", "beside"} -> {"seconds": [...], "figures": [...]}
        seconds of a run, or of one of its repetitions; where "beside" names a slot, that one runs after each
        run: seconds are of both then, and figures have "own_s" and "beside_s"
    {"do": "memory"} -> {"own": {...}}, what the side knows of its memory
    {"do": "close"} -> {}

The first line, which nobody asks for, is {"versions"}. An error, such as an output that is not finite, is
{"error": text, "kind": "not available" or "FAILED"}; the process lives on.
"""

from __future__ import annotations

import ctypes
import gc
import json
import os
import signal
import subprocess
import sys
import tempfile
import threading
from collections.abc import Callable, Generator, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path
from time import perf_counter
from typing import Any

import numpy as np

from ..engines.errors import BackendError, LatentrtError
from ..engines.spec import Array
from .case import Case
from .machine import clocks, describe_machine
from .records import Status, one_line, short
from .sides.contract import YARDSTICK, NotAvailableError, OpenSide, Task, Work, open_side

LIMIT = 900.0  # seconds for a process to open, or to answer
_TAIL = 400  # characters of what a child printed, in an error
_SET_PDEATHSIG = 1  # of prctl(2)


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


class Child(ExitStack):
    """A Python process that writes lines to stdout; closing it kills the process and all that it started.

    What it prints on stderr goes to the file `log`, if one is named. `interpreter` is Python's; by default
    the one that runs this.
    """

    def __init__(
        self,
        *arguments: str,
        environment: Mapping[str, str] | None = None,
        log: Path | None = None,
        interpreter: str = sys.executable,
    ) -> None:
        super().__init__()
        noise = log.open("w+b") if log else tempfile.TemporaryFile()  # noqa: SIM115
        self._noise = self.enter_context(noise)
        self._process = subprocess.Popen(  # noqa: S603
            [interpreter, *arguments],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self._noise,
            encoding="utf-8",
            errors="replace",
            # PYTHONSAFEPATH: `-m` would otherwise put the current folder first, and take modules from there.
            env={**os.environ, "PYTHONSAFEPATH": "1", **(environment or {})},
            start_new_session=True,  # whatever it starts is killed with it
        )
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        self._stdin, self._stdout = self._process.stdin, self._process.stdout
        self.pid = self._process.pid
        self.callback(self._end)

    def ask(self, **command: Any) -> dict[str, Any]:
        """The answer to one command. Raises SideError."""
        self.tell(**command)
        return self.answer()

    def tell(self, **command: Any) -> None:
        """Send one command."""
        with suppress(BrokenPipeError):  # it died: the missing answer says so
            self._stdin.write(json.dumps(command) + "\n")
            self._stdin.flush()

    def answer(self) -> dict[str, Any]:
        """The next line as JSON. Raises SideError if there is none, or if it is {"error", "kind"}."""
        with self._at_most(LIMIT, f"no answer within {LIMIT:.0f} s"):
            line = self._stdout.readline()
            if not line:
                self._process.wait()
        if not line:
            raise SideError("FAILED", self._ending())
        answer: dict[str, Any] = json.loads(line)
        if "error" in answer:
            raise SideError(answer["kind"], answer["error"])
        return answer

    def lines(self, limit: float | None) -> Iterator[str]:
        """Every line until the process ends, as soon as it is written.

        Raises SideError if it ends badly, or not within `limit` seconds: it is killed then.
        """
        with self._at_most(limit, f"it did not end within {limit or 0.0:.0f} s"):
            for line in self._stdout:
                yield line.rstrip("\n")
            code = self._process.wait()  # a library may hang in its last clean-up, after the last line
        if code:
            raise SideError("FAILED", self._ending())

    @contextmanager
    def _at_most(self, seconds: float | None, late: str) -> Generator[None]:
        """Kill the process where the block takes longer, and raise SideError(`late`) then."""
        killed = threading.Event()

        def kill() -> None:
            killed.set()
            self._kill()

        timer = threading.Timer(threading.TIMEOUT_MAX if seconds is None else seconds, kill)
        timer.daemon = True
        timer.start()
        try:
            yield
        finally:
            timer.cancel()
        if killed.is_set():
            raise SideError("FAILED", late)

    def _end(self) -> None:
        self._kill()
        self._stdout.close()
        with suppress(BrokenPipeError):
            self._stdin.close()

    def _kill(self) -> None:
        with suppress(ProcessLookupError, PermissionError):  # all of it has ended
            if hasattr(os, "killpg"):
                os.killpg(self._process.pid, signal.SIGKILL)
            else:
                self._process.kill()
        self._process.wait()

    def _ending(self) -> str:
        """How it ended, and the last that it printed on stderr."""
        code = self._process.wait()
        how = f"exit code {code}" if code >= 0 else signal.Signals(-code).name
        size = self._noise.seek(0, os.SEEK_END)
        self._noise.seek(max(0, size - 4 * _TAIL))
        text = one_line(self._noise.read().decode("utf-8", errors="replace"))[-_TAIL:]
        return f"it ended with {how}" + (f": {text}" if text else "")


def run(arguments: Sequence[str], *, limit: float | None = None) -> list[str]:
    """The lines that `python ARGUMENTS` printed. Raises SideError as `Child.lines`."""
    with Child(*arguments) as child:
        return list(child.lines(limit))


class SideProcess(Child):
    """A fresh process with the side `module` of `SIDES` open. Raises SideError if it cannot be opened.

    Its rows have the `name`: the same, or `AGAIN` for ours a second time.
    """

    def __init__(self, name: str, module: str, task: Task) -> None:
        super().__init__("-m", f"{__package__}.process", module, task.text)
        self.name = name
        self._folder = Path(self.enter_context(tempfile.TemporaryDirectory()))
        self.callback(self._close_side)
        try:
            opened = self.answer()
        except SideError:
            self.close()
            raise
        self._stop(True)
        self._machine = {**describe_machine(), "side": opened["versions"]}

    @property
    def stamp(self) -> dict[str, Any]:
        """What a row of this side was measured on, with the clocks as they are now."""
        return {**self._machine, **clocks()}

    def prepare(
        self, workload: str, case: Case, *, slot: str = ""
    ) -> tuple[dict[str, Any], Mapping[str, Array]]:
        """Have a workload prepared and run once; the answer and the outputs. Raises SideError."""
        path = self._folder / "outputs.npz"
        answer = self.ask(do="prepare", workload=workload, case=case.to_json(), slot=slot, save=str(path))
        with np.load(path) as file:
            return answer, {name: file[name] for name in file.files}

    def time(
        self, runs: int, *, slot: str = "", beside: str | None = None
    ) -> tuple[tuple[float, ...], list[dict[str, Any]]]:
        """Seconds of each run, and its figures; both with those of the slot `beside`. Raises SideError."""
        answer = self.ask(do="time", runs=runs, slot=slot, beside=beside)
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

    def _close_side(self) -> None:
        if self._process.poll() is None:
            with suppress(SideError):
                self.ask(do="close")


# ── in the child ─────────────────────────────────────────────────────────────────────────────────────


class Server:
    """An open side, and what was prepared, by slot."""

    def __init__(self, opened: OpenSide, task: Task) -> None:
        self._opened, self._task = opened, task
        self._slots: dict[str | None, Work] = {}

    def answer(self, command: Mapping[str, Any]) -> dict[str, Any]:
        """Carry one command out."""
        if command["do"] == "prepare":
            return self._prepare(command)
        if command["do"] == "time":
            return self._time(command)
        if command["do"] == "memory":
            return {"own": dict(self._opened.memory())}
        self._opened.close()
        return {}

    def _prepare(self, command: Mapping[str, Any]) -> dict[str, Any]:
        if before := self._slots.pop(command["slot"], None):
            before.close()
        if command["workload"] == YARDSTICK:
            from .sides.yardstick import open_yardstick

            work = open_yardstick(self._task)
        else:
            work = self._opened.prepare(command["workload"], Case(**command["case"]))
        self._slots[command["slot"]] = work
        seconds, outputs = _seconds(work), _finite_outputs(work)
        if "save" in command:
            np.savez(command["save"], **outputs)
        return {"seconds": seconds, "figures": dict(work.figures())}

    def _time(self, command: Mapping[str, Any]) -> dict[str, Any]:
        work, beside = self._slots[command["slot"]], self._slots.get(command.get("beside"))
        seconds: list[float] = []
        figures: list[dict[str, Any]] = []
        gc.disable()  # a collection would be some run's bad luck
        try:
            for _ in range(command["runs"]):
                seconds.append(_seconds(work))
                figures.append(dict(work.figures()))
                if beside:
                    figures[-1] |= {"own_s": seconds[-1], "beside_s": _seconds(beside)}
                    seconds[-1] += figures[-1]["beside_s"]
        finally:
            gc.enable()
        _finite_outputs(work)
        return {"seconds": seconds, "figures": figures}


def _seconds(work: Work) -> float:
    """The time of one run, or of one of its repetitions."""
    began = perf_counter()
    work.run()
    return (perf_counter() - began) / work.repeats


def _finite_outputs(work: Work) -> dict[str, Any]:
    """Those of the last run. Raises FloatingPointError where one is not finite."""
    outputs = dict(work.outputs())
    if wrong := [name for name, array in outputs.items() if not np.isfinite(array).all()]:
        raise FloatingPointError(f"the output {', '.join(wrong)} is not finite")
    return outputs


def serve(commands: Iterable[str], server: Server, reply: Callable[[Mapping[str, Any]], None]) -> None:
    """Answer every command, until `close` or the end of them."""
    for line in commands:
        command = json.loads(line)
        try:
            reply(server.answer(command))
        except Exception as error:  # whatever a library raises is a result
            reply(_error(error))
        if command["do"] == "close":
            return


def _error(error: Exception) -> dict[str, Any]:
    kind = "not available" if isinstance(error, NotAvailableError) else "FAILED"
    text = error.found if isinstance(error, LatentrtError) else f"{type(error).__name__}: {error}"
    return {"error": short(text), "kind": kind}


def become_child() -> Callable[[Mapping[str, Any]], None]:
    """What a child does first; returns what writes a line of JSON to its real stdout.

    From now on whoever prints, prints to stderr. Linux ends this process when its parent dies: a parent that
    was killed cannot, and this process may be stopped then and would stay so, with all its memory (prctl(2),
    PR_SET_PDEATHSIG).
    """
    if sys.platform == "linux":
        parent = os.getppid()
        ctypes.CDLL(None).prctl(_SET_PDEATHSIG, signal.SIGKILL)
        if os.getppid() != parent:  # it died before that
            sys.exit(1)
    replies = os.fdopen(os.dup(1), "w", encoding="utf-8")
    os.dup2(2, 1)

    def reply(answer: Mapping[str, Any]) -> None:
        replies.write(json.dumps(answer) + "\n")
        replies.flush()

    return reply


def main(arguments: Sequence[str]) -> None:
    """Open the side and serve."""
    reply = become_child()
    name, task = arguments[0], Task.parse(arguments[1])
    try:
        opened = open_side(name, task)
    except Exception as error:  # whatever a library raises is a result
        reply(_error(error))
        return
    reply({"versions": dict(opened.versions)})
    serve(sys.stdin, Server(opened, task), reply)


if __name__ == "__main__":
    main(sys.argv[1:])
