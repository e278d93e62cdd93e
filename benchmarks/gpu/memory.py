"""Sections of the GPU check: memory comes back; where it is scarce a request is lowered, or refused."""

from __future__ import annotations

import re
from collections.abc import Generator, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing, contextmanager, suppress
from dataclasses import replace
from functools import partial
from threading import Event
from typing import Any, NamedTuple

from ...engines.device import Device
from ...engines.errors import MemoryLimitError
from ...engines.spec import Array
from ...engines.tolerances import PICTURE_DB
from ..likeness import psnr
from ..records import Row
from ..sides.device_work import ledger_of
from .opener import Opened, Opener, Scale, attempt, judged, mebibytes, not_available, too_far
from .pictures import draw

MIB = 2**20
BACK = 64 * MIB  # how near to the baseline memory must come back
GROWTH = 16 * MIB  # how much more may be missing after the last cycle than after the first
TILED_DB = 15.0  # tiles cannot see each other: the same picture, no more
_PERIOD = 0.002  # seconds between two looks at the free memory
_SMALLEST = MIB // 4  # pieces of the ballast
_NUMBERS = re.compile(r"\d+ MiB of \d+ free")


@contextmanager
def lowest_free(device: Device) -> Generator[list[int], None, None]:
    """The least free memory in bytes, one number, as a thread of its own sees it until the block is left.

    Raises what the device raises, at the end of the block.
    """
    free, stop = [device.memory().free], Event()

    def look() -> None:
        free[0] = min(free[0], device.memory().free)

    def watch() -> None:
        while not stop.wait(_PERIOD):
            look()

    with ThreadPoolExecutor(1) as pool:
        watching = pool.submit(watch)
        try:
            yield free
        finally:
            stop.set()
        watching.result()
    look()


# ── back to the baseline ───────────────────────────────────────────────────────────────────────


class _Cycle(NamedTuple):
    """Free bytes before opening, once open, at the lowest while drawing, and once closed; and the ledger."""

    before: int
    opened: int
    lowest: int
    after: int
    ledger: dict[str, Any]

    def figures(self, baseline: int) -> dict[str, float]:
        """MiB taken since the baseline."""
        return {
            "opened_mib": mebibytes(baseline - self.opened),
            "peak_mib": mebibytes(baseline - self.lowest),
            "closed_mib": mebibytes(baseline - self.after),
        }


def memory(opener: Opener, scale: Scale) -> Iterator[Row]:
    """Open, draw, close, several times: what is free afterwards is what was free before.

    The first cycle is reported and not judged: the libraries load their kernels in it, and keep them until
    the process ends. The baseline is what is free after it.
    """
    with closing(opener.watch()) as watch:
        first = _cycle(opener, scale, watch)
        kept = {"kept_by_libraries_mib": mebibytes(first.before - first.after)}
        yield judged("first cycle", [], {**first.figures(first.before), **kept})
        cycles: list[_Cycle] = []
        for number in range(1, scale.cycles + 1):
            cycles.append(_cycle(opener, scale, watch))
            missing = first.after - cycles[-1].after
            late = f"{mebibytes(missing)} MiB did not come back, more than {mebibytes(BACK)}"
            figures = {**cycles[-1].figures(first.after), "measured_by": opener.measured_by}
            yield judged(f"cycle {number}", [late] if missing > BACK else [], figures)
        grown = cycles[0].after - cycles[-1].after
        less = f"{mebibytes(grown)} MiB less are free than after the first cycle"
        figures = {"growth_mib": mebibytes(grown), "cycles": scale.cycles}
        yield judged("no growth", [less] if grown > GROWTH else [], figures)
        yield _ledger(opener, cycles[-1].ledger)


def _cycle(opener: Opener, scale: Scale, watch: Device) -> _Cycle:
    before = watch.memory().free
    with opener.pipeline("on") as opened:
        after_opening = watch.memory().free
        with lowest_free(watch) as lowest:
            for _ in range(3):  # plain, captured, replayed
                draw(opened.pipe, replace(scale.case, pictures=2))
        ledger = ledger_of(opened.loop)
    return _Cycle(before, after_opening, lowest[0], watch.memory().free, ledger)


def _ledger(opener: Opener, ledger: dict[str, Any]) -> Row:
    """What each net holds, as it says itself; a net with weights that has none on the device is a lie."""
    files = opener.package.manifest.nets
    empty = [name for name, row in ledger["ledger"].items() if files[name].weights and row["weights"] <= 0]
    problems = [f"no weights of {', '.join(empty)} are counted"] if empty else []
    return judged("ledger", problems, {"known_mib": mebibytes(ledger["known"]), **ledger})


# ── the ladder ─────────────────────────────────────────────────────────────────────────────────


def ladder(opener: Opener, scale: Scale) -> Iterator[Row]:
    """A large request with memory to spare, with less and less, with none, and with all of it back."""
    with closing(opener.watch()) as watch:
        if watch.memory().unified:
            reason = "the device shares its memory with the host: to make it scarce would stop the machine"
            yield not_available("scarce memory", reason)
            return
        _ample(opener, scale, watch)  # the libraries load their kernels
        wanted, need = _ample(opener, scale, watch)
        size = {"size": f"{scale.large}x{scale.large}", "pictures": scale.many}
        yield judged("memory to spare", [], {"need_mib": mebibytes(need), **size})
        lowered: set[str] = set()
        for share in scale.shares:
            what = f"{share:.0%} of that free"
            row = attempt(what, partial(_scarce, what, opener, scale, watch, wanted, int(need * share)))
            yield row
            lowered.update(row.figures.get("rungs", ()))
            if row.status == "FAILED" or not row.figures.get("drawn"):
                break  # it only gets scarcer
        problems = [] if lowered else ["no request was drawn that needed a rung"]
        yield judged("a rung helped", problems, {"rungs": sorted(lowered)})
        with opener.pipeline() as opened:
            _warm_up(opened, scale)
            with ballast(watch, 0):
                yield attempt("nothing free", partial(_refused, opened, scale, watch))
            yield attempt("free again", partial(_alike, "free again", opened, scale, wanted, {}))


def _ample(opener: Opener, scale: Scale, watch: Device) -> tuple[Array, int]:
    """The pictures, and how many bytes they took beyond a pipeline that is warm."""
    with opener.pipeline() as opened:
        _warm_up(opened, scale)
        before = watch.memory().free
        with lowest_free(watch) as lowest:
            images, _ = draw(opened.pipe, scale.large_case)
        return images, before - lowest[0]


def _scarce(what: str, opener: Opener, scale: Scale, watch: Device, wanted: Array, margin: int) -> Row:
    with opener.pipeline() as opened:
        _warm_up(opened, scale)
        with ballast(watch, margin):
            figures = {"free_mib": mebibytes(watch.memory().free)}
            try:
                return _alike(what, opened, scale, wanted, figures)
            except MemoryLimitError as error:
                return judged(what, _numbers(error), {**figures, "drawn": False, "refused": error.found})


def _alike(what: str, opened: Opened, scale: Scale, wanted: Array, figures: dict[str, Any]) -> Row:
    """The large request, judged by the pictures. Raises MemoryLimitError."""
    found, seconds = draw(opened.pipe, scale.large_case)
    tiled = any(re.search(r"tile=\d", line) for line in opened.log)
    likeness = psnr(found, wanted)
    problems = too_far(likeness, TILED_DB if tiled else PICTURE_DB["fp16"])
    figures = {**figures, "drawn": True, "psnr_db": likeness, "rungs": _rungs(opened)}
    return judged(what, problems, figures, [seconds])


def _refused(opened: Opened, scale: Scale, watch: Device) -> Row:
    figures: dict[str, Any] = {"free_mib": mebibytes(watch.memory().free), "message": ""}
    problems = ["it was drawn, although no memory was free"]
    try:
        draw(opened.pipe, scale.large_case)
    except MemoryLimitError as error:
        figures |= {"message": error.found, "rungs": _rungs(opened)}
        problems = _numbers(error)
    return judged("nothing free", problems, figures)


def _numbers(error: MemoryLimitError) -> list[str]:
    return [] if _NUMBERS.search(error.found) else [f"the refusal has no numbers: {error.found}"]


def _rungs(opened: Opened) -> list[str]:
    """What the loop logged as `out of memory (WHY): RUNG -> PLAN`."""
    return [line.rpartition("): ")[2].partition(" -> ")[0] for line in opened.log]


def _warm_up(opened: Opened, scale: Scale) -> None:
    """Let engines be opened by a small picture, and keep nothing of it that could be given up later."""
    draw(opened.pipe, replace(scale.case, width=scale.short, height=scale.short, steps=2))
    opened.loop.free_idle()


@contextmanager
def ballast(device: Device, margin: int) -> Generator[None, None, None]:
    """Take memory until `margin` bytes are free, or no piece is to be had; give it back at the end."""
    taken: list[int] = []
    try:
        piece = left = device.memory().free - margin
        while min(piece, left) >= _SMALLEST:
            size = min(piece, left)
            try:
                taken.append(device.allocate(size))
            except MemoryLimitError:
                piece //= 2  # the last bytes come in smaller pieces
                continue
            left = min(left - size, device.memory().free - margin)  # a device rounds sizes up
        device.synchronize()
        yield
    finally:
        for address in taken:
            with suppress(MemoryLimitError):
                device.free(address)
