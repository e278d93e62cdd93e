"""Steps of the GPU check: memory comes back, none leaks; what does not fit is lowered, or refused."""

from __future__ import annotations

import re
from collections.abc import Generator, Iterator
from contextlib import closing, contextmanager, suppress
from dataclasses import replace
from typing import Any

from ...engines.device import Device
from ...engines.errors import MemoryLimitError
from ...engines.spec import Array
from ...engines.tolerances import PICTURE_DB
from ..likeness import psnr
from ..machine import resident_bytes
from ..records import Row
from ..sides.ours_device import ledger_of
from ..verbs.memory_watch import sampled
from .opener import Opened, Opener, Scale, attempt, draw, mebibytes, row_of

MIB = 2**20
BACK = 64.0  # MiB that may be missing from the baseline
GROWTH = 16.0  # MiB that may be missing after the last cycle beyond those after the first
FLAT = 8 * MIB  # bytes of growth over all pictures: a leak in each run of the UNet is many times that
TILED_DB = 15.0  # tiles cannot see each other: the same picture, no more
_PERIOD = 0.002  # seconds between two looks at the free memory
_SMALLEST = MIB // 4  # pieces of the ballast
_NUMBERS = re.compile(r"\d+ MiB of \d+ free")


# ── back to the baseline ───────────────────────────────────────────────────────────────────────


def memory(opener: Opener, scale: Scale) -> Iterator[Row]:
    """Open, draw, close, several times: what is free afterwards is what was free before.

    The first cycle is reported and not judged: the libraries load their kernels in it, and keep them until
    the process ends. The baseline is what is free after it.
    """
    with closing(opener.watch()) as watch:
        figures, ledger = _cycle(opener, scale, watch, watch.memory().free)
        yield row_of("first cycle", figures)
        baseline, missing = watch.memory().free, list[float]()
        for number in range(1, scale.cycles + 1):
            figures, ledger = _cycle(opener, scale, watch, baseline)
            missing.append(figures["closed_mib"])
            late = f"{missing[-1]} MiB did not come back, more than {BACK:g}"
            yield row_of(f"cycle {number}", figures, [late] if missing[-1] > BACK else [])
        grown = round(missing[-1] - missing[0], 2)
        less = f"{grown} MiB less are free than after the first cycle"
        yield row_of("no growth", {"growth_mib": grown}, [less] if grown > GROWTH else [])
        # A net with weights that counts none on the device says what is not so.
        nets, counted = opener.package.manifest.nets, ledger["ledger"]
        empty = [name for name, row in counted.items() if nets[name].weights and row["weights"] <= 0]
        problems = [f"no weights of {', '.join(empty)} are counted"] if empty else []
        yield row_of("ledger", ledger, problems)


def _cycle(
    opener: Opener, scale: Scale, watch: Device, baseline: int
) -> tuple[dict[str, float], dict[str, Any]]:
    """MiB taken since the baseline once open, at most while drawing, and once closed; and the ledger."""
    with opener.pipeline("on") as opened:
        free = {"opened_mib": watch.memory().free}
        with sampled(lambda: watch.memory().free, _PERIOD) as looks:
            for _ in range(3):  # plain, captured, replayed
                draw(opened.pipe, replace(scale.case, pictures=2))
        free["peak_mib"] = min(size for _, size in looks)
        ledger = ledger_of(opened.loop)
    free["closed_mib"] = watch.memory().free
    return {name: mebibytes(baseline - size) for name, size in free.items()}, ledger


def host_memory(opener: Opener, scale: Scale) -> Iterator[Row]:
    """Plain loops draw many pictures, and the process's resident memory stays as it is."""
    if not resident_bytes()[0]:
        yield row_of("pictures", missing="the system does not tell resident memory")
        return
    with opener.pipeline("off") as opened:
        for seed in range(max(scale.pictures // 5, 2)):  # arenas grow, and libraries compile
            draw(opened.pipe, replace(scale.case, seed=seed))
        before = resident_bytes()[0]
        for seed in range(scale.pictures):
            draw(opened.pipe, replace(scale.case, seed=seed))
        grown = resident_bytes()[0] - before
    problems = [f"{mebibytes(grown)} MiB more, which is over {mebibytes(FLAT)}"] if grown > FLAT else []
    sizes = {"resident_mib": mebibytes(before), "grown_mib": mebibytes(grown)}
    yield row_of("pictures", {"pictures": scale.pictures, **sizes}, problems)


# ── the ladder ─────────────────────────────────────────────────────────────────────────────────


def ladder(opener: Opener, scale: Scale) -> Iterator[Row]:
    """A large request with memory to spare, with less and less, with none, and with all of it back."""
    with closing(opener.watch()) as watch:
        if watch.memory().unified:
            reason = "the device shares its memory with the host: to make it scarce would stop the machine"
            yield row_of("scarce memory", missing=reason)
            return
        _ample(opener, scale, watch)  # the libraries load their kernels
        wanted, need = _ample(opener, scale, watch)
        yield row_of("memory to spare", {"need_mib": mebibytes(need)})
        lowered: set[str] = set()
        for share in scale.shares:
            row = attempt(f"{share:.0%} of that free", _scarce, opener, scale, watch, wanted, need * share)
            yield row
            lowered.update(row.figures.get("rungs", ()) if row.figures.get("drawn") else ())
            if row.status == "FAILED" or not row.figures["drawn"]:
                break  # it only gets scarcer
        problems = [] if lowered else ["no request was drawn that needed a rung"]
        yield row_of("a rung helped", {"rungs": sorted(lowered)}, problems)
        with opener.pipeline() as opened:
            _warm_up(opened, scale)
            with ballast(watch, 0):
                yield attempt("nothing free", _large, opened, scale, watch, wanted, False)
            yield attempt("free again", _large, opened, scale, watch, wanted, True)


def _ample(opener: Opener, scale: Scale, watch: Device) -> tuple[Array, int]:
    """The pictures, and how many bytes they took beyond a pipeline that is warm."""
    with opener.pipeline() as opened:
        _warm_up(opened, scale)
        before = watch.memory().free
        with sampled(lambda: watch.memory().free, _PERIOD) as looks:
            images = draw(opened.pipe, scale.large)
        return images, before - min(size for _, size in looks)


def _scarce(what: str, opener: Opener, scale: Scale, watch: Device, wanted: Array, margin: float) -> Row:
    with opener.pipeline() as opened:
        _warm_up(opened, scale)
        with ballast(watch, int(margin)):
            return _large(what, opened, scale, watch, wanted, None)


def _large(
    what: str, opened: Opened, scale: Scale, watch: Device, wanted: Array, expected: bool | None
) -> Row:
    """The large request, judged by its pictures, or its refusal by its words.

    `expected` tells whether it has to be drawn; None: either will do.
    """
    figures: dict[str, Any] = {"free_mib": mebibytes(watch.memory().free)}
    try:
        found = draw(opened.pipe, scale.large)
    except MemoryLimitError as error:
        figures |= {"drawn": False, "refused": error.found}
        problems = [] if _NUMBERS.search(error.found) else [f"the refusal has no numbers: {error.found}"]
        problems += [f"it was refused: {error.found}"] if expected else []
    else:
        tiled = any(re.search(r"tile=\d", line) for line in opened.log)
        likeness, bar = psnr(found, wanted), TILED_DB if tiled else PICTURE_DB["fp16"]
        figures |= {"drawn": True, "psnr_db": likeness}
        problems = [] if likeness >= bar else [f"{likeness:.1f} dB, below {bar:g}"]
        problems += ["it was drawn, although no memory was free"] if expected is False else []
    # What the loop logged as `out of memory (WHY): RUNG -> PLAN`.
    rungs = [line.rpartition("): ")[2].partition(" -> ")[0] for line in opened.log]
    return row_of(what, {**figures, "rungs": rungs}, problems)


def _warm_up(opened: Opened, scale: Scale) -> None:
    """Let engines be opened by a small picture, and keep nothing of it that could be given up later."""
    draw(opened.pipe, replace(scale.several, pictures=1, steps=2))
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
