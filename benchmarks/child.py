"""One side in a process of its own: `python -m latentrt.benchmarks.child SIDE TASK`, commands on stdin.

Each command is a line of JSON and gets one line back. What libraries print goes to stderr.

    {"do": "prepare", "workload", "case", "slot", "save"}   first run; outputs go to the .npz file `save`;
                                                            what was in the slot before is forgotten
                                                            -> {"seconds", "finite", "figures"}
                                                            the workload "yardstick" is every side's
    {"do": "time", "slot", "runs", "beside"}        -> {"seconds": [...], "finite", "figures": [...]}
                                                    seconds of a run, or of one of its repetitions; where
                                                    "beside" names a slot, that one runs after each run, and
                                                    "beside_s" of its figures says how long
    {"do": "memory"}                                -> {"rss", "peak_rss", "own": {...}}
    {"do": "close"}                                 -> {}

The first line it sends, without being asked, is {"opened": seconds, "versions", "rss"}.
An error is {"error": text, "kind": "not available" or "FAILED"}; the process lives on.
"""

from __future__ import annotations

import ctypes
import gc
import json
import os
import signal
import sys
from collections.abc import Callable, Iterable, Mapping, Sequence
from time import perf_counter
from typing import Any

import numpy as np

from ..engines.errors import LatentrtError
from ..engines.spec import Array
from .case import Case
from .machine import resident_bytes
from .records import short
from .sides.contract import YARDSTICK, NotAvailableError, OpenSide, Task, Work, open_side

Reply = Callable[[Mapping[str, Any]], None]

_SET_PDEATHSIG = 1


class Server:
    """An open side, and what was prepared, by slot."""

    def __init__(self, opened: OpenSide, task: Task) -> None:
        self._opened, self._task = opened, task
        self._slots: dict[str | None, Work] = {}

    def answer(self, command: Mapping[str, Any]) -> dict[str, Any]:
        """Carry one command out."""
        verbs: Mapping[str, Callable[[Mapping[str, Any]], dict[str, Any]]] = {
            "prepare": self._prepare,
            "time": self._time,
            "memory": self._memory,
            "close": self._close,
        }
        return verbs[command["do"]](command)

    def _prepare(self, command: Mapping[str, Any]) -> dict[str, Any]:
        if before := self._slots.pop(command["slot"], None):
            before.close()
        work = self._work(command["workload"], Case.from_json(command["case"]))
        seconds = _seconds(work)
        outputs = work.outputs()
        if command.get("save"):
            arrays: dict[str, Any] = {name: np.asarray(array) for name, array in outputs.items()}
            np.savez(command["save"], **arrays)
        self._slots[command["slot"]] = work
        return {"seconds": seconds, "finite": _finite(outputs), "figures": dict(work.figures())}

    def _work(self, workload: str, case: Case) -> Work:
        if workload != YARDSTICK:
            return self._opened.prepare(workload, case)
        from .sides.yardstick import open_yardstick

        return open_yardstick(self._task)

    def _time(self, command: Mapping[str, Any]) -> dict[str, Any]:
        work, beside = self._slots[command["slot"]], self._slots.get(command.get("beside"))
        seconds: list[float] = []
        figures: list[dict[str, Any]] = []
        collecting = gc.isenabled()
        gc.disable()  # a collection would be some run's bad luck
        try:
            for _ in range(command["runs"]):
                seconds.append(_seconds(work))
                figures.append(dict(work.figures()))
                if beside:
                    figures[-1]["beside_s"] = _seconds(beside)
        finally:
            if collecting:
                gc.enable()
        return {"seconds": seconds, "finite": _finite(work.outputs()), "figures": figures}

    def _memory(self, command: Mapping[str, Any]) -> dict[str, Any]:
        now, peak = resident_bytes()
        return {"rss": now, "peak_rss": peak, "own": dict(self._opened.memory())}

    def _close(self, command: Mapping[str, Any]) -> dict[str, Any]:
        self._opened.close()
        return {}


def _seconds(work: Work) -> float:
    """The time of one run, or of one of its repetitions."""
    began = perf_counter()
    work.run()
    return (perf_counter() - began) / work.repeats


def _finite(outputs: Mapping[str, Array]) -> bool:
    return all(bool(np.isfinite(array).all()) for array in outputs.values())


def serve(commands: Iterable[str], server: Server, reply: Reply) -> None:
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


def become_child() -> Reply:
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
    name, task = arguments[0], Task.from_json(json.loads(arguments[1]))
    began = perf_counter()
    try:
        opened = open_side(name, task)
    except Exception as error:  # whatever a library raises is a result
        reply(_error(error))
        return
    took = perf_counter() - began
    reply({"opened": took, "versions": dict(opened.versions), "rss": resident_bytes()[0]})
    serve(sys.stdin, Server(opened, task), reply)


if __name__ == "__main__":
    main(sys.argv[1:])
