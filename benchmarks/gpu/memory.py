"""Of the GPU check: memory comes back; where it is scarce a request is lowered, or refused with numbers."""

from __future__ import annotations

import re
from collections.abc import Generator, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from threading import Event, Thread
from typing import Any

from ...engines.device import Device
from ...engines.errors import MemoryLimitError
from ...engines.ledger import Ledger, take_ledger
from ...engines.spec import Array
from ...engines.tolerances import PICTURE_DB
from ..likeness import psnr
from .opener import Opened, Opener, Scale
from .pictures import draw
from .rows import Row, attempt, judged, mebibytes

MIB = 2**20
BACK = 64 * MIB  # how near to the baseline memory must come back
GROWTH = 16 * MIB  # how much more may be missing after the last cycle than after the first
TILED_DB = 15.0  # tiles cannot see each other: the same picture, no more
_PERIOD = 0.002  # seconds between two looks at the free memory
_SMALLEST = MIB // 4  # pieces of the ballast
_NUMBERS = re.compile(r"\d+ MiB of \d+ free")


class Lowest:
    """The least free memory seen meanwhile, in bytes."""

    def __init__(self, device: Device) -> None:
        self._device = device
        self._stop = Event()
        self._error: Exception | None = None
        self.free = device.memory().free

    def look(self) -> None:
        """Once."""
        self.free = min(self.free, self._device.memory().free)

    def _watch(self) -> None:
        try:
            while not self._stop.wait(_PERIOD):
                self.look()
        except Exception as error:  # for the thread that waits
            self._error = error

    @contextmanager
    def watching(self) -> Generator[None, None, None]:
        """Look all the time, from a thread of its own."""
        thread = Thread(target=self._watch, daemon=True)
        thread.start()
        try:
            yield
        finally:
            self._stop.set()
            thread.join()
        self.look()
        if self._error is not None:
            raise self._error


# ── back to the baseline ───────────────────────────────────────────────────────────────────────


@dataclass(frozen=True, kw_only=True)
class _Cycle:
    """Free bytes before opening, once open, at the lowest while drawing, and once closed."""

    before: int
    opened: int
    lowest: int
    after: int
    ledger: Ledger


def memory(opener: Opener, scale: Scale) -> Iterator[Row]:
    """Open, draw, close, several times: what is free afterwards is what was free before.

    The first cycle is told and not judged: the libraries load their kernels in it, and keep them until the
    process ends. The baseline is what is free after it.
    """
    with opener.watching() as watch:
        first = _cycle(opener, scale, watch)
        yield judged(
            "first cycle",
            [],
            {**_figures(first, first.before), "kept_by_libraries_mib": mebibytes(first.before - first.after)},
        )
        baseline = first.after
        cycles: list[_Cycle] = []
        for number in range(1, scale.cycles + 1):
            cycles.append(_cycle(opener, scale, watch))
            missing = baseline - cycles[-1].after
            problems = (
                [f"{mebibytes(missing)} MiB did not come back, more than {mebibytes(BACK)}"]
                if missing > BACK
                else []
            )
            figures = {**_figures(cycles[-1], baseline), "measured_by": opener.measured_by}
            yield judged(f"cycle {number}", problems, figures)
        grown = cycles[0].after - cycles[-1].after
        problems = (
            [f"{mebibytes(grown)} MiB less are free than after the first cycle"] if grown > GROWTH else []
        )
        yield judged("no growth", problems, {"growth_mib": mebibytes(grown), "cycles": scale.cycles})
        yield _ledger(opener, cycles[-1])


def _cycle(opener: Opener, scale: Scale, watch: Device) -> _Cycle:
    before = watch.memory().free
    with opener.pipeline("on") as opened:
        after_opening = watch.memory().free
        lowest = Lowest(watch)
        with lowest.watching():
            for _ in range(3):  # plain, captured, replayed
                draw(opened.pipe, scale.request(num_images_per_prompt=2))
        told = getattr(watch, "process_memory", None)
        ledger = take_ledger(
            watch.name,
            opened.loop.nets,
            watch.memory(),
            process=told() if told else None,
            scratch=opened.loop.pool.scratch_size,
        )
    return _Cycle(
        before=before, opened=after_opening, lowest=lowest.free, after=watch.memory().free, ledger=ledger
    )


def _figures(cycle: _Cycle, baseline: int) -> dict[str, float]:
    """MiB taken since the baseline."""
    return {
        "opened_mib": mebibytes(baseline - cycle.opened),
        "peak_mib": mebibytes(baseline - cycle.lowest),
        "closed_mib": mebibytes(baseline - cycle.after),
    }


def _ledger(opener: Opener, cycle: _Cycle) -> Row:
    """What each net holds, as it says itself; a net with weights that has none on the device is a lie."""
    files = opener.package.manifest.nets
    empty = [row.name for row in cycle.ledger.nets if files[row.name].weights and row.weights <= 0]
    problems = [f"no weights of {', '.join(empty)} are counted"] if empty else []
    told = cycle.ledger.to_json()
    figures = {"known_mib": mebibytes(cycle.ledger.known), "nets": told["nets"], "scratch": told["scratch"]}
    return judged("ledger", problems, {**figures, "process": told["process"], "rest": told["rest"]})


# ── the ladder ─────────────────────────────────────────────────────────────────────────────────


def ladder(opener: Opener, scale: Scale) -> Iterator[Row]:
    """A large request with memory to spare, with less and less, with none, and with all of it back."""
    with opener.watching() as watch:
        if watch.memory().unified:
            yield Row(
                what="scarce memory",
                status="not available",
                reason="the device shares its memory with the host: to make it scarce would stop the machine",
            )
            return
        _ample(opener, scale, watch)  # the libraries load their kernels
        wanted, need = _ample(opener, scale, watch)
        yield judged("memory to spare", [], {"need_mib": mebibytes(need), **_size(scale)})
        lowered: list[str] = []
        for share in scale.shares:
            rungs: list[str] = []
            row = attempt(
                f"{share:.0%} of that free",
                lambda share=share, rungs=rungs: _scarce(opener, scale, watch, wanted, need, share, rungs),
            )
            yield row
            lowered += rungs if row.figures.get("drawn") else []
            if row.status == "FAILED" or not row.figures.get("drawn"):
                break  # it only gets scarcer
        problems = [] if lowered else ["no request was drawn that needed a rung"]
        yield judged("a rung helped", problems, {"rungs": sorted(set(lowered))})
        yield from _refused_then_drawn(opener, scale, watch, wanted)


def _ample(opener: Opener, scale: Scale, watch: Device) -> tuple[Array, int]:
    """The pictures, and how many bytes they took beyond a pipeline that is warm."""
    with opener.pipeline() as opened:
        _warm_up(opened, scale)
        lowest = Lowest(watch)
        before = lowest.free
        with lowest.watching():
            images, _ = draw(opened.pipe, scale.large_request)
        return images, before - lowest.free


def _scarce(
    opener: Opener, scale: Scale, watch: Device, wanted: Array, need: int, share: float, rungs: list[str]
) -> Row:
    what = f"{share:.0%} of that free"
    with opener.pipeline() as opened:
        _warm_up(opened, scale)
        with ballast(watch, int(need * share)):
            figures = {"free_mib": mebibytes(watch.memory().free)}
            try:
                found, seconds = draw(opened.pipe, scale.large_request)
            except MemoryLimitError as error:
                return judged(what, _numbers(error), {**figures, "drawn": False, "refused": error.found})
        rungs += [_rung(line) for line in opened.log]
        likeness, bar = psnr(found, wanted), _bar(opened)
        problems = [] if likeness >= bar else [f"{likeness:.1f} dB, below {bar:g}"]
        told = {"drawn": True, "psnr_db": likeness, "seconds": seconds, "rungs": list(rungs)}
        return judged(what, problems, {**figures, **told})


def _refused_then_drawn(opener: Opener, scale: Scale, watch: Device, wanted: Array) -> Iterator[Row]:
    with opener.pipeline() as opened:
        _warm_up(opened, scale)
        with ballast(watch, 0):
            yield attempt("nothing free", lambda: _refused(opened, scale, watch))
        yield attempt("free again", lambda: _recovered(opened, scale, wanted))


def _refused(opened: Opened, scale: Scale, watch: Device) -> Row:
    figures = {"free_mib": mebibytes(watch.memory().free), "message": ""}
    try:
        draw(opened.pipe, scale.large_request)
    except MemoryLimitError as error:
        told = {**figures, "message": error.found, "rungs": [_rung(line) for line in opened.log]}
        return judged("nothing free", _numbers(error), told)
    return judged("nothing free", ["it was drawn, although no memory was free"], figures)


def _recovered(opened: Opened, scale: Scale, wanted: Array) -> Row:
    found, seconds = draw(opened.pipe, scale.large_request)
    likeness, bar = psnr(found, wanted), _bar(opened)
    problems = [] if likeness >= bar else [f"{likeness:.1f} dB, below {bar:g}"]
    return judged("free again", problems, {"psnr_db": likeness, "seconds": seconds})


def _numbers(error: MemoryLimitError) -> list[str]:
    return [] if _NUMBERS.search(error.found) else [f"the refusal has no numbers: {error.found}"]


def _rung(line: str) -> str:
    """`out of memory (WHY): RUNG -> PLAN`; what else the loop says stays as it is."""
    return line.rpartition("): ")[2].partition(" -> ")[0]


def _bar(opened: Opened) -> float:
    return TILED_DB if any(re.search(r"tile=\d", line) for line in opened.log) else PICTURE_DB["fp16"]


def _warm_up(opened: Opened, scale: Scale) -> None:
    """Let engines be opened by a small picture, and keep nothing of it that could be given up later."""
    draw(opened.pipe, scale.request(width=scale.short, height=scale.short, num_inference_steps=2))
    opened.loop.free_idle()


def _size(scale: Scale) -> dict[str, Any]:
    return {"size": f"{scale.large}x{scale.large}", "pictures": scale.many}


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
