"""Of `latentrt bench memory`: our memory over one request, and whether its steps leave anything behind.

timeline            resident memory at a fixed interval, sampled by this process; `marks` say when stages
                    began; of the first request of a fresh process
growth per step     Python's and NumPy's allocations after every step; the bar is none that grow with steps
peak against steps  the peaks of two fresh processes that each drew one picture, of few steps and of many
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Generator, Mapping
from contextlib import contextmanager, suppress
from typing import Any

from ..process import SideError
from ..records import Row, short
from .memory_rows import Bench, looking
from .memory_samples import NO_PROC, PROC, Sampler, Series, holding, on_a_grid, resident
from .memory_timeline import SETTLED, STEADY, growth_per_step

TIMELINE, GROWTH, AGAINST_STEPS = "timeline", "growth per step", "peak against steps"
_SAMPLES = 1000  # of a timeline, at most; longer requests have longer intervals
_TAIL = 400  # characters of what a process printed


class _Watched:
    """`memory_timeline.py` in a process of its own."""

    def __init__(self, process: subprocess.Popen[str], noise: Any) -> None:
        self.pid = process.pid
        self._process, self._noise = process, noise
        self.opened = self._answer()

    def ask(self, **command: Any) -> dict[str, Any]:
        """The answer to one command. Raises SideError."""
        assert self._process.stdin is not None
        with suppress(BrokenPipeError):  # it died: the missing answer says so
            self._process.stdin.write(json.dumps(command) + "\n")
            self._process.stdin.flush()
        return self._answer()

    def _answer(self) -> dict[str, Any]:
        assert self._process.stdout is not None
        if line := self._process.stdout.readline():
            answer: dict[str, Any] = json.loads(line)
            return answer
        code = self._process.wait()
        self._noise.seek(0)
        said = short(self._noise.read().decode("utf-8", errors="replace"))[-_TAIL:]
        raise SideError("FAILED", f"the process ended with exit code {code}: {said}")


@contextmanager
def _watched(bench: Bench) -> Generator[_Watched]:
    """A fresh process with our pipeline open. Raises SideError."""
    told = [json.dumps(item.to_json()) for item in (bench.task, bench.case)]
    command = [sys.executable, "-m", f"{__package__}.memory_timeline", *told]
    with (
        tempfile.TemporaryFile() as noise,
        subprocess.Popen(  # noqa: S603
            command,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=noise,
            text=True,
            env={**os.environ, "PYTHONSAFEPATH": "1"},
        ) as process,
    ):
        try:
            yield _Watched(process, noise)
        finally:
            process.kill()  # it may be amid a picture; what it knew is told


def timeline(bench: Bench) -> Row:
    """Samples less an empty interpreter's; `device` is the same of a GPU, less an empty context.

    Figures: `interval_s`, `marks` ({"stage", "at_s"} since the request began), `seconds`.
    """
    if bench.baselines.interpreter is None:
        return bench.missing(TIMELINE, NO_PROC)
    before = bench.watch.look() if bench.watch else None
    with looking(bench.watch, bench.interval) as looks, _watched(bench) as item:
        pid = item.pid
        with Sampler(lambda: _resident_now(pid), bench.interval) as sampler:
            told = item.ask(do="draw", steps=bench.case.steps)
        held = holding(pid, before, list(looks)) if before else None
    began, ended = told["began"], told["ended"]
    interval = max(bench.interval, (ended - began) / _SAMPLES)
    empty = bench.baselines.interpreter
    sizes = [size - empty for size in on_a_grid(sampler.samples, began, ended, interval)]
    figures = {"interval_s": interval, "seconds": ended - began, "backend": item.opened["backend"]}
    figures["marks"] = [{"stage": stage, "at_s": moment - began} for stage, moment in told["marks"]]
    if held is not None and bench.baselines.context is not None:
        figures["device"] = _on_device(held.series, bench.baselines.context, began, ended, interval)
        figures["device_measured_by"] = held.measured_by
    return bench.row(TIMELINE, [sizes], figures)


def _on_device(series: Series, context: int, began: float, ended: float, interval: float) -> list[int]:
    return [max(0, size - context) for size in on_a_grid(series, began, ended, interval)]


def _resident_now(pid: int) -> int | None:
    """The cheap answer: 20 microseconds, where `resident` takes 100."""
    try:
        pages = (PROC / str(pid) / "statm").read_text(encoding="ascii").split()[1]
    except (OSError, IndexError):
        return None
    return int(pages) * os.sysconf("SC_PAGE_SIZE")


def growth(bench: Bench, steps: int) -> Row:
    """Samples are bytes of Python's allocations after every step, by tracemalloc. FAILED if steps add up.

    Figures: `growth_per_step`, bytes, which is judged, of the last of `requests`; `traced_growth` over all
    steps but the first few, caches that libraries fill once among it; `transient_p50`, what a step holds and
    frees again; `rss_growth` of the process, which has a page's resolution and others' allocations in it too;
    `device_allocations` of a device's loop between its rows; `lines` that grew.
    """
    with _watched(bench) as item:
        told = item.ask(do="growth", steps=steps)
    return judge_growth(bench, told)


def judge_growth(bench: Bench, told: Mapping[str, Any]) -> Row:
    """The row of what `memory_timeline.watch_steps` found."""
    traced, rss, on_device = told["traced"], told["resident"], told["device_allocations"]
    first = min(SETTLED, len(traced) - 1)
    grown, per_step = traced[-1] - traced[first], growth_per_step(traced)
    transient = sorted(told["transient"][first:])
    figures = {
        "steps": len(traced),
        "from_step": first,
        "growth_per_step": per_step,
        "requests": told["requests"],
        "traced_growth": grown,
        "transient_p50": transient[len(transient) // 2],
        "rss_growth": rss[-1] - rss[first] if rss else None,
        "lines": told["lines"],
        "device_allocations": sum(on_device) if on_device is not None else None,
    }
    problems: list[str] = []
    if per_step > STEADY:
        problems.append(f"{per_step:.0f} bytes per step, {grown} from step {first} to {len(traced)}")
    if on_device and sum(on_device):
        problems.append(f"{sum(on_device)} allocations on the device between rows")
    return bench.row(
        GROWTH, [traced], figures, status="FAILED" if problems else "ok", reason="; ".join(problems)
    )


def against_steps(bench: Bench, few: int, many: int) -> Row:
    """A sample is the peak of a process that drew one picture, less an empty interpreter's; few, then many.

    Figures: `difference`, and `schedule`, the time embeddings of the steps that one had more, which are
    computed once for the whole request.
    """
    if bench.baselines.interpreter is None:
        return bench.missing(AGAINST_STEPS, NO_PROC)
    peaks: list[int] = []
    schedule = 0
    for steps in (few, many):
        with _watched(bench) as item:
            schedule = item.ask(do="draw", steps=steps)["schedule_bytes"]
            found = resident(item.pid)
        if found is None:
            raise SideError("FAILED", "the process ended")
        peaks.append(found.peak - bench.baselines.interpreter)
    figures = {
        "steps": [few, many],
        "difference": peaks[1] - peaks[0],
        "schedule": schedule * (many - few),
        "schedule_per_step": schedule,
    }
    return bench.row(AGAINST_STEPS, [(peak,) for peak in peaks], figures)
