"""`latentrt bench opening`: how long a checkpoint takes to its first picture, as it is and by other ways.

Whole processes (`first_picture.py`), each with what it keeps on disk in a folder of its own. The checkpoint's
files were read before, so that all of them find it in the system's cache.
"""

from __future__ import annotations

import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from math import prod
from pathlib import Path
from statistics import median
from typing import Any

from ...checkpoints.files.component import TensorHeader
from ...checkpoints.files.open import Checkpoint
from ...engines.errors import LatentrtError
from ..case import Case
from ..machine import clocks, describe_machine
from ..process import SideError
from ..records import Document, Row, Status
from .first_picture import DTYPE, WAYS, Errand, Taken
from .latency import Progress, silent
from .memory import NO_PROC

OPENED, DRAWN, PEAK, WRITTEN = "opened", "first picture", "peak", "written"
SIZE = 128  # pixels: opening is what is measured, and a step of this size is short
_PIECE = 1 << 24  # bytes


@dataclass(kw_only=True)
class _Found:
    """What the rounds of one row of ways found: samples, or why it was not gone to its end."""

    taken: list[Taken] = field(default_factory=list[Taken])
    status: Status = "ok"
    reason: str = ""


def measure_opening(
    checkpoint: Path,
    *,
    width: int = SIZE,
    height: int = SIZE,
    ways: Sequence[str] = tuple(WAYS),
    rounds: int = 1,
    threads: int | None = None,
    sdcpp: Path | None = None,
    progress: Progress = silent,
) -> Document:
    """Rows of every way: seconds until it is open and until its picture is there, and bytes.

    Args:
        checkpoint: a file, or for some ways a diffusers folder.
        width, height: of the picture, which is drawn in one step, in pixels.
        ways: of `first_picture.WAYS`, in the order of the first round, which flips from round to round.
        rounds: how often each is gone.
        threads: of a CPU; None is what each takes by itself.
        sdcpp: a Python interpreter that has cyllama.
        progress: is told what is being done.

    Raises:
        CheckpointError: the checkpoint is missing, damaged, or of a family that is not supported.
    """
    source = Checkpoint.open(checkpoint)
    guidance = source.defaults["guidance_scale"]
    case = Case(width=width, height=height, guidance_scale=guidance, steps=1, sampler="euler")
    errand = Errand(source=source, case=case, threads=threads, sdcpp=sdcpp)
    found = {name: [_Found() for _ in WAYS[name].ways] for name in ways}
    _read_once(source, progress)
    for number in range(rounds):
        for name in ways if number % 2 == 0 else reversed(ways):
            progress(f"round {number + 1} of {rounds}: {', '.join(WAYS[name].ways)}")
            if found[name][0].status == "ok":
                _go(name, errand, found[name])
    rows = [
        row
        for name, results in found.items()
        for way, result in zip(WAYS[name].ways, results, strict=True)
        for row in _rows(WAYS[name].side, {"way": way, **case.to_json()}, result, _weights(source))
    ]
    return Document(
        benchmark="opening",
        model=_describe(source),
        settings={"ways": list(ways), "rounds": rounds, "threads": threads, "device": "cpu"},
        rows=tuple(rows),
    )


def _go(name: str, errand: Errand, found: Sequence[_Found]) -> None:
    """Go a way once more, and add what each of its rows took; whoever failed is not started again."""
    if reason := WAYS[name].refusal(errand):
        for result in found:
            result.status, result.reason = "not available", reason
        return
    with tempfile.TemporaryDirectory(prefix="latentrt-opening-") as folder:
        going = WAYS[name].go(errand, Path(folder))
        try:
            for result, taken in zip(found, going, strict=True):
                result.taken.append(taken)
        except LatentrtError as error:
            status: Status = error.status if isinstance(error, SideError) else "FAILED"
            for result in found:
                result.status, result.reason = status, error.found


def _rows(side: str, case: dict[str, Any], found: _Found, weights: int) -> Iterator[Row]:
    """The rows of a way, one for each thing that is measured; one row alone where it failed."""
    stamp = {**describe_machine(), **clocks()}
    if found.status != "ok":
        yield Row(side=side, workload=DRAWN, case=case, status=found.status, reason=found.reason, stamp=stamp)
        return
    taken = found.taken
    stamp["side"] = dict(taken[0].side)
    exports = [one.export for one in taken if one.export is not None]
    measured: dict[str, tuple[str, list[float], dict[str, float]]] = {
        OPENED: ("s", [one.opened for one in taken], {"export_s": median(exports)} if exports else {}),
        DRAWN: ("s", [one.drawn for one in taken], {}),
        PEAK: ("B", [one.peak for one in taken], {"weights": weights}),
        WRITTEN: ("B", [one.written for one in taken], {}),
    }
    for workload, (unit, samples, figures) in measured.items():
        row = Row(side=side, workload=workload, case=case, unit=unit, figures=figures, stamp=stamp)
        if workload == PEAK and not all(samples):
            yield replace(row, status="not available", reason=NO_PROC)
            continue
        over = {"over_weights": max(samples) / weights} if workload == PEAK else {}
        yield replace(row, rounds=tuple((sample,) for sample in samples), figures={**figures, **over})


def _headers(source: Checkpoint) -> Iterator[TensorHeader]:
    """Every tensor of the checkpoint."""
    for part in source.parts.values():
        yield from part.tensors.values()


def _weights(source: Checkpoint) -> int:
    """Bytes of the weights in the arithmetic of the ways."""
    return sum(4 * prod(header.shape) for header in _headers(source))


def _files(source: Checkpoint) -> list[Path]:
    return sorted({header.file for header in _headers(source)})


def _describe(source: Checkpoint) -> dict[str, Any]:
    """What a document says of the checkpoint."""
    weights = {path.name: path.stat().st_size for path in _files(source)}
    return {"name": source.name, "family": source.family, "dtype": DTYPE, "weights_bytes": weights}


def _read_once(source: Checkpoint, progress: Progress) -> None:
    """Have the system's cache hold the files, as far as there is room."""
    for path in _files(source):
        progress(f"reading {path.name}")
        with path.open("rb") as file:
            while file.read(_PIECE):
                pass
